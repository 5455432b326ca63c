"""The virtual pipeline compared with a slow reference that keeps full copies of every version."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pipeline_worker import Autocast, bfloat16_loss
from tolerances import MANY_STEPS
from torch import nn
from torch.nn import functional as F
from toy import microbatch, model

import nesterov_pp as npp
from nesterov_pp.pipeline import VirtualPipeline, microbatch_seed, recipes, stage_delays


def slow_reference(
    stages: list[nn.Module],
    updates: int,
    optimizers: list[torch.optim.Optimizer],
    delays: list[int],
    *,
    k: int = 1,
    seed: int | None = None,
    flush_every: int | None = None,
    clip: float | None = None,
) -> list[float]:
    """Train with full copies of every version of every stage; each update runs on fresh copies of the late versions."""
    versions = [[copy.deepcopy(stage)] for stage in stages]
    losses = []
    for t in range(updates):
        drained_at = 0 if flush_every is None else t // flush_every * flush_every
        late = [copy.deepcopy(v[max(drained_at, t - tau)]) for v, tau in zip(versions, delays, strict=True)]
        for m in range(t * k, (t + 1) * k):
            hidden, y = microbatch(m)
            for i, stage in enumerate(late):
                if seed is not None:
                    torch.manual_seed(microbatch_seed(seed, i, m))
                hidden = stage(hidden)
            loss = F.cross_entropy(hidden, y)
            (loss / k).backward()
            losses.append(loss.item())
        for i, stage in enumerate(stages):
            for p, q in zip(stage.parameters(), late[i].parameters(), strict=True):
                p.grad = q.grad
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(stage.parameters(), clip)
            optimizers[i].step()
            versions[i].append(copy.deepcopy(stage))
    return losses


def torch_optimizer(method: str, stage: nn.Module, lr: float) -> torch.optim.Optimizer:
    if method == "nesterov":
        return torch.optim.NAdam(
            stage.parameters(), lr=lr, betas=(0.99, 0.999), weight_decay=0.01, decoupled_weight_decay=True
        )
    return torch.optim.AdamW(stage.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)


@pytest.fixture
def float64_scalars():
    """Make float64 the default: torch's own NAdam keeps its scalars in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SYNCHRONOUS = ["gpipe", "gpipe-1"]


@pytest.mark.usefixtures("float64_scalars")
@pytest.mark.parametrize("stages", [1, 2, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 16))])
@pytest.mark.parametrize(
    "method", ["nesterov", "pipedream", *(pytest.param(m, marks=pytest.mark.slow) for m in SYNCHRONOUS)]
)
def test_equals_the_slow_reference(method, stages):
    assert_equals_the_slow_reference(method, stages)


@pytest.mark.usefixtures("float64_scalars")
@pytest.mark.parametrize("method", SYNCHRONOUS)
def test_synchronous_methods_equal_the_slow_reference(method):
    assert_equals_the_slow_reference(method, 3)


def assert_equals_the_slow_reference(method: str, stages: int) -> None:
    """Check that losses and weights agree up to floating-point noise over 100 updates with dropout and clipping."""
    updates, lr, seed, clip = 100, 3e-3, 7, 0.5
    k = recipes()[method].microbatches_per_update
    delays = stage_delays(stages) if method in ("nesterov", "pipedream") else [0] * stages
    judged, slow = model(stages, dropout=0.1), model(stages, dropout=0.1)
    pipe = VirtualPipeline(judged, F.cross_entropy, method=method, lr=lr, seed=seed, max_grad_norm=clip)
    assert pipe.delays == delays
    losses = [float(pipe.step(*microbatch(m))) for m in range(updates * k)]
    optimizers = [torch_optimizer(method, stage, lr) for stage in slow]
    expected = slow_reference(slow, updates, optimizers, delays, k=k, seed=seed, clip=clip)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
    for ours, theirs in zip(judged, slow, strict=True):
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("float64_scalars")
def test_slack_equals_the_slow_reference():
    judged, slow = model(4), model(4)
    pipe = VirtualPipeline(judged, F.cross_entropy, "nesterov", 3e-3, slack=4)
    losses = [float(pipe.step(*microbatch(m))) for m in range(40)]
    expected = slow_reference(slow, 40, [torch_optimizer("nesterov", stage, 3e-3) for stage in slow], [7, 5, 3, 0])
    assert losses == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="slack adds to the method's own delays; omit it, or omit delays"):
        VirtualPipeline(model(4), F.cross_entropy, slack=4, delays=[3, 2, 1, 0])


@pytest.mark.usefixtures("float64_scalars")
@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_wrong_delay_would_be_noticed(wrong):
    judged, slow = model(4), model(4)
    pipe = VirtualPipeline(judged, F.cross_entropy, lr=3e-3)
    losses = [float(pipe.step(*microbatch(m))) for m in range(60)]
    optimizers = [torch_optimizer("nesterov", stage, 3e-3) for stage in slow]
    delays = [max(0, tau + wrong) for tau in stage_delays(4)]
    expected = slow_reference(slow, 60, optimizers, delays)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["nesterov", "pipedream", "gpipe-1", "nesterov-no-stash", "nesterov-rotated"])
def test_one_stage_is_ordinary_training_bit_for_bit(name, dtype):
    """Dropout is drawn from the global generator, as in an ordinary loop."""
    ordinary, piped = model(1, 0.2, dtype)[0], model(1, 0.2, dtype)
    recipe = recipes()[name]
    pipe = VirtualPipeline(piped, F.cross_entropy, method=name, lr=3e-3)
    place = npp.pipeline.Placement(1, 1, 0)
    optimizer = recipe.rule(ordinary.parameters(), lr=3e-3, **recipe.options, **recipe.stage_options(place))
    torch.manual_seed(5)
    losses = [pipe.step(*microbatch(m)) for m in range(100)]
    torch.manual_seed(5)
    for m in range(100):
        x, y = microbatch(m)
        optimizer.zero_grad()
        loss = F.cross_entropy(ordinary(x), y)
        loss.backward()
        optimizer.step()
        assert torch.equal(loss, losses[m])
    assert all(torch.equal(p, q) for p, q in zip(ordinary.parameters(), piped[0].parameters(), strict=True))


def halves(stage: nn.Module) -> list[dict[str, Any]]:
    matrices, vectors = ([p for p in stage.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    return [{"params": matrices, "lr_scale": 3.0}, {"params": vectors, "weight_decay": 0.5}]


def test_groups_have_their_own_options_and_share_of_the_learning_rate():
    ordinary, piped = model(1)[0], model(1)
    pipe = VirtualPipeline(piped, F.cross_entropy, method="pipedream", lr=1.0, param_groups=halves)
    options = dict(recipes()["pipedream"].options)
    matrices, vectors = ({"params": g["params"]} for g in halves(ordinary))
    optimizer = npp.AdamW([{**matrices, "lr": 3e-3 * 3.0}, {**vectors, "lr": 3e-3, "weight_decay": 0.5}], **options)
    pipe.lr = 3e-3
    for m in range(5):
        x, y = microbatch(m)
        pipe.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(ordinary(x), y).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ordinary.parameters(), piped[0].parameters(), strict=True))


@pytest.mark.parametrize("method", ["pipedream", "pipedream-lr"])
def test_schedulers_are_obeyed_and_a_recipe_multiplies_what_they_set(method):
    """A chainable scheduler computes the next rate from the group's, which must not hold the recipe's factor."""
    by_scheduler, by_hand = model(3), model(3)
    first, second = (VirtualPipeline(m, F.cross_entropy, method=method, lr=1e-2) for m in (by_scheduler, by_hand))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in first.optimizers]
    for m in range(12):
        x, y = microbatch(m)
        second.lr = first.optimizers[0].param_groups[0]["lr"]
        assert second.lr == pytest.approx(1e-2 * 0.9**m)
        assert torch.equal(first.step(x, y), second.step(x, y))
        for scheduler in schedulers:
            scheduler.step()
    for ours, theirs in zip(by_scheduler, by_hand, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.usefixtures("float64_scalars")
def test_flush_every_reproduces_the_periodic_drain():
    judged, slow, never = model(4), model(4), model(4)
    pipe = VirtualPipeline(judged, F.cross_entropy, lr=3e-3, flush_every=10)
    losses = [float(pipe.step(*microbatch(m))) for m in range(40)]
    optimizers = [torch_optimizer("nesterov", stage, 3e-3) for stage in slow]
    expected = slow_reference(slow, 40, optimizers, stage_delays(4), flush_every=10)
    assert losses == pytest.approx(expected, rel=1e-10)
    undrained = VirtualPipeline(never, F.cross_entropy, lr=3e-3)
    other = [float(undrained.step(*microbatch(m))) for m in range(40)]
    assert losses[:10] == other[:10]
    assert losses[10] != other[10]


def no_stash_reference(stages: list[nn.Module], updates: int, optimizers: list[torch.optim.Optimizer]) -> list[float]:
    """Run a pipeline without a stash, event by event, for stages of one layer each.

    The forward of microbatch m on stage i runs when the weights are at version max(0, m - tau_i). The backward, tau_i
    updates later, finds the weights overwritten behind autograd's back.
    """
    delays = stage_delays(len(stages))
    pending: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [{} for _ in stages]
    losses = []
    for clock in range(updates + delays[0]):
        for i, stage in enumerate(stages):  # forwards: microbatch m reaches stage i when update m - tau_i is next
            m = clock - delays[0] + delays[i]
            early = range(m + 1) if clock == delays[0] - delays[i] + 0 and m == delays[i] else [m]
            for n in early:
                if 0 <= n < updates and n not in pending[i]:
                    if i == 0:
                        x, entry = microbatch(n)[0], torch.zeros(0)
                    else:
                        entry = pending[i - 1][n][1].detach().requires_grad_()
                        x = entry
                    pending[i][n] = (entry, stage(x))
        update = clock - delays[0]
        if update < 0:
            continue
        entry, output = pending[-1][update]
        loss = F.cross_entropy(output, microbatch(update)[1])
        losses.append(loss.item())
        upstream = None
        for i in reversed(range(len(stages))):
            entry, output = pending[i].pop(update)
            if upstream is None:
                loss.backward()
            else:
                output.backward(upstream)
            upstream = entry.grad
        for stage, optimizer in zip(stages, optimizers, strict=True):
            behind_autograd(stage, optimizer)
    return losses


def behind_autograd(stage: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Step without autograd noticing: graphs in flight share the memory that is written."""
    versions = [p._version for p in stage.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    for p, version in zip(stage.parameters(), versions, strict=True):
        torch._C._autograd._unsafe_set_version_counter((p,), (version,))


@pytest.mark.usefixtures("float64_scalars")
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_no_stash_linearises_at_the_current_weights(stages):
    updates, lr = 100, 1e-2
    judged, slow = model(stages), model(stages)
    pipe = VirtualPipeline(judged, F.cross_entropy, method="nesterov-no-stash", lr=lr, correction_updates=1)
    losses = [float(pipe.step(*microbatch(m))) for m in range(updates)]
    optimizers = [
        torch.optim.NAdam(
            stage.parameters(),
            lr=lr,
            betas=(0.9 + 0.09 * (stages - i) / stages, 0.999),
            weight_decay=0.01,
            decoupled_weight_decay=True,
        )
        for i, stage in enumerate(slow, start=1)
    ]
    assert losses == pytest.approx(no_stash_reference(slow, updates, optimizers), rel=1e-9)
    for ours, theirs in zip(judged, slow, strict=True):
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-8, atol=1e-9)
    relabelled = model(stages)
    stashed = VirtualPipeline(
        relabelled,
        F.cross_entropy,
        method=npp.pipeline.Recipe(
            **{**vars(recipes()["nesterov-no-stash"]), "linearise_at": "version", "correction_updates": 1}
        ),
        lr=lr,
    )
    other = [float(stashed.step(*microbatch(m))) for m in range(updates)]
    assert max(abs(a - b) for a, b in zip(losses, other, strict=True)) > 1e-6, "stashed weights would have differed"


@pytest.mark.parametrize("method", list(recipes()))
def test_state_dict_goes_on_bit_for_bit(method, tmp_path):
    k = recipes()[method].accumulation(4)
    whole, first, second = (model(4, 0.1, torch.float32) for _ in range(3))
    options = {"method": method, "lr": 1e-2, "seed": 3, "flush_every": 7}
    pipe = VirtualPipeline(whole, F.cross_entropy, **options)
    expected = [pipe.step(*microbatch(m)) for m in range(20 * k)]
    pipe = VirtualPipeline(first, F.cross_entropy, **options)
    losses = [pipe.step(*microbatch(m)) for m in range(10 * k)]
    torch.save(pipe.state_dict(), tmp_path / "pipe.pt")
    with torch.no_grad():
        for stage in second:
            for p in stage.parameters():
                p.zero_()
    pipe = VirtualPipeline(second, F.cross_entropy, **options)
    pipe.load_state_dict(torch.load(tmp_path / "pipe.pt", weights_only=True))
    lost = sum(pipe.delay_model.draw(m) is None for m in range(10 * k))
    assert pipe.updates == 10 - lost
    losses += [pipe.step(*microbatch(m)) for m in range(10 * k, 20 * k)]
    assert all(torch.equal(a, b) for a, b in zip(losses, expected, strict=True))


def test_memory_is_the_formula():
    stages = model(4, dtype=torch.float32)
    pipe = VirtualPipeline(stages, F.cross_entropy)
    sizes = [sum(p.numel() * 4 for p in stage.parameters()) for stage in stages]
    assert pipe.memory() == {
        "weights": sum(sizes),
        "stash": sum(tau * size for tau, size in zip([3, 2, 1, 0], sizes, strict=True)),
        "moments": 2 * sum(sizes),
        "masters": 0,
    }


def test_predict_and_evaluate_use_the_newest_weights_and_leave_no_trace():
    stages = model(4, dropout=0.5, dtype=torch.float32)
    pipe = VirtualPipeline(stages, F.cross_entropy, lr=1e-2)
    for m in range(10):
        pipe.step(*microbatch(m))
    x, y = microbatch(99)
    hidden = x
    for stage in stages:
        hidden = copy.deepcopy(stage).eval()(hidden)
    assert torch.equal(pipe.predict(x), hidden)
    assert torch.equal(pipe.evaluate(x, y), F.cross_entropy(hidden, y))
    assert all(stage.training for stage in stages)
    assert pipe.microbatches == 10


@pytest.mark.parametrize("method", ["nesterov", "gpipe", "xpipe"])
@pytest.mark.parametrize("seed", [None, 3])
def test_recomputation_changes_nothing_and_keeps_no_activations(method, seed):
    results = []
    for recompute in (False, True):
        torch.manual_seed(1)
        stages = model(4, dropout=0.2, dtype=torch.float32)
        pipe = VirtualPipeline(stages, F.cross_entropy, method, lr=1e-2, seed=seed, recompute=recompute)
        torch.manual_seed(2)
        losses = [float(pipe.step(*microbatch(m))) for m in range(24)]
        results.append((losses, [p.detach() for stage in stages for p in stage.parameters()]))
    (losses, weights), (again, others) = results
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_is_that_of_every_stage_and_of_the_loss(recompute):
    ours = VirtualPipeline(
        model(3, 0.1, torch.float32), F.cross_entropy, seed=5, autocast=torch.bfloat16, recompute=recompute
    )
    judge = VirtualPipeline([Autocast(m) for m in model(3, 0.1, torch.float32)], bfloat16_loss, seed=5)
    full = VirtualPipeline(model(3, 0.1, torch.float32), F.cross_entropy, seed=5)
    batches = [microbatch(m) for m in range(12)]
    found, wanted, other = ([float(pipe.step(*b)) for b in batches] for pipe in (ours, judge, full))
    assert found == wanted != other
    assert float(ours.evaluate(*batches[0])) == float(judge.evaluate(*batches[0]))
    assert ours.predict(batches[0][0]).dtype == torch.bfloat16


def test_what_a_stashless_backward_cannot_have_is_refused():
    with pytest.raises(ValueError, match="'nesterov-no-stash' changes the weights between forward and backward"):
        VirtualPipeline(model(2), F.cross_entropy, "nesterov-no-stash", autocast=torch.bfloat16)
    with pytest.raises(ValueError, match="keeps activations of older weights"):
        VirtualPipeline(model(2), F.cross_entropy, "nesterov-no-stash", recompute=True)


def test_sequential_partition_and_a_stage_without_parameters():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    pipe = VirtualPipeline(layers, F.mse_loss, partition=[2, 1, 1, 1], lr=1e-2)
    assert [len(stage) for stage in pipe.stages] == [2, 1, 1, 1]
    assert pipe.optimizers[2] is None
    x = torch.randn(8, 4)
    first = float(pipe.step(x, torch.zeros(8, 3)))
    for _ in range(200):
        last = float(pipe.step(x, torch.zeros(8, 3)))
    assert last < first / 10
    cut = VirtualPipeline(copy.deepcopy(layers), F.mse_loss, partition=2)
    assert sum(len(stage) for stage in cut.stages) == 5


def tied() -> list[nn.Module]:
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    last.weight = first.weight
    return [first, nn.Linear(4, 4), last]


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: VirtualPipeline(model(2), F.cross_entropy, method="adam"), "choose one of nesterov, "),
        (lambda: VirtualPipeline(model(2), F.cross_entropy, betta=1), "has no hyper-parameter 'betta'; it has betas"),
        (lambda: VirtualPipeline(tied(), F.mse_loss), "stage 2's weight is stage 0's weight: tied parameters"),
        (lambda: VirtualPipeline([], F.mse_loss), "at least one stage"),
        (lambda: VirtualPipeline(model(2), F.mse_loss, partition=2), "a list of stages is cut already"),
        (lambda: VirtualPipeline(nn.Linear(2, 2), F.mse_loss), "a list of modules, or an nn.Sequential"),
        (lambda: VirtualPipeline(nn.Sequential(nn.Tanh()), F.mse_loss, partition=2), "1 layers cannot be cut into 2"),
        (lambda: VirtualPipeline(nn.Sequential(nn.Tanh()), F.mse_loss, partition=[0, 1]), "positive sizes"),
        (lambda: VirtualPipeline(model(2), F.mse_loss, flush_every=0), "flush_every must be at least 1"),
        (lambda: VirtualPipeline(model(2), F.mse_loss, microbatches_per_update=0), "must be at least 1, not 2 and 0"),
        (
            lambda: VirtualPipeline(model(2), F.mse_loss, param_groups=lambda stage: []),
            "param_groups must hold every trainable parameter of a stage once, and no other; 0.weight is trainable and "
            "in 0 of them",
        ),
        (
            lambda: VirtualPipeline(model(2), F.mse_loss, method="basis-rotation", param_groups=halves),
            "method 'basis-rotation' takes no param_groups; its rule groups the parameters itself",
        ),
    ],
)
def test_bad_arguments(build, sentence):
    with pytest.raises(ValueError) as error:
        build()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at the gradient of every input
def test_stages_that_are_compiled_modules() -> None:
    def losses(compiled: bool) -> list[float]:
        torch._dynamo.reset()
        stages = model(3)
        pipe = VirtualPipeline(
            [torch.compile(m, backend="aot_eager") if compiled else m for m in stages], F.cross_entropy
        )
        return [float(pipe.step(*microbatch(m))) for m in range(12)]

    assert losses(compiled=True) == pytest.approx(losses(compiled=False), rel=MANY_STEPS[torch.float64]["rtol"])
