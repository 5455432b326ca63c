"""Compile the CUDA sources for several architectures and count what the machine code does, without a GPU.

``python -m benchmarks.machine_code`` needs ``nvcc``, and ``cuobjdump`` from the toolkit or from Triton. The C++ around
the kernels is compiled against the headers of the installed torch, which need not have CUDA.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import corrected_steps
from benchmarks.gpu_check import toolkit
from benchmarks.main_loop import SLOTS_PER_BYTE, code_of, main_loop, operation

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
PAGE = ROOT / "docs" / "kernels.md"
ARCHITECTURES = (80, 90, 100)
MOST_STOCHASTIC = 0.7
MOST_SMALL = {"8-bit moments, stochastic": 1.45, "8-bit": 1.2, "stochastic": 0.78, "24-bit": 0.6}
"""The same of steps in small formats: that of the first key that is in a step's name."""
DTYPES = {
    "float": "float32",
    "double": "float64",
    "BFloat16": "bfloat16",
    "Half": "float16",
    "Split": "24-bit",
    "Code": "8-bit",
}
BYTES = {"float": 4, "double": 8, "BFloat16": 2, "Half": 2, "Split": 3, "Code": 1}  # the scales of codes are apart
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "24-bit": 2}  # as `_wide` counts, without residuals
SCALES = 2 * 2 / 32  # bytes a parameter that are read and written for the scales of a moment
FORMS = ("step, no second moment", "step", "step, sign", "corrected step")  # in the order of Form in csrc/spec.h


class MissingToolError(RuntimeError):
    """The error raised if a required program is not on the machine."""


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code for one architecture."""

    architecture: int
    name: str
    registers: int
    stack: int  # bytes
    instructions: int
    loads_128: int
    stores_128: int
    spills: int  # loads and stores of local memory
    loop: float = 0.0  # instructions of the main loop per parameter; 0 for kernels that are not steps
    moved: float = 0.0  # bytes that a step reads and writes per parameter

    @property
    def share(self) -> float:
        """The share of the issue slots that the main loop uses at the memory speed of an H200; 0 if not a step."""
        return self.loop / (SLOTS_PER_BYTE * self.moved) if self.moved else 0.0


def nvcc() -> tuple[Path, Path]:
    """Return the compiler and the folder of its headers."""
    home = toolkit(os.environ)
    if home is None:
        raise MissingToolError(
            "the CUDA sources need nvcc, but no CUDA toolkit was found; set CUDA_HOME or put nvcc on the PATH"
        )
    return home / "bin" / "nvcc", home / "include"


def cuobjdump() -> Path:
    """Return the ``cuobjdump`` on the PATH, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.exists():
            return bundled
    raise MissingToolError("reading machine code needs cuobjdump; install the CUDA toolkit or Triton")


def compile_kernels(folder: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Path]:
    """Compile every .cu file to an object file with machine code for all architectures; warnings are errors."""
    compiler, _ = nvcc()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-Wall,-Wextra", "-Werror", "all-warnings"]
    sources = sorted(SOURCES.glob("cuda/*.cu"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor() as pool:
        commands = [
            [compiler, *flags, "-Xptxas", "-warn-spills", *targets, "-c", source, "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
    return objects


def corrected_uses(folder: Path) -> list[corrected_steps.Use]:
    """Count the instructions of each kind of correction, on an H200's architecture."""
    compiler, _ = nvcc()
    made = folder / "corrected_steps.cubin"
    flags = ["-std=c++17", "-O3", "--fmad=false", "-I", SOURCES, "-arch=sm_90", "-cubin"]
    _run([compiler, *flags, corrected_steps.write_source(folder), "-o", made])
    return corrected_steps.uses_in(_run([cuobjdump(), "-sass", made]))


def check_host_code(folder: Path) -> None:
    """Check that the C++ that launches the kernels compiles against torch's headers."""
    import torch

    _, cuda_headers = nvcc()
    headers = Path(torch.__file__).parent / "include"
    # A torch without CUDA lacks this one generated header.
    stub = folder / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    folders = [cuda_headers, headers, headers / "torch/csrc/api/include", sysconfig.get_paths()["include"], folder]
    system = [argument for folder in folders for argument in ("-isystem", folder)]
    standard = "-std=c++20" if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12) else "-std=c++17"
    flags = [standard, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DNPP_CUDA", "-DTORCH_EXTENSION_NAME=_C"]
    for source in [*sorted(SOURCES.glob("cuda/*.cpp")), SOURCES / "torch" / "bindings.cpp"]:
        _run([*shlex.split(os.environ.get("CXX", "c++")), *flags, *system, source])


def kernels_of(objects: list[Path], architectures: tuple[int, ...] = ARCHITECTURES) -> list[Kernel]:
    """Return the kernels in the object files."""
    tool = cuobjdump()
    found = []
    for file in objects:
        for architecture in architectures:
            only = ["-arch", f"sm_{architecture}"]
            usage = _run([tool, "-res-usage", *only, file])
            resources = {
                mangled: (int(registers), int(stack))
                for mangled, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
            }
            listing = _run([tool, "-sass", *only, file])
            for part in listing.split("Function : ")[1:]:
                mangled = part.split(maxsplit=1)[0]
                registers, stack = resources[mangled]
                code = code_of(part)
                operations = [name for _, text in code if (name := operation(text))]
                name, streams = described(mangled)
                loop = main_loop(code) if streams is not None else None
                found.append(
                    Kernel(
                        architecture,
                        name,
                        registers,
                        stack,
                        len(operations),
                        sum(o.startswith("LDG") and ".128" in o for o in operations),
                        sum(o.startswith("STG") and ".128" in o for o in operations),
                        sum(o.startswith(("LDL", "STL")) for o in operations),
                        loop.instructions * streams.read / loop.bytes if loop and streams else 0.0,
                        streams.moved if streams else 0.0,
                    )
                )
    return sorted(found, key=lambda k: (k.name, k.architecture))


class Streams(NamedTuple):
    """The bytes that a step reads and writes per parameter."""

    read: int
    written: int
    scales: float = 0.0  # read and written beside these, by one thread for others

    @property
    def moved(self) -> float:
        return self.read + self.written + self.scales


def described(mangled: str) -> tuple[str, Streams | None]:
    """Return the kernel's name with its dtypes, and the bytes that a step moves.

    An example of a name is "step: float32 weights, bfloat16 gradients, float32 moments".
    """
    name = _run(["c++filt", mangled]).replace("nesterov_pp::", "").strip()
    step = re.search(r"Pass<(\w+), (\w+), (\w+), \(Form\)(\d), (true|false)>", name)
    if step is None:
        reduction = re.search(r"(\w+)_kernel(?:<(\w+)>)?", name)
        kind, dtype = reduction.groups() if reduction else (name, None)
        return (kind if dtype is None else f"{kind}: {DTYPES[dtype]}"), None
    weight, grad, moment = (DTYPES[t] for t in step.groups()[:3])
    shown = weight if weight == grad == moment else f"{weight} weights, {grad} gradients, {moment} moments"
    rounding = ", stochastic rounding" if step.group(5) == "true" else ""
    form = FORMS[int(step.group(4))]
    w, g, m = (BYTES[t] for t in step.groups()[:3])
    second, corrects = form in ("step", "corrected step"), form == "corrected step"
    moments = m * (1 + second + corrects)
    read = w + g + moments + g * corrects  # w, g and moments; with a correction the late weights and the running mean
    copies = weight != grad and step.group(1) != "Split"  # masters
    written = w + moments + g * corrects + g * copies
    scales = SCALES * (1 + second) if step.group(3) == "Code" else 0.0
    return f"{form}: {shown}{rounding}", Streams(read, written, scales)


def most_share(name: str) -> float:
    """Return the largest share of an H200's issue slots that a step may use; corrected steps have no limit."""
    if name.startswith("corrected") or "step" not in name:
        return float("inf")
    if "8-bit" in name or "24-bit" in name:
        return 0.75 if "float32 weights" in name else next(most for key, most in MOST_SMALL.items() if key in name)
    if "stochastic" in name:
        return MOST_STOCHASTIC
    return 0.25 if name == "step: float32" else 0.5


def problems(kernels: list[Kernel]) -> list[str]:
    """Return a sentence for each problem of a pass.

    Problems are spilled registers, more registers than the blocks of a multiprocessor can have, narrow loads and
    stores, and more instructions than the memory leaves time for.
    """
    found = []
    for kernel in kernels:
        most = _most_registers(kernel.name)
        loads, stores = _wide(kernel.name)
        wrong = {
            f"spills registers ({kernel.spills} times)": kernel.spills > 0,
            f"keeps {kernel.stack} bytes on the stack": kernel.stack > 0,
            f"takes {kernel.registers} registers of {most}": kernel.registers > most,
            f"loads 128 bits {kernel.loads_128} times instead of {loads} or more": kernel.loads_128 < loads,
            f"stores 128 bits {kernel.stores_128} times instead of {stores} or more": kernel.stores_128 < stores,
            f"takes {kernel.share:.1%} of the issue slots": kernel.architecture == 90
            and kernel.share > most_share(kernel.name),
        }
        found += [f"{kernel.name} on sm_{kernel.architecture} {what}" for what, is_so in wrong.items() if is_so]
    return found


def _wide(name: str) -> tuple[int, int]:
    """Return how many loads and how many stores of 128 bits a pass has.

    A thread takes 128 bits of the widest dtype, and so fewer of the others. A plain step has its loop twice, and every
    step copies the weights without a gradient.
    """
    if "step" not in name:
        return int(name.startswith("squares")), 0
    if "8-bit" in name:
        return 2, 1  # codes are read and written 64 bits at a time
    form, _, dtypes = name.partition(": ")
    named = re.findall(r"(\S+) (?:weights|gradients|moments)", dtypes)
    w, g, m = (SIZES[dtype] for dtype in named or [dtypes.partition(",")[0]] * 3)
    corrects = form.startswith("corrected")
    moments = [m] * (1 + (form in ("step", "corrected step")) + corrects)
    read = [w, g, *moments, *[g] * corrects]  # a correction also reads the late weights and a running mean
    written = [w, *moments, *[g] * corrects]  # and writes the predicted weights
    loops = 1 if corrects else 2
    loads, stores = (loops * sum(size == max(w, m) for size in sizes) + 1 for sizes in (read, written))
    return loads, stores


def _most_registers(name: str) -> int:
    """Return how many registers leave a multiprocessor the blocks that csrc/cuda/step.h asks for: 2, 3 or 4."""
    if "step" not in name or "8-bit" in name:
        return 64
    if "float64" in name:
        return 128
    return 80 if re.search("corrected|stochastic|float16", name.replace("bfloat16", "")) else 64


def table(kernels: list[Kernel]) -> str:
    """Return a table with one row per kernel, with the numbers of all architectures."""
    architectures = sorted({k.architecture for k in kernels})
    lines = [
        "| kernel | "
        + " | ".join(f"sm_{a}: registers, instructions" for a in architectures)
        + " | 128-bit loads, stores | a parameter (sm_90) | share |",
        "|---|" + "--:|" * (len(architectures) + 3),
    ]
    for name in dict.fromkeys(k.name for k in kernels):
        rows = {k.architecture: k for k in kernels if k.name == name}
        last = rows[architectures[-1]]
        cells = [f"{rows[a].registers}, {rows[a].instructions}" for a in architectures]
        measured = rows.get(90, last)
        counted = measured.moved > 0 and not name.startswith("corrected")
        slots = f"{measured.loop:.1f} | {measured.share:.0%}" if counted else " | "
        lines.append(f"| {name} | {' | '.join(cells)} | {last.loads_128}, {last.stores_128} | {slots} |")
    return "\n".join(lines)


def _run(command: list[object]) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`{shlex.join(map(str, command))}` failed:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"also write the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            check_host_code(Path(folder))
            found = kernels_of(compile_kernels(Path(folder)))
            uses = corrected_uses(Path(folder))
    except MissingToolError as reason:
        print(reason, file=sys.stderr)
        return 1
    tables = f"{table(found)}\n\n{corrected_steps.table(uses)}"
    print(tables)
    if options.write:
        text = PAGE.read_text()
        start, end = "<!-- machine code -->\n", "<!-- /machine code -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        PAGE.write_text(before + start + tables + "\n" + end + after)
    wrong = problems(found) + corrected_steps.problems(uses)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
