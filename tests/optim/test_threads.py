"""Several threads, the GIL, and the threads that a step leaves behind in the process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import nesterov_pp as npp
from nesterov_pp.kernels import StepSlots

pytestmark = pytest.mark.skipif(npp.kernels.available_backends()["cpu"] is not None, reason="no compiled extension")


def train(seed: int, steps: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ps = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (100_000, 3, 5000)]
    optimizer = npp.NAdam(ps, lr=1e-2, max_grad_norm=1.0)
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in ps]


def test_threads_with_optimizers_of_their_own_do_not_disturb_each_other():
    expected = [train(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(train, range(6)))
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


SMALL = {"state_dtype": "8bit", "master_weights": "24bit"}


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        pytest.param("NAdam", torch.float32, {}, id="NAdam"),
        pytest.param("AdamW", torch.float32, {}, id="AdamW"),
        pytest.param("NAG", torch.float32, {}, id="NAG"),
        pytest.param("NAdam", torch.float32, {"state_dtype": "8bit"}, id="8bit"),
        pytest.param("NAdam", torch.bfloat16, {"stochastic_rounding": True}, id="stochastic"),
        pytest.param("NAdam", torch.bfloat16, SMALL, id="24bit-8bit"),
    ],
)
def test_any_number_of_threads_gives_the_same_bits(name, dtype, options):
    """Compare the norm, weights and state of tensors that are large enough to be split in the middle of one of them.

    The magnitudes of the gradients are far apart, so that sums in another order would differ. Three threads begin at
    odd multiples of 64 elements, between groups of codes that share random words.
    """
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(0)
            sizes = (3, 1_000_001, 70_000, 17)
            ps = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
            optimizer = getattr(npp, name)(ps, lr=1e-2, max_grad_norm=1.0, **options)
            for _ in range(3):
                for p in ps:
                    spread = torch.randn(p.shape, generator=generator).mul_(4).exp_()
                    p.grad = (torch.randn(p.shape, generator=generator) * spread).to(dtype)
                optimizer.step()
            state = [value for p in ps for value in optimizer.state[p].values()]
            results.append([*(p.detach() for p in ps), *state, optimizer.last_grad_norm])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("half", ["the norm", "the pass"])
def test_the_gil_is_released(half):
    """Another Python thread continues while a call of many milliseconds runs.

    If the GIL were held, the thread would stop from the call into C++ until its return.
    """
    p = torch.nn.Parameter(torch.zeros(30_000_000))
    p.grad = torch.ones_like(p)
    optimizer = npp.NAdam([p])
    assert optimizer.backend == "cpu"
    call = optimizer.step
    if half == "the norm":
        plan = optimizer._prepare().plan
        plan.collect(StepSlots())
        call = plan.gradient_norm
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stamps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        for _ in range(20):  # on a busy machine, one success is enough
            begin = time.perf_counter()
            call()
            end = time.perf_counter()
            inside = [stamp for stamp in stamps if begin + 0.25 * (end - begin) < stamp < begin + 0.75 * (end - begin)]
            if len(inside) >= 2:
                return
    finally:
        stop.set()
        ticker.join()
        torch.set_num_threads(threads)
    pytest.fail("no other Python thread ran in the middle of 20 calls")


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SETUP = """
import os, signal, torch, nesterov_pp as npp
def count():
    return len(os.listdir("/proc/self/task"))
def step(optimizer, p):
    p.grad = torch.ones_like(p)
    optimizer.step()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_no_thread_of_ours_outlives_a_step():
    """With one thread, a step starts none; with two, no more than torch has for its own operators."""
    program = """
torch.set_num_threads({threads})
a = torch.ones(3_000_000)
for _ in range(3):
    a = a * 2 + 1
p = torch.nn.Parameter(torch.zeros(3_000_000))
optimizer = npp.NAdam([p], max_grad_norm=1.0)
before = count()
for _ in range(5):
    step(optimizer, p)
print(count() - before)
"""
    for threads in (1, 2):
        assert run(SETUP + program.format(threads=threads)) == "0"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_child_steps_on():
    """The child uses one thread, as torch's own operators must in a forked child."""
    program = """
torch.set_num_threads(1)
p = torch.nn.Parameter(torch.zeros(1_000_000))
optimizer = npp.NAdam([p])
step(optimizer, p)
child = os.fork()
if child == 0:
    signal.alarm(60)
    step(optimizer, p)
    os._exit(0 if float(optimizer.state[p]["step"]) == 2 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), float(optimizer.state[p]["step"]))
"""
    assert run(SETUP + program) == "0 1.0"
