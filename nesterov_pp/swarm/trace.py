"""The files of a swarm's run: its trace, its timeline, and the states of its stages."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.swarm.lineage import MalformedError, Update
from nesterov_pp.swarm.messages import RefusedError, decode_header, encode_header
from nesterov_pp.swarm.nests import pack, unpack

_LENGTHS = struct.Struct("<IQ")


@dataclass(frozen=True)
class Trace:
    """What a run was, what happened in it, and the updates of all stages, in the order in which they were reported."""

    run: dict[str, Any]
    updates: list[Update]
    events: list[dict[str, Any]]


class TraceFile:
    """A trace to append to: lines of JSON, for the run and for every update and event. Each is written at once."""

    def __init__(self, path: Path, run: Mapping[str, Any] | None) -> None:
        """Begin a trace of ``run``; with None, go on with the one that is there."""
        self._file = path.open("wb" if run is not None else "ab", buffering=0)
        if run is not None:
            self._write({"run": dict(run)})

    def update(self, update: Update) -> None:
        self._write({"update": update.to_json(), "t": time.time()})

    def event(self, **what: Any) -> None:
        self._write({"event": what})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def read_trace(path: Path) -> Trace:
    """Return a trace; an unfinished last line is left out.

    Raises:
        MalformedError: the file is not a trace.
        OSError: it cannot be read.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        rows = [json.loads(line) for line in lines]
        run = rows[0]["run"]
        updates = [Update.from_json(row["update"], int(run["stages"])) for row in rows if "update" in row]
        return Trace(run, updates, [row["event"] for row in rows if "event" in row])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise MalformedError(f"{path} is damaged or not the trace of a swarm ({error})") from None


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a stage's state, in the form in which it is sent; the file is replaced at once or not at all."""
    packed, tensors = pack(dict(state))
    parts = [t.contiguous() for t in tensors]
    header = encode_header({"kind": "state", "state": packed}, parts)
    body = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in parts if t.numel())
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(_LENGTHS.pack(len(header), len(body)) + header + body)
    temporary.replace(path)


def read_state(path: Path) -> dict[str, Any]:
    """Return a stage's state. Raises MalformedError."""
    content = path.read_bytes()
    try:
        length, size = _LENGTHS.unpack_from(content)
        start = _LENGTHS.size
        header, described = decode_header(content[start : start + length], size)
        tensors, offset = [], start + length
        for dtype, shape in described:
            tensor = torch.empty(shape, dtype=dtype)
            count = tensor.numel() * tensor.element_size()
            if count:
                source = torch.frombuffer(bytearray(content[offset : offset + count]), dtype=torch.uint8)
                tensor.reshape(-1).view(torch.uint8).copy_(source)
            tensors.append(tensor)
            offset += count
        state = unpack(header["state"], tensors)
    except (struct.error, RefusedError, KeyError, ValueError, RuntimeError) as error:
        raise MalformedError(f"{path} is damaged ({error})") from None
    if not isinstance(state, dict) or "version" not in state:
        raise MalformedError(f"{path} is not the state of a stage")
    return state


def weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the newest weights and the buffers of a stage's state, by name."""
    return {**state["stash"]["weights"][-1], **state["buffers"]}
