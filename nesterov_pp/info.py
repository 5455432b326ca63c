"""Installed versions, the machine, and the backends that can be used here: the start of a bug report."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

import torch

import nesterov_pp
from nesterov_pp.kernels import automatic_backend, available_backends, describe_backend, extension


def info() -> str:
    """Return versions, machine, backends (with the reason where one cannot be used), and the choice of ``"auto"``."""
    module, _ = extension.load()
    found = gpus()
    versions = {
        "nesterov_pp": nesterov_pp.__version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": _version("triton"),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores",
        "GPUs": ", ".join(found) or "none",
        "compiled extension": str(module.__file__) if module is not None else "none",
        "instruction set": f"{module.isa()} (of {', '.join(module.isas())})" if module is not None else "none",
    }
    lines = [f"{name:<20}{value}" for name, value in versions.items()]
    lines += ["", "Backends of the optimizer step:"]
    for name, reason in available_backends().items():
        lines.append(f"  {name:<11}{'yes' if reason is None else 'no':<5}{reason or describe_backend(name)}")
    takes = {"the CPU": automatic_backend("cpu")} | ({"a GPU": automatic_backend("cuda")} if found else {})
    lines.append('backend="auto" selects ' + ", ".join(f"{name} on {where}" for where, name in takes.items()))
    return "\n".join(lines)


def gpus() -> list[str]:
    """Return the name, compute capability and memory of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)" for gpu in found]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
