"""The parameters of an optimizer and their state: how it is created, changed and saved."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, ParamsT

from nesterov_pp.kernels import DEVICE_BACKENDS, Normaliser
from nesterov_pp.optim import counts, saved_state
from nesterov_pp.optim.coded import widened_entries
from nesterov_pp.optim.device_counts import needs_host
from nesterov_pp.optim.fresh import follow_parameters, fresh_masters, fresh_state
from nesterov_pp.optim.options import Options

_UNSET = object()


class States(defaultdict[Any, Any]):
    """The state of all parameters, by parameter; calls ``dropped`` when some of it is dropped.

    The plan of the steps holds the state too, and would otherwise keep its memory until the next step.
    """

    def __init__(self, states: Mapping[Any, Any], dropped: Callable[[], None]) -> None:
        super().__init__(dict, states)
        self._dropped = dropped

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(key)
        self._dropped()

    def pop(self, *args: Any) -> Any:
        self._dropped()
        return super().pop(*args)

    def popitem(self) -> Any:
        self._dropped()
        return super().popitem()

    def clear(self) -> None:
        self._dropped()
        super().clear()

    def copy(self) -> Any:
        return defaultdict(dict, self)

    __copy__: Any = copy

    def __reduce__(self) -> Any:
        return defaultdict, (dict,), None, None, iter(self.items())


class StatefulOptimizer(Optimizer):
    """An optimizer with every parameter's state from its constructor on; ``torch.optim`` has it from the first step."""

    _normaliser: ClassVar[Normaliser] = Normaliser.RMS
    _has_mu_product: ClassVar[bool] = False
    _counted_by_host = False  # True for a rule whose scalars are functions of a count on the host
    # Values for groups from checkpoints that are older than an option, as in torch.optim.
    _legacy: ClassVar[dict[str, Any]] = {
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
    }

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], options: Options, *, fused: bool | None = None
    ) -> None:
        self.options = options
        self.fused = bool(fused)
        self.backend = options.backend
        self._lock = RLock()  # one thread at a time steps, or changes the tensors that a step goes over
        self._prepared: Any = None
        super().__init__(params, defaults)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and not isinstance(value, States):
            value = States(value, _forgets_plan(weakref.ref(self)))
        super().__setattr__(name, value)

    # ------------------------------------------------------------------ parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError("a parameter group has no 'params'")
        with self._lock:
            super().add_param_group(param_group)
            parameters = self.param_groups[-1]["params"]
            try:
                self._check_group(self.param_groups[-1])
                self._init_state(unique(p for p in parameters if p.requires_grad and not is_lazy(p)))
            except BaseException:  # including out of memory
                del self.param_groups[-1]
                raise
            self._prepared = None

    def _check_group(self, group: dict[str, Any]) -> None:
        parameters, options = group["params"], self.options.of_group(group)
        for p in parameters:
            if p.requires_grad and not is_lazy(p):
                options.check_parameter(p)
        stash = self.options.stash
        if stash is not None:
            if len(unique(parameters)) < len(parameters):
                raise ValueError("a parameter group has the same parameter twice; with a WeightStash, list it once")
            stash.leaves(parameters, complete=False)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _options_of(self, parameters: Iterable[Tensor]) -> list[Options]:
        """Return the options of each parameter, which are those of its group."""
        of = {id(p): o for g in self.param_groups for o in (self.options.of_group(g),) for p in g["params"]}
        return [of[id(p)] for p in parameters]

    def _capturable(self) -> bool:
        return any(group.get("capturable") for group in self.param_groups)

    def _counts_on_device(self) -> bool:
        """Return whether steps are counted on the device, as requested or in order not to wait for a ``GradScaler``."""
        if self._capturable():
            return True
        scaled = hasattr(self, "found_inf") and self.backend in DEVICE_BACKENDS
        return scaled and not self._counted_by_host and needs_host(self.options, self._parameters()) is None

    # ------------------------------------------------------------------ their state

    def _state_names(self) -> list[str]:
        """Return the names of the entries in every parameter's state."""
        needed = {
            "step": True,
            "mu_product": self._has_mu_product,
            "exp_avg": True,
            "exp_avg_sq": self._normaliser == Normaliser.RMS,
        }
        names = [name for name, is_needed in needed.items() if is_needed]
        return names if self.options.mean_name is None else [*names, self.options.mean_name]

    def _init_state(self, parameters: list[Tensor]) -> None:
        options = self._options_of(parameters)
        entries = fresh_state(parameters, self._state_names(), options, on_device=self._capturable())
        masters = fresh_masters(parameters, self.options)
        for i, p in enumerate(parameters):
            self.state[p].update(entries[i])
            if masters[i] is not None:
                self.state[p]["master_weight"] = masters[i]

    def _states(self) -> dict[Tensor, dict[str, Any]]:
        """Return the state of every parameter that has some, without what a user keeps there."""
        return {p: self.state[p] for p in self._parameters() if self.state.get(p)}

    def _follow_parameters(self) -> bool:
        """Drop the state of parameters that are no longer in any group; return whether there were any.

        Also recreate state that was never stepped and no longer fits its parameter.
        """
        parameters = unique(self._parameters())
        known = {id(p) for p in parameters}
        strangers = [key for key in self.state if isinstance(key, Tensor) and id(key) not in known]
        for key in strangers:
            del self.state[key]
        options = self._options_of(parameters)
        follow_parameters(parameters, self.state, self._state_names(), options, on_device=self._capturable())
        return bool(strangers)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the format of ``torch.optim``.

        State of parameters that are no longer in any group is dropped; parameters that took their places get new state.
        """
        with self._lock:
            if self._follow_parameters():
                self._prepared = None  # it holds the state of the parameters that were replaced
                fresh = [p for p in self._parameters() if p.requires_grad and not is_lazy(p) and not self.state.get(p)]
                self._init_state(unique(fresh))
        return super().state_dict()

    def widened_state_dict(self) -> dict[str, Any]:
        """Return the state with float32 moments and master weights, also where this optimizer keeps codes.

        ``torch.optim`` and optimizers with other formats load it.
        """
        saved = self.state_dict()
        stash = self.options.stash
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        parameters = self._parameters()
        newest = parameters if stash is None else stash.leaves(parameters)[stash.newest % stash.versions]
        of = dict(zip(keys, newest, strict=True))
        states = {key: widened_entries(entries, of[key]) for key, entries in saved["state"].items() if key in of}
        groups = [{k: v for k, v in group.items() if k != "state_dtype"} for group in saved["param_groups"]]
        return {**saved, "state": {**saved["state"], **states}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's or torch's ``state_dict``, keeping the dtype of state saved in float32 or bfloat16.

        ``torch.optim.Optimizer`` casts all state but ``step`` to the parameter's dtype, which would round the scalars
        and moments of low-precision parameters and make a resumed run differ. State of float64 parameters is cast.
        Moments are put in eight bits if this optimizer keeps them so; a group keeps its own ``state_dtype``.

        Raises:
            ValueError: the state is of other parameters or of another optimizer; nothing has been changed.
        """
        saved_state.check_form(state_dict)
        loaded: dict[str, Any] = {}

        def note(_: Optimizer, state: dict[str, Any]) -> None:  # runs after all hooks that may change the state
            needed = [key for key in self.defaults if key not in self._legacy]
            saved_state.check_fits(state, self.param_groups, needed, self._state_names(), self.options)
            loaded.update(state)

        formats = [group.get("state_dtype", _UNSET) for group in self.param_groups]
        with self._lock, torch.inference_mode(False):
            handle = self.register_load_state_dict_pre_hook(note)
            try:
                super().load_state_dict(state_dict)
            finally:
                handle.remove()
            for group, own in zip(self.param_groups, formats, strict=True):
                group.pop("state_dtype", None)
                if own is not _UNSET:
                    group["state_dtype"] = own
            saved_state.keep_dtypes(loaded, self._parameters(), self.state)
            states = self._states()
            for (p, entries), options in zip(states.items(), self._options_of(states), strict=True):
                saved_state.keep_formats(entries, p, options)
            (counts.to_devices if self._capturable() else counts.to_host)(states)
            counts.lay_side_by_side(states)
            self._prepared = None

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        if self.options.stash is not None:
            raise TypeError(
                "an optimizer with a WeightStash cannot be copied or pickled; save its state_dict() and the stash's"
            )
        kept = ("options", "backend", "fused", "_step_supports_amp_scaling")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = RLock()
        self._prepared = None
        self.state = self.__dict__["state"]
        for group in self.param_groups:
            for key, value in self._legacy.items():
                group.setdefault(key, value)
        counts.to_tensors(self._states())


def _forgets_plan(optimizer: weakref.ref[StatefulOptimizer]) -> Callable[[], None]:
    def forget() -> None:
        if (owner := optimizer()) is not None:
            owner._prepared = None

    return forget


def unique(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return each parameter once, in order: a group may have one several times, which torch warns about."""
    return list({id(p): p for p in parameters}.values())
