"""A worker: one process that computes one stage, together with others that may come and go."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nesterov_pp.swarm.computer import Computer
from nesterov_pp.swarm.core import StageCore
from nesterov_pp.swarm.gradients import Gradients
from nesterov_pp.swarm.jobs import Job, Jobs
from nesterov_pp.swarm.lineage import ROOT, MalformedError, Update, is_version, number_of
from nesterov_pp.swarm.messages import ClosedError, Header, Link, Message, RefusedError, dial
from nesterov_pp.swarm.nests import unpack
from nesterov_pp.swarm.peers import Listener, Peers, join
from nesterov_pp.swarm.protocol import checked
from nesterov_pp.swarm.quorum import Member, QuorumClient
from nesterov_pp.swarm.rounds import HealError, Rounds
from nesterov_pp.swarm.task import Task

STATUS_SECONDS = 0.5
SILENCE_SECONDS = 10.0
"""Without a word for so long, the coordinator is taken to be gone, and is looked for again."""
STATE_SECONDS = 10.0

Build = Callable[[Header], Task]
"""``(the run's settings) -> the task``."""


class WorkerError(Exception):
    """A worker cannot go on; the message is one sentence."""


class Worker:
    """A worker of the swarm whose coordinator is at ``join``.

    Args:
        join: ``host:port`` of the coordinator.
        token: the swarm's secret.
        build: makes the task from the settings that the coordinator sends.
        stage: which stage to compute, from 0 (default: the coordinator chooses).
        host: the address under which the other workers reach this one.
        port: where to listen (default: any free port).
        slow: factor by which forwards and backwards are made to take longer, to try out an uneven swarm.
        patience: seconds for which to look for a coordinator that is away.
        log: takes sentences about what happens.
    """

    def __init__(
        self,
        join: str,
        token: bytes,
        build: Build,
        *,
        stage: int | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        slow: float = 1.0,
        patience: float = 60.0,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._join, self._token, self._build, self._wanted_stage = join, token, build, stage
        self._slow, self._patience, self._log = slow, patience, log
        self._jobs, self._gradients = Jobs(), Gradients()
        self._peers = Peers(token, self._not_sent)
        self._listener = Listener(host, port, token, self._from_peer, self._log)
        self._address = f"{host}:{self._listener.port}"
        self._why: str | None = None
        self._name: str | None = None
        self._stage = -1
        self._rounds: Rounds | None = None
        self._built = False
        self._link: Link | None = None
        self._unsent: list[Header] = []
        self._reporting = threading.Lock()
        self._finished = False
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------------ the process

    def run(self) -> None:
        """Work until the coordinator says that the run is finished.

        Raises:
            WorkerError: the coordinator refuses this worker, or is away for longer than ``patience``; or something
                went wrong here.
        """
        try:
            welcome = self._connect()
            self._thread(self._status)  # from here on, silence means death
            task = self._build(welcome["run"])
            self._stage, self._name = welcome["stage"], welcome["worker"]
            self._task = task
            core = StageCore(task, self._stage)
            lighthouse = f"{self._join.rpartition(':')[0]}:{welcome['lighthouse']}"
            me = Member(welcome["worker"], self._address, ROOT)
            client = QuorumClient(lighthouse, me.worker, self._address)
            self._rounds = rounds = Rounds(
                me, self._stage, task.stages, core.shapes, client, self._peers, self._gradients, self, self._end
            )
            self._computer = Computer(
                core, self._jobs, self._gradients, self._peers.send, self.report, rounds.want, self._slow
            )
            self._built = True
            self._thread(self._control)
            rounds.start()
            self._computer.run()
        finally:
            self._close()
        if self._why is not None:
            raise WorkerError(self._why)

    def stop(self) -> None:
        """Have ``run`` return soon; the swarm goes on as after a death."""
        self._jobs.close()

    def _end(self, why: str | None) -> None:
        if self._why is None and not self._jobs.closed:
            self._why = why
        self._jobs.close()

    def _thread(self, run: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=self._guarded, args=(run,), daemon=True))
        self._threads[-1].start()

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            known = isinstance(error, WorkerError | HealError)
            self._end(str(error) if known else f"this worker ended: {error!r}")

    def _close(self) -> None:
        self._jobs.close()
        if self._rounds is not None and self._built:
            self._rounds.close()
        self._listener.close()
        self._peers.close()
        if self._link is not None:
            self._link.close()
        join(self._threads)

    # ------------------------------------------------------------------ the coordinator

    def _connect(self) -> Header:
        """Find the coordinator, and return its welcome."""
        until = time.monotonic() + self._patience
        version = ROOT if self._rounds is None else self._rounds.version
        hello = {
            "kind": "hello",
            "worker": self._name,
            "stage": self._wanted_stage if self._name is None else self._stage,
            "address": self._address,
            "version": None if self._name is None else version,
            "pending": self._gradients.waiting,
        }
        while True:
            try:
                link = dial(self._join, self._token)
                link.send(hello)
                answer = link.receive(SILENCE_SECONDS)
                if answer is None:
                    raise ClosedError("the coordinator did not answer")
                header = checked(answer, "welcome", "refused").header
                if header["kind"] == "refused":
                    raise WorkerError(f"the coordinator refuses this worker: {header['why']}")
                with self._reporting:
                    self._link = link
                return header
            except RefusedError as error:
                raise WorkerError(f"{self._join} sent {error}; give both the same token") from None
            except ClosedError as error:
                if self._jobs.closed or time.monotonic() > until:
                    raise WorkerError(
                        f"no coordinator at {self._join} for {self._patience:g} seconds ({error})"
                    ) from None
                time.sleep(0.2)

    def _control(self) -> None:
        silent = 0.0
        while not self._jobs.closed:
            try:
                assert self._link is not None
                message = self._link.receive(1.0)
                silent = 0.0 if message is not None else silent + 1.0
                if silent > SILENCE_SECONDS:
                    raise ClosedError("the coordinator is silent")
                if message is not None:
                    self._obey(message)
            except RefusedError as error:
                self._log(f"refused {error} from the coordinator")
                self._find_again()
            except ClosedError:
                if not self._jobs.closed:
                    self._find_again()
            if self._finished:
                self._end(None)

    def _find_again(self) -> None:
        """Connect again after the coordinator was away: what was on its way is dropped, and sent again by it."""
        self._log("the coordinator is away; looking for it")
        self._computer.between(self._computer.drop_held, STATE_SECONDS)
        self._connect()
        with self._reporting:
            unsent, self._unsent = self._unsent, []
        for header in unsent:
            self.report(header)
        assert self._rounds is not None
        if self._rounds.begun:
            self.report({"kind": "ready", "version": self._rounds.version})

    def report(self, header: Header, tensors: Sequence[Tensor] = ()) -> None:
        with self._reporting:
            link = self._link
            if header["kind"] == "update":
                self._unsent = [*self._unsent[-100:], header]
        with contextlib.suppress(ClosedError):  # what matters is said again to the next coordinator
            if link is not None:
                link.send(header, tensors)

    def _obey(self, message: Message) -> None:
        header, tensors = checked(message, "begin", "team", "start", "cancel", "replace", "adopt", "save", "finish")
        assert self._rounds is not None
        match header["kind"]:
            case "team":
                self._rounds.set_team(header["addresses"])
            case "begin":
                self._begin(header["state"], tensors)
            case "start":
                self._jobs.add(Job(header["m"], header["a"], header["route"], header["count"], []))
            case "cancel":
                self._computer.cancel((header["m"], header["a"]))
            case "replace":
                self._replace(header)
            case "adopt":
                self._adopt(header)
            case "save":
                self._computer.send_state(self.report)
            case "finish":
                self._finished = True

    def _begin(self, packed: Any, tensors: list[Tensor]) -> None:
        """Begin as the only worker of the stage, with a checkpoint's state or the initial one."""
        assert self._rounds is not None
        rounds = self._rounds
        if packed is not None and not rounds.begun:
            state = self._state_from(packed, tensors)
            self._take_over(state, STATE_SECONDS, "the checkpoint of this stage")
            rounds.version = state["version"]
        rounds.begun = True
        rounds.wanted.set()

    def _status(self) -> None:
        while not self._jobs.closed:
            time.sleep(STATUS_SECONDS)
            seconds, events = self._computer.news() if self._built else (None, [])
            self.report({"kind": "status", "seconds": seconds, "events": events})

    # ------------------------------------------------------------------ other workers

    def _from_peer(self, link: Link, message: Message) -> None:
        header, tensors = checked(message, "activation", "gradient", "adopt", "again", "poke", "bundle", "fetch")
        if self._rounds is None or not self._built:
            return  # whoever sent it has heard of this worker before it was ready, and sends again
        match header["kind"]:
            case "activation":
                self._activation(header, tensors)
            case "gradient":
                self._gradient(header, tensors)
            case "adopt":
                self._adopt(header)
            case "again":
                self._again(header)
            case "poke":
                self._rounds.wanted.set()
            case "bundle":
                self._rounds.arrived(message)
            case "fetch":
                self._computer.send_state(link.send)

    def _activation(self, header: Header, tensors: list[Tensor]) -> None:
        s = self._stage
        if not 0 < header["stage"] == s or len(header["f"]) != s:
            raise RefusedError(f"an activation that is not for stage {s}")
        self._check_route(header)
        self._check(tensors, "an activation")
        self._jobs.add(Job(header["m"], header["a"], header["route"], header["count"], header["f"], tensors[0]))

    def _gradient(self, header: Header, tensors: list[Tensor]) -> None:
        stages, s = self._task.stages, self._stage
        if header["stage"] != s or len(header["f"]) != stages or len(header["b"]) != stages - 1 - s or s == stages - 1:
            raise RefusedError(f"a gradient that is not for stage {s}")
        self._check(tensors, "a gradient")
        key = header["m"], header["a"]
        held = self._computer.held.get(key) or self._computer.takeovers.awaited(key)
        if held is not None:
            job = Job(held.microbatch, held.attempt, held.route, held.counts, header["f"], tensors[0])
            job.backward, job.loss = header["b"], header["loss"]
            self._jobs.add(job)

    def _replace(self, header: Header) -> None:
        if header["stage"] != self._stage - 1:
            raise RefusedError(f"a takeover that is not before stage {self._stage}")
        self._check_route(header)
        self._jobs.call(lambda: self._computer.takeovers.replace(header))

    def _adopt(self, header: Header) -> None:
        if header["stage"] != self._stage or len(header["f"]) not in (
            0,
            *range(self._stage + 1, self._task.stages + 1),
        ):
            raise RefusedError(f"a takeover that is not for stage {self._stage}")
        self._check_route(header)
        self._computer.takeovers.adopt(header)

    def _again(self, header: Header) -> None:
        if header["stage"] != self._stage + 1:
            raise RefusedError(f"a takeover that is not behind stage {self._stage}")
        self._jobs.call(lambda: self._computer.takeovers.again(header))

    def _check_route(self, header: Header) -> None:
        if not len(header["route"]) == len(header["count"]) == self._task.stages:
            raise RefusedError("a route that does not have every stage once")

    def _check(self, tensors: list[Tensor], what: str) -> None:
        if len(tensors) != 1 or tensors[0].dtype != torch.float32 or tuple(tensors[0].shape) != self._task.boundary:
            raise RefusedError(f"{what} that is not float32 of shape {self._task.boundary}")

    def _not_sent(self, address: str, header: Header, why: str) -> None:
        if header["kind"] in ("activation", "gradient", "adopt", "again"):
            what = {"kind": "failed", "m": header["m"], "a": header["a"], "why": why[:1000], "to": address}
            self.report(what)
        elif header["kind"] == "bundle" and self._rounds is not None:
            self._rounds.mailbox.fail(header["round"])

    # ------------------------------------------------------------------ for the rounds

    def apply(self, update: Update, sums: list[Tensor]) -> None:
        self._computer.apply(update, sums)

    def behind(self) -> bool:
        return self._computer.behind()

    def heal(self, member: Member) -> str:
        begin = time.monotonic()
        try:
            link = dial(member.address, self._token)
            try:
                link.send({"kind": "fetch"})
                answer = link.receive(STATE_SECONDS)
            finally:
                link.close()
            if answer is None:
                raise HealError(f"{member.worker} did not send its state")
            header, tensors = checked(answer, "state")
            state = self._state_from(header["state"], tensors)
        except (ClosedError, RefusedError) as error:
            raise HealError(f"{member.worker}: {error}") from None
        self._take_over(state, 60.0 * self._slow, f"the state of {member.worker}")
        version: str = state["version"]
        seconds = time.monotonic() - begin
        self._log(f"took over version {number_of(version)} from {member.worker} in {seconds:.2f} s")
        return version

    def _state_from(self, packed: Any, tensors: list[Tensor]) -> dict[str, Any]:
        try:
            state = unpack(packed, tensors)
        except MalformedError as error:
            raise RefusedError(str(error)) from None
        parts = {"version", "names", "counted", "stage", "stash", "optimizer", "buffers"}
        if not isinstance(state, dict) or not parts <= state.keys() or not isinstance(state["names"], list):
            raise RefusedError("a state that lacks a part")
        if not all(map(is_version, [state["version"], *state["names"]])):
            raise RefusedError("a state of no version")
        return state

    def _take_over(self, state: dict[str, Any], seconds: float, what: str) -> None:
        """Have a state loaded. Raises HealError."""
        found = self._computer.between(lambda: (self._computer.load(state),), seconds)
        if found is None:
            raise HealError(f"{what} was not loaded within {seconds:g} seconds")
        if found[0] is not None:
            raise HealError(f"{what} does not fit this worker: {found[0]}")
