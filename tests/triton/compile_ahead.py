"""Compile every Triton kernel ahead of time for a compute capability, and print counts from the machine code.

``python compile_ahead.py 90`` prints a JSON list: name, registers, spilled bytes, counts of loads and stores by width,
additions fused with multiplications, and instructions of the usual loop per parameter. No GPU is needed.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.main_loop import Code, branch_target, code_of, operation
from nesterov_pp.kernels import triton_package

plans, launches = triton_package.imported("plan"), triton_package.imported("differences")
kernels = plans.kernels
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
F32, F64, BF16, F16, CODE = tl.float32, tl.float64, tl.bfloat16, tl.float16, tl.int8
# Name, dtypes of weights, gradients and moments, normaliser, kind of correction or None, stochastic rounding.
NONE, RMS, SIGN = 0, 1, 2
STEPS = [
    ("float32", F32, F32, F32, RMS, None, False),
    ("float32, no second moment", F32, F32, F32, NONE, None, False),
    ("float32, sign", F32, F32, F32, SIGN, None, False),
    ("float32, bfloat16 moments", F32, F32, BF16, RMS, None, False),
    ("float64", F64, F64, F64, RMS, None, False),
    ("bfloat16", BF16, BF16, BF16, RMS, None, False),
    ("bfloat16, rounded stochastically", BF16, BF16, BF16, RMS, None, True),
    ("bfloat16, float32 moments", BF16, BF16, F32, RMS, None, False),
    ("float16", F16, F16, F16, RMS, None, False),
    ("float32 masters of bfloat16", F32, BF16, F32, RMS, None, False),
    ("corrected: predicted alone", F32, F32, F32, RMS, 0, False),
    ("corrected: gap", F32, F32, F32, RMS, 3, False),
    ("corrected: gap, float64", F64, F64, F64, RMS, 3, False),
    ("corrected: gap, bfloat16, float32 moments", BF16, BF16, F32, RMS, 3, False),
    ("corrected: gap, float32 masters of bfloat16", F32, BF16, F32, RMS, 3, False),
    ("corrected: gap, bfloat16, rounded stochastically", BF16, BF16, BF16, RMS, 3, True),
]
# Name, dtypes, normaliser, whether weights have 24 bits, stochastic rounding.
SMALL = [
    ("8 bits: float32", F32, F32, CODE, RMS, False, False),
    ("8 bits: float32, no second moment", F32, F32, CODE, NONE, False, False),
    ("8 bits: float32, sign", F32, F32, CODE, SIGN, False, False),
    ("8 bits: bfloat16", BF16, BF16, CODE, RMS, False, False),
    ("8 bits: bfloat16, rounded stochastically", BF16, BF16, CODE, RMS, False, True),
    ("8 bits: float32 masters of bfloat16", F32, BF16, CODE, RMS, False, False),
    ("8 and 24 bits", BF16, BF16, CODE, RMS, True, False),
    ("24 bits", BF16, BF16, F32, RMS, True, False),
    ("24 bits, bfloat16 moments", BF16, BF16, BF16, RMS, True, False),
]
COUNTED = re.compile(r"\b((?:LDG|STG|LDL|STL)[.A-Z0-9]*)")


def compiled(fn, signature: dict[str, str], constants: dict[str, object], capability: int, shape: Any):
    source = ASTSource(
        fn=fn,
        signature={name: signature.get(name, "constexpr") for name in fn.arg_names},
        constexprs=constants,
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": shape.warps, "maxnreg": shape.registers, "enable_fp_fusion": False},
    )


def described(name: str, kernel, threads: int, block: int) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
        listing = subprocess.run(
            [TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    counts = collections.Counter(COUNTED.findall(sass))
    return {
        "name": name,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "loads_128": sum(n for op, n in counts.items() if op.startswith("LDG") and ".128" in op),
        "stores_128": sum(n for op, n in counts.items() if op.startswith("STG") and ".128" in op),
        "spills": sum(n for op, n in counts.items() if op[:3] in ("LDL", "STL")),
        "fused": kernel.asm["ptx"].count("fma.") + kernel.asm["ptx"].count("fma.rn.f32x2"),
        "loop": usual_loop(listing) * threads / block,
    }


def usual_loop(listing: str) -> int:
    """Return the instructions of an iteration of the shortest loop that loads 128 bits at a time; 0 if there is none.

    The shortest has no L2 term. Its instructions are the fewest that an iteration can take: those of the fast ways of
    roots and quotients.
    """
    code = code_of(listing)
    lengths = []
    for last, text in code:
        first = branch_target(text)
        if first is not None and first <= last:
            body = [(address, t) for address, t in code if first <= address <= last and operation(t)]
            if any(operation(t).startswith("LDG") and ".128" in t for _, t in body):
                lengths.append(fewest(body))
    return min(lengths, default=0)


def fewest(body: Code) -> int:
    """Return the number of instructions on the shortest way through code without loops."""
    left: dict[int, int] = {}
    after = 0
    for address, text in reversed(body):
        further = left.get(branch_target(text), after)
        after = left[address] = 1 + (min(after, further) if text.startswith("@") else further)
    return after


def differences(capability: int) -> list[dict[str, object]]:
    """Compile the kernels of differences. Their rows of scales begin at multiples of 4 bytes."""
    shape, found = plans.Shape(launches.BLOCK, launches.WARPS), []
    signature = dict.fromkeys(("table", "chunks"), "*i64") | {"codes": "*i8", "scales": "*bf16"}
    of_decode = signature | {"numbers": "*i64", "rows": "i32", "length": "i32"}
    for name, dtype in (("float32", F32), ("float16", F16)):
        constants = {"S": dtype, "BLOCK": shape.block}
        for kind, kernel, types in (
            ("encode", launches.kernels.encode_kernel, signature),
            ("decode", launches.kernels.decode_kernel, of_decode),
        ):
            code = compiled(kernel, types, constants, capability, shape)
            found.append(described(f"{kind} differences: {name}", code, 32 * shape.warps, shape.block))
    return found


def main(capability: int) -> list[dict[str, object]]:
    found = []
    steps = [(*step[:5], False, *step[5:]) for step in STEPS] + [(*step[:6], None, step[6]) for step in SMALL]
    for name, weight, grad, moment, normaliser, split, kind, stochastic in steps:
        shape = plans.shape_of(weight, moment, kind is not None)
        constants = {
            "W": weight,
            "G": grad,
            "M": moment,
            "T": F64 if weight == F64 else F32,
            "SPLIT": split,
            "NORMALISER": normaliser,
            "CORRECTS": kind is not None,
            "KIND": kind or 0,
            "RING_PREDICTS": kind is not None,
            "STOCHASTIC": stochastic,
            "SCALED": True,
            "BLOCK": shape.block,
        }
        signature = dict.fromkeys(("table", "chunks"), "*i64")
        signature |= {"rows": "*fp64", "factor": "*fp64"}
        signature |= dict.fromkeys(("tensors", "grads", "source", "target"), "i32") | {"key0": "u32", "key1": "u32"}
        kernel = compiled(kernels.step_kernel, signature, constants, capability, shape)
        found.append(described(name, kernel, 32 * shape.warps, shape.block))
    found += differences(capability)
    signature = {"table": "*i64", "chunks": "*i64", "partials": "*fp64", "tensors": "i32"}
    constants = {"G": F32, "T": F32, "BLOCK": plans.SQUARES.block}
    kernel = compiled(kernels.squares_kernel, signature, constants, capability, plans.SQUARES)
    found.append(described("squares", kernel, 32 * plans.SQUARES.warps, plans.SQUARES.block))
    signature = dict.fromkeys(("partials", "scale", "limit", "result"), "*fp64") | {
        "count": "i32",
        "grad_scale": "*fp32",
    }
    constants = {"UNSCALES": True, "BLOCK": 1024}
    kernel = compiled(kernels.scaling_kernel, signature, constants, capability, plans.Shape(1024, 4))
    found.append(described("scaling", kernel, 128, 1024))
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
