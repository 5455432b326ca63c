"""Build ``nesterov_pp._C`` against the torch of the environment it will run in, with CUDA if there is a toolkit.

Environment variables: ``NPP_CUDA=0`` leaves CUDA out, and ``NPP_CUDA=1`` fails if CUDA cannot be built;
``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST`` and ``CXX`` work as in torch; ``NPP_WERROR=1`` turns warnings into errors.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

try:
    import torch
except ImportError:
    sys.exit(
        "nesterov_pp builds against the torch it will run with, but this build environment has none: "
        "install torch first, then run `pip install --no-build-isolation .`"
    )
from setuptools import Extension, find_packages, setup

EXTENSION = "nesterov_pp._C"


def toolkits() -> list[Path]:
    """Return the folders of CUDA toolkits. The ``nvcc`` on the PATH may be a script that calls another one."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        top = re.search(r"TOP=(\S+)", plan.stderr + plan.stdout)
        candidates += [top.group(1) if top else None, str(Path(nvcc).resolve().parents[1])]
    candidates += ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True)]
    folders = dict.fromkeys(Path(folder).resolve() for folder in candidates if folder)
    return [f for f in folders if (f / "include" / "cuda_runtime.h").exists() and (f / "bin" / "nvcc").exists()]


def release(home: Path) -> tuple[int, int]:
    """Return the major and minor version of a toolkit."""
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def cuda() -> Path | None:
    """Return the toolkit to build the CUDA kernels with, or print why they are left out and return None."""
    wanted, built_with = os.environ.get("NPP_CUDA", ""), torch.version.cuda
    if wanted == "0":
        why = "NPP_CUDA=0"
    elif built_with is None:
        why = f"torch {torch.__version__} has no CUDA"
    else:
        found = {home: release(home) for home in toolkits()}
        fitting = [home for home, version in found.items() if version[0] == int(built_with.split(".")[0])]
        if fitting:
            return fitting[0]
        why = "no CUDA toolkit was found (CUDA_HOME, nvcc)"
        if found:
            home, (major, minor) = next(iter(found.items()))
            why = f"torch {torch.__version__} has CUDA {built_with}, but the toolkit in {home} is {major}.{minor}"
    if wanted == "1":
        sys.exit(f"nesterov_pp cannot be built with CUDA, as NPP_CUDA=1 asks: {why}")
    print(f"nesterov_pp is built without CUDA kernels: {why}", file=sys.stderr)
    return None


def architectures(home: Path) -> str:
    """Return the targets if no GPU is visible: one of each generation, and PTX that newer ones can compile."""
    return "8.0;9.0;10.0+PTX" if release(home) >= (12, 8) else "8.0;9.0+PTX"


CUDA = cuda()
if CUDA is not None:
    os.environ["CUDA_HOME"] = str(CUDA)  # read when torch.utils.cpp_extension is imported
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(CUDA)

from torch.utils.cpp_extension import (  # noqa: E402
    BuildExtension,
    CppExtension,
    CUDAExtension,
    get_cxx_compiler,
)


def extension() -> Extension:
    flags = [
        "-O3",
        "-g0",
        "-fopenmp",
        "-ffp-contract=off",  # the same bits for every instruction set of the kernels
        "-fno-math-errno",  # else sqrt is not vectorised
        "-Wall",
        "-Wextra",
    ]
    cuda_flags = ["-O3", "--fmad=false"]  # for the same bits as on the CPU
    if os.environ.get("NPP_WERROR") == "1":
        flags.append("-Werror")
        cuda_flags += ["-Werror", "all-warnings"]
    sources = [file for folder in ("plan", "cpu", "device", "torch") for file in glob(f"csrc/{folder}/*.cpp")]
    if CUDA is not None:
        sources += [*glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]
        flags.append("-DNPP_CUDA")
    ext = (CppExtension if CUDA is None else CUDAExtension)(
        EXTENSION,
        sorted(sources),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        extra_link_args=["-fopenmp", "-s"],
    )
    # Include torch's headers as system headers, to suppress their warnings.
    for folder in ext.include_dirs:
        flags += ["-isystem", folder]
        cuda_flags += ["-isystem", folder]
    ext.include_dirs = []
    ext.extra_compile_args = {"cxx": flags, "nvcc": cuda_flags}
    return ext


class Build(BuildExtension):
    """The build, which also records the torch version built against, for ``nesterov_pp.kernels.extension``."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # The files of an earlier build look up to date even if they were built against another torch.
        self.force = True
        self.build_temp += f"/torch-{torch.__version__}"

    def run(self) -> None:
        if shutil.which(get_cxx_compiler()) is None:
            sys.exit(
                f"nesterov_pp needs a C++ compiler, but `{get_cxx_compiler()}` was not found: "
                "install g++, or name a compiler in the environment variable CXX"
            )
        super().run()
        note = Path(self.get_ext_fullpath(EXTENSION)).with_name("_built_with_torch.txt")
        note.write_text(torch.__version__ + "\n")


setup(
    packages=[*find_packages(include=["nesterov_pp", "nesterov_pp.*"]), "nesterov_pp.triton_kernels"],
    package_dir={"nesterov_pp.triton_kernels": "triton_kernels"},
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
)
