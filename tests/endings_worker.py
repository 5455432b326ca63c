"""Run pairs of processes, one pair after the other, in which both stop with an error right after a collective.

Each pair runs on one core with every thread but the first scheduled last, as can happen to an ending process on a
loaded machine. Print the exit statuses of each pair.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

from launch import environment, free_port

from nesterov_pp.pipeline import connect


def yield_to_the_first_thread() -> None:
    core = {min(os.sched_getaffinity(0))}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):  # it has ended by now
            os.sched_setaffinity(thread, core)
            if thread != threading.get_native_id():
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def stop(rank: int, port: int) -> None:
    os.environ.update(environment(rank, 2, port))
    try:
        with connect(20.0) as world:
            yield_to_the_first_thread()
            world.gather(rank)
            raise KeyError("no such thing")
    except KeyError:
        sys.exit(2)


for _ in range(int(sys.argv[1])):
    port = free_port()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            stop(rank, port)
        children.append(child)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
