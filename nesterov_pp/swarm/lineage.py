"""Versions of a stage's weights, named by how they came about, and the updates that lead from one to the next.

A version is named ``number:digest``; the digest is that of the update that made it, which contains the name of its
parent. The versions of a stage form a tree: usually a line, with a branch where workers died between an update and the
next, or where a stage went on from a checkpoint. A name stands for one set of weights, whoever holds them.

An update says which gradients it was made of, and each gradient says all that it depends on: its microbatch, the
version that every stage ran its forward with, and for this and every later stage the version whose graph the backward
went through and the version at which it differentiated. So the updates of a run are its whole trace.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ROOT = "0:0000000000000000"
"""The name of the initial weights of every stage."""

_VERSION = re.compile(r"(0|[1-9][0-9]{0,11}):[0-9a-f]{16}")
_WORKER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST_CONTRIBUTIONS = 100_000


class MalformedError(ValueError):
    """A record of a trace, or one that arrived, does not have the form that it should have."""


def number_of(version: str) -> int:
    """Return the number of updates that led to a version."""
    return int(version.partition(":")[0])


def is_version(name: object) -> bool:
    return isinstance(name, str) and _VERSION.fullmatch(name) is not None


def is_worker(name: object) -> bool:
    return isinstance(name, str) and _WORKER.fullmatch(name) is not None


def is_count(value: object, below: int = 1 << 40) -> bool:
    return type(value) is int and 0 <= value < below


@dataclass(frozen=True)
class Contribution:
    """A microbatch's gradient on a stage.

    Attributes:
        microbatch: its number, from 0.
        forward: the versions that its forward ran with, on every stage of the pipeline.
        backward: for this stage and every later one, the version of the graph that its backward went through, and the
            version at which it differentiated.
        loss: the loss, as ``float.hex``.
    """

    microbatch: int
    forward: tuple[str, ...]
    backward: tuple[tuple[str, str], ...]
    loss: str

    def to_json(self) -> dict[str, Any]:
        return {"m": self.microbatch, "f": self.forward, "b": self.backward, "loss": self.loss}

    @classmethod
    def from_json(cls, found: object, stages: int, stage: int) -> Contribution:
        """Return the contribution of a stage (from 0). Raises MalformedError."""
        match found:
            case {"m": int(m), "f": [*forward], "b": [*backward], "loss": str(loss)} if is_count(m):
                pairs = [tuple(p) for p in backward if isinstance(p, list | tuple) and len(p) == 2]
                names = [*forward, *(name for pair in pairs for name in pair)]
                if (
                    (len(forward), len(backward), len(pairs)) == (stages, stages - stage, stages - stage)
                    and all(map(is_version, names))
                    and is_loss(loss)
                ):
                    return cls(m, tuple(forward), tuple((a, b) for a, b in pairs), loss)
        raise MalformedError(f"a malformed gradient of stage {stage}")


def is_loss(text: object) -> bool:
    if not isinstance(text, str) or len(text) > 40:
        return False
    try:
        float.fromhex(text)
    except (ValueError, OverflowError):
        return False
    return True


@dataclass(frozen=True)
class Update:
    """A step of a stage (from 0): from ``parent``, with the mean of all gradients of ``bundles``.

    Each bundle is the sum of a worker's gradients, added up in this order; the bundles are added up in this order, and
    the sum is divided by the number of gradients.
    """

    stage: int
    parent: str
    workers: tuple[str, ...]
    bundles: tuple[tuple[Contribution, ...], ...]

    @property
    def number(self) -> int:
        return number_of(self.parent)

    @property
    def contributions(self) -> list[Contribution]:
        return [one for bundle in self.bundles for one in bundle]

    @property
    def delay(self) -> int:
        """How many updates the graph of the oldest gradient is behind."""
        return max(self.number - number_of(one.backward[0][0]) for one in self.contributions)

    @cached_property
    def name(self) -> str:
        """The name of the version that this update makes."""
        content = json.dumps(self._content(), separators=(",", ":"), sort_keys=True).encode()
        return f"{self.number + 1}:{hashlib.sha256(content).hexdigest()[:16]}"

    def _content(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "parent": self.parent,
            "workers": self.workers,
            "bundles": [[one.to_json() for one in bundle] for bundle in self.bundles],
        }

    def to_json(self) -> dict[str, Any]:
        return {**self._content(), "version": self.name}

    @classmethod
    def from_json(cls, found: Mapping[str, Any], stages: int) -> Update:
        """Raises MalformedError, also if the update does not have the name that it is said to have."""
        match found:
            case {
                "stage": int(s),
                "parent": str(parent),
                "workers": [*workers],
                "bundles": [*bundles],
                "version": name,
            }:
                if not is_count(s, stages) or not is_version(parent) or not all(map(is_worker, workers)):
                    raise MalformedError("an update of no stage, parent or worker")
                if not bundles or len(bundles) != len(workers) or not all(isinstance(b, list) and b for b in bundles):
                    raise MalformedError("an update without gradients")
                if sum(map(len, bundles)) > MOST_CONTRIBUTIONS:
                    raise MalformedError("an update of too many gradients")
                parts = tuple(tuple(Contribution.from_json(one, stages, s) for one in bundle) for bundle in bundles)
                update = cls(s, parent, tuple(workers), parts)
                if update.name == name:
                    return update
                raise MalformedError(f"an update that makes {update.name}, not {name}")
        raise MalformedError("a malformed update")
