"""Find the loop over the elements in the machine code of a CUDA kernel, and count its instructions.

A multiprocessor issues one instruction per clock for each of its four schedulers, whatever the instruction does. The
issue slots that pass while the memory moves the bytes of a parameter are the most that a step may use for it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# For an H200: multiprocessors, schedulers, lanes per instruction, clock under load; over a copy's bytes per second.
SLOTS_PER_BYTE = 132 * 4 * 32 * 1.755e9 / 4.3e12

Code = list[tuple[int, str]]
"""The address and text of each instruction."""

_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*?0x([0-9a-f]+)")
_OPERATION = re.compile(r"^(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


class Loop(NamedTuple):
    """One iteration of a loop: its ``instructions`` outside slow paths, and the ``bytes`` that it loads."""

    instructions: int
    bytes: int


def code_of(listing: str) -> Code:
    """Return the instructions in the output of ``cuobjdump -sass`` for one function."""
    return [
        (int(address, 16), text.strip()) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", listing)
    ]


def operation(instruction: str) -> str:
    """Return the operation of an instruction: ``LDG.E.EF.128`` of ``@P0 LDG.E.EF.128 R4, desc[UR4][R2.64]``."""
    found = _OPERATION.match(instruction)
    return found.group(1) if found else ""


def main_loop(code: Code) -> Loop | None:
    """Return the loop that loads 16 bytes at a time and computes; the shorter one if the usual case has its own.

    Code that a branch jumps over and that contains a loop is a slow path: CUDA's square root and division of unusual
    numbers, one by one.
    """
    loops = []
    for last, text in code:
        first = branch_target(text)
        if first is None or first > last:
            continue
        whole = [(address, text) for address, text in code if first <= address <= last]
        slow = _slow_ways(whole)
        usual = [text for address, text in whole if not any(a <= address <= b for a, b in slow)]
        loops.append([text for text in usual if operation(text)])
    wide = [body for body in loops if any(_bytes(text) == 16 for text in body)]
    most = max((_products(body) for body in wide), default=0)
    if most == 0:
        return None
    shortest = min((body for body in wide if _products(body) > 0.7 * most), key=len)
    return Loop(len(shortest), sum(map(_bytes, shortest)))


def branch_target(text: str) -> int | None:
    """Return the address that an instruction branches to, or None if it is no branch."""
    found = _BRANCH.search(text)
    return int(found.group(1), 16) if found else None


def _slow_ways(body: Code) -> list[tuple[int, int]]:
    """Return the first and last address of each part of a loop that a branch jumps over and that contains a loop."""
    start, end = body[0][0], body[-1][0]
    jumps = [(address, target) for address, text in body[:-1] if (target := branch_target(text)) is not None]
    inner = [(target, address) for address, target in jumps if start < target <= address]
    found = []
    for first, last in inner:
        over = [(address, target) for address, target in jumps if address < first and last < target <= end]
        found.append((max(over)[0] + 1, max(over)[1] - 1) if over else (first, last))
    return found


def _bytes(text: str) -> int:
    """Return the bytes of a tensor that an instruction loads: such loads are marked as used once."""
    name = operation(text)
    if not name.startswith("LDG") or ".EF" not in name:
        return 0
    return 16 if ".128" in name else 8 if ".64" in name else 4


def _products(body: list[str]) -> int:
    return sum(operation(text).startswith(("FMUL", "DMUL")) for text in body)
