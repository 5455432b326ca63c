"""Parameters that are replaced, converted, added or dropped behind the optimizer's back, and the memory of dropped
ones."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from backends import BACKENDS
from tolerances import MANY_STEPS
from torch import nn

import nesterov_pp as npp

CLOSE = MANY_STEPS[torch.float32]
SHARED = ["NAdam", "AdamW"]
ALL = [*SHARED, "NAG"]


def optimizer_of(name: str, backend: str | None, params: object) -> torch.optim.Optimizer:
    """Return our optimizer on a backend, or torch's if ``backend`` is None: the one that loops."""
    if backend is None:
        return getattr(torch.optim, name)(params, lr=1e-2, foreach=False)
    return getattr(npp, name)(params, lr=1e-2, backend=backend)


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> list[torch.Tensor]:
    first = next(net.parameters())
    for t in range(count):
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(t)).to(first.device, first.dtype)
        optimizer.zero_grad()
        net(x).abs().square().mean().backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("named", [True, False])
def test_parameters_added_to_a_group_are_trained(named, name, backend):
    """This also holds if the group has only the names of the other parameters."""
    ends = []
    for which in (backend, None):
        net = model()
        body, head = net[0], net[2]
        optimizer = optimizer_of(name, which, body.named_parameters() if named else body.parameters())
        optimizer.param_groups[0]["params"].extend(head.parameters())
        ends.append(steps(net, optimizer))
        assert len(optimizer.state_dict()["state"]) == 4
    torch.testing.assert_close(*ends, **CLOSE)


def test_a_parameter_without_a_name_is_named_by_its_number():
    net = model()
    optimizer = npp.NAdam(net[0].named_parameters())
    optimizer.param_groups[0]["params"].extend(net[2].parameters())
    steps(net, optimizer, 1)
    net[2].bias.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^parameter 3 has a storage smaller"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHARED)
def test_the_same_parameter_twice_is_stepped_twice_with_torchs_warning(name, backend):
    ends = []
    for which in (backend, None):
        net = model()
        ps = list(net.parameters())
        with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
            optimizer = optimizer_of(name, which, [ps[0], ps[1], ps[0], ps[0]])
        ends.append([*steps(net, optimizer), float(optimizer.state[ps[0]]["step"]), optimizer.state[ps[0]]["exp_avg"]])
        again = optimizer_of(name, which, ps[1:])
        with pytest.raises(ValueError, match="loaded state dict contains a parameter group that doesn't match"):
            again.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(*ends, **CLOSE)
    assert ends[0][-2] == 9


def test_a_parameter_twice_in_a_later_group_is_stepped_by_that_groups_rates():
    ends = []
    for module in (npp, torch.optim):
        ps = list(model().parameters())
        with pytest.warns(UserWarning, match="duplicate"):
            optimizer = module.NAdam([{"params": ps[:2], "lr": 1.0}, {"params": [ps[2], ps[3], ps[2]], "lr": 1e-2}])
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
        ends.append([p.detach() for p in ps])
    torch.testing.assert_close(*ends, **CLOSE)


def test_the_same_parameter_twice_is_clipped_once():
    ends = []
    for twice in (False, True):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.full((3,), 100.0)
        if twice:
            with pytest.warns(UserWarning, match="duplicate"):
                optimizer = npp.NAdam([p, p], max_grad_norm=1.0)
            optimizer.step()
        else:
            optimizer = npp.NAdam([p], max_grad_norm=1.0)
            optimizer.step()
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_user_keeps_in_the_state_stays(backend):
    """torch.optim allows entries other than parameters in the state."""
    net = model()
    optimizer = npp.NAdam(net.parameters(), backend=backend)
    optimizer.register_step_post_hook(lambda o, *_: o.state.__setitem__("steps", o.state.get("steps", 0) + 1))
    optimizer.state["anything"] = True
    steps(net, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"]["anything"] is True
    assert saved["state"]["steps"] == 3
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.state["steps"] == 3
    other = model()
    other.load_state_dict(net.state_dict())
    again = npp.NAdam(other.parameters(), backend=backend)
    again.load_state_dict(copy.deepcopy(saved))
    for o, n in ((optimizer, net), (again, other)):
        steps(n, o)
    assert all(map(torch.equal, net.parameters(), other.parameters()))


# ---------------------------------------------------------------------- replaced parameters


@pytest.mark.parametrize("when", ["before the first step", "later"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_state_of_replaced_parameters_is_dropped(backend, when):
    """Accelerate with FSDP2 replaces parameters this way; a checkpoint may be the next call."""
    net = model()
    optimizer = npp.NAdam(net.parameters(), backend=backend)
    if when == "later":
        steps(net, optimizer)
    before = [weakref.ref(optimizer.state[p]["exp_avg"]) for p in net.parameters()]
    other = model(1)
    optimizer.param_groups[0]["params"][:] = other.parameters()
    saved = optimizer.state_dict()
    assert set(saved["state"]) == {0, 1, 2, 3}
    assert all(float(entry["step"]) == 0 for entry in saved["state"].values())
    assert set(map(id, optimizer.state)) == set(map(id, other.parameters()))
    gc.collect()
    assert not any(reference() is not None for reference in before)
    plain = model(1)
    expected = steps(plain, npp.NAdam(plain.parameters(), backend=backend))
    assert all(map(torch.equal, steps(other, optimizer), expected))


def test_dcp_after_parameters_were_replaced():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net = model()
    optimizer = npp.NAdam(net.parameters())
    other = model(1)
    optimizer.param_groups[0]["params"][:] = other.parameters()
    saved = get_optimizer_state_dict(other, optimizer)
    assert set(saved["state"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(
    "convert",
    [
        lambda net: net.double(),
        lambda net: net.bfloat16(),
        lambda net: net.half().double(),
        lambda net: net.to(torch.complex64),
        lambda net: net.to(torch.float32),
    ],
    ids=["double", "bfloat16", "half, double", "complex64", "float32"],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("swap", [False, True], ids=["data", "swapped"])
def test_a_model_converted_after_the_optimizer_was_made(swap, backend, convert, name):
    """State that was never stepped follows, whichever way ``module.to`` converts the parameters."""
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        results = []
        for which in (backend, None):
            net = model()
            optimizer = optimizer_of(name, which, net.parameters())
            convert(net)
            ends = steps(net, optimizer)
            results.append((ends, {p.dtype for p in ends}, optimizer.state[net[0].weight]["exp_avg"].dtype))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert results[0][1:] == results[1][1:]
    tolerance = {"rtol": 2e-2, "atol": 1e-2} if torch.bfloat16 in results[0][1] else CLOSE
    torch.testing.assert_close(results[0][0], results[1][0], **tolerance)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_can_be_swapped_after_a_step(backend, name):
    """``torch.utils.swap_tensors`` refuses a tensor to which someone else holds a reference."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net, plain = model(), model()
        optimizer = optimizer_of(name, backend, net.parameters())
        steps(net, optimizer)
        optimizer.zero_grad()
        net.to(torch.float64)
        net.to(torch.float32)
        steps(net, optimizer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    other = optimizer_of(name, backend, plain.parameters())
    steps(plain, other)
    steps(plain, other)
    assert all(map(torch.equal, net.parameters(), plain.parameters()))


@pytest.mark.parametrize("swap", [False, True], ids=["data", "swapped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_converted_after_a_step_is_refused_as_by_torch(backend, swap):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        net = model()
        optimizer = npp.NAdam(net.parameters(), backend=backend)
        steps(net, optimizer)
        optimizer.zero_grad()
        net.double()
        net(torch.ones(2, 7, dtype=torch.float64)).sum().backward()
        before = [p.detach().clone() for p in net.parameters()]
        with pytest.raises(ValueError, match="the first moment of parameter 0 is"):
            optimizer.step()
        assert all(map(torch.equal, net.parameters(), before))
        net.float()
        steps(net, optimizer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("name", SHARED)
def test_lazy_parameters(name):
    results = []
    for module in (npp, torch.optim):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))
        optimizer = getattr(module, name)(net.parameters(), lr=1e-2)
        torch.manual_seed(1)
        with torch.no_grad():
            net(torch.ones(1, 7))
        results.append(steps(net, optimizer))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("name", SHARED)
def test_meta_parameters_and_to_empty(name):
    results = []
    for module in (npp, torch.optim):
        with torch.device("meta"):
            net = model()
        optimizer = getattr(module, name)(net.parameters(), lr=1e-2)
        if module is npp:
            assert optimizer.state_dict()["state"][0]["exp_avg"].is_meta
        torch.__future__.set_swap_module_params_on_conversion(True)  # otherwise the module gets new parameters
        try:
            net.to_empty(device="cpu")
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        for i, p in enumerate(net.parameters()):
            with torch.no_grad():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) + i)
        results.append(steps(net, optimizer))
        assert not optimizer.state[net[0].weight]["exp_avg"].is_meta
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("name", ["NAdam", "AdamW"])
def test_fused_refuses_meta_parameters_in_torchs_words(name):
    with torch.device("meta"):
        net = model()
    optimizer = getattr(npp, name)(net.parameters(), fused=True)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"^`fused=True` requires all the params to be floating point Tensors of"):
        optimizer.step()
    assert all(float(entry["step"]) == 0 for entry in optimizer.state.values())


# ---------------------------------------------------------------------- parameters that are not stepped


@pytest.mark.parametrize("options", [{}, {"backend": "cpu"}, {"state_dtype": torch.float32}, {"master_weights": True}])
def test_frozen_parameters_may_be_anything(options):
    if options.get("backend") == "cpu" and "cpu" not in BACKENDS:
        pytest.skip("no compiled extension")
    net = model()
    frozen = [
        nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False),
        nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False),
        nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False),
        nn.Parameter(torch.ones(3, device="meta"), requires_grad=False),
        nn.Parameter(torch.ones(1).expand(4), requires_grad=False),
        nn.Parameter(torch.ones(4, dtype=torch.complex128), requires_grad=False),
    ]
    optimizer = npp.NAdam([*net.parameters(), *frozen], lr=1e-2, **options)
    plain = model()
    expected = steps(plain, npp.NAdam(plain.parameters(), lr=1e-2, **options))
    assert all(map(torch.equal, steps(net, optimizer), expected))
    if "backend" in options:
        assert optimizer.backend == "cpu"
    assert len(optimizer.state) == 4


# ---------------------------------------------------------------------- memory


@pytest.fixture
def resident() -> Iterator[object]:
    """Return a function that reads the memory in use, in MiB."""
    resource = pytest.importorskip("resource")

    def read() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    try:
        read()
    except OSError:
        pytest.skip("the system does not say")
    return read


@pytest.mark.parametrize("drop", ["pop", "del", "clear"])
def test_dropped_state_gives_its_memory_back(resident, drop):
    mib = 8
    ps = [nn.Parameter(torch.ones(mib * 2**18)) for _ in range(8)]
    optimizer = npp.NAdam(ps)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    full = resident()
    for p in ps[:6]:
        if drop == "pop":
            optimizer.state.pop(p)
        elif drop == "del":
            del optimizer.state[p]
    if drop == "clear":
        optimizer.state.clear()
    freed = full - resident()
    assert freed > 0.9 * 2 * mib * (8 if drop == "clear" else 6)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(float(optimizer.state[p]["step"]) == (1 if drop == "clear" or i < 6 else 2) for i, p in enumerate(ps))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("failing", ["overflow", "refused", "not finite", "not run"])
def test_no_gradient_outlives_a_step_that_was_not_taken(failing, backend):
    ps = [nn.Parameter(torch.ones(9)) for _ in range(2)]
    optimizer = npp.NAdam(
        ps, backend=backend, fused=True, on_nonfinite="raise" if failing == "not finite" else "ignore"
    )
    ps[0].grad = torch.ones(9)
    ps[1].grad = torch.full((9,), float("inf")) if failing == "not finite" else torch.ones(9)
    first, uses = weakref.ref(ps[0].grad), ps[0].grad._use_count()
    if failing == "overflow":
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.ones(1)
        optimizer.step()
    elif failing == "refused":
        optimizer.param_groups[0]["lr"] = float("nan")
        with pytest.raises(ValueError, match="cannot be stepped"):
            optimizer.step()
    elif failing == "not finite":
        with pytest.raises(FloatingPointError):
            optimizer.step()
    else:
        optimizer.step()
    assert ps[0].grad._use_count() == uses
    optimizer.zero_grad()
    gc.collect()
    assert first() is None


# ---------------------------------------------------------------------- threads


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_that_step_one_optimizer_wait_for_each_other(backend):
    ps = [nn.Parameter(torch.zeros(1000)) for _ in range(50)]
    optimizer = npp.NAdam(ps, lr=1e-3, backend=backend)
    for p in ps:
        p.grad = torch.ones(1000)
    failures: list[BaseException] = []

    def work(kind: int) -> None:
        try:
            for _ in range(20):
                if kind == 3:
                    optimizer.state_dict()
                    optimizer.load_state_dict(optimizer.state_dict())
                else:
                    optimizer.step()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(float(optimizer.state[p]["step"]) == 60 for p in ps)
    plain = [nn.Parameter(torch.zeros(1000)) for _ in range(50)]
    other = npp.NAdam(plain, lr=1e-3, backend=backend)
    for p in plain:
        p.grad = torch.ones(1000)
    for _ in range(60):
        other.step()
    assert all(map(torch.equal, ps, plain))
