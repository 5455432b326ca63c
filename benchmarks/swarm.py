"""A swarm on this machine: a demonstration with kills, and measurements of what kills, joins and slow workers cost.

``python -m benchmarks.swarm demo | churn | slow | loss``. Every worker is a process of its own, killed with SIGKILL. A
worker whose computing is made slow by sleeping leaves the cores to the others, so that many workers fit on few cores.
``--network MS,MBIT`` gives each a host of its own (``benchmarks.hosts``), behind links with that latency and rate.
``--json FILE`` adds what was found to a file of results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.hosts import Hosts, address, missing
from benchmarks.swarm_planned import delays_of, planned
from nesterov_pp.planning import Network
from nesterov_pp.swarm.picture import read_timeline

START_SECONDS, END_SECONDS = 120.0, 600.0
INTERVAL = (2.0, 6.0)


def free_port() -> int:
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def free_ports(count: int) -> int:
    """Return the first of ``count`` ports in a row that are free now."""
    for first in random.sample(range(20_000, 30_000), 200):
        with closing(socket.socket()) as a, closing(socket.socket()) as b:
            try:
                a.bind(("127.0.0.1", first))
                b.bind(("127.0.0.1", first + count - 1))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports")


class Swarm:
    """The processes of one swarm, with their output in ``out-logs``.

    With ``hosts``, the coordinator is on the first of them, and each worker alone on one of the others.
    """

    def __init__(self, out: Path, stages: int, *settings: str, hosts: Hosts | None = None) -> None:
        self.out, self.stages, self.hosts = out, stages, hosts
        self.free = list(range(1, len(hosts.names))) if hosts is not None else []
        self.host = "127.0.0.1" if hosts is None else address(0)
        self.port = free_ports(stages + 1)
        self.logs = out.with_name(f"{out.name}-logs")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **os.environ,
            "NESTEROV_PP_SWARM_TOKEN": secrets.token_hex(16),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.workers: dict[str, tuple[int, subprocess.Popen[Any], float, int]] = {}
        text = self.logs / "text.txt"  # a copy, which nobody changes meanwhile
        docs = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
        text.write_text("".join(path.read_text() for path in docs))
        self._place = ["--out", str(out), "--host", self.host, "--port", str(self.port)]
        given = ["--data", str(text), "--stages", str(stages), *settings]
        self.coordinator = self._start("coordinator", 0, "coordinate", *self._place, *given)

    def _start(self, name: str, host: int, *arguments: str) -> subprocess.Popen[Any]:
        words = ["-m", "nesterov_pp", "swarm", *arguments]
        with (self.logs / f"{name}.txt").open("ab") as log:
            if self.hosts is not None:
                return self.hosts.start(host, words, self.environment, stdout=log, stderr=subprocess.STDOUT)
            return subprocess.Popen(
                [sys.executable, *words], env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def again(self) -> None:
        """Start the coordinator again, as it was."""
        self.coordinator = self._start("coordinator", 0, "coordinate", "--resume", *self._place)

    def join(self, stage: int, slow: float = 1.0) -> str:
        """Start a worker of a stage (from 1), and return its address."""
        port, place = free_port(), self.free.pop(0) if self.hosts is not None else 0
        host = self.host if self.hosts is None else address(place)
        own, begin = f"{host}:{port}", time.time()
        more = ["--stage", str(stage), "--host", host, "--port", str(port), "--slow", str(slow)]
        process = self._start(f"worker-{port}", place, "work", "--join", f"{self.host}:{self.port}", *more)
        self.workers[own] = stage, process, begin, place
        return own

    def kill(self, worker: str) -> float:
        """Kill a worker at once, and return when."""
        self.workers[worker][1].send_signal(signal.SIGKILL)
        now = time.time()
        _, process, _, place = self.workers.pop(worker)
        process.wait()
        self.free.append(place)
        return now

    def rows(self) -> list[dict[str, Any]]:
        """Return the lines of the trace so far."""
        path = self.out / "trace.jsonl"
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [row["event"] for row in self.rows() if row.get("event", {}).get("kind") == kind]

    def ready(self) -> set[str]:
        """Return the addresses of the workers that have had their stage's weights."""
        names = {event["worker"] for event in self.events("ready")}
        return {event["address"] for event in self.events("joined") if event["worker"] in names}

    def wait_ready(self, addresses: Sequence[str]) -> None:
        until = time.monotonic() + START_SECONDS
        while not set(addresses) <= self.ready():
            if time.monotonic() > until or self.coordinator.poll() is not None:
                raise RuntimeError(f"workers did not join; see {self.logs}")
            time.sleep(0.1)

    def updates(self) -> int:
        return sum("update" in row for row in self.rows())

    def finish(self, seconds: float = END_SECONDS) -> str:
        """Wait for the end, and return the coordinator's last line."""
        self.coordinator.wait(seconds)
        for _, process, _, _ in self.workers.values():
            process.wait(30.0)
        last = (self.logs / "coordinator.txt").read_text().strip().splitlines()[-1]
        if self.coordinator.returncode:
            raise RuntimeError(last)
        return last

    def close(self) -> None:
        for process in [self.coordinator, *(process for _, process, _, _ in self.workers.values())]:
            if process.poll() is None:
                process.kill()
            process.wait()


@contextmanager
def swarm(out: Path, stages: int, *settings: str, hosts: Hosts | None = None) -> Iterator[Swarm]:
    """A swarm, none of whose processes is left behind."""
    if out.exists():
        sys.exit(f"{out} is there already; give another --out")
    found = Swarm(out, stages, *settings, hosts=hosts)
    try:
        yield found
    finally:
        found.close()


def command(*arguments: str) -> str:
    """Return what a command of the swarm prints; raise RuntimeError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "nesterov_pp", "swarm", *arguments], capture_output=True, text=True, timeout=END_SECONDS
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout.strip()


def demo(out: Path) -> None:
    """Two stages and five workers; two are killed and one joins, on a script."""
    model = ["--layers", "4", "--context", "32", "--lr", "2e-3", "--embedding-lr", "10", "--max-grad-norm", "1"]
    with swarm(out, 2, "--method", "nesterov", "--microbatches", "2000", *model) as s:
        print(f"Two stages, five workers; the output of each is in {s.logs}.", flush=True)
        first = [s.join(1), s.join(1)]
        second = [s.join(2), s.join(2), s.join(2)]
        s.wait_ready([*first, *second])
        acts: list[tuple[int, str, Callable[[], object]]] = [
            (400, "a worker of stage 1 is killed", lambda: s.kill(first[0])),
            (800, "a worker joins stage 1", lambda: s.join(1)),
            (1400, "a worker of stage 2 is killed", lambda: s.kill(second[0])),
        ]
        shown = 0
        while s.coordinator.poll() is None:
            time.sleep(0.2)
            lines = (s.logs / "coordinator.txt").read_text().splitlines()
            for line in lines[shown:]:
                print(line, flush=True)
            shown = len(lines)
            if acts and s.updates() >= acts[0][0]:
                _, what, act = acts.pop(0)
                print(f"--- {what} ---", flush=True)
                act()
        s.finish()
        for line in (s.logs / "coordinator.txt").read_text().splitlines()[shown:]:
            print(line)
    print(command("replay", str(out)))
    print(command("picture", str(out)))


def churn(
    out: Path,
    method: str,
    stages: int,
    team: int,
    kills: int,
    microbatches: int,
    seed: int,
    network: Network | None = None,
    interval: tuple[float, float] = INTERVAL,
) -> dict[str, Any]:
    """Kill and start workers at random; return what that cost. With a ``network``, each process has its own host."""
    draw = random.Random(seed)
    model = ["--layers", str(stages), "--width", "32", "--context", "32", "--lr", "1e-3", "--seed", str(seed)]
    more = ["--method", method, "--microbatches", str(microbatches), "--checkpoint-every", "50"]
    killed: list[tuple[float, int, int]] = []
    started: dict[str, float] = {}
    loaded = load()
    bench = nullcontext() if network is None else Hosts(1 + stages * team, network.latency, network.bandwidth)
    with bench as hosts, swarm(out, stages, *more, *model, hosts=hosts) as s:
        s.wait_ready([s.join(stage + 1, slow=SLOWNESS) for stage in range(stages) for _ in range(team)])
        for k in range(kills):
            time.sleep(draw.uniform(*interval))
            ready = s.workers.keys() & s.ready()
            victim = draw.choice(sorted(ready))
            stage = s.workers[victim][0]
            left = sum(s.workers[address][0] == stage for address in ready) - 1
            killed.append((s.kill(victim), stage, left))
            begin = time.time()
            started[s.join(stage, slow=SLOWNESS)] = begin
            if s.coordinator.poll() is not None:
                raise RuntimeError(f"the run ended after {k + 1} kills; give more --microbatches")
        last = s.finish()
        rows, joined, taken = s.rows(), s.events("joined"), s.events("taken over")
    spans = read_timeline(out / "timeline.jsonl")
    times = [[row["t"] for row in rows if row.get("update", {}).get("stage") == stage] for stage in range(stages)]
    begun = {name: [begin for kind, _, begin, _ in own if kind == "forward"] for name, own in spans.items()}
    first = {name: min(own) for name, own in begun.items() if own}
    entered = {event["worker"]: event for event in joined}
    return {
        "load of the machine, at first and at last": [loaded, load()],
        "microbatches": microbatches,
        "seconds between kills": list(interval),
        "run": last,
        "replay": command("replay", str(out)),
        "killed": len(killed),
        "joined": len(joined) - stages * team,
        "updates": [len(own) for own in times],
        "taken over": len(taken),
        "of these, begun again at the dead worker's version": sum(e["version"] == e["before"] for e in taken),
        "of these, begun again at another": sum(e["before"] not in (None, e["version"]) for e in taken),
        **planned(out, kills, network or Network()),
        "from a kill to the stage's next update, s": spread(
            [next_after(times[s - 1], t) for t, s, left in killed if left]
        ),
        "the same, if it was the last worker": spread(
            [next_after(times[s - 1], t) for t, s, left in killed if not left]
        ),
        "longest pause of the stage in the 2 s after a kill": spread(
            [pause(times[s - 1], t) for t, s, left in killed if left]
        ),
        "longest pause of another stage then": spread(
            [pause(own, t) for t, s, left in killed if left for k, own in enumerate(times, start=1) if k != s]
        ),
        "from joining (after imports) to the first microbatch, s": spread(
            [first[name] - event["t"] for name, event in entered.items() if name in first]
        ),
        "from the process's start to the first microbatch, s": spread(
            [
                first[name] - started[event["address"]]
                for name, event in entered.items()
                if name in first and event["address"] in started
            ]
        ),
    }


def load() -> float:
    """Return the load of the machine, the mean over the last minute."""
    return round(os.getloadavg()[0], 1)


SLOWNESS, ASLEEP = 10.0, 30.0
AFTER_SECONDS = 2.0


def next_after(times: Sequence[float], kill: float) -> float:
    """Return the time from a kill to the next update."""
    return min(t for t in times if t > kill) - kill


def pause(times: Sequence[float], kill: float) -> float:
    """Return the longest time between two updates in the seconds after a kill."""
    before = [t for t in times if t <= kill][-1:]
    after = [t for t in times if kill < t]
    near = [
        *before,
        *[t for t in after if t < kill + AFTER_SECONDS],
        *[t for t in after if t >= kill + AFTER_SECONDS][:1],
    ]
    return max((b - max(a, kill) for a, b in pairwise(near)), default=0.0)


def spread(values: Sequence[float]) -> str:
    """Return median and largest of some seconds."""
    return f"{median(values):.2f} (max {max(values):.2f}, n = {len(values)})" if values else "none"


def slow(out: Path, team: int, microbatches: int) -> dict[str, Any]:
    """Measure the throughput with and without a worker at a tenth of the speed in the first of two stages.

    The workers of the second stage are twice as fast, so that the first one sets the pace.
    """
    rates: dict[str, float] = {}
    busy: dict[str, float] = {}
    begin = load()
    for name, factor in (("equal", 1.0), ("one at a tenth", 10.0)):
        place = out / name.replace(" ", "-")
        place.parent.mkdir(parents=True, exist_ok=True)
        model = ["--layers", "2", "--width", "32", "--context", "32", "--lr", "1e-3"]
        with swarm(place, 2, "--microbatches", str(microbatches), *model) as s:
            slownesses = [ASLEEP * factor, *[ASLEEP] * (team - 1), *[ASLEEP / 2] * team]
            s.wait_ready([s.join(1 + k // team, slow=slowness) for k, slowness in enumerate(slownesses)])
            s.finish()
        command("replay", str(place))
        spans = read_timeline(place / "timeline.jsonl")
        ends = sorted(end for own in spans.values() for kind, _, _, end in own if kind == "backward")
        middle = ends[len(ends) // 5 : -len(ends) // 5]
        rates[name] = (len(middle) - 1) / 2 / (middle[-1] - middle[0])
        first = [span for worker, own in spans.items() if worker.startswith("s0") for span in own]
        during = [end - begin for _, _, begin, end in first if middle[0] < begin < middle[-1]]
        busy[name] = sum(during) / team / (middle[-1] - middle[0])
    return {
        "load of the machine, at first and at last": [begin, load()],
        "microbatches a second": rates,
        "share of the time in which the first stage computes": busy,
        "ratio": rates["one at a tenth"] / rates["equal"],
        "must reach": 0.75 * (team - 0.9) / team,
    }


def loss(out: Path, method: str, stages: int, team: int, kills: int, microbatches: int, seed: int) -> dict[str, Any]:
    """Compare the validation loss of a swarm with churn with that of pipelines of the same tokens."""
    out.mkdir(parents=True)
    found = churn(out / "swarm", method, stages, team, kills, microbatches, seed)
    kept = ("run", "replay", "updates", "load of the machine, at first and at last")
    return {**pipelines(out, method, stages, microbatches, seed), **{name: found[name] for name in kept}}


def pipelines(out: Path, method: str, stages: int, microbatches: int, seed: int) -> dict[str, Any]:
    """Train pipelines beside the swarm that has run in ``out/swarm``; return the validation losses of all."""
    delays = delays_of(out / "swarm")
    (out / "delays.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in delays))
    model = ["--layers", str(stages), "--width", "32", "--context", "32", "--lr", "1e-3", "--seed", str(seed)]
    text = out / "swarm-logs" / "text.txt"
    fixed = ",".join(str(stages - 1 - s) for s in range(stages))
    said = (out / "swarm-logs" / "coordinator.txt").read_text().splitlines()[-1]
    losses = {"swarm with churn": float(said.split("validation loss ")[1].split(";")[0])}
    for name, words in (("virtual, the same delays", f"trace:{out / 'delays.txt'}"), (f"fixed, {fixed}", fixed)):
        more = ["--method", method, "--stages", str(stages), "--microbatches", str(microbatches), "--delays", words]
        place = out / name.split(",")[0]
        where = ["--data", str(text), "--out", str(place), "--tokenizer", "bytes"]
        arguments = [sys.executable, "-m", "nesterov_pp", "train", *more, *model, *where]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=END_SECONDS)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        losses[name] = json.loads((place / "summary.json").read_text())["validation_loss"]
    columns = list(zip(*delays, strict=True))
    return {
        "validation loss": losses,
        "mean and largest delay of each stage": [[round(sum(c) / len(c), 2), max(c)] for c in columns],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("demo", "churn", "slow", "loss"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--method", default="swarm")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--team", type=int, default=3)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--microbatches", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", type=_network, default=None, metavar="MS,MBIT", help="of churn only")
    what = "seconds between two kills of churn (default: 2,6); more where workers take long to start"
    parser.add_argument("--interval", type=_interval, default=INTERVAL, metavar="S,S", help=what)
    given = parser.parse_args()
    if given.network is not None and (why := missing()):
        sys.exit(f"no hosts can be made on this machine: {why}")
    out = given.out or Path("runs") / f"{given.what}-swarm"
    if given.what == "demo":
        demo(out)
        return
    if given.what == "loss":
        found = loss(out, given.method, given.stages, given.team, given.kills, given.microbatches, given.seed)
    elif given.what == "churn":
        run = (given.stages, given.team, given.kills, given.microbatches, given.seed)
        found = churn(out, given.method, *run, given.network, given.interval)
    else:
        found = slow(out, given.team, given.microbatches)
    for name, value in found.items():
        print(f"{name}: {value if not isinstance(value, float) else round(value, 3)}")
    if given.json is not None:
        before = json.loads(given.json.read_text()) if given.json.exists() else {}
        name = f"{given.what}, {given.stages} stages x {given.team} workers, {given.method}, seed {given.seed}"
        if given.network is not None:
            name += f", {1e3 * given.network.latency:g} ms, {given.network.bandwidth * 8 / 1e6:g} Mbit/s"
        given.json.write_text(json.dumps({**before, f"{name}, {given.kills} kills": found}, indent=1) + "\n")


def _interval(text: str) -> tuple[float, float]:
    least, most = map(float, text.split(","))
    return least, most


def _network(text: str) -> Network:
    """Return the network of ``MS,MBIT``."""
    latency, _, rate = text.partition(",")
    return Network(float(latency) / 1e3, float(rate) * 1e6 / 8)


if __name__ == "__main__":
    main()
