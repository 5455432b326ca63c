"""Bad input gets one clear sentence, and changes nothing: no parameter, no state, no group, no version."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import nesterov_pp as npp

NAN = float("nan")


@dataclass
class Scene:
    """An optimizer in the middle of training, in place or over a ring; a case spoils something and calls it."""

    ring: bool
    module: nn.Linear = field(init=False)
    optimizer: npp.NAdam = field(init=False)
    stash: npp.WeightStash | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(4, 3)
        self.stash = npp.WeightStash(self.module, 3) if self.ring else None
        self.optimizer = npp.NAdam(self.module.parameters(), lr=1e-2, stash=self.stash)
        for seed in (1, 2):
            self.good_step(seed)
        self.give_gradients(3)

    @property
    def weight(self) -> nn.Parameter:
        return self.leaves()[0]

    @property
    def group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[0]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return self.optimizer.state[self.group["params"][0]]

    def leaves(self) -> list[nn.Parameter]:
        if self.stash is not None:
            return list(self.stash.parameters(self.stash.newest).values())
        return list(self.module.parameters())

    def give_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in self.leaves():
            p.grad = torch.randn(p.shape, generator=generator)

    def good_step(self, seed: int) -> None:
        self.give_gradients(seed)
        self.optimizer.step(**({} if self.stash is None else {"version": self.stash.newest}))

    def everything(self) -> Any:
        versions = [] if self.stash is None else [self.stash.newest, self.stash.state_dict()["weights"]]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = [dict(s) for s in self.optimizer.state.values()]
        return copy.deepcopy([[p.detach() for p in self.leaves()], groups, state, versions])


Case = Callable[[Scene], Any]


def changed_group(**values: Any) -> Case:
    """Step with hyper-parameters that somebody set; they are put back, being the caller's own."""

    def call(scene: Scene) -> None:
        before = {key: scene.group[key] for key in values}
        scene.group.update(values)
        try:
            scene.optimizer.step()
        finally:
            scene.group.update(before)

    return call


def changed_state(name: str, make: Callable[[torch.Tensor], Any]) -> Case:
    """Step with an entry of the state that somebody replaced."""

    def call(scene: Scene) -> None:
        before = scene.state[name]
        scene.state[name] = make(before)
        try:
            scene.optimizer.step()
        finally:
            scene.state[name] = before

    return call


def loaded(change: Callable[[dict[str, Any]], Any]) -> Case:
    """Load the optimizer's own state, spoiled."""

    def call(scene: Scene) -> None:
        saved = copy.deepcopy(scene.optimizer.state_dict())
        replaced = change(saved)
        scene.optimizer.load_state_dict(saved if replaced is None else replaced)

    return call


def made(**options: Any) -> Case:
    return lambda scene: npp.NAdam(nn.Linear(2, 2).parameters(), **options)


def without_entry(scene: Scene) -> None:
    state = dict(scene.state)
    scene.state.pop("exp_avg_sq")
    try:
        scene.optimizer.step()
    finally:
        scene.state.clear()
        scene.state.update(state)


def gradient_of_another_shape(scene: Scene) -> None:
    weight, value = scene.weight, scene.weight.data
    weight.data = torch.zeros(2, 2)
    try:
        scene.optimizer.step()
    finally:
        weight.data = value


def sparse_gradient(scene: Scene) -> None:
    grad = scene.weight.grad
    scene.weight.grad = grad.to_sparse()
    try:
        scene.optimizer.step()
    finally:
        scene.weight.grad = grad


def nonfinite_gradient(scene: Scene) -> None:
    optimizer = npp.NAdam([("layer.weight", scene.weight)], on_nonfinite="raise")
    grad = scene.weight.grad.clone()
    scene.weight.grad[0, 0] = NAN
    try:
        optimizer.step()
    finally:
        scene.weight.grad = grad


def other_state(scene: Scene) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    other = torch.optim.SGD([p, nn.Parameter(torch.ones(2))], momentum=0.9)
    other.step()
    scene.optimizer.load_state_dict(other.state_dict())


def float16_parameter(**options: Any) -> Case:
    return lambda scene: npp.NAdam([nn.Parameter(torch.ones(2, dtype=torch.float16))], **options)


def nag_schedule(scene: Scene) -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    npp.NAG([p], momentum=lambda t: 0.5 if t == 1 else 1.5).step()


def overwriting_step(scene: Scene) -> None:
    """Version 0 has a microbatch in flight and is about to leave the ring."""
    assert scene.stash is not None
    scene.stash._in_flight[0] += 1
    try:
        scene.optimizer.step(version=scene.stash.newest)
    finally:
        scene.stash._in_flight.clear()


def tied_by_memory(scene: Scene) -> None:
    module = nn.ParameterList([nn.Parameter(torch.ones(6)[:4])])
    module.append(nn.Parameter(module[0].data[2:]))
    npp.WeightStash(module, 2)


def incomplete_stash(scene: Scene) -> None:
    module = nn.Linear(2, 2)
    npp.NAdam([module.weight], stash=npp.WeightStash(module, 2))


def foreign_stash(scene: Scene) -> None:
    npp.NAdam(nn.Linear(2, 2).parameters(), stash=npp.WeightStash(nn.Linear(2, 2), 2))


CASES: dict[str, tuple[Case, type[Exception], str]] = {
    # the constructor
    "negative lr": (made(lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
    "nan lr": (made(lr=NAN), ValueError, "Invalid learning rate: nan"),
    "lr is a string": (made(lr="fast"), ValueError, "Invalid learning rate: fast"),
    "lr of two elements": (made(lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
    "beta1 of one": (made(betas=(1.0, 0.9)), ValueError, "Invalid beta parameter at index 0: 1.0"),
    "negative beta2": (made(betas=(0.9, -0.1)), ValueError, "Invalid beta parameter at index 1: -0.1"),
    "three betas": (made(betas=(0.9, 0.9, 0.9)), ValueError, "they must be a pair of numbers"),
    "one beta": (made(betas=0.9), ValueError, "they must be a pair of numbers"),
    "nan eps": (made(eps=NAN), ValueError, "Invalid epsilon value: nan"),
    "negative weight decay": (made(weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
    "negative momentum decay": (made(momentum_decay=-1), ValueError, "Invalid momentum_decay value: -1"),
    "no clipping at all": (made(max_grad_norm=0.0), ValueError, "Invalid max_grad_norm: 0.0; it must be above 0"),
    "nan clipping": (made(max_grad_norm=NAN), ValueError, "Invalid max_grad_norm: nan"),
    "clipping by a word": (made(max_grad_norm="1"), ValueError, "Invalid max_grad_norm: 1"),
    "unknown on_nonfinite": (made(on_nonfinite="skip"), ValueError, "'skip'; choose one of ignore, raise"),
    "moments of integers": (made(state_dtype=torch.int8), ValueError, "Invalid state_dtype: torch.int8; choose one of"),
    "negative seed": (made(seed=-1), ValueError, "Invalid seed: -1; it must be a whole number"),
    "unknown backend": (made(backend="fast"), ValueError, "unknown backend 'fast'; choose one of auto"),
    "no such backend here": (made(backend="cuda"), ValueError, "backend 'cuda' cannot be used: "),
    "unknown keyword": (made(momentum=0.9), TypeError, "unexpected keyword argument 'momentum'"),
    "no parameters": (lambda scene: npp.NAdam([]), ValueError, "empty parameter list"),
    "a bare tensor": (lambda scene: npp.NAdam(torch.ones(2)), TypeError, "should be an iterable of Tensors or dicts"),
    "not a tensor": (lambda scene: npp.NAdam([1.0]), TypeError, "optimizer can only optimize Tensors"),
    "not a leaf": (lambda scene: npp.NAdam([scene.weight * 2]), ValueError, "can't optimize a non-leaf Tensor"),
    "float64 and narrow moments": (
        lambda scene: npp.NAdam([nn.Parameter(torch.ones(2).double())], state_dtype=torch.bfloat16),
        ValueError,
        "state_dtype=torch.bfloat16 cannot hold the moments of float64 parameters",
    ),
    "float16 rounded stochastically": (
        float16_parameter(stochastic_rounding=True),
        ValueError,
        "stochastic_rounding is for bfloat16, and a parameter is float16",
    ),
    "amsgrad on the cpu backend": (
        lambda scene: npp.AdamW(nn.Linear(2, 2).parameters(), amsgrad=True, backend="cpu"),
        ValueError,
        "backend 'cpu' cannot be used: it does not have amsgrad=True",
    ),
    "parameters that share memory": (
        lambda scene: npp.NAdam([nn.Parameter(t) for t in torch.ones(9).view(3, 3).expand(2, 3, 3)], backend="cpu"),
        ValueError,
        "some of these share memory",
    ),
    "momentum of one": (
        lambda scene: npp.NAG([scene.weight], momentum=1.0),
        ValueError,
        "Invalid momentum value: 1.0",
    ),
    "a schedule above one": (nag_schedule, ValueError, "Invalid momentum value: 1.5"),
    # groups
    "the same parameter again": (
        lambda scene: scene.optimizer.add_param_group({"params": [scene.group["params"][0]]}),
        ValueError,
        "some parameters appear in more than one parameter group",
    ),
    "a group of integers": (
        lambda scene: scene.optimizer.add_param_group({"params": [3]}),
        TypeError,
        "optimizer can only optimize Tensors",
    ),
    "lr became nan": (changed_group(lr=NAN), ValueError, "group 0 cannot be stepped with lr=nan"),
    "lr became a word": (changed_group(lr="fast"), ValueError, "group 0 cannot be stepped with lr='fast'"),
    "lr became None": (changed_group(lr=None), ValueError, "group 0 cannot be stepped with lr=None"),
    "beta2 became one": (changed_group(betas=(0.9, 1.0)), ValueError, "cannot be stepped with .*1.0\\)"),
    "betas became a number": (changed_group(betas=0.9), ValueError, "cannot be stepped with .*betas=0.9"),
    "capturable on the CPU": (
        changed_group(capturable=True),
        AssertionError,
        "If capturable=True, params, mu_products and state_steps must be on supported devices",
    ),
    # the step
    "no microbatches": (lambda scene: scene.optimizer.step(microbatches=0), ValueError, "at least 1, not 0"),
    "half a microbatch": (lambda scene: scene.optimizer.step(microbatches=1.5), ValueError, "whole number .* not 1.5"),
    "a closure that is none": (lambda scene: scene.optimizer.step(3), TypeError, "not callable"),
    "sparse gradient": (sparse_gradient, RuntimeError, "NAdam does not support sparse gradients"),
    "gradient of another shape": (
        gradient_of_another_shape,
        ValueError,
        "(the gradient|the first moment|next version) of .* has shape",
    ),
    "gradient that is nan": (nonfinite_gradient, FloatingPointError, "the gradient of layer.weight is not finite"),
    "moment of another shape": (
        changed_state("exp_avg", lambda m: m[:1]),
        ValueError,
        "the first moment of .* has shape \\[1, 4\\], but the parameter has \\[3, 4\\]",
    ),
    "moment in another dtype": (
        changed_state("exp_avg_sq", lambda v: v.double()),
        ValueError,
        "the second moment of .* is Double, but the first is Float",
    ),
    "moments in a foreign dtype": (
        changed_state("exp_avg", lambda m: m.double()),
        ValueError,
        "the first moment of .* is Double, which does not go with a Float parameter",
    ),
    "moment elsewhere": (
        changed_state("exp_avg", lambda m: m.to("meta")),
        ValueError,
        "the first moment of .* is on meta, but the parameter is on cpu",
    ),
    "moment that is no tensor": (
        changed_state("exp_avg", lambda m: 0.0),
        ValueError,
        "the state of .* has no tensor 'exp_avg'; clear all of it",
    ),
    "step count of two": (
        changed_state("step", lambda s: torch.ones(2)),
        ValueError,
        "the step count of .* must be one number",
    ),
    "moment that is gone": (without_entry, ValueError, "the state of .* has no tensor 'exp_avg_sq'"),
    # checkpoints
    "loading a number": (lambda scene: scene.optimizer.load_state_dict(5), ValueError, "a dict with 'state' and"),
    "loading half of it": (loaded(lambda saved: {"state": saved["state"]}), ValueError, "'param_groups', not"),
    "another number of groups": (
        loaded(lambda saved: saved["param_groups"].append(saved["param_groups"][0])),
        ValueError,
        "loaded state dict has a different number of parameter groups",
    ),
    "another number of parameters": (
        loaded(lambda saved: saved["param_groups"][0]["params"].clear()),
        ValueError,
        "doesn't match the size of optimizer's group",
    ),
    "moments of another model": (
        loaded(lambda saved: saved["state"][0].update(exp_avg=torch.zeros(2))),
        ValueError,
        "the saved 'exp_avg' of parameter 0 of group 0 has shape \\(2,\\), but the parameter has \\(3, 4\\)",
    ),
    "state without a moment": (
        loaded(lambda saved: saved["state"][1].__delitem__("mu_product")),
        ValueError,
        "the saved state of parameter 1 of group 0 has no 'mu_product'",
    ),
    "state of another optimizer": (other_state, ValueError, "saved parameter group 0 has no 'betas'"),
}

RING_CASES: dict[str, tuple[Case, type[Exception], str]] = {
    "version that is to come": (
        lambda scene: scene.optimizer.step(version=9),
        ValueError,
        "version 9 does not exist; the newest is 2",
    ),
    "negative version": (
        lambda scene: scene.optimizer.step(version=-1),
        ValueError,
        "version -1 does not exist",
    ),
    "overwriting a version in flight": (overwriting_step, ValueError, "would overwrite version 0, which 1 microbatch"),
    "two optimizers": (
        lambda scene: npp.NAdam(scene.module.parameters(), stash=scene.stash),
        ValueError,
        "this WeightStash already has an optimizer",
    ),
    "no versions": (lambda scene: npp.WeightStash(nn.Linear(2, 2), 0), ValueError, "versions must be at least 1"),
    "tied by memory": (tied_by_memory, ValueError, "1 shares memory with 0; tie them by using one Parameter"),
    "a parameter is missing": (incomplete_stash, ValueError, "must step all its parameters; bias is missing"),
    "another module's stash": (foreign_stash, ValueError, "is not in the WeightStash; build the stash on the module"),
    "pickling": (lambda scene: copy.deepcopy(scene.optimizer), TypeError, "cannot be copied or pickled; save its"),
    "a ring of another length": (
        lambda scene: scene.stash.load_state_dict({"newest": 2, "weights": []}),
        ValueError,
        "the saved ring holds 0 versions at version 2",
    ),
}
IN_PLACE_ONLY: dict[str, tuple[Case, type[Exception], str]] = {
    "version without a stash": (
        lambda scene: scene.optimizer.step(version=0),
        ValueError,
        "needs an optimizer built with stash=",
    ),
}


def both(cases: dict[str, Any], ring: bool) -> list[Any]:
    return [pytest.param(*case, ring, id=f"{name} ({'ring' if ring else 'in place'})") for name, case in cases.items()]


@pytest.mark.skipif(npp.kernels.available_backends()["cpu"] is not None, reason="the words are the cpu backend's")
@pytest.mark.parametrize(
    ("call", "error", "sentence", "ring"),
    both(CASES | IN_PLACE_ONLY, False) + both(CASES | RING_CASES, True),
)
def test_one_sentence_and_nothing_changed(call, error, sentence, ring):
    scene, untouched = Scene(ring), Scene(ring)
    before = scene.everything()
    with pytest.raises(error, match=sentence) as caught:
        call(scene)
    message = str(caught.value)
    assert "\n" not in message
    assert 15 <= len(message) <= 330
    after = scene.everything()
    assert str(before[1]) == str(after[1])
    torch.testing.assert_close([before[0], before[2:]], [after[0], after[2:]], rtol=0, atol=0)
    for seed in (4, 5):
        scene.good_step(seed)
        untouched.good_step(seed)
    for p, q in zip(scene.leaves(), untouched.leaves(), strict=True):
        assert torch.equal(p, q)
