"""Loads the compiled extension, or says why it cannot be loaded."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch  # first: the process is to load torch's OpenMP runtime, not another one

_REBUILD = "`pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """The extension module ``nesterov_pp._C`` and None, or None and the reason why there is none."""
    try:
        built_with = importlib.import_module("nesterov_pp._built_with").TORCH
    except ImportError:
        return (
            None,
            f"nesterov_pp was imported without its compiled extension; build it with {_REBUILD}",
        )
    if _minor(built_with) != _minor(torch.__version__):
        return None, (
            f"nesterov_pp was built against torch {built_with}, but torch {torch.__version__} is running; "
            f"rebuild it with {_REBUILD}"
        )
    try:
        return importlib.import_module("nesterov_pp._C"), None
    except ImportError as error:
        return (
            None,
            f"the extension of nesterov_pp cannot be loaded ({error}); rebuild it with {_REBUILD}",
        )


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]
