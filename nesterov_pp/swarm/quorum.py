"""All names of torchft that a swarm uses: its lighthouse, which says who takes part in an update.

torchft calls these names its low-level interface and may change them, so they are in this module only, and its version
is pinned. The lighthouse is asked for a quorum before every update. What is averaged goes over the swarm's own
messages: torchft's ``Manager`` would send it unauthenticated and, to a worker that joins, pickled.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from typing import NamedTuple

# Before torchft is imported: its lighthouse logs every quorum.
os.environ.setdefault("RUST_LOG", "error")

VERSION = "0.2.0"
HEARTBEAT_SECONDS = 0.1
DEAD_AFTER = 1.0
"""Seconds without a heartbeat after which a worker no longer counts."""


class NoQuorumError(Exception):
    """There was no quorum in time, or the lighthouse cannot be reached."""


class Member(NamedTuple):
    """A worker in a quorum, its address, and the version of its weights."""

    worker: str
    address: str
    version: str


class Quorum(NamedTuple):
    """Who takes part in one round. All members of a round are told the same; ``round`` is never used again."""

    round: str
    members: list[Member]


class Lighthouse:
    """The lighthouse of one stage, in this process.

    A quorum waits ``straggler`` seconds for a living worker that has not asked for one.
    """

    def __init__(self, host: str, port: int, straggler: float) -> None:
        from torchft.coordination import LighthouseServer

        self._server = LighthouseServer(
            bind=f"{host}:{port}",
            min_replicas=1,
            join_timeout_ms=int(1000 * straggler),
            quorum_tick_ms=50,
            heartbeat_timeout_ms=int(1000 * DEAD_AFTER),
        )

    def close(self) -> None:
        self._server.shutdown()


class QuorumClient:
    """A worker's place at the lighthouse ``host:port``, kept by heartbeats from a thread until ``close``."""

    def __init__(self, lighthouse: str, worker: str, address: str) -> None:
        self._lighthouse, self._worker, self._address = f"http://{lighthouse}", worker, address
        self._closing = threading.Event()
        self._client = self._connected()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._beating.start()

    def _connected(self) -> object:
        from torchft.coordination import LighthouseClient

        try:
            return LighthouseClient(self._lighthouse, timedelta(seconds=2))
        except Exception as error:
            raise NoQuorumError(f"the lighthouse {self._lighthouse} cannot be reached: {error}") from None

    def ask(self, version: str, number: int, seconds: float) -> Quorum:
        """Wait until the stage's workers have come together, and return them.

        Raises:
            NoQuorumError: they have not within ``seconds``.
        """
        try:
            found = self._client.quorum(  # type: ignore[attr-defined]
                self._worker,
                timedelta(seconds=seconds),
                address=self._address,
                step=number,
                data={"version": version},
            )
        except Exception as error:  # torchft raises RuntimeError, TimeoutError and others, as gRPC has it
            raise NoQuorumError(str(error)) from None
        members = [
            Member(str(m.replica_id), str(m.address), str((m.data or {}).get("version", "")))
            for m in found.participants
        ]
        made = f"{found.quorum_id}/{found.created.seconds}.{found.created.nanos}"
        return Quorum(made, sorted(members))

    def _beat(self) -> None:
        client: object | None = None
        while not self._closing.wait(HEARTBEAT_SECONDS):
            try:
                client = client or self._connected()
                client.heartbeat(self._worker, timedelta(seconds=1))  # type: ignore[attr-defined]
            except Exception:
                client = None

    def close(self) -> None:
        self._closing.set()
        self._beating.join(3.0)
