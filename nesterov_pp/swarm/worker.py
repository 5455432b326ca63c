"""A worker: one process that computes one stage, together with others that may come and go."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from nesterov_pp.swarm.core import StageCore
from nesterov_pp.swarm.gradients import Gradients
from nesterov_pp.swarm.jobs import Job, Jobs, Key
from nesterov_pp.swarm.lineage import ROOT, Contribution, MalformedError, Update, is_version, number_of
from nesterov_pp.swarm.messages import ClosedError, Header, Link, Message, RefusedError, dial
from nesterov_pp.swarm.nests import pack, unpack
from nesterov_pp.swarm.peers import Listener, Peers, join
from nesterov_pp.swarm.protocol import checked
from nesterov_pp.swarm.quorum import Member, QuorumClient
from nesterov_pp.swarm.rounds import HealError, Rounds
from nesterov_pp.swarm.task import Task

STATUS_SECONDS = 0.5
SILENCE_SECONDS = 10.0
"""Without a word for so long, the coordinator is taken to be gone, and is looked for again."""
STATE_SECONDS = 10.0
BEHIND_BYTES, MOST_BEHIND = 512 << 20, 256
_REMEMBERED = 20_000

T = TypeVar("T")
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
        self._listener = Listener(host, port, token, self._from_peer, self._warn)
        self._address = f"{host}:{self._listener.port}"
        self._why: str | None = None
        self._name: str | None = None
        self._stage = -1
        self._core: StageCore | None = None
        self._rounds: Rounds | None = None
        self._counted: OrderedDict[Key, bool] = OrderedDict()
        self._held: OrderedDict[Key, Job] = OrderedDict()
        self._link: Link | None = None
        self._unsent: list[Header] = []
        self._reporting = threading.Lock()
        self._events: list[list[Any]] = []
        self._seconds: dict[str, float] = {}
        self._pending = 0
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
            self._core = StageCore(task, self._stage)
            self._task = task
            lighthouse = f"{self._join.rpartition(':')[0]}:{welcome['lighthouse']}"
            me = Member(welcome["worker"], self._address, ROOT)
            client = QuorumClient(lighthouse, me.worker, self._address)
            shapes = self._core.shapes
            self._rounds = Rounds(
                me, self._stage, task.stages, shapes, client, self._peers, self._gradients, self, self._end
            )
            size = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in shapes)
            self._most_behind = max(4, min(MOST_BEHIND, BEHIND_BYTES // max(1, size)))
            self._threads = [
                threading.Thread(target=self._guarded, args=(run,), daemon=True)
                for run in (self._control, self._status)
            ]
            for thread in self._threads:
                thread.start()
            self._rounds.start()
            self._compute()
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
            self._end(f"this worker ended: {error!r}" if not isinstance(error, WorkerError) else str(error))

    def _close(self) -> None:
        self._jobs.close()
        if self._rounds is not None:
            self._rounds.close()
        self._listener.close()
        self._peers.close()
        if self._link is not None:
            self._link.close()
        join(self._threads)

    def _warn(self, sentence: str) -> None:
        self._log(sentence)

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
                self._warn(f"refused {error} from the coordinator")
                self._find_again()
            except ClosedError:
                if not self._jobs.closed:
                    self._find_again()
            if self._finished:
                self._end(None)

    def _find_again(self) -> None:
        """Connect again after the coordinator was away: what was on its way is dropped, and sent again by it."""
        self._log("the coordinator is away; looking for it")
        self._between(self._drop_held, STATE_SECONDS)
        self._connect()
        with self._reporting:
            unsent, self._unsent = self._unsent[-_REMEMBERED:], []
        for header in unsent:
            self.report(header)
        assert self._rounds is not None
        if self._rounds.begun:
            self.report({"kind": "ready", "version": self._rounds.version})

    def report(self, header: Header, tensors: list[Tensor] | None = None) -> None:
        with self._reporting:
            link = self._link
            if header["kind"] == "update":
                self._unsent = [*self._unsent[-100:], header]
        with contextlib.suppress(ClosedError):  # what matters is said again to the next coordinator
            if link is not None:
                link.send(header, tensors or ())

    def _obey(self, message: Message) -> None:
        header, tensors = checked(message, "begin", "team", "start", "cancel", "save", "finish")
        assert self._rounds is not None
        match header["kind"]:
            case "team":
                self._rounds.set_team(header["addresses"])
            case "begin":
                self._begin(header["state"], tensors)
            case "start":
                self._jobs.add(Job(header["m"], header["a"], header["route"], header["count"], []))
            case "cancel":
                key = header["m"], header["a"]
                self._jobs.cancel(key)
                self._jobs.call(lambda: self._cancelled(key))
            case "save":
                self._jobs.call(lambda: self._send_state(self.report))
            case "finish":
                self._finished = True

    def _begin(self, packed: Any, tensors: list[Tensor]) -> None:
        """Begin as the only worker of the stage, with a checkpoint's state or the initial one."""
        assert self._rounds is not None
        rounds = self._rounds
        if packed is not None and not rounds.begun:
            state = self._state_from(packed, tensors)
            if not self._between(lambda: self._load(state), STATE_SECONDS):
                raise WorkerError("the checkpoint that the coordinator sent does not fit this worker")
            rounds.version = state["version"]
        rounds.begun = True
        rounds.wanted.set()

    def _status(self) -> None:
        while not self._jobs.closed:
            time.sleep(STATUS_SECONDS)
            events, self._events = self._events, []
            known = len(self._seconds) == 2
            seconds = sum(self._seconds.values()) if known else None
            self.report({"kind": "status", "seconds": seconds, "events": events})

    # ------------------------------------------------------------------ other workers

    def _from_peer(self, link: Link, message: Message) -> None:
        header, tensors = checked(message, "activation", "gradient", "poke", "bundle", "fetch")
        if self._rounds is None or self._core is None:
            return  # whoever sent it has heard of this worker before it was ready, and sends again
        match header["kind"]:
            case "activation":
                self._activation(header, tensors)
            case "gradient":
                self._gradient(header, tensors)
            case "poke":
                self._rounds.wanted.set()
            case "bundle":
                self._rounds.arrived(message)
            case "fetch":
                self._jobs.call(lambda: self._send_state(link.send))

    def _activation(self, header: Header, tensors: list[Tensor]) -> None:
        stages, s = self._task.stages, self._stage
        if not 0 < header["stage"] == s or len(header["f"]) != s:
            raise RefusedError(f"an activation that is not for stage {s}")
        if len(header["route"]) != stages or len(header["count"]) != stages:
            raise RefusedError("a route that does not have every stage once")
        self._check(tensors, "an activation")
        self._jobs.add(Job(header["m"], header["a"], header["route"], header["count"], header["f"], tensors[0]))

    def _gradient(self, header: Header, tensors: list[Tensor]) -> None:
        stages, s = self._task.stages, self._stage
        if header["stage"] != s or len(header["f"]) != stages or len(header["b"]) != stages - 1 - s or s == stages - 1:
            raise RefusedError(f"a gradient that is not for stage {s}")
        self._check(tensors, "a gradient")
        held = self._held.get((header["m"], header["a"]))
        if held is not None:
            job = Job(held.microbatch, held.attempt, held.route, held.counts, header["f"], tensors[0])
            job.backward, job.loss = header["b"], header["loss"]
            self._jobs.add(job)

    def _check(self, tensors: list[Tensor], what: str) -> None:
        if len(tensors) != 1 or tensors[0].dtype != torch.float32 or tuple(tensors[0].shape) != self._task.boundary:
            raise RefusedError(f"{what} that is not float32 of shape {self._task.boundary}")

    def _not_sent(self, header: Header, why: str) -> None:
        if header["kind"] in ("activation", "gradient"):
            self.report({"kind": "failed", "m": header["m"], "a": header["a"], "why": why[:1000]})
        elif header["kind"] == "bundle" and self._rounds is not None:
            self._rounds.mailbox.fail(header["round"])

    # ------------------------------------------------------------------ for the rounds

    def apply(self, update: Update, sums: list[Tensor]) -> None:
        with self._reporting:
            self._pending += 1
        self._jobs.call(lambda: self._applied(update, sums))

    def _applied(self, update: Update, sums: list[Tensor]) -> None:
        assert self._core is not None
        begin = time.time()
        self._core.apply(update, sums)
        with self._reporting:
            self._pending -= 1
        self._event("step", update.number + 1, begin)

    def behind(self) -> bool:
        return self._pending > self._most_behind

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
        if not self._between(lambda: self._load(state), 60.0 * self._slow):
            raise HealError(f"the state of {member.worker} does not fit this worker")
        version: str = state["version"]
        seconds = time.monotonic() - begin
        self._log(f"took over version {number_of(version)} from {member.worker} in {seconds:.2f} s")
        return version

    def _state_from(self, packed: Any, tensors: list[Tensor]) -> dict[str, Any]:
        try:
            state = unpack(packed, tensors)
        except MalformedError as error:
            raise RefusedError(str(error)) from None
        parts = {"version", "counted", "stage", "stash", "optimizer", "buffers"}
        if not isinstance(state, dict) or not parts <= state.keys() or not is_version(state["version"]):
            raise RefusedError("a state that lacks a part")
        return state

    def _load(self, state: dict[str, Any]) -> bool:
        """Take over a state, dropping what is held and what was not averaged; return whether it fits."""
        assert self._core is not None
        self._drop_held()
        dropped = self._gradients.drop()
        if dropped:
            self.report({"kind": "dropped", "microbatches": dropped})
        try:
            self._core.load(state)
        except (ValueError, KeyError, TypeError) as error:
            self._warn(f"a state does not fit: {error}")
            return False
        return True

    def _between(self, act: Callable[[], T], seconds: float) -> T | None:
        """Have something done between two computations, and return what it returned; None if it takes too long."""
        found: list[T] = []
        done = threading.Event()

        def call() -> None:
            found.append(act())
            done.set()

        self._jobs.call(call)
        return found[0] if done.wait(seconds) else None

    def _send_state(self, send: Callable[..., None]) -> None:
        assert self._core is not None
        packed, tensors = pack(self._core.state())

        def deliver() -> None:
            with contextlib.suppress(ClosedError):  # whoever asked asks again, or another
                send({"kind": "state", "state": packed}, tensors)

        threading.Thread(target=deliver, name="state", daemon=True).start()

    # ------------------------------------------------------------------ computing

    def _compute(self) -> None:
        while not self._jobs.closed:
            job = self._jobs.next(1.0)
            if isinstance(job, Job):
                self._do(job)
            elif job is not None:
                job()

    def _do(self, job: Job) -> None:
        if job.backward is None:
            with self._computing("forward", job.microbatch):
                self._forward(job)
        if job.backward is not None:  # also right after the forward, on the last stage
            with self._computing("backward", job.microbatch):
                self._backward(job)

    @contextlib.contextmanager
    def _computing(self, kind: str, number: int) -> Iterator[None]:
        begin = time.time()
        yield
        if self._slow > 1.0:
            time.sleep((self._slow - 1.0) * (time.time() - begin))
        self._event(kind, number, begin)

    def _forward(self, job: Job) -> None:
        core, s = self._core, self._stage
        assert core is not None
        given = self._task.batch(job.microbatch)[0] if job.given is None else job.given
        output, version = core.forward(job.key, job.microbatch, given)
        job.forward, job.given = [*job.forward, version], None
        self._held[job.key] = job
        if core.is_last:
            loss = core.loss(job.key, self._task.batch(job.microbatch)[1])
            job.loss, job.backward = float(loss).hex(), []
            return
        header = {
            "kind": "activation",
            "m": job.microbatch,
            "a": job.attempt,
            "route": job.route,
            "count": job.counts,
            "stage": s + 1,
            "f": job.forward,
        }
        self._peers.send(job.route[s + 1][1], header, [output])

    def _backward(self, job: Job) -> None:
        core, s = self._core, self._stage
        assert core is not None
        assert self._rounds is not None
        if self._held.pop(job.key, None) is None:
            return
        found = core.backward(job.key, job.given)
        backward = [[found.graph, found.at], *(job.backward or [])]
        if job.counts[s]:
            pairs = tuple((graph, at) for graph, at in backward)
            one = Contribution(job.microbatch, tuple(job.forward), pairs, job.loss)
            self._gradients.add(one, found.of_weights)
            self._counted[job.key] = True
            while len(self._counted) > _REMEMBERED:
                self._counted.popitem(last=False)
        if core.is_first:
            self.report({"kind": "done", "m": job.microbatch, "a": job.attempt, "loss": job.loss})
        else:
            header = {
                "kind": "gradient",
                "m": job.microbatch,
                "a": job.attempt,
                "stage": s - 1,
                "f": job.forward,
                "b": backward,
                "loss": job.loss,
            }
            assert found.of_input is not None
            self._peers.send(job.route[s - 1][1], header, [found.of_input])
        if job.counts[s]:
            self._rounds.want()

    def _cancelled(self, key: Key) -> None:
        assert self._core is not None
        self._held.pop(key, None)
        self._core.drop(key)
        counted = self._counted.get(key, False) and key[0] in self._gradients.waiting
        self.report({"kind": "cancelled", "m": key[0], "a": key[1], "counted": counted})

    def _drop_held(self) -> None:
        assert self._core is not None
        for key in self._core.drop_all():
            self._jobs.cancel(key)
            held = self._held.pop(key, None)
            if held is not None:
                self.report({"kind": "failed", "m": key[0], "a": key[1], "why": "dropped to take over a state"})

    def _event(self, kind: str, number: int, begin: float) -> None:
        end = time.time()
        self._events.append([kind, number, begin, end])
        if kind != "step":
            before = self._seconds.get(kind, end - begin)
            self._seconds[kind] = 0.8 * before + 0.2 * (end - begin)
