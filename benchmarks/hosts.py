"""Hosts on one machine: network namespaces, joined by links with a delay, a rate and losses (``links.cpp``).

Linux's own emulation, netem, is missing in the kernels of many small machines; TUN devices are everywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

SOURCE = Path(__file__).with_name("links.cpp")
ROOT = SOURCE.parents[1]
DEVICE, MTU = "npp0", 1500
TCP = ("net.ipv4.tcp_congestion_control=reno", "net.ipv4.tcp_slow_start_after_idle=0")
"""Settings of every host. Reno is in every kernel; BBR, the default of some, paces what is sent now and then."""


@cache
def missing() -> str:
    """Return why this machine cannot have several hosts; nothing if it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    absent = [name for name in ("ip", "c++") if shutil.which(name) is None]
    if absent:
        return f"there is no {absent[0]}"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun"
    try:
        with Hosts(1):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"the links do not work here: {error}"


@cache
def _built() -> str:
    """Return the path of the compiled links."""
    path = Path(tempfile.mkdtemp()) / "links"
    subprocess.run(["c++", "-std=c++17", "-O2", "-o", str(path), str(SOURCE)], check=True)
    return str(path)


class Hosts:
    """Hosts 0 ... ``count - 1`` with addresses on links to each other, as a context manager.

    Args:
        count: number of hosts, at most 16.
        latency: seconds that a packet takes from one host to another.
        bandwidth: bytes a second of each link in each direction.
    """

    def __init__(self, count: int, latency: float = 0.0, bandwidth: float = 125e6) -> None:
        self.names = [f"npp-{os.getpid()}-{k}" for k in range(count)]
        self.latency, self.bandwidth = latency, bandwidth

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                _ip("netns", "add", name)
            self._links = subprocess.Popen(
                [_built(), *self.names], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            if _pipe(self._links.stdout).readline() != "ready\n":
                raise OSError("the program of the links has ended")
            for k, name in enumerate(self.names):
                for setting in TCP:
                    _ip("netns", "exec", name, "sysctl", "-qw", setting)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "addr", "add", f"{address(k)}/24", "dev", DEVICE)
                _ip("-n", name, "link", "set", "dev", DEVICE, "mtu", str(MTU), "up")
            self.set(self.latency, self.bandwidth)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        with suppress(AttributeError):
            self._links.kill()
            self._links.communicate()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)

    def set(self, latency: float, bandwidth: float) -> None:
        """Change latency and bandwidth of all links."""
        self.latency, self.bandwidth = latency, bandwidth
        self._tell(f"delay {1e3 * latency}")
        self._tell(f"rate {bandwidth * 8 / 1e6}")

    def lose(self, percent: float) -> None:
        """Lose a share of all packets at random."""
        self._tell(f"loss {percent}")

    @contextmanager
    def without(self, host: int) -> Iterator[None]:
        """Cut all links of a host inside the block."""
        self._tell(f"down {host + 1}")
        try:
            yield
        finally:
            self._tell(f"up {host + 1}")

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start ``python command`` on a host, as the process of that rank in a run with one process a host."""
        place = {"RANK": str(host), "WORLD_SIZE": str(len(self.names)), "MASTER_ADDR": address(0)}
        own = {**place, "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1"}
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # addresses have no names
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], sys.executable, *command],
            env={**os.environ, "PYTHONPATH": paths, **own, **quiet, **(environment or {})},
            text=True,
            **options,
        )

    def _tell(self, line: str) -> None:
        pipe = _pipe(self._links.stdin)
        pipe.write(line + "\n")
        pipe.flush()
        _pipe(self._links.stdout).readline()


def address(host: int) -> str:
    """Return the address of a host."""
    return f"10.88.0.{host + 1}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    return cast("IO[str]", pipe)
