"""Finds the loop of a CUDA kernel that passes over the elements, in its machine code, and counts its instructions.

A multiprocessor issues one instruction a clock for each of its four schedulers, whatever the instruction does. What the
memory leaves of these slots while it moves the bytes of a parameter is the most that a step may take for one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# An H200: multiprocessors, schedulers, lanes of an instruction, clock under load; over the bytes that a copy moves.
SLOTS_PER_BYTE = 132 * 4 * 32 * 1.755e9 / 4.3e12

Code = list[tuple[int, str]]
"""Address and text of each instruction."""

_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*?0x([0-9a-f]+)")
_OPERATION = re.compile(r"^(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


class Loop(NamedTuple):
    """``instructions`` of one round but for those of slow ways, and the ``bytes`` that it loads."""

    instructions: int
    bytes: int


def code_of(listing: str) -> Code:
    """The instructions in what ``cuobjdump -sass`` prints of one function."""
    return [
        (int(address, 16), text.strip()) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", listing)
    ]


def operation(instruction: str) -> str:
    """``LDG.E.EF.128`` of ``@P0 LDG.E.EF.128 R4, desc[UR4][R2.64]``."""
    found = _OPERATION.match(instruction)
    return found.group(1) if found else ""


def main_loop(code: Code) -> Loop | None:
    """The loop that loads 16 bytes at a time and computes; the shorter one where it is there for the usual case too.

    What a branch jumps over that has a loop of its own inside is a slow way: CUDA's root and quotient, one by one, of
    numbers out of the ordinary.
    """
    loops = []
    for last, text in code:
        first = _target(text)
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


def _target(text: str) -> int | None:
    found = _BRANCH.search(text)
    return int(found.group(1), 16) if found else None


def _slow_ways(body: Code) -> list[tuple[int, int]]:
    """First and last address of each part of a loop that is jumped over and has a loop inside."""
    start, end = body[0][0], body[-1][0]
    jumps = [(address, target) for address, text in body[:-1] if (target := _target(text)) is not None]
    inner = [(target, address) for address, target in jumps if start < target <= address]
    found = []
    for first, last in inner:
        over = [(address, target) for address, target in jumps if address < first and last < target <= end]
        found.append((max(over)[0] + 1, max(over)[1] - 1) if over else (first, last))
    return found


def _bytes(text: str) -> int:
    """What an instruction loads of a tensor: such loads are marked as used once."""
    name = operation(text)
    if not name.startswith("LDG") or ".EF" not in name:
        return 0
    return 16 if ".128" in name else 8 if ".64" in name else 4


def _products(body: list[str]) -> int:
    return sum(operation(text).startswith(("FMUL", "DMUL")) for text in body)
