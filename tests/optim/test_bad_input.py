"""Bad input raises one clear sentence and changes no bit anywhere, including gradients and other versions."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from backends import BACKENDS
from torch import nn

import nesterov_pp as npp

NAN, INF = float("nan"), float("inf")
# Words of internal errors, which did not come from a check.
INSIDE = re.compile(
    r"0x[0-9a-f]{4}|object at|has no attribute|not subscriptable|unsupported operand|not supported between|"
    r"INTERNAL ASSERT|incompatible function arguments|too many values|not enough values|cannot convert float|"
    r"Boolean value of Tensor|can be converted to|invalid literal|unhashable|not iterable"
)


def gradient(p: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)


class World:
    """Every kind of optimizer in mid-training, a ring with a microbatch in flight, and a ring without an optimizer."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        torch.manual_seed(0)
        self.module, self.staged, self.unowned = (nn.Linear(4, 3) for _ in range(3))
        self.stash, self.free = npp.WeightStash(self.staged, 3), npp.WeightStash(self.unowned, 2)
        self.optimizers = {
            "nadam": npp.NAdam(self.module.named_parameters(), lr=1e-2, backend=backend),
            "adamw": npp.AdamW(self.leaves_of(nn.Linear(3, 2)), lr=1e-2, max_grad_norm=1.0, backend=backend),
            "nag": npp.NAG(self.leaves_of(nn.Linear(3, 2)), lr=1e-2, on_nonfinite="raise", backend=backend),
            "narrow": npp.NAdam(self.leaves_of(nn.Linear(3, 2)), state_dtype=torch.bfloat16, backend=backend),
            "ring": npp.NAdam(self.staged.parameters(), lr=1e-2, stash=self.stash, backend=backend),
        }
        for seed in (1, 2):
            self.good_steps(seed)
        with self.stash.use(1):
            self.staged(torch.ones(1, 4)).sum().backward()
        self.give(3)

    @property
    def unusable(self) -> str:
        """A backend that does not take this world's parameters."""
        return "cpu" if self.module.weight.is_cuda else "cuda"

    @staticmethod
    def leaves_of(module: nn.Module) -> list[nn.Parameter]:
        return list(module.parameters())

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["optimizers"][name]
        except KeyError:
            raise AttributeError(name) from None

    def leaves(self, name: str) -> list[torch.Tensor]:
        if name == "ring":
            return list(self.stash.parameters(self.stash.newest).values())
        return self.optimizers[name].param_groups[0]["params"]

    def give(self, seed: int) -> None:
        for name in self.optimizers:
            for p in self.leaves(name):
                p.grad = gradient(p, seed)

    def step(self, name: str) -> None:
        self.optimizers[name].step(**({"version": self.stash.newest} if name == "ring" else {}))

    def good_steps(self, seed: int) -> None:
        self.give(seed)
        for name in self.optimizers:
            self.step(name)

    @property
    def p(self) -> torch.Tensor:
        return self.leaves("nadam")[0]

    @property
    def group(self) -> dict[str, Any]:
        return self.nadam.param_groups[0]

    @property
    def state(self) -> dict[str, Any]:
        return self.nadam.state[self.p]

    def everything(self) -> list[Any]:
        """Return plain copies of everything, with the ids of the objects."""
        seen: list[Any] = []
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                seen.append({k: v for k, v in group.items() if k != "params"})
                for p in group["params"]:
                    seen += [id(p), p.detach(), p.grad, optimizer.state[p]]
            seen += [list(map(id, optimizer.state)), optimizer.backend]
        for stash, module in ((self.stash, self.staged), (self.free, self.unowned)):
            seen += [stash.newest, stash.oldest, stash.versions, stash.names, list(map(id, module.parameters()))]
            for version in range(stash.oldest, stash.newest + 1):
                leaves = stash.parameters(version).values()
                seen += [stash.in_flight(version), *((id(p), p.detach(), p.grad) for p in leaves)]
        return copy.deepcopy(seen)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---------------------------------------------------------------------- how cases are written

Case = Callable[[World], Any]


@contextmanager
def put(container: Any, key: Any, value: Any) -> Iterator[None]:
    """Set ``container[key] = value`` inside the block."""
    before = container[key]
    container[key] = value
    try:
        yield
    finally:
        container[key] = before


def new(cls: type, **options: Any) -> Case:
    """Make an optimizer on a new parameter."""
    return lambda w: cls([nn.Parameter(torch.ones(2, 2))], **{"backend": w.backend, **options})


def of(make: Callable[[], Any], cls: type = npp.NAdam, **options: Any) -> Case:
    """Make an optimizer on the parameters that ``make`` returns."""
    return lambda w: cls(make(), **{"backend": w.backend, **options})


def on_the_host() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2, device="cpu"))]


def added(group: Callable[[World], Any], to: str = "nadam") -> Case:
    return lambda w: w.optimizers[to].add_param_group(group(w))


def stepped_with(which: str = "nadam", **changes: Any) -> Case:
    """Step after hyper-parameters were changed in the group."""

    def call(w: World) -> None:
        group = w.optimizers[which].param_groups[0]
        before = {key: group[key] for key in changes}
        group.update(changes)
        try:
            w.step(which)
        finally:
            group.update(before)

    return call


def stepped_with_state(key: str, change: Callable[[torch.Tensor], Any], which: str = "nadam") -> Case:
    def call(w: World) -> None:
        optimizer = w.optimizers[which]
        state = optimizer.state[optimizer.param_groups[0]["params"][1]]
        with put(state, key, change(state[key])):
            w.step(which)

    return call


def stepped_without(key: str) -> Case:
    def call(w: World) -> None:
        entry = dict(w.state)
        del w.state[key]
        try:
            w.nadam.step()
        finally:
            w.state.clear()
            w.state.update(entry)

    return call


def stepped_without_option(w: World) -> None:
    options = dict(w.group)
    del w.group["betas"]
    try:
        w.nadam.step()
    finally:
        w.group.clear()
        w.group.update(options)


def with_gradient(change: Callable[[torch.Tensor], torch.Tensor], which: str = "nadam", index: int = 1) -> Case:
    """Step after a gradient was changed behind autograd's back."""

    def call(w: World) -> None:
        p = w.leaves(which)[index]
        before, value = p.grad, p.grad.data
        changed = change(p.grad.detach())
        if changed.layout == torch.strided:
            p.grad.data = changed
        else:
            p.grad = changed
        try:
            w.step(which)
        finally:
            before.data = value
            p.grad = before

    return call


def with_data(change: Callable[[torch.Tensor], torch.Tensor], index: int = 1) -> Case:
    def call(w: World) -> None:
        p = w.leaves("nadam")[index]
        value, grad = p.data, p.grad
        p.data = change(value)
        try:
            w.nadam.step()
        finally:
            p.grad = None
            p.data = value
            p.grad = grad

    return call


def loaded(change: Callable[[dict[str, Any]], Any], into: str = "nadam") -> Case:
    """Load the optimizer's own state, either changed in place or replaced by the result of ``change``."""

    def call(w: World) -> None:
        saved = copy.deepcopy(w.optimizers[into].state_dict())
        other = change(saved)
        w.optimizers[into].load_state_dict(saved if other is None else other)

    return call


def entry(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][1].update({key: value})


def loaded_from(cls: type, into: str = "nadam", **options: Any) -> Case:
    def call(w: World) -> None:
        ps = [nn.Parameter(p.detach().clone()) for p in w.leaves(into)]
        other = cls(ps, **options)
        for p in ps:
            p.grad = torch.ones_like(p)
        other.step()
        w.optimizers[into].load_state_dict(other.state_dict())

    return call


def ring_loaded(change: Callable[[dict[str, Any]], Any]) -> Case:
    def call(w: World) -> None:
        saved = copy.deepcopy(w.stash.state_dict())
        other = change(saved)
        w.stash.load_state_dict(saved if other is None else other)

    return call


def used(version: Any, **options: Any) -> Case:
    def call(w: World) -> None:
        with w.stash.use(version, **options):
            pass

    return call


def overwriting(w: World) -> None:
    """Step with one of two microbatches in flight on the only version of a ring."""
    module = nn.Linear(2, 2)
    stash = npp.WeightStash(module, 1)
    optimizer = npp.NAdam(module.parameters(), stash=stash, backend=w.backend)
    for _ in range(2):
        with stash.use(0):
            module(torch.ones(1, 2)).sum().backward()
    before = [p.detach().clone() for p in module.parameters()]
    try:
        optimizer.step(version=0)
    finally:
        assert stash.newest == 0
        assert stash.in_flight(0) == 2
        assert same([p.detach() for p in module.parameters()], before)


def scaled_ring(w: World) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    grads = [p.grad for p in w.leaves("ring")]
    try:
        scaler.step(w.ring)
    finally:
        for p, grad in zip(w.leaves("ring"), grads, strict=True):
            p.grad = grad


def hooked_module() -> nn.Module:
    module = nn.Linear(2, 2)
    module.bias.register_hook(lambda g: g)
    return module


def overlapping_module() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.ones(3).expand(2, 3))])


def schedule(value: Any) -> Case:
    """Step with a schedule whose first value is valid."""

    def call(w: World) -> None:
        p = nn.Parameter(torch.ones(2))
        optimizer = npp.NAG([p], momentum=lambda t: 0.5 if t == 1 else value, backend=w.backend)
        p.grad = torch.ones(2)
        try:
            optimizer.step()
        finally:
            assert torch.equal(p.detach(), torch.ones(2))
            assert optimizer.param_groups[0]["momentum"] == 0.5

    return call


T, V, F, R = TypeError, ValueError, FloatingPointError, RuntimeError
CASES: dict[str, tuple[Case, type[Exception], str]] = {
    # ------------------------------------------------------------------ the constructor
    "infinite lr": (new(npp.NAdam, lr=INF), V, "Invalid learning rate: inf"),
    "lr of None": (new(npp.AdamW, lr=None), V, "Invalid learning rate: None"),
    "complex lr": (new(npp.NAG, lr=1j), V, "Invalid learning rate: 1j"),
    "lr tensor of nan": (new(npp.NAdam, lr=torch.tensor(NAN)), V, "Invalid learning rate: "),
    "lr tensor below zero": (new(npp.AdamW, lr=torch.tensor(-1.0)), V, "Invalid learning rate: "),
    "empty lr tensor": (new(npp.AdamW, lr=torch.ones(0)), V, "Tensor lr must be 1-element"),
    "complex lr tensor": (new(npp.AdamW, lr=torch.tensor(1j)), V, "Invalid learning rate: "),
    "betas of None": (new(npp.NAdam, betas=None), V, "Invalid betas: None; they must be a pair"),
    "one beta": (new(npp.NAdam, betas=(0.9,)), V, "Invalid betas: "),
    "betas as a string": (new(npp.AdamW, betas="ab"), V, "Invalid betas: ab"),
    "words as betas": (new(npp.AdamW, betas=("a", 0.9)), V, "Invalid beta parameter at index 0: a"),
    "nan beta": (new(npp.NAdam, betas=(0.9, NAN)), V, "Invalid beta parameter at index 1: nan"),
    "beta tensors of two": (
        new(npp.AdamW, betas=(torch.full((2,), 0.9), torch.full((2,), 0.9))),
        V,
        r"Tensor betas\[0\] must be 1-element",
    ),
    "eps of None": (new(npp.NAdam, eps=None), V, "Invalid epsilon value: None"),
    "infinite eps": (new(npp.AdamW, eps=INF), V, "Invalid epsilon value: inf"),
    "nan weight decay": (new(npp.NAG, weight_decay=NAN), V, "Invalid weight_decay value: nan"),
    "word as weight decay": (new(npp.AdamW, weight_decay="0.1"), V, "Invalid weight_decay value: 0.1"),
    "nan momentum decay": (new(npp.NAdam, momentum_decay=NAN), V, "Invalid momentum_decay value: nan"),
    "negative clipping": (new(npp.NAG, max_grad_norm=-1.0), V, "Invalid max_grad_norm: -1.0"),
    "on_nonfinite of None": (new(npp.NAG, on_nonfinite=None), V, "Invalid on_nonfinite: None; choose one of"),
    "on_nonfinite a list": (new(npp.NAG, on_nonfinite=["raise"]), V, r"Invalid on_nonfinite: \['raise'\]"),
    "float16 state": (new(npp.NAdam, state_dtype=torch.float16), V, "Invalid state_dtype: torch.float16"),
    "named state dtype": (new(npp.NAdam, state_dtype="bfloat16"), V, "Invalid state_dtype: bfloat16"),
    "half a seed": (new(npp.NAdam, seed=1.5), V, "Invalid seed: 1.5"),
    "too large a seed": (new(npp.NAdam, seed=2**64), V, "Invalid seed: 18446744073709551616"),
    "backend of None": (new(npp.NAdam, backend=None), V, "unknown backend None; choose one of"),
    "backend a list": (new(npp.NAdam, backend=["cpu"]), V, r"unknown backend \['cpu'\]; choose one of"),
    "no GPU": (of(on_the_host, npp.AdamW, backend="cuda"), V, "backend 'cuda' cannot be used: "),
    "stash that is none": (new(npp.NAdam, stash="ring"), V, "stash must be a WeightStash"),
    "too many positions": (
        lambda w: npp.NAdam([w.p], 1e-3, (0.9, 0.999), 1e-8, 0.0, 4e-3, False, True),
        T,
        "takes from 2 to 8 positional arguments",
    ),
    "number among groups": (
        of(lambda: [{"params": [nn.Parameter(torch.ones(1))]}, 3]),
        T,
        "param_group must be a dict|list",
    ),
    "string of parameters": (of(lambda: "abc"), T, "can only optimize Tensors"),
    "none among parameters": (of(lambda: [None]), T, "can only optimize Tensors"),
    "empty groups": (of(list, npp.NAG), V, "empty parameter list"),
    "a group without parameters": (of(lambda: [{"lr": 1.0}]), V, "a parameter group has no 'params'"),
    "half named": (
        of(lambda: [("a", nn.Parameter(torch.ones(1))), nn.Parameter(torch.ones(1))]),
        V,
        "with/without names",
    ),
    "the same in two groups": (
        lambda w: npp.NAdam([{"params": [w.p]}, {"params": [w.p]}]),
        V,
        "appear in more than one parameter group",
    ),
    "sparse parameters": (of(lambda: [torch.ones(3, 3).to_sparse().requires_grad_()]), V, "sparse"),
    "complex state in bfloat16": (
        of(lambda: [nn.Parameter(torch.ones(2, dtype=torch.complex64))], state_dtype=torch.bfloat16),
        V,
        "cannot hold the moments of complex64 parameters",
    ),
    "negative momentum": (new(npp.NAG, momentum=-0.1), V, "Invalid momentum value: -0.1"),
    "nan momentum": (new(npp.NAG, momentum=NAN), V, "Invalid momentum value: nan"),
    "word as momentum": (new(npp.NAG, momentum="0.9"), V, "Invalid momentum value: 0.9"),
    "schedule that starts too high": (new(npp.NAG, momentum=lambda t: 1.5), V, "Invalid momentum value: 1.5"),
    "schedule of None": (schedule(None), V, "Invalid momentum value: None"),
    "schedule that gets too high": (schedule(1.5), V, "Invalid momentum value: 1.5"),
    "fused and foreach": (new(npp.AdamW, fused=True, foreach=True), R, "cannot be `True` together"),
    "differentiable on the cpu backend": (
        new(npp.NAdam, differentiable=True, backend="cpu"),
        V,
        "backend 'cpu' cannot be used: ",
    ),
    # ------------------------------------------------------------------ groups
    "group that is a list": (added(lambda w: [nn.Parameter(torch.ones(1))]), T, "param_group must be a dict"),
    "group without params": (added(lambda w: {"lr": 1.0}), V, "a parameter group has no 'params'"),
    "group of a set": (added(lambda w: {"params": {nn.Parameter(torch.ones(1))}}), T, "ordered collections"),
    "group of results": (added(lambda w: {"params": [("x", w.p * 2)]}), V, "can't optimize a non-leaf Tensor"),
    "unnamed beside named": (added(lambda w: {"params": [nn.Parameter(torch.ones(1))]}), V, "names"),
    "float64 beside narrow state": (
        added(lambda w: {"params": [nn.Parameter(torch.ones(1).double())]}, "narrow"),
        V,
        "state_dtype=torch.bfloat16 cannot hold the moments of float64",
    ),
    "group from outside the ring": (
        added(lambda w: {"params": [nn.Parameter(torch.ones(2, 7))]}, "ring"),
        V,
        r"a parameter of shape \(2, 7\) is not in the WeightStash",
    ),
    # ------------------------------------------------------------------ hyper-parameters that were changed
    "lr became infinite": (stepped_with(lr=INF), V, "group 0 .*lr=inf"),
    "lr became two": (stepped_with(lr=torch.ones(2)), V, "group 0 .*lr="),
    "lr became a nan tensor": (stepped_with("adamw", lr=torch.tensor(NAN)), V, "group 0 .*lr=tensor"),
    "lr of nag became a word": (stepped_with("nag", lr="fast"), V, "group 0 .*lr='fast'"),
    "lr of the ring became nan": (stepped_with("ring", lr=NAN), V, "group 0 .*lr=nan"),
    "eps became nan": (stepped_with(eps=NAN), V, "group 0 .*eps=nan"),
    "eps became None": (stepped_with("adamw", eps=None), V, "group 0 .*eps=None"),
    "weight decay became a word": (stepped_with(weight_decay="0.1"), V, "group 0 .*weight_decay='0.1'"),
    "weight decay became nan": (stepped_with("adamw", weight_decay=NAN), V, "group 0 .*weight_decay=nan"),
    "momentum decay became None": (stepped_with(momentum_decay=None), V, "group 0 .*momentum_decay=None"),
    "three betas now": (stepped_with(betas=(0.9, 0.9, 0.9)), V, "group 0 .*betas="),
    "one beta now": (stepped_with("adamw", betas=(0.9,)), V, "group 0 .*betas="),
    "beta1 became nan": (stepped_with("adamw", betas=(NAN, 0.9)), V, "group 0 .*betas="),
    "beta1 above one": (stepped_with(betas=(1.5, 0.999)), V, "group 0 .*betas="),
    "beta2 above one": (stepped_with("adamw", betas=(0.9, 1.5)), V, "group 0 .*betas="),
    "beta1 below zero": (stepped_with("adamw", betas=(-0.5, 0.9)), V, "group 0 .*betas="),
    "word as beta": (stepped_with("adamw", betas=("a", 0.9)), V, "group 0 .*betas="),
    "betas gone": (stepped_without_option, V, "betas"),
    "momentum became one": (stepped_with("nag", momentum=1.0), V, "Invalid momentum value: 1.0"),
    "momentum became None": (stepped_with("nag", momentum=None), V, "Invalid momentum value: None"),
    # ------------------------------------------------------------------ the step's arguments
    "string as closure": (lambda w: w.nadam.step("again"), T, "closure|callable"),
    "negative microbatches": (lambda w: w.nadam.step(microbatches=-1), V, "at least 1, not -1"),
    "microbatches as a word": (lambda w: w.nadam.step(microbatches="2"), V, "at least 1, not 2"),
    "microbatches of None": (lambda w: w.nadam.step(microbatches=None), V, "at least 1, not None"),
    "version without a ring": (lambda w: w.adamw.step(version=0), V, "needs an optimizer built with stash="),
    # ------------------------------------------------------------------ gradients
    "longer gradient": (with_gradient(lambda g: torch.ones(5)), V, "the gradient of bias has shape"),
    "gradient with a dimension more": (with_gradient(lambda g: g[None]), V, "the gradient of bias has shape"),
    "float64 gradient": (with_gradient(lambda g: g.double()), V, "the gradient of bias is (torch.float64|Double)"),
    "bfloat16 gradient": (with_gradient(lambda g: g.bfloat16()), V, "the gradient of bias is (torch.bf|BF)loat16"),
    "sparse gradient of nag": (
        with_gradient(lambda g: g.to_sparse(), "nag"),
        R,
        "NAG does not support sparse gradients",
    ),
    "sparse gradient in the ring": (
        with_gradient(lambda g: g.to_sparse(), "ring"),
        R,
        "NAdam does not support sparse gradients",
    ),
    "longer gradient in the ring": (with_gradient(lambda g: torch.ones(5), "ring"), V, "the gradient of .* has shape"),
    "nan gradient": (with_gradient(lambda g: g * NAN, "nag"), F, "the gradient of parameter 1 is not finite"),
    "infinite gradient": (with_gradient(lambda g: g + INF, "nag", 0), F, "the gradient of parameter 0 is not finite"),
    "weights of another shape": (with_data(lambda v: torch.ones(7)), V, "bias"),
    "weights of another dtype": (with_data(lambda v: v.double()), V, "bias"),
    # ------------------------------------------------------------------ state
    "first moment too long": (stepped_with_state("exp_avg", lambda m: torch.ones(9)), V, "first moment of bias"),
    "second moment flat": (stepped_with_state("exp_avg_sq", lambda v: v[:1], "adamw"), V, "second moment of .* 1 "),
    "moment of nag too long": (stepped_with_state("exp_avg", lambda m: torch.ones(9), "nag"), V, "first moment of"),
    "moment in the ring too long": (
        stepped_with_state("exp_avg", lambda m: torch.ones(9), "ring"),
        V,
        "first moment of",
    ),
    "moment of integers": (stepped_with_state("exp_avg", lambda m: m.long()), V, "first moment of bias"),
    "complex moment": (stepped_with_state("exp_avg_sq", lambda m: m + 0j), V, "second moment of bias"),
    "sparse moment": (stepped_with_state("exp_avg", lambda m: m.to_sparse()), V, "first moment of bias"),
    "moments unlike": (stepped_with_state("exp_avg_sq", lambda m: m.bfloat16()), V, "second moment of bias"),
    "moment of None": (stepped_with_state("exp_avg", lambda m: None), V, "the state of bias has no tensor 'exp_avg'"),
    "moment elsewhere": (stepped_with_state("exp_avg", lambda m: m.to("meta")), V, "first moment of bias"),
    "steps elsewhere": (stepped_with_state("step", lambda s: s.to("meta")), V, "the step count of bias"),
    "plain number of steps": (stepped_with_state("step", lambda s: 2.0), V, "has no tensor 'step'"),
    "nan steps": (stepped_with_state("step", lambda s: s * NAN), V, "the step count of bias"),
    "negative steps": (stepped_with_state("step", lambda s: s - 7), V, "the step count of bias"),
    "two mu products": (stepped_with_state("mu_product", lambda s: torch.ones(2)), V, "the mu product of bias"),
    "nan mu product": (stepped_with_state("mu_product", lambda s: s * NAN), V, "the mu product of bias"),
    "step count gone": (stepped_without("step"), V, "the state of weight has no tensor 'step'"),
    "mu product gone": (stepped_without("mu_product"), V, "the state of weight has no tensor 'mu_product'"),
    # ------------------------------------------------------------------ checkpoints
    "loading None": (lambda w: w.nadam.load_state_dict(None), V, "load_state_dict takes what state_dict"),
    "loading a list": (loaded(lambda s: [s]), V, "load_state_dict takes .*, not list"),
    "loading nothing": (loaded(lambda s: {"param_groups": s["param_groups"]}), V, "load_state_dict takes"),
    "loading SGD": (loaded_from(torch.optim.SGD, lr=0.1, momentum=0.9), V, "group 0 has no .*another optimizer"),
    "loading SGD into nag": (loaded_from(torch.optim.SGD, "nag", lr=0.1, momentum=0.9), V, "has no '(step|exp_avg)'"),
    "loading AdamW into NAdam": (loaded_from(npp.AdamW), V, "group 0 has no 'momentum_decay'"),
    "loading NAG into AdamW": (loaded_from(npp.NAG, "adamw"), V, "group 0 has no 'betas'"),
    "loading Adagrad": (loaded_from(torch.optim.Adagrad, "adamw"), V, "group 0 has no 'betas'"),
    "groups that are no list": (loaded(lambda s: {**s, "param_groups": 3}), V, "param_groups"),
    "groups that are no dicts": (loaded(lambda s: {**s, "param_groups": [3]}), V, "param_groups|parameter group"),
    "saved group without params": (
        loaded(lambda s: s["param_groups"][0].pop("params") and None),
        V,
        "param_groups|parameter group 0 has no 'params'",
    ),
    "state that is no dict": (loaded(lambda s: {**s, "state": [1]}), V, "state"),
    "entry that is no dict": (loaded(lambda s: s["state"].update({1: [1]})), V, "parameter 1 of group 0"),
    "fewer parameters": (
        loaded(lambda s: s["param_groups"][0]["params"].pop() and None),
        V,
        "size of optimizer's group",
    ),
    "a group more": (loaded(lambda s: s["param_groups"].append({"params": []})), V, "number of parameter groups"),
    "second moment of another shape": (
        loaded(entry("exp_avg_sq", torch.ones(3, 1))),
        V,
        "the saved 'exp_avg_sq' of parameter 1 of group 0 has shape",
    ),
    "saved moment in the ring": (loaded(entry("exp_avg", torch.ones(9)), "ring"), V, "'exp_avg' .* has shape"),
    "saved moment a word": (loaded(entry("exp_avg", "zeros")), V, "'exp_avg' of parameter 1 of group 0"),
    "saved moment a number": (loaded(entry("exp_avg", 0.0)), V, "'exp_avg' of parameter 1 of group 0"),
    "saved moment sparse": (loaded(entry("exp_avg", torch.ones(3).to_sparse())), V, "'exp_avg' of parameter 1"),
    "saved moment complex": (loaded(entry("exp_avg", torch.ones(3) * 1j)), V, "'exp_avg' of parameter 1"),
    "two saved steps": (loaded(entry("step", torch.ones(2))), V, "'step' of parameter 1 of group 0"),
    "saved steps a word": (loaded(entry("step", "3")), V, "'step' of parameter 1 of group 0"),
    "saved mu product of two": (loaded(entry("mu_product", torch.ones(2))), V, "'mu_product' of parameter 1"),
    # ------------------------------------------------------------------ the ring
    "version to come": (lambda w: w.ring.step(version=3), V, "version 3 does not exist; the newest is 2"),
    "version as a word": (lambda w: w.ring.step(version="1"), V, "version must be a whole number"),
    "half a version": (lambda w: w.ring.step(version=1.5), V, "version must be a whole number"),
    "which version is not said": (lambda w: w.ring.step(), V, r"gradients are waiting on version 1.*step\(version=1\)"),
    "overwriting a version in flight": (overwriting, V, "would overwrite version 0, which 1 microbatch"),
    "GradScaler with a ring": (scaled_ring, V, "GradScaler sees the gradients of one weight version only"),
    "using a version to come": (used(7), V, "version 7 does not exist"),
    "using a negative version": (used(-1), V, "version -1 does not exist"),
    "using a word": (used("1"), V, "version must be a whole number"),
    "unknown backward": (used(1, linearise_at="sideways"), V, "linearise_at must be .*version"),
    "parameters of a version to come": (lambda w: w.stash.parameters(9), V, "version 9 does not exist"),
    "releasing what is not in flight": (lambda w: w.stash.release(2), V, "version 2"),
    "releasing a version to come": (lambda w: w.stash.release(9), V, "version 9 does not exist"),
    "ring of half a version": (lambda w: npp.WeightStash(nn.Linear(2, 2), 1.5), V, "versions must be"),
    "ring of a word": (lambda w: npp.WeightStash(nn.Linear(2, 2), "2"), V, "versions must be"),
    "ring of a tensor": (lambda w: npp.WeightStash(torch.ones(2), 2), V, "module|Module"),
    "ring of a hooked module": (lambda w: npp.WeightStash(hooked_module(), 2), V, "bias carries hooks"),
    "ring of overlapping weights": (lambda w: npp.WeightStash(overlapping_module(), 2), V, "0 is not a dense strided"),
    "second optimizer of a ring": (
        lambda w: npp.AdamW(w.staged.parameters(), stash=w.stash),
        V,
        "already has an optimizer",
    ),
    "part of a ring": (lambda w: npp.NAdam([w.unowned.weight], stash=w.free), V, "bias is missing"),
    "bad lr over a ring": (lambda w: npp.NAdam(w.unowned.parameters(), lr=-1.0, stash=w.free), V, "learning rate"),
    "bad backend over a ring": (
        lambda w: npp.NAdam(w.unowned.parameters(), backend=w.unusable, stash=w.free),
        V,
        "backend 'c[a-z]+' cannot be used",
    ),
    "ring loaded from a list": (ring_loaded(lambda s: [s]), V, "load_state_dict takes|WeightStash"),
    "ring loaded from half": (ring_loaded(lambda s: {"newest": 2}), V, "weights"),
    "ring of other lengths": (ring_loaded(lambda s: s["weights"].pop() and None), V, "the saved ring holds 2 versions"),
    "ring of other names": (
        ring_loaded(lambda s: s["weights"][1].update(other=s["weights"][1].pop("bias"))),
        V,
        "the saved ring is of another module",
    ),
    "ring of other shapes": (ring_loaded(lambda s: s["weights"][2].update(bias=torch.ones(9))), V, "bias was saved as"),
    "ring of other dtypes": (
        ring_loaded(lambda s: s["weights"][2].update(bias=torch.ones(3).double())),
        V,
        "bias was saved as torch.float64",
    ),
    "ring of words": (ring_loaded(lambda s: s["weights"][2].update(bias="ones")), V, "bias"),
    "ring at a negative version": (ring_loaded(lambda s: s.update(newest=-1, weights=[])), V, "newest|version"),
    "ring at a word": (ring_loaded(lambda s: s.update(newest="two")), V, "newest"),
}


def test_there_are_many_cases():
    assert len(CASES) >= 45


def go_on(world: World) -> list[Any]:
    """Take two more good steps with every optimizer, including the first one on the unowned ring."""
    world.stash.release(1)
    optimizer = npp.NAdam(world.unowned.parameters(), stash=world.free, backend=world.backend)
    for seed in (4, 5):
        world.good_steps(seed)
        for p in world.free.parameters(world.free.newest).values():
            p.grad = gradient(p, seed)
        optimizer.step()
    weights = [p.detach() for name in world.optimizers for p in world.leaves(name)]
    weights += [p.detach() for p in world.free.parameters(world.free.newest).values()]
    return [weights, [list(optimizer.state.values()) for optimizer in world.optimizers.values()]]


@cache
def untroubled(backend: str) -> list[Any]:
    """Return the end of a world without any bad input."""
    return go_on(World(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_not_a_bit_changed(case, backend):
    call, error, sentence = CASES[case]
    world = World(backend)
    before = world.everything()
    with pytest.raises(error) as caught:
        call(world)
    after = world.everything()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if not same(a, b)]
    assert not changed, changed
    assert same(go_on(world), untroubled(backend))
    message = str(caught.value)
    assert re.search(sentence, message), message
    assert "\n" not in message, message
    assert 15 <= len(message) <= 300, f"{len(message)}: {message}"
    assert not INSIDE.search(message), message


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expanded_moment_is_laid_out_anew_or_refused_before_anything_is_written(backend):
    world = World(backend)
    state = world.nadam.state[world.leaves("nadam")[1]]
    state["exp_avg"] = torch.full((1,), 0.5).expand(3)
    before = world.everything()
    refusal = ""
    try:
        world.nadam.step()
    except (ValueError, RuntimeError) as error:
        refusal = str(error)
    if refusal:
        assert same(before, world.everything())
        assert "first moment of bias" in refusal
    else:
        assert state["exp_avg"].unique().numel() == 3


def test_a_refused_optimizer_does_not_keep_the_ring():
    """The ring is free even while someone, such as a notebook, holds the error and thus the half-made optimizer."""
    module = nn.Linear(2, 2)
    stash = npp.WeightStash(module, 2)
    errors = []
    for bad in ({"backend": "cuda"}, {"lr": -1.0}, {"backend": "cpu", "differentiable": True}):
        with pytest.raises(ValueError) as caught:
            npp.NAdam(module.parameters(), stash=stash, **bad)
        errors.append(caught.value)
    npp.NAdam(module.parameters(), stash=stash)
