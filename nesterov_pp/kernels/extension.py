"""The compiled extension, or the reason why it cannot be loaded."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch  # before the extension, so that the process loads torch's OpenMP runtime and no other

from nesterov_pp.kernels.plan import Tensors

_NAME = "nesterov_pp._C"
_NOTE = "_built_with_torch.txt"
_HOW = "with `pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """Return the extension module ``nesterov_pp._C`` and None, or None and the reason why it cannot be used.

    The extension is not opened if the running torch has another minor version than the one that the extension was built
    against, since C++ symbols change between minor versions.
    """
    file = _find()
    if file is None or not file.with_name(_NOTE).exists():
        package = _package().__path__[0]
        return None, f"nesterov_pp in {package} has no compiled extension for this Python; build it {_HOW}"
    built_with = file.with_name(_NOTE).read_text().strip()
    if _minor(built_with) != _minor(torch.__version__):
        return None, (
            f"nesterov_pp was built against torch {built_with}, but torch {torch.__version__} is running; "
            f"rebuild it {_HOW}"
        )
    try:
        return importlib.import_module(_NAME), None
    except ImportError as error:
        return None, f"{file} cannot be loaded ({error}); rebuild it {_HOW}"


def require() -> ModuleType:
    """Return the extension module.

    Raises:
        ValueError: the extension cannot be loaded.
    """
    module, reason = load()
    if module is None:
        raise ValueError(f"the compiled extension cannot be used: {reason}")
    return module


def tensors_of(module: ModuleType, tensors: Tensors) -> object:
    """Return the tensors of a plan in the form that the extension takes."""
    return module.Tensors(
        names=tensors.names,
        numbers=tensors.numbers,
        groups=tensors.groups,
        slots=tensors.slots,
        exp_avgs=tensors.exp_avgs,
        exp_avg_sqs=tensors.exp_avg_sqs,
        masters=tensors.masters,
        steps=tensors.steps,
        mu_products=tensors.mu_products,
        means=tensors.means,
        shadows=tensors.shadows,
        normaliser=int(tensors.normaliser),
        corrects=tensors.corrects,
        kind=int(tensors.kind),
        ring_predicts=tensors.ring_predicts,
        exp_avg_scales=tensors.exp_avg_scales,
        exp_avg_sq_scales=tensors.exp_avg_sq_scales,
        residuals=tensors.residuals,
        code_seed=tensors.code_seed,
    )


def _find() -> Path | None:
    package = _package()
    if PathFinder.find_spec(_NAME, package.__path__) is None:
        # Python was started in the source folder, which hides the installed package; use its extension.
        package.__path__ = pkgutil.extend_path(package.__path__, package.__name__)
    spec = PathFinder.find_spec(_NAME, package.__path__)
    return Path(spec.origin) if spec and spec.origin else None


def _package() -> ModuleType:
    return sys.modules["nesterov_pp"]


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
