"""Builds ``nesterov_pp._C`` against the torch of the environment it will run in."""

from __future__ import annotations

import os
import shutil
import sys
from glob import glob
from pathlib import Path

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    sys.exit(
        "nesterov_pp builds against the torch it will run with, and this build environment has none: "
        "install torch first, then run `pip install --no-build-isolation .`"
    )
from setuptools import Extension, find_packages, setup

EXTENSION = "nesterov_pp._C"


def extension() -> Extension:
    flags = [
        "-O3",
        "-g0",
        "-fopenmp",
        "-ffp-contract=off",  # the same bits whatever instruction set the kernels are compiled for
        "-fno-math-errno",  # else sqrt is not vectorised
        "-Wall",
        "-Wextra",
    ]
    if os.environ.get("NPP_WERROR") == "1":
        flags.append("-Werror")
    ext = CppExtension(
        EXTENSION,
        sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp"), *glob("csrc/device/*.cpp")]),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        extra_link_args=["-fopenmp", "-s"],
    )
    # torch's headers as system headers, whose warnings are not ours.
    for folder in ext.include_dirs:
        flags += ["-isystem", folder]
    ext.include_dirs = []
    ext.extra_compile_args = {"cxx": flags}
    return ext


class Build(BuildExtension):
    """Also leaves a note of the torch built against, which nesterov_pp.kernels.extension reads."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # What an earlier build left here looks up to date even if it was built against another torch.
        self.force = True
        self.build_temp += f"/torch-{torch.__version__}"

    def run(self) -> None:
        if shutil.which(get_cxx_compiler()) is None:
            sys.exit(
                f"nesterov_pp needs a C++ compiler, and `{get_cxx_compiler()}` was not found: "
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
