"""The coordinator: lets workers in, wires microbatches, and keeps the trace. No tensor of the training passes here."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nesterov_pp.swarm.attempts import Action, Attempt, Replace, Start, Worker
from nesterov_pp.swarm.lineage import ROOT, MalformedError, Update, is_version, number_of
from nesterov_pp.swarm.messages import ClosedError, Header, Link, Message, RefusedError
from nesterov_pp.swarm.nests import pack, unpack
from nesterov_pp.swarm.peers import Listener
from nesterov_pp.swarm.protocol import checked
from nesterov_pp.swarm.quorum import Lighthouse
from nesterov_pp.swarm.scheduler import Scheduler
from nesterov_pp.swarm.trace import TraceFile, read_state, read_trace, write_state

TICK_SECONDS = 0.02
STATUS_SECONDS = 1.0
SILENCE_SECONDS = 10.0
SAVE_SECONDS = 5.0
FAILED_LOUDLY = 100


class SwarmError(Exception):
    """A run cannot go on; the message is one sentence."""


@dataclass(frozen=True)
class Settings:
    """How a coordinator runs.

    Attributes:
        stages, total: number of stages and of microbatches.
        host, port: where it listens; the lighthouse of stage ``s`` (from 0) listens at ``port + 1 + s``.
        per_worker: microbatches in flight for each worker.
        seed: of the wiring.
        resend: whether microbatches that failed are sent again.
        checkpoint_every: updates of a stage after which its state is saved.
        straggler: seconds for which a stage holds its updates for a living worker that takes over a state.
        idle: seconds without any progress after which the run is given up.
    """

    stages: int
    total: int
    host: str = "127.0.0.1"
    port: int = 29600
    per_worker: float = 2.0
    seed: int = 0
    resend: bool = True
    checkpoint_every: int = 100
    straggler: float = 2.0
    idle: float = 600.0


class _Desk:
    """A worker's connection, with a thread that sends, so that a slow worker keeps nobody waiting."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._queue: queue.Queue[tuple[Header, list[Any]] | None] = queue.Queue()
        threading.Thread(target=self._run, name="desk", daemon=True).start()

    def send(self, header: Header, tensors: list[Any] | None = None) -> None:
        self._queue.put((header, tensors or []))

    def close(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self.link.send(*item)
        except ClosedError:
            pass
        time.sleep(0.2)
        self.link.close()


class Coordinator:
    """The coordinator of one run, whose files are in ``out``.

    Args:
        settings: how it runs.
        run: what the workers are told about the run; JSON.
        token: the swarm's secret.
        out: the run's folder. If it has a trace already, the run goes on.
        log: takes sentences and, once a second, a line of status.
        observe: takes (microbatch, loss, mean delay by stage) for every microbatch that is done.
    """

    def __init__(
        self,
        settings: Settings,
        run: Mapping[str, Any],
        token: bytes,
        out: Path,
        *,
        log: Callable[[str], None],
        observe: Callable[[int, float, list[float]], None] = lambda _m, _loss, _delays: None,
    ) -> None:
        self.settings, self._run, self._out, self._log, self._observe = settings, dict(run), out, log, observe
        self._lock, self._token = threading.RLock(), token
        s = settings
        self.scheduler = Scheduler(s.stages, s.total, per_worker=s.per_worker, seed=s.seed, resend=s.resend)
        self._desks: dict[str, _Desk] = {}
        self._named: dict[int, str] = {}
        self._numbers: Counter[int] = Counter()
        self._begun: dict[int, str] = {}
        self._saved = [0] * s.stages
        self._states: dict[int, dict[str, Any]] = {}
        self._delays: list[deque[int]] = [deque(maxlen=200) for _ in range(s.stages)]
        self._losses: deque[float] = deque(maxlen=50)
        self._done: deque[float] = deque(maxlen=100_000)
        self._why: str | None = None
        self._progress = time.monotonic()
        self._failures = 0
        self._finishing = False
        self._lighthouses: list[Lighthouse] = []
        self.trace_path = out / "trace.jsonl"
        self._trace = self._opened()
        self._timeline = (out / "timeline.jsonl").open("ab", buffering=0)
        self._listener: Listener | None = None

    def _opened(self) -> TraceFile:
        if not self.trace_path.exists():
            return TraceFile(self.trace_path, {**self._run, "stages": self.settings.stages})
        before = read_trace(self.trace_path)
        if before.run != {**self._run, "stages": self.settings.stages}:
            raise SwarmError(f"the run in {self._out} has other settings; give the same ones, or another --out")
        content = self.trace_path.read_bytes()
        if not content.endswith(b"\n"):
            self.trace_path.write_bytes(content[: content.rfind(b"\n") + 1])
        generation = 1 + sum(event["kind"] == "coordinator" for event in before.events)
        self.scheduler.went_on(before.updates, time.monotonic(), generation)
        names = [event["worker"] for event in before.events if event["kind"] == "joined"]
        for name in names:
            stage, _, number = name.removeprefix("s").partition("w")
            self._numbers[int(stage)] = max(self._numbers[int(stage)], int(number) + 1)
        trace = TraceFile(self.trace_path, None)
        trace.event(kind="coordinator", t=time.time())
        return trace

    # ------------------------------------------------------------------ the process

    def run(self) -> list[dict[str, Any]]:
        """Run to the end, and return the states of all stages.

        Raises:
            SwarmError: the loss is not finite, every attempt fails, or nothing happens for ``idle`` seconds.
        """
        s = self.settings
        try:
            self._lighthouses = [Lighthouse(s.host, s.port + 1 + i, s.straggler) for i in range(s.stages)]
            self._listener = Listener(s.host, s.port, self._token, self._arrived, self._log, self._gone)
        except (OSError, RuntimeError) as error:
            self._close()
            raise SwarmError(
                f"the ports {s.port} to {s.port + s.stages} of {s.host} cannot be used ({error}); give another --port"
            ) from None
        try:
            self._loop()
            return self._final()
        finally:
            self._close()

    def stop(self, why: str) -> None:
        """Have ``run`` end with this reason; the run can go on later."""
        with self._lock:
            self._why = self._why or why

    def _close(self) -> None:
        for desk in list(self._desks.values()):
            desk.close()
        if self._listener is not None:
            time.sleep(0.3)
            self._listener.close()
        for lighthouse in self._lighthouses:
            lighthouse.close()
        self._trace.close()
        self._timeline.close()

    def _loop(self) -> None:
        begin = status = time.monotonic()
        while True:
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            with self._lock:
                if self._why is not None:
                    raise SwarmError(self._why)
                for name in [n for n, desk in self._desks.items() if now - desk.link.heard > SILENCE_SECONDS]:
                    self._died(name, "is silent")
                for name in self.scheduler.silent(now) & self._desks.keys():
                    self._died(name, "does not answer")
                self._begin_stages()
                self._act(self.scheduler.tick(now))
                if self.scheduler.finished:
                    self._finishing = True
                    return
                if now - self._progress > self.settings.idle:
                    raise SwarmError(f"nothing has happened for {self.settings.idle:g} seconds{self._missing()}")
                if now - status >= STATUS_SECONDS:
                    status = now
                    self._log(self._line(now - begin))
                    self._tell_teams()

    def _final(self) -> list[dict[str, Any]]:
        """Return the states of all stages at the heads of their lines."""
        until = time.monotonic() + 60.0
        asked = 0.0
        while time.monotonic() < until:
            with self._lock:
                heads = [line.head for line in self.scheduler.lines]
                missing = [s for s, head in enumerate(heads) if self._states.get(s, {}).get("version") != head]
                if not missing:
                    for desk in self._desks.values():
                        desk.send({"kind": "finish"})
                    return [self._states[s] for s in range(self.settings.stages)]
                self._begin_stages()
                if time.monotonic() - asked > 1.0:
                    asked = time.monotonic()
                    for s in missing:
                        self._ask_for_state(s)
            time.sleep(TICK_SECONDS)
        raise SwarmError(f"the weights of stage {missing[0] + 1} did not arrive; start the coordinator again")

    # ------------------------------------------------------------------ what arrives

    def _arrived(self, link: Link, message: Message) -> None:
        with self._lock:
            name = self._named.get(id(link))
            if name is None:
                self._hello(link, checked(message, "hello").header)
                return
            kinds = (
                "ready",
                "update",
                "done",
                "cancelled",
                "failed",
                "adopted",
                "beyond",
                "dropped",
                "status",
                "state",
            )
            header, tensors = checked(message, *kinds)
            if name not in self._desks:
                return
            now = time.monotonic()
            match header["kind"]:
                case "ready":
                    self._ready(name, header["version"])
                case "update":
                    self._updated(name, header["update"])
                case "done":
                    self._is_done(header)
                case "cancelled":
                    self.scheduler.cancelled(name, header["m"], header["a"], header["counted"])
                case "failed":
                    self._failed(name, header, now)
                case "adopted":
                    self._adopted(name, header, now)
                case "beyond":
                    self._act(self.scheduler.beyond(header["m"], header["a"], now))
                case "dropped":
                    self._act(self.scheduler.dropped(name, header["microbatches"], now))
                case "status":
                    self._status_of(name, header)
                case "state":
                    self._state(name, unpack(header["state"], tensors))

    def _hello(self, link: Link, hello: Header) -> None:
        stages = self.settings.stages
        stage, name = hello["stage"], hello["worker"]
        desk = _Desk(link)
        if (stage is not None and stage >= stages) or (self._finishing and name is None):
            why = "the run is finished" if self._finishing else f"the swarm has stages 1 to {stages}"
            desk.send({"kind": "refused", "why": why})
            desk.close()
            return
        if stage is None:
            sizes = Counter(worker.stage for worker in self.scheduler.workers.values())
            stage = min(range(stages), key=lambda s: (sizes[s], s))
        if name is not None and name in self._desks:
            self._died(name, "came back")
        if name is None:
            name = f"s{stage}w{self._numbers[stage]}"
            self._numbers[stage] += 1
        self._named[id(link)] = name
        self._desks[name] = desk
        self.scheduler.joined(Worker(name, stage, hello["address"]), hello["pending"])
        self._trace.event(kind="joined", worker=name, stage=stage, address=hello["address"], t=time.time())
        desk.send(
            {
                "kind": "welcome",
                "worker": name,
                "stage": stage,
                "run": self._run,
                "lighthouse": self.settings.port + 1 + stage,
            }
        )
        self._log(f"{name} joined stage {stage + 1} from {hello['address']}")
        self._progress = time.monotonic()
        self._tell_teams()

    def _ready(self, name: str, version: str) -> None:
        self.scheduler.ready(name, version)
        stage = self.scheduler.workers[name].stage
        self._begun.pop(stage, None)
        self._trace.event(kind="ready", worker=name, stage=stage, version=version, t=time.time())
        self._log(f"{name} has version {number_of(version)} of stage {stage + 1}")

    def _updated(self, name: str, found: Mapping[str, Any]) -> None:
        try:
            update = Update.from_json(found, self.settings.stages)
        except MalformedError as error:
            raise RefusedError(f"{error} from {name}") from None
        stage = self.scheduler.workers[name].stage
        if update.stage != stage:
            raise RefusedError(f"an update of stage {update.stage + 1} from {name}, a worker of stage {stage + 1}")
        if not self.scheduler.updated(update):
            return
        self._progress = time.monotonic()
        self._trace.update(update)
        self._delays[stage].extend(update.number - number_of(one.backward[0][0]) for one in update.contributions)
        if update.number + 1 - self._saved[stage] >= self.settings.checkpoint_every:
            self._saved[stage] = update.number + 1
            self._ask_for_state(stage)
        elif update.number + 1 < self._saved[stage]:
            self._saved[stage] = update.number + 1

    def _is_done(self, header: Header) -> None:
        loss = float.fromhex(header["loss"])
        if not math.isfinite(loss):
            self.stop(f"the loss is {loss} at microbatch {header['m'] + 1}; try a smaller --lr, or --max-grad-norm 1")
            return
        self._failures = 0
        self._losses.append(loss)
        self._done.append(time.monotonic())
        self.scheduler.done(header["m"], header["a"], time.monotonic())
        self._observe(header["m"], loss, [_mean(delays) for delays in self._delays])

    def _failed(self, name: str, header: Header, now: float) -> None:
        self._failures += 1
        if self._failures > FAILED_LOUDLY:
            self.stop(f"{FAILED_LOUDLY} attempts failed in a row, the last on {name}: {header['why']}")
        self._act(self.scheduler.failed(header["m"], header["a"], now, header["to"]))

    def _adopted(self, name: str, header: Header, now: float) -> None:
        attempt = self.scheduler.adopted(header["m"], header["a"], now)
        if attempt is not None:
            stage = self.scheduler.workers[name].stage
            what = {"m": header["m"], "a": header["a"], "version": header["version"], "before": header["before"]}
            self._trace.event(kind="taken over", worker=name, of=attempt.before, stage=stage, **what, t=time.time())

    def _status_of(self, name: str, header: Header) -> None:
        worker = self.scheduler.workers.get(name)
        if worker is None:
            return
        worker.seconds = header["seconds"] or worker.seconds
        if header["events"]:
            line = {"worker": name, "stage": worker.stage, "events": header["events"]}
            self._timeline.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def _state(self, name: str, state: Any) -> None:
        stage = self.scheduler.workers[name].stage
        if not isinstance(state, dict) or state.get("stage") != stage or not is_version(state.get("version")):
            raise RefusedError(f"a state of another stage from {name}")
        self._states[stage] = state
        write_state(self._path(stage), state)

    def _gone(self, link: Link) -> None:
        with self._lock:
            name = self._named.pop(id(link), None)
            if name is not None and name in self._desks and self._desks[name].link is link:
                self._died(name, "is gone")

    def _died(self, name: str, how: str) -> None:
        desk = self._desks.pop(name)
        desk.close()
        worker = self.scheduler.workers[name]
        self._trace.event(kind="left", worker=name, stage=worker.stage, t=time.time())
        self._log(f"{name} {how}")
        self._act(self.scheduler.died(name, time.monotonic()))
        self._tell_teams()

    # ------------------------------------------------------------------ what is sent

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Start):
                self._tell(action.attempt.route[0].name, {"kind": "start", **_described(action.attempt)})
            elif isinstance(action, Replace):
                route, stage = action.attempt.route, action.stage
                header = {**_described(action.attempt), "stage": stage}
                if stage < len(route) - 1:
                    self._tell(route[stage + 1].name, {"kind": "replace", **header})
                else:
                    self._tell(route[stage].name, {"kind": "adopt", "f": [], **header})
            else:
                self._tell(action.worker, {"kind": "cancel", "m": action.microbatch, "a": action.attempt})

    def _tell(self, name: str, header: Header, tensors: list[Any] | None = None) -> None:
        desk = self._desks.get(name)
        if desk is not None:
            desk.send(header, tensors)

    def _tell_teams(self) -> None:
        for stage in range(self.settings.stages):
            team = [worker for worker in self.scheduler.workers.values() if worker.stage == stage]
            for worker in team:
                self._tell(worker.name, {"kind": "team", "addresses": [other.address for other in team]})

    def _begin_stages(self) -> None:
        """Have one worker of a stage without any begin, from the stage's last checkpoint."""
        for stage in self.scheduler.waits_for:
            team = [worker.name for worker in self.scheduler.workers.values() if worker.stage == stage]
            if not team or self._begun.get(stage) in team:
                continue
            self._begun[stage] = team[0]
            state = self._checkpoint(stage)
            version = ROOT if state is None else state["version"]
            if version != self.scheduler.lines[stage].head:
                self._log(f"stage {stage + 1} goes on from version {number_of(version)}, its last checkpoint")
            packed, tensors = (None, []) if state is None else pack(state)
            self._tell(team[0], {"kind": "begin", "state": packed}, tensors)

    def _checkpoint(self, stage: int) -> dict[str, Any] | None:
        if stage not in self._states and self._path(stage).exists():
            self._states[stage] = read_state(self._path(stage))
        return self._states.get(stage)

    def _ask_for_state(self, stage: int) -> None:
        ready = [w.name for w in self.scheduler.workers.values() if w.stage == stage and w.ready]
        if ready:
            fastest = min(ready, key=lambda name: self.scheduler.workers[name].seconds or 0.0)
            self._tell(fastest, {"kind": "save"})

    def _path(self, stage: int) -> Path:
        return self._out / f"stage-{stage + 1}.state"

    # ------------------------------------------------------------------ what is said

    def _line(self, seconds: float) -> str:
        scheduler, now = self.scheduler, time.monotonic()
        workers = "+".join(
            str(sum(w.stage == s and w.ready for w in scheduler.workers.values())) for s in range(self.settings.stages)
        )
        recent = sum(1 for t in self._done if now - t < 5.0) / min(5.0, max(seconds, 1.0))
        delays = " ".join(f"{_mean(d):.1f} (max {max(d, default=0)})" for d in self._delays)
        loss = f"{_mean(self._losses):.3f}" if self._losses else "-"
        return (
            f"{seconds:4.0f} s | workers {workers} | {scheduler.settled}/{scheduler.total}, {recent:.1f}/s | "
            f"delays {delays} | in flight {len(scheduler.attempts)}, taken over {scheduler.taken_over}, again "
            f"{scheduler.again}, lost {len(scheduler.lost)} | loss {loss}{self._missing()}"
        )

    def _missing(self) -> str:
        missing = self.scheduler.waits_for
        return f" | waiting for a worker of stage {', '.join(str(s + 1) for s in missing)}" if missing else ""


def _described(attempt: Attempt) -> Header:
    route = [[worker.name, worker.address] for worker in attempt.route]
    return {"m": attempt.microbatch, "a": attempt.number, "route": route, "count": list(attempt.count)}


def _mean(values: deque[Any]) -> float:
    return sum(values) / len(values) if values else 0.0
