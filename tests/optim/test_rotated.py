"""The rotated optimizers as torch optimizers; their equations are tested with the recipes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backends import BACKENDS
from tolerances import MANY_STEPS
from torch import nn

import nesterov_pp as npp
from nesterov_pp.optim import bases
from nesterov_pp.optim.stacks import block_side

F64 = torch.float64
RULES = [npp.RotatedNAdam, npp.RotatedAdamW]
WIDTH = 6


def net(dtype: torch.dtype = F64, seed: int = 0) -> nn.Sequential:
    """Return layers with square and long matrices, two of one shape, vectors, and a convolution's tensor."""
    torch.manual_seed(seed)
    layers = [
        nn.Linear(WIDTH, WIDTH),
        nn.Linear(WIDTH, 4 * WIDTH),
        nn.Linear(4 * WIDTH, WIDTH),
        nn.Linear(WIDTH, WIDTH),
    ]
    model = nn.Sequential(*layers).to(dtype)
    model.register_parameter("conv", nn.Parameter(torch.randn(2, 3, 2, 2, dtype=dtype)))
    return model


def gradients(model: nn.Module, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=F64).to(p)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for k in steps:
        gradients(model, k)
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance or {"rtol": 0.0, "atol": 0.0})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["no side is short enough", "every basis is the identity"])
def test_without_a_rotation_it_is_the_plain_rule(rule: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "every basis is the identity":
        monkeypatch.setattr(bases, "first_basis", lambda c: torch.eye(c.shape[-1], dtype=c.dtype).expand_as(c))
        monkeypatch.setattr(bases, "is_refreshed", lambda t, every: False)
        options = {}
    else:
        options = {"block_size": 1}
    a, b = net(), net()
    same = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    plain: Any = npp.NAdam if rule is npp.RotatedNAdam else npp.AdamW
    decoupled = {"decoupled_weight_decay": True} if plain is npp.NAdam else {}
    train(a, rule(a.parameters(), **same, **options), range(30))
    train(b, plain(b.parameters(), **same, **decoupled), range(30))
    assert_same(a, b, **MANY_STEPS[F64])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_every_backend_steps_alike(rule: Any, dtype: torch.dtype, backend: str) -> None:
    """On its device, where new bases may be computed in another way, as the reference on the host in float64.

    Where a covariance is singular or a rotated gradient 0, as off the diagonal in the first step, only rounding errors
    are left: the matrices are square, and eps is larger than such errors.
    """
    torch.manual_seed(0)
    begun = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).to(F64)
    ours = copy.deepcopy(begun).to(torch.get_default_device(), dtype)
    judge = copy.deepcopy(begun).to("cpu")
    for model, which in ((ours, backend), (judge, "reference")):
        train(model, rule(model.parameters(), lr=1e-2, eps=1e-2, refresh_every=3, backend=which), range(12))
    ends = [[p.detach().to("cpu", F64) for p in model.parameters()] for model in (ours, judge)]
    torch.testing.assert_close(*ends, **(MANY_STEPS[F64] if dtype == F64 else {"rtol": 1e-3, "atol": 1e-3}))


@pytest.mark.parametrize("rule", RULES)
def test_a_rotated_problem_is_stepped_alike(rule: Any) -> None:
    """With weights and gradients turned by orthogonal matrices, the steps are turned too; a plain rule's are not."""
    torch.manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q for n in (5, 5))
    w = torch.randn(5, 5, dtype=F64)
    a, b = nn.Parameter(w.clone()), nn.Parameter(left @ w @ right)
    first, second = (rule([p], lr=1e-2, refresh_every=3) for p in (a, b))
    for k in range(12):
        g = torch.randn(5, 5, generator=torch.Generator().manual_seed(k), dtype=F64)
        a.grad, b.grad = g.clone(), left @ g @ right
        first.step()
        second.step()
    torch.testing.assert_close(left @ a @ right, b, rtol=1e-6, atol=1e-8)
    assert (a - w).abs().max() > 0.05


@pytest.mark.parametrize("rule", RULES)
def test_matrices_of_one_shape_are_stepped_as_each_alone(rule: Any) -> None:
    a, b = net(), net()
    train(a, rule(a.parameters(), refresh_every=4), range(13))
    alone = [rule([p], refresh_every=4) for p in b.parameters()]
    for k in range(13):
        gradients(b, k)
        for optimizer in alone:
            optimizer.step()
    assert_same(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_blocks_of_a_long_matrix_are_stepped_as_matrices(rule: Any) -> None:
    whole = nn.Parameter(torch.randn(2 * WIDTH, 3 * WIDTH, generator=torch.Generator().manual_seed(0), dtype=F64))
    cut = [[nn.Parameter(b.clone()) for b in row.detach().split(WIDTH, 1)] for row in whole.split(WIDTH)]
    one = rule([whole], block_size=WIDTH, refresh_every=4, covariance_every=2)
    other = rule([b for row in cut for b in row], refresh_every=4, covariance_every=2)
    for k in range(25):
        whole.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(k), dtype=F64)
        for row, grads in zip(cut, whole.grad.split(WIDTH), strict=True):
            for b, g in zip(row, grads.split(WIDTH, 1), strict=True):
                b.grad = g.clone()
        one.step()
        other.step()
    torch.testing.assert_close(whole, torch.cat([torch.cat(row, 1) for row in cut]), **MANY_STEPS[F64])
    assert one.state[whole]["basis_0"].shape == (6, WIDTH, WIDTH)


@pytest.mark.parametrize("block_size", [4, 1024])
def test_a_transposed_view_is_stepped_like_its_copy(block_size: int) -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    view, copied = nn.Parameter(weight.clone().t()), nn.Parameter(weight.t().contiguous())
    optimizers = [npp.RotatedNAdam([p], refresh_every=3, block_size=block_size) for p in (view, copied)]
    for k in range(25):
        view.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(k), dtype=F64).t()
        copied.grad = view.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(view, copied, **MANY_STEPS[F64])
    assert not view.is_contiguous()


@pytest.mark.parametrize(
    ("length", "largest", "side"),
    [(6, 6, 6), (6, 8, 6), (12, 6, 6), (12, 8, 6), (192, 128, 96), (10, 8, 5), (50257, 1024, 50257), (7, 6, 7)],
)
def test_long_sides_are_cut_into_equal_blocks_if_they_can_be(length: int, largest: int, side: int) -> None:
    assert block_side(length, largest) == side


def test_bases_are_refreshed_more_often_at_the_beginning() -> None:
    assert [t for t in range(1, 61) if bases.is_refreshed(t, 5)] == [
        *range(1, 20),
        *range(20, 30, 2),
        *range(30, 40, 3),
        40,
        44,
        48,
        50,
        55,
        60,
    ]


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_without_a_gradient_stays_and_is_not_counted(rule: Any) -> None:
    a, b = net(), net()
    one, other = (rule(m.parameters(), refresh_every=3) for m in (a, b))
    still = a[3].weight.detach().clone()
    for k in range(8):
        gradients(a, k)
        gradients(b, k)
        a[3].weight.grad = b[3].weight.grad = None
        if k % 2:
            a[0].weight.grad = None
            b[0].weight.grad = None
        one.step()
        other.step()
    assert torch.equal(a[3].weight, still)
    assert float(one.state[a[3].weight]["step"]) == 0
    assert float(one.state[a[0].weight]["step"]) == 4
    assert_same(a, b)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("at", [5, 6, 7])
def test_a_checkpoint_goes_on_bit_for_bit(rule: Any, at: int, tmp_path: Any) -> None:
    whole, model = net(torch.float32), net(torch.float32)
    train(whole, rule(whole.parameters(), refresh_every=3, max_grad_norm=1.0), range(20))
    optimizer = rule(model.parameters(), refresh_every=3, max_grad_norm=1.0)
    train(model, optimizer, range(at))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    again = net(torch.float32, seed=9)
    again.load_state_dict(saved["model"])
    resumed = rule(again.parameters(), refresh_every=3, max_grad_norm=1.0)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(at, 20))
    assert_same(again, whole)


@pytest.mark.parametrize("rule", RULES)
def test_late_steps_in_a_ring_are_those_of_one_copy(rule: Any) -> None:
    """The step reads the newest slot, writes the next one, and takes the gradient of an older one."""
    module, plain = net(torch.float32), net(torch.float32)
    stash = npp.WeightStash(module, 3)
    ringed = rule(module.parameters(), stash=stash, refresh_every=4, max_grad_norm=2.0)
    single = rule(plain.parameters(), refresh_every=4, max_grad_norm=2.0)
    for k in range(11):
        late = max(0, stash.newest - 2)
        gradients(plain, k)
        for leaf, p in zip(stash.parameters(late).values(), plain.parameters(), strict=True):
            leaf.grad = None if p.grad is None else 2.0 * p.grad
        ringed.step(version=late, microbatches=2)
        single.step()
    for ours, p in zip(stash.weights().values(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, p, **MANY_STEPS[torch.float32])
    assert ringed.last_grad_norm == pytest.approx(float(single.last_grad_norm), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_a_float32_state(dtype: torch.dtype) -> None:
    low, wide = net(dtype), net(dtype).float()
    optimizer, other = (npp.RotatedNAdam(m.parameters(), lr=1e-2) for m in (low, wide))
    for k in range(5):
        gradients(low, k)
        for p, q in zip(low.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        other.step()
    assert {t.dtype for s in optimizer.state.values() for n, t in s.items() if n != "step"} <= {torch.float32, F64}
    for p, q in zip(low.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(
            p.float(), q, rtol=0.0, atol=5 * torch.finfo(dtype).eps * float(q.detach().abs().max())
        )


def test_groups_have_their_own_hyper_parameters() -> None:
    a, b = net(), net()
    ours = npp.RotatedNAdam(
        [{"params": a[0].parameters(), "lr": 1e-3}, {"params": a[3].parameters(), "betas": (0.5, 0.9)}]
    )
    train(a, ours, range(9))
    train(b, npp.RotatedNAdam(b[0].parameters(), lr=1e-3), range(9))
    train(b, npp.RotatedNAdam(b[3].parameters(), betas=(0.5, 0.9)), range(9))
    assert_same(a[0], b[0], rtol=1e-9, atol=1e-11)
    assert_same(a[3], b[3], rtol=1e-9, atol=1e-11)


def test_a_horizon_looks_further_ahead_and_maximize_goes_the_other_way() -> None:
    a, b, c = net(), net(), net()
    train(a, npp.RotatedNAdam(a.parameters(), weight_decay=0.0), range(4))
    further = npp.RotatedNAdam(b.parameters(), weight_decay=0.0)
    for group in further.param_groups:
        group["horizon"] = 4.0
    train(b, further, range(4))
    assert not torch.allclose(a[0].weight, b[0].weight)
    train(c, npp.RotatedNAdam(c.parameters(), weight_decay=0.0, maximize=True), range(4))
    torch.testing.assert_close(c[0].weight - net()[0].weight, net()[0].weight - a[0].weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"refresh_every": 0}, "refresh_every must be a whole number of at least 1, not 0"),
        ({"block_size": 2.5}, "block_size must be a whole number of at least 1, not 2.5"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"backend": "cuda"}, "backend 'cuda' cannot be used"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ],
)
def test_bad_hyper_parameters(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        npp.RotatedNAdam(net().parameters(), **options)
    assert sentence in str(error.value)


def test_bad_steps_change_nothing() -> None:
    model = net()
    optimizer = npp.RotatedNAdam(model.parameters())
    train(model, optimizer, range(2))
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    gradients(model, 2)
    for step in (lambda: optimizer.step(version=0), lambda: optimizer.step(microbatches=0)):
        with pytest.raises(ValueError):
            step()
    model[1].weight.grad = model[1].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="rotated optimizers do not support sparse gradients"):
        optimizer.step()
    after = [model.state_dict(), optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)


def test_a_first_gradient_without_an_eigenbasis_is_refused() -> None:
    model = net()
    optimizer = npp.RotatedNAdam(model.parameters())
    gradients(model, 0)
    model[2].weight.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="the first gradient of parameter 5 is not finite"):
        optimizer.step()
    assert_same(model, net())
    assert all(float(s["step"]) == 0 and not s["exp_avg"].any() for s in optimizer.state.values())


@pytest.mark.parametrize("failing", [(), (torch.float32,), (torch.float32, F64)])
@pytest.mark.parametrize("raises", [True, False])
def test_a_first_gradient_of_low_rank_has_a_basis(failing: Any, raises: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding's, with equal rows and rows of zeros, on whose covariances LAPACK fails in float32."""
    eigh = torch.linalg.eigh

    def failing_eigh(c: torch.Tensor) -> Any:
        found = eigh(c)
        if c.dtype in failing and raises:
            raise torch.linalg.LinAlgError("did not converge")
        if c.dtype in failing:
            found.eigenvectors[0] = float("nan")
        return found

    monkeypatch.setattr(torch.linalg, "eigh", failing_eigh)
    p = nn.Parameter(torch.zeros(1024, 64))
    counts = torch.poisson(torch.full((1024, 1), 0.25), generator=torch.Generator().manual_seed(0))
    optimizer = npp.RotatedNAdam([p], lr=1e-2, weight_decay=0.0, block_size=64)
    for _ in range(3):
        p.grad = 16.0 * counts.expand(1024, 64).contiguous()
        optimizer.step()
    basis = optimizer.state[p]["basis_0"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(64).expand_as(basis), rtol=0.0, atol=1e-5)
    assert bool(torch.isfinite(p).all())
    assert float((p.detach() * counts).sum()) < 0.0


@pytest.mark.parametrize("rank", [1, 5, 200])
@pytest.mark.parametrize("side", [6, 64])
def test_q_by_cholesky_is_that_of_the_decomposition(side: int, rank: int) -> None:
    """For the images of power iterations, also those of covariances that are hardly of full rank."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -6, side)[:, None]
    gradients = spread * torch.randn(3, side, rank, generator=generator)
    turned = torch.linalg.qr(torch.randn(3, side, side, generator=generator)).Q
    covariance = turned @ (gradients @ gradients.mT) @ turned.mT
    image = torch.bmm(covariance, bases.first_basis(covariance))
    found, failed = bases.cholesky_q(image)
    exact = torch.linalg.qr(image).Q
    assert not failed.any()
    torch.testing.assert_close(found.mT @ found, torch.eye(side).expand_as(found), rtol=0.0, atol=1e-6)
    torch.testing.assert_close((found * exact).sum(1).abs(), torch.ones(3, side), rtol=0.0, atol=1e-3)


def test_q_by_cholesky_says_where_it_failed() -> None:
    image = torch.eye(4).repeat(3, 1, 1)
    image[1, 2, 2] = float("nan")
    found, failed = bases.cholesky_q(image)
    assert failed.tolist() == [False, True, False]
    assert torch.equal(found[0], torch.eye(4))


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="a parameter is complex; rotated optimizers only step real, unsharded"):
        npp.RotatedNAdam([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("versions", [None, 3])
def test_the_master_is_a_float32_run_and_the_parameter_its_rounding(
    rule: Any, dtype: torch.dtype, versions: int | None
) -> None:
    low, full = net(dtype), net(dtype).float()
    stash = None if versions is None else npp.WeightStash(low, versions)
    ours = rule(low.parameters(), lr=1e-2, block_size=8, refresh_every=3, stash=stash, master_weights=True)
    theirs = rule(full.parameters(), lr=1e-2, block_size=8, refresh_every=3)
    states = list(ours.state.values())
    for k in range(12):
        gradients(low, k)
        for p, q in zip(low.parameters(), full.parameters(), strict=True):
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        for p, q, state in zip(low.parameters(), full.parameters(), states, strict=True):
            assert torch.equal(state["master_weight"], q)
            assert torch.equal(p, q.to(dtype))
    with torch.no_grad():
        low[0].weight[0] = 7.0  # the master follows, and the state goes on bit for bit
    again = net(dtype)
    again.load_state_dict(copy.deepcopy(low.state_dict()))
    other = rule(again.parameters(), lr=1e-2, block_size=8, refresh_every=3, master_weights=True)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(low, ours, range(12, 15))
    train(again, other, range(12, 15))
    assert_same(low, again)
    assert (low[0].weight[0] > 6.0).all()
