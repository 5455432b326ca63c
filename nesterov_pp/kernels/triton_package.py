"""The Triton kernels, which are a package of their own: Triton may be missing, or not work."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_NAME = "nesterov_pp.triton_kernels"


def imported(name: str) -> ModuleType:
    """Return a module of ``nesterov_pp.triton_kernels``, even if nesterov_pp runs uninstalled from its source tree.

    Raises:
        ImportError: Triton is not installed, or does not work.
    """
    source = Path(__file__).resolve().parents[2] / "triton_kernels"
    if importlib.util.find_spec(_NAME) is None and source.is_dir():
        spec = importlib.util.spec_from_file_location(
            _NAME, source / "__init__.py", submodule_search_locations=[str(source)]
        )
        assert spec is not None
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{_NAME}.{name}")
