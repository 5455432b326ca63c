"""Changes to a module while its weights are in a ring: followed from the next version on, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import data, layer, objective
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

import nesterov_pp as npp
from nesterov_pp import WeightStash
from nesterov_pp.pipeline import VirtualPipeline


def ring(kind: str = "linear", versions: int = 3) -> tuple[nn.Module, WeightStash, npp.NAdam]:
    module = layer(kind)
    stash = WeightStash(module, versions)
    return module, stash, npp.NAdam(module.parameters(), lr=0.1, stash=stash)


def forward(module: nn.Module, stash: WeightStash, m: int) -> tuple[int, torch.Tensor]:
    with stash.use(stash.newest):
        return stash.newest, objective(module(data(m)))


def late(module: nn.Module, stash: WeightStash, optimizer: npp.NAdam, tau: int) -> Callable[[int], None]:
    """Return a function that makes one update per call, with gradients ``tau`` updates late."""
    waiting = [forward(module, stash, -1 - m) for m in range(tau)]

    def update(m: int) -> None:
        waiting.append(forward(module, stash, m))
        version, loss = waiting.pop(0)
        loss.backward()
        optimizer.step(version=version)

    return update


def test_a_frozen_weight_rests_and_trains_again_when_unfrozen() -> None:
    """Compare with a run whose gradients are removed by hand while the other run's weight is frozen."""

    def run(freeze: bool) -> list[torch.Tensor]:
        module, stash, optimizer = ring()
        if not freeze:
            for v in range(3):
                stash._slots[v][0].register_post_accumulate_grad_hook(
                    lambda p: setattr(p, "grad", None) if resting else None
                )
        resting = False
        update = late(module, stash, optimizer, 2)
        seen = []
        for m in range(24):
            if m in (8, 16):
                resting = m == 8
                if freeze:
                    module.weight.requires_grad_(not resting)
            update(m)
            if freeze:
                assert module.weight.requires_grad == (not resting)
                assert module.bias.requires_grad
            seen.append(torch.cat([module.weight.flatten(), module.bias]).detach().clone())
        weights = [both[:64] for both in seen]
        assert all(torch.equal(w, weights[7]) for w in weights[8:16])
        # When the weight was unfrozen, two frozen versions still had microbatches in flight.
        assert torch.equal(weights[17], weights[15]) == freeze
        assert not torch.equal(weights[18], weights[17])
        return seen

    torch.testing.assert_close(run(True)[:16], run(False)[:16], rtol=0, atol=0)


def test_freezing_inside_a_block_or_everything() -> None:
    module, stash, optimizer = ring()
    update = late(module, stash, optimizer, 2)
    for m in range(4):
        update(m)
    with stash.use(stash.oldest):
        module.weight.requires_grad_(False)
    before = module.weight.detach().clone()
    for m in range(4):
        update(m)
        assert not module.weight.requires_grad
    assert torch.equal(module.weight, before)
    state, steps = stash.state_dict(), [float(s["step"]) for s in optimizer.state.values()]
    assert steps == [4.0, 8.0]
    stash.load_state_dict(copy.deepcopy(state))
    assert not module.weight.requires_grad, "frozen before the load, and after it"
    module.requires_grad_(False)
    bias = module.bias.detach().clone()
    for leaf in stash.parameters(stash.newest).values():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    assert torch.equal(module.bias, bias)
    assert not any(p.requires_grad for p in module.parameters())


def test_freezing_a_stage_of_a_virtual_pipeline() -> None:
    stages = [layer("linear", seed) for seed in range(3)]
    pipe = VirtualPipeline(stages, F.mse_loss, lr=0.05)
    for m in range(20):
        if m == 8:
            stages[0].weight.requires_grad_(False)
            stages[1].requires_grad_(False)
            before = [p.detach().clone() for p in (stages[0].weight, *stages[1].parameters())]
        if m == 14:
            stages[1].requires_grad_(True)
            middle = stages[1].weight.detach().clone()
            assert torch.equal(middle, before[1])
        pipe.step(data(m), data(m + 50))
    assert torch.equal(stages[0].weight, before[0])
    assert not torch.equal(stages[1].weight, before[1])
    assert stages[1].weight.requires_grad
    assert not stages[0].weight.requires_grad


def assign(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    module.load_state_dict(state, assign=True)


def replace(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    made: dict[int, nn.Parameter] = {}
    for name, p in list(module.named_parameters(remove_duplicate=False)):
        *path, key = name.split(".")
        setattr(module.get_submodule(".".join(path)), key, made.setdefault(id(p), nn.Parameter(state[name].clone())))


def in_place(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    module.load_state_dict(state)


@pytest.mark.parametrize("kind", ["linear", "tied", "lstm", "encoder"])
@pytest.mark.parametrize("change", [assign, replace])
def test_a_replacement_is_taken_over(kind: str, change: Callable[[nn.Module, dict[str, Any]], None]) -> None:
    """This equals loading the values in place: they become the newest version, and late gradients keep arriving."""

    def run(change: Callable[[nn.Module, dict[str, Any]], None]) -> list[torch.Tensor]:
        module, stash, optimizer = ring(kind)
        update = late(module, stash, optimizer, 2)
        for m in range(4):
            update(m)
        change(module, layer(kind, seed=5).state_dict())
        for m in range(4, 8):
            update(m)
        slots = {id(leaf) for slot in stash._slots for leaf in slot}
        assert all(id(p) in slots for p in module.parameters())
        return [p.detach() for p in module.parameters()]

    torch.testing.assert_close(run(change), run(in_place), rtol=0, atol=0)


@pytest.mark.parametrize("shadow", ["stepped", "linearised"])
def test_a_replacement_is_taken_over_outside_the_ring_too(shadow: Any) -> None:
    module = layer("linear")
    stash = WeightStash(module, 2, shadow=shadow)
    assign(module, layer("linear", seed=5).state_dict())
    with stash.use(0), torch.no_grad():
        assert torch.equal(module.weight, layer("linear", seed=5).weight)
    assert torch.equal(stash.state_dict()["shadow"]["weight"], module.weight)
    assert module.weight is stash.parameters(0)["weight"]


def test_a_replacement_brings_its_gradient() -> None:
    module, _, optimizer = ring()
    module.weight = nn.Parameter(torch.zeros_like(module.weight))
    module.weight.grad = torch.ones_like(module.weight)
    optimizer.step()
    assert (module.weight < 0).all()


def unfreeze_an_outsider(module: nn.Module) -> None:
    module[2].requires_grad_(True)


def lora(module: nn.Module) -> None:
    module[0].register_parameter("extra", nn.Parameter(torch.ones(2)))


def another_layer(module: nn.Module) -> None:
    module[0] = nn.Linear(8, 8).double()


CHANGES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "deleted": (lambda m: delattr(m[0], "weight"), r"0\.weight was taken out of the module"),
    "none": (lambda m: setattr(m[0], "weight", None), r"0\.weight was taken out of the module"),
    "parametrized": (lambda m: parametrizations.weight_norm(m[0]), r"0\.weight was parametrized after"),
    "orthogonal": (lambda m: parametrizations.orthogonal(m[0]), r"0\.weight was parametrized after"),
    "weight norm": (lambda m: weight_norm(m[0]), r"0\.weight was taken out of the module"),
    "shape": (
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 8).double())),
        r"0\.weight was replaced by a float64 Parameter of shape \(2, 8\) on cpu; .* shape \(8, 8\) on cpu",
    ),
    "dtype": (lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(8, 8))), "by a float32 Parameter"),
    "device": (lambda m: m.to("meta"), "Parameter of shape .* on meta"),
    "half": (lambda m: m.half(), "0.weight has become a float16 Parameter .*; convert or move a module before"),
    "data": (lambda m: setattr(m[0].weight, "data", torch.ones(2, 8).double()), r"0\.weight has become a .*\(2, 8\)"),
    "untied": (
        lambda m: setattr(m[3], "weight", nn.Parameter(torch.ones(8, 8).double())),
        r"3\.weight was replaced, but not 0\.weight, which was the same parameter",
    ),
    "tied to two": (
        lambda m: [setattr(m[k], "weight", nn.Parameter(k + torch.ones(8, 8).double())) for k in (0, 3)],
        r"3\.weight and 0\.weight are one parameter in two places, and were replaced by two that differ",
    ),
    "outsider": (unfreeze_an_outsider, r"2\.weight requires gradients, but is not in the WeightStash"),
    "added": (lora, r"0\.extra requires gradients, but is not in the WeightStash"),
    "other layer": (another_layer, r"0\.weight requires gradients, but is not in the WeightStash"),
    "no layer": (lambda m: m.__delitem__(0), r"is no longer a parameter of the module|requires gradients"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("by", ["use", "step", "state_dict", "load_state_dict"])
def test_what_cannot_be_followed_is_refused(name: str, by: str) -> None:
    if (name, by) in (("half", "step"), ("data", "step")):
        pytest.skip("the pass says so itself")
    change, sentence = CHANGES[name]
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8)).double()
    module[2].requires_grad_(False)
    module[3].weight = module[0].weight
    stash = WeightStash(module, 2)
    optimizer = npp.NAdam([p for p in module.parameters() if p.requires_grad], stash=stash)
    saved = copy.deepcopy(stash.state_dict())
    for leaf in stash.parameters(0).values():
        leaf.grad = torch.ones_like(leaf)
    change(module)
    acts: dict[str, Callable[[], Any]] = {
        "use": lambda: stash.use(0).__enter__(),
        "step": lambda: optimizer.step(version=0),
        "state_dict": stash.state_dict,
        "load_state_dict": lambda: stash.load_state_dict(saved),
    }
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence) as error:
            acts[by]()
        assert "\n" not in str(error.value)
    assert stash.newest == 0
    assert stash.in_use == 0
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())


def test_a_replacement_inside_a_block_of_older_weights_is_refused() -> None:
    module, stash, optimizer = ring()
    update = late(module, stash, optimizer, 1)
    update(0)

    def swap() -> None:
        with stash.use(0):
            module.weight = nn.Parameter(torch.zeros_like(module.weight))

    with pytest.raises(
        ValueError, match="weight was replaced while the module was bound to other weights than the new"
    ):
        swap()


def test_recurrent_layers_follow_after_a_move() -> None:
    """``Module.to`` gives a recurrent layer a new list of its weights, which must follow the ring like the old one."""
    module, stash, optimizer = ring("lstm")
    module.to("cpu")
    for leaf in stash.parameters(0).values():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    with torch.no_grad():
        now = module(data(0))
        assert not torch.equal(now, layer("lstm")(data(0)))
        with stash.use(0):
            assert torch.equal(module(data(0)), layer("lstm")(data(0)))
    lists = module.lstm._flat_weights
    assert [id(p) for p in lists] == [id(p) for p in stash.parameters(1).values()]


def test_wrapping_a_part_changes_nothing() -> None:
    """The wrapper has the same parameters under other names."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    stash = WeightStash(module, 2)
    optimizer = npp.NAdam(module.parameters(), stash=stash)
    module[0] = nn.Sequential(module[0])
    with stash.use(0):
        objective(module(data(0))).backward()
    optimizer.step()
    assert [id(p) for p in module.parameters()] == [id(p) for p in stash.parameters(1).values()]


def test_foreign_weights_of_a_functional_call_are_left_alone() -> None:
    module, stash, optimizer = ring()
    foreign = {n: torch.zeros_like(p).requires_grad_() for n, p in module.named_parameters()}
    loss = objective(torch.func.functional_call(module, foreign, (data(0),)))
    for _ in range(4):
        for leaf in stash.parameters(stash.newest).values():
            leaf.grad = torch.ones_like(leaf)
        optimizer.step()
    loss.backward()
    assert foreign["weight"].grad is not None
    assert all(leaf.grad is None for slot in stash._slots for leaf in slot)


def fake() -> nn.Module:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return nn.Linear(4, 4)


def without_memory() -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight.untyped_storage().resize_(0)
    return module


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: nn.Linear(4, 4, device="meta"), r"weight is on the meta device.*materialise the module with to_empty"),
        (lambda: nn.LazyLinear(4), "weight is not initialised yet, because its module is lazy until its first forward"),
        (fake, "weight is a FakeTensor, which has no values"),
        (without_memory, "weight is without memory, because its storage was resized to nothing"),
    ],
    ids=["meta", "lazy", "fake", "freed"],
)
@pytest.mark.parametrize("versions", [1, 3])
def test_parameters_without_values(make: Callable[[], nn.Module], sentence: str, versions: int) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        WeightStash(make(), versions)
    assert "shares memory" not in str(error.value)
