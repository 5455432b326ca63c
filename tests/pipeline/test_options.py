"""Options of the rules, groups, and frozen parameters in both pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import options_worker as worker
import pytest
import torch
from launch import finish, start
from pipeline_worker import methods
from tolerances import MANY_STEPS
from torch import nn
from torch.nn import functional as F
from toy import microbatch, model

import nesterov_pp as npp
from nesterov_pp.methods.costs import of_step
from nesterov_pp.pipeline import AsyncPipeline, VirtualPipeline, World, find_recipe, no_decay, recipes
from nesterov_pp.planning import StageCost, memory_per_stage

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = torch.bfloat16
WORKER = Path(worker.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all scenarios in three processes."""
    folder = tmp_path_factory.mktemp("found")
    names = ",".join([*worker.LOW, *worker.FROZEN])
    results = finish(start([str(WORKER), str(folder), names], worker.STAGES), timeout=300)
    assert [status for status, _ in results] == [0] * worker.STAGES, "\n".join(output for _, output in results)
    return folder


@pytest.mark.parametrize("name", [*worker.LOW, *worker.FROZEN])
def test_both_pipelines_agree_bit_for_bit(found: Path, name: str) -> None:
    """The one across processes is saved and restarted half way."""
    parts = [torch.load(found / f"{name}-{rank}.pt") for rank in range(worker.STAGES)]
    wanted = worker.expected(name)
    assert parts[-1]["losses"] == wanted["losses"]
    for part, weights in zip(parts, wanted["weights"], strict=True):
        assert all(torch.equal(p, weights[n]) for n, p in part["weights"].items())
    for kind in ("weights", "moments", "masters"):
        assert sum(part["memory"][kind] for part in parts) == wanted["memory"][kind]


@pytest.mark.slow
def test_a_parameter_frozen_on_all_replicas(tmp_path: Path) -> None:
    """The versions in which it was frozen have no gradient for it, not zeros."""
    results = finish(start([str(WORKER), str(tmp_path), worker.REPLICAS], 4), timeout=120)
    assert [status for status, _ in results] == [0] * 4, "\n".join(output for _, output in results)
    parts = [torch.load(tmp_path / f"{worker.REPLICAS}-{rank}.pt") for rank in range(4)]
    wanted, close = worker.expected_of_replicas(), MANY_STEPS[torch.float32]  # the dtype of the loss
    assert parts[1]["losses"] == parts[3]["losses"] == pytest.approx(wanted["losses"], rel=close["rtol"])
    for rank, part in enumerate(parts):
        for name, p in part["weights"].items():
            assert torch.equal(p, parts[(rank + 2) % 4]["weights"][name])
            torch.testing.assert_close(p, wanted["weights"][rank % 2][name], **close)


def pipeline(method: str, stages: list[nn.Module], **options: Any) -> VirtualPipeline:
    return VirtualPipeline(stages, worker.loss_fn, method, lr=1e-2, seed=7, **options)


# ---------------------------------------------------------------------- options


REFUSED = {
    "state_dtype": ("rotated", "muon", "basis-rotation"),
    "stochastic_rounding": ("rotated", "muon", "basis-rotation"),
    "master_weights": ("muon", "basis-rotation"),
    "": ("basis-rotation",),
}
"""Parts of the names of the methods that refuse an option, or ("") bfloat16 weights."""


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("name", methods())
def test_bfloat16_weights_train_with_every_rule_or_are_refused(name: str, option: str) -> None:
    """What is not refused trains, and goes on bit for bit from a state."""
    options = {option: torch.float32 if option == "state_dtype" else True} if option else {}
    if any(part in name for part in REFUSED[option]):
        with pytest.raises(ValueError, match=r"has no such option; omit it|float32 and float64 weights only"):
            pipeline(name, model(2, dtype=BF16), **options)
        return
    pipe = pipeline(name, model(2, dtype=BF16), **options)
    k = pipe.microbatches_per_update
    for m in range(3 * k):
        pipe.step(*microbatch(m))
    again = pipeline(name, model(2, dtype=BF16), **options)
    again.load_state_dict(worker.through_file(pipe.state_dict()))
    for m in range(3 * k, 5 * k):
        assert torch.equal(pipe.step(*microbatch(m)), again.step(*microbatch(m)))
    if option == "master_weights":
        states = [state for optimizer in pipe.optimizers for state in optimizer.state.values()]
        assert all(state["master_weight"].dtype == torch.float32 for state in states)


@pytest.mark.parametrize("method", ["nesterov", "nesterov-rotated", "xpipe"])
def test_masters_keep_the_updates_that_bfloat16_would_lose(method: str) -> None:
    def moved(**options: Any) -> float:
        stages = model(1, dtype=BF16)
        before = [p.detach().clone() for p in stages[0].parameters()]
        pipe = VirtualPipeline(stages, worker.loss_fn, method, lr=1e-5, weight_decay=0.0, **options)
        for m in range(60):
            pipe.step(*microbatch(m))
        weights = [s.get("master_weight", p) for p, s in pipe.optimizers[0].state.items()]
        still = sum(int((w == b).sum()) for w, b in zip(weights, before, strict=True))
        return 1 - still / sum(b.numel() for b in before)

    assert moved(master_weights=True) > 0.7 > 2 * moved()


def test_each_stage_rounds_at_random_in_its_own_way() -> None:
    seeds = []
    for seed in (None, 0, 3):
        pipe = VirtualPipeline(model(3, dtype=BF16), worker.loss_fn, seed=seed, stochastic_rounding=True)
        seeds.append([optimizer.options.seed for optimizer in pipe.optimizers])
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(len(set(of_stages)) == 3 for of_stages in seeds)


def test_options_in_a_methods_name() -> None:
    recipe = find_recipe("nesterov:state_dtype=bfloat16:master_weights=True")
    assert recipe.options["state_dtype"] is BF16
    assert recipe.options["master_weights"] is True


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"method": "gpipe-muon", "master_weights": True},
            "'gpipe-muon' has no master_weights, because StepsCopies has",
        ),
        ({"method": "nesterov-rotated", "state_dtype": BF16}, "has no state_dtype, because RotatedNAdam has no such"),
        ({"method": "basis-rotation"}, "basis-rotation steps float32 and float64 weights only, and some here are bflo"),
        ({"state_dtype": torch.float64}, "Invalid state_dtype: torch.float64; choose one of None, torch.float32, "),
        (
            {"param_groups": lambda stage: [{"params": list(stage.parameters()), "master_weights": True}]},
            "master_weights is not an option of one group; give it to the pipeline, for all parameters",
        ),
        (
            {"param_groups": lambda stage: [{"params": list(stage.parameters()), "weight_decy": 0.1}]},
            "method 'nesterov' has no option 'weight_decy' for a group; it has lr_scale, betas, ",
        ),
    ],
)
def test_what_a_rule_does_not_take_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        VirtualPipeline(model(2, dtype=BF16), worker.loss_fn, **options)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def bytes_held(tensors: list[torch.Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("method", ["nesterov", "xpipe", "nesterov-sgd", "gap-aware"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": BF16}),
        (BF16, {}),
        (BF16, {"master_weights": True}),
        (BF16, {"master_weights": True, "state_dtype": BF16}),
        (torch.float32, {"state_dtype": "8bit"}),
        (BF16, {"master_weights": "24bit", "state_dtype": "8bit"}),
    ],
)
def test_memory_and_the_planned_memory_are_the_bytes_held(
    method: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    if "8bit" in options.values() and method in ("xpipe", "gap-aware"):
        pytest.skip("a correction or a prediction keeps wider state")
    pipe = pipeline(method, model(3, dtype=dtype), **options)
    before = pipe.memory()
    for m in range(4):
        pipe.step(*microbatch(m))
    memory, parts = pipe.memory(), {"ring": 0, "moments": 0, "masters": 0}
    for stash, optimizer in zip(pipe.stashes, pipe.optimizers, strict=True):
        state = stash.state_dict()
        parts["ring"] += bytes_held(
            [p for version in [*state["weights"], state.get("shadow", {})] for p in version.values()]
        )
        tensors = [(n, t) for s in optimizer.state.values() for n, t in s.items() if t.dim() > 0]
        parts["moments"] += bytes_held([t for n, t in tensors if not n.startswith("master_")])
        parts["masters"] += bytes_held([t for n, t in tensors if n.startswith("master_")])
    assert before == memory
    # Moments lie side by side, at the beginnings of cache lines.
    assert memory["weights"] + memory["stash"] == pytest.approx(parts["ring"], rel=0.1)
    assert memory["moments"] == pytest.approx(parts["moments"], rel=0.1)
    assert memory["masters"] == parts["masters"]
    cost = of_step(find_recipe(method).override(options), dtype)
    assert cost is not None
    one = [sum(p.numel() * p.element_size() for p in stash.weights().values()) for stash in pipe.stashes]
    planned = memory_per_stage(
        "async", [StageCost(0, 0, weight_bytes=b) for b in one], state=cost.state / dtype.itemsize
    )
    tensors = sum(len(stash.names) for stash in pipe.stashes) if options.get("state_dtype") == "8bit" else 0
    beyond = sum(memory.values()) + sum(one) - sum(planned)  # with the gradients
    assert 0 <= beyond <= 4 * tensors  # two scales of float16 for a last group that is not full


# ---------------------------------------------------------------------- groups


class RMSNorm(nn.Module):
    def __init__(self, *sides: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(*sides))


class LearnedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 8))
        self.project = nn.Linear(8, 8)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.places = LearnedEmbedding()
        self.norms = nn.ModuleList([nn.LayerNorm((3, 8)), RMSNorm(8), RMSNorm(2, 8), nn.BatchNorm1d(8)])
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.gate = nn.Parameter(torch.ones(8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.embed.weight


DECAYED = ["places.project.weight", "attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"]


def test_norms_biases_and_embeddings_are_told_by_type_and_dimension() -> None:
    stage = Everything()
    stage.conv.bias.requires_grad_(False)
    names = {id(p): n for n, p in stage.named_parameters()}
    decayed, rest = ([names[id(p)] for p in group["params"]] for group in no_decay(stage))
    assert decayed == DECAYED
    assert rest == [n for n, p in stage.named_parameters() if n not in DECAYED and p.requires_grad]
    assert no_decay(stage)[1]["weight_decay"] == 0.0
    with_embeddings = [names[id(p)] for p in no_decay(embeddings=False)(stage)[0]["params"]]
    assert with_embeddings == ["embed.weight", "places.table", *DECAYED]


def faster(stage: nn.Module) -> list[dict[str, Any]]:
    tables = [p for m in stage.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
    known = {id(p) for p in tables}
    return [{"params": tables, "lr_scale": 3.0}, {"params": [p for p in stage.parameters() if id(p) not in known]}]


def test_no_decay_divides_other_groups() -> None:
    pipe = VirtualPipeline(model(1), F.cross_entropy, "pipedream", lr=0.1, param_groups=no_decay(within=faster))
    groups = pipe.optimizers[0].param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (pytest.approx(0.3), 0.0, 1),
        (pytest.approx(0.1), 0.01, 3),
        (pytest.approx(0.1), 0.0, 5),
    ]


def test_no_decay_is_that_of_torch() -> None:
    ordinary, piped = model(1)[0], model(1)
    pipe = VirtualPipeline(piped, F.cross_entropy, "pipedream", lr=1e-2, weight_decay=0.5, param_groups=no_decay)
    matrices, rest = ([p for n, p in ordinary.named_parameters() if d == _decays(n)] for d in (True, False))
    optimizer = npp.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.5)
    for m in range(5):
        x, y = microbatch(m)
        pipe.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(ordinary(x), y).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ordinary.parameters(), piped[0].parameters(), strict=True))


def _decays(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name and name != "0.0.weight"


def test_the_state_of_other_groups_is_refused() -> None:
    def backwards(stage: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(reversed(list(stage.parameters())))}]

    def forwards(stage: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(stage.parameters())}]

    def built(groups: Callable[[nn.Module], list[dict[str, Any]]]) -> VirtualPipeline:
        return VirtualPipeline([nn.Linear(4, 4)] * 1, F.mse_loss, param_groups=groups)

    state = built(forwards).state_dict()
    built(forwards).load_state_dict(state)
    with pytest.raises(ValueError, match="the saved groups have weight where this pipeline's have bias; give the same"):
        built(backwards).load_state_dict(state)


# ---------------------------------------------------------------------- frozen parameters


@pytest.mark.parametrize("method", [n for n in recipes() if n not in ("swarm", "gba", "paci")])
def test_a_frozen_parameter_stays_put_everywhere(method: str) -> None:
    """It is not decayed, its state rests, and where the ring holds predictions they are the weights themselves."""
    stages = model(3, dtype=torch.float32)
    pipe = VirtualPipeline(stages, F.cross_entropy, method, lr=1e-2, seed=7, weight_decay=0.5)
    k = pipe.microbatches_per_update
    frozen = stages[0][1].up.weight
    for m in range(8 * k):
        if m == 4 * k:
            stages[0][1].up.weight.requires_grad_(False)
            frozen = pipe.stashes[0].weights()["1.up.weight"].detach().clone()
            optimizer = pipe.optimizers[0]
            states = [
                {n: t.clone() for n, t in s.items()} for p, s in optimizer.state.items() if p.shape == frozen.shape
            ]
        pipe.step(*microbatch(m))
    stash = pipe.stashes[0]
    for version in range(stash.oldest + (1 if stash.versions > 3 else 0), stash.newest + 1):
        assert torch.equal(stash.parameters(version)["1.up.weight"], frozen)
    for weights in (stash.weights(), stash.state_dict().get("shadow", {"1.up.weight": frozen})):
        assert torch.equal(weights["1.up.weight"], frozen)
    resting = [s for p, s in pipe.optimizers[0].state.items() if p.shape == frozen.shape]
    same = [all(torch.equal(s[n], t) for n, t in then.items()) for s, then in zip(resting, states, strict=True)]
    assert same.count(True) == 1
    assert not torch.equal(stages[0][1].down.weight, model(3, dtype=torch.float32)[0][1].down.weight)


@pytest.mark.parametrize("method", ["nesterov", "nesterov-no-stash", "xpipe"])
@pytest.mark.parametrize("until", [9, 15])
def test_a_checkpoint_holds_what_is_frozen(method: str, until: int) -> None:
    """Just after unfreezing, versions in which the parameter was frozen are still to be used."""

    def run(pipe: VirtualPipeline, stages: list[nn.Module], first: int, last: int) -> list[float]:
        losses = []
        for m in range(first, last):
            if m in (4, until):
                stages[0][1].up.weight.requires_grad_(m == until)
            losses.append(float(pipe.step(*microbatch(m))))
        return losses

    stages, others = model(4, dtype=torch.float32), model(4, dtype=torch.float32)
    pipe, again = pipeline(method, stages), pipeline(method, others)
    run(pipe, stages, 0, 10)
    again.load_state_dict(worker.through_file(pipe.state_dict()))
    assert others[0][1].up.weight.requires_grad == (until == 9)
    assert run(pipe, stages, 10, 20) == run(again, others, 10, 20)


def virtual(stages: list[nn.Module], k: int) -> Callable[[], object]:
    pipe = VirtualPipeline(stages, F.cross_entropy, microbatches_per_update=k)
    return lambda: pipe.step(*microbatch(pipe.microbatches))


def across_processes(stages: list[nn.Module], k: int) -> Callable[[], object]:
    pipe = AsyncPipeline(stages, F.cross_entropy, microbatch, 8, World(0, 1), microbatches_per_update=k)
    return pipe.step


@pytest.fixture
def group(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", [virtual, across_processes])
def test_what_cannot_be_followed_is_one_sentence(kind: Callable[[list[nn.Module], int], Callable[[], object]]) -> None:
    stages = model(1)
    norm = stages[0][0][1].norm if isinstance(stages[0][0], nn.Sequential) else stages[0][0].norm
    norm.weight.requires_grad_(False)
    step = kind(stages, 2)
    step()
    step()
    norm.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"norm\.weight requires gradients, but is not in the WeightStash.* build the st"
    ):
        step()
    norm.weight.requires_grad_(False)
    step()
    norm.bias.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"norm\.bias was frozen or unfrozen after 1 microbatch\(es\) of an update; undo"
    ):
        step()
    norm.bias.requires_grad_(True)
    step()
    norm.bias.requires_grad_(False)
    step()
