"""8-bit differences of versions: errors, bits on every instruction set, special values, tails."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nesterov_pp.kernels import differences, extension

DTYPES = differences.DTYPES
MODULE = extension.load()[0]
SIZES = [(1,), (31,), (32,), (33,), (64,), (65,), (7, 19), (0,), (300, 70)]


def compiled() -> list[str | None]:
    return [None] if MODULE is None else [None, *MODULE.isas()]


@pytest.fixture(params=compiled())
def isa(request, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    """Use plain torch (None), or the C++ kernel with one of the instruction sets."""
    if request.param is None:
        monkeypatch.setattr(differences, "_compiled", lambda tensors: False)
        yield None
        return
    before = MODULE.isa()
    MODULE.set_isa(request.param)
    yield request.param
    MODULE.set_isa(before)


def unavailable() -> str | None:
    """Return why the Triton kernels cannot run here: they take a GPU, or Triton's interpreter."""
    kernels = differences._triton_kernels()
    if kernels is None:
        return "Triton does not work"
    return None if torch.cuda.is_available() or kernels.INTERPRETED else "there is no GPU"


def tensors(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, generator=g).to(dtype) for size in SIZES]
    image = torch.randn(3, 5, 4, 2, generator=g).to(dtype).to(memory_format=torch.channels_last)
    return [*drawn, image, torch.randn(6, 9, generator=g).to(dtype).T]


def chain(dtype: torch.dtype, lr: float, rows: int = 7) -> list[list[Tensor]]:
    versions = [tensors(dtype)]
    for k in range(rows):
        moves = tensors(torch.float32, seed=k + 1)
        versions.append([(w.float() + lr * d).to(dtype) for w, d in zip(versions[-1], moves, strict=True)])
    return versions


def kept(versions: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    codes, scales = differences.new_rows(versions[0], len(versions) - 1)
    for row in range(len(versions) - 1):
        differences.encode(versions[row], versions[row + 1], codes, scales, row)
    return codes, scales


def decoded(versions: list[list[Tensor]], codes: Tensor, scales: Tensor, version: int = 0) -> list[Tensor]:
    out = [torch.full_like(t, torch.nan) for t in versions[0]]
    rows = list(range(len(versions) - 2, version - 1, -1))
    differences.decode(versions[-1], out, codes, scales, rows)
    return out


def norm(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=True)).sqrt())


@pytest.mark.parametrize("lr", [1e-2, 1e-5])
def test_the_version_seven_updates_ago_is_within_a_hundredth_of_the_distance(isa, lr):
    versions = chain(torch.float32, lr)
    codes, scales = kept(versions)
    for version in (0, 3, 6):
        error = norm(decoded(versions, codes, scales, version), versions[version])
        assert 0.0 < error < 0.01 * norm(versions[-1], versions[version])


def test_every_element_is_within_half_a_code_of_each_difference(isa):
    versions = chain(torch.float32, 1e-2, rows=1)
    codes, scales = kept(versions)
    found, groups = decoded(versions, codes, scales), scales.float()
    place = 0
    for t, out, before in zip(versions[1], found, versions[0], strict=True):
        step = groups[0, place // 32 :].repeat_interleave(32)[: t.numel()]
        apart = (differences.flat(out) - differences.flat(before)).abs()
        # The largest code may stand for a little more than 127 steps, as the scale is rounded to 8 bits.
        assert (apart <= 0.76 * step + 1e-6).all()
        place += differences.codes_of(t.numel())
    assert place == codes.shape[1]


@pytest.mark.parametrize("lr", [1e-3, 1e-6, 1e-39])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_instruction_sets_give_the_bits_of_plain_torch(monkeypatch, dtype, lr):
    if MODULE is None:
        pytest.skip("there is no compiled extension")
    versions, results = chain(dtype, lr), []
    before = MODULE.isa()
    for isa in compiled():
        with monkeypatch.context() as context:
            if isa is None:
                context.setattr(differences, "_compiled", lambda tensors: False)
            else:
                MODULE.set_isa(isa)
            codes, scales = kept(versions)
            results.append([codes, scales, *decoded(versions, codes, scales)])
    MODULE.set_isa(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
@pytest.mark.parametrize("lr", [1e-3, 1e-6, 1e-39])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_gives_the_bits_of_plain_torch(monkeypatch, dtype, lr):
    """Whole and cut groups, every alignment, and more than one chunk of a tensor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    longer = torch.randn(9001, generator=torch.Generator().manual_seed(0)).to(dtype)
    versions, results = chain(dtype, lr), []
    for k, version in enumerate(versions):
        version.extend([longer + k * lr, (longer * (1 + k * lr))[1:]])
    there = [[t.to(device) for t in version[:-1]] + [version[-1].to(device)] for version in versions]
    for version, host in zip(there, versions, strict=True):
        version[-1] = torch.cat([version[-1].new_zeros(1), version[-1]])[1:]  # at an odd address
        host[-1] = host[-1].clone()
    kernels = differences._triton_kernels()
    for chosen, of in ((lambda tensors: None, versions), (lambda tensors: kernels, there)):
        with monkeypatch.context() as context:
            context.setattr(differences, "_compiled", lambda tensors: False)
            context.setattr(differences, "_triton", chosen)
            codes, scales = kept(of)
            results.append([codes, scales, *decoded(of, codes, scales), *decoded(of, codes, scales, 5)])
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_torch_gives_the_same_bits_on_a_gpu(monkeypatch, dtype):
    versions = chain(dtype, 1e-3)
    there = [[t.cuda() for t in version] for version in versions]
    monkeypatch.setattr(differences, "_triton", lambda tensors: None)
    results = [[*kept(of), *decoded(of, *kept(of))] for of in (versions, there)]
    for host, ours in zip(*results, strict=True):
        assert torch.equal(host, ours.cpu())


def test_the_bits_do_not_depend_on_the_number_of_threads():
    versions = [[torch.randn(700_001)]]
    versions.append([versions[0][0] + 1e-3 * torch.randn(700_001)])
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        codes, scales = kept(versions)
        results.append((codes, scales, decoded(versions, codes, scales)[0]))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_equal_versions_are_decoded_exactly(isa):
    versions = [tensors(torch.float32)] * 4
    codes, scales = kept(versions)
    assert not codes.any()
    assert not scales.any()
    assert all(torch.equal(a, b) for a, b in zip(decoded(versions, codes, scales), versions[0], strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_in_its_group_alone(isa, bad):
    before = [torch.zeros(100)]
    after = [torch.ones(100)]
    after[0][40] = bad
    codes, scales = kept([before, after])
    found = decoded([before, after], codes, scales)[0]
    assert found[32:64].isnan().all()
    assert found[:32].abs().max() < 1 / 254
    assert found[64:].abs().max() < 1 / 254


def test_differences_too_small_for_a_scale_are_dropped(isa):
    before, after = [torch.zeros(32)], [torch.full((32,), 1e-44)]
    codes, scales = kept([before, after])
    assert not codes.any()
    assert torch.equal(decoded([before, after], codes, scales)[0], after[0])


def test_all_codes_are_used_and_monotone(isa):
    wanted = torch.arange(-127, 128).float()
    found = []
    for part in wanted.split(31):  # the last place of each group has the largest difference
        before, after = [torch.zeros(32)], [torch.cat([part.repeat(31 // len(part) + 1)[:31], torch.tensor([127.0])])]
        codes, scales = kept([before, after])
        assert scales[0, 0] == 1.0
        found.append(codes[0, : len(part)])
        assert torch.equal(decoded([before, after], codes, scales)[0], before[0])
    assert torch.equal(torch.cat(found).float(), wanted)


def test_codes_are_rounded_to_even(isa):
    after = [torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 0.51])]
    codes, _ = kept([[torch.zeros(9)], after])
    assert codes[0, :9].tolist() == [127, 0, 2, 2, 0, -2, -2, 0, 1]


@pytest.mark.skipif(MODULE is None, reason="there is no compiled extension")
def test_the_kernel_refuses_what_does_not_fit():
    codes, scales = differences.new_rows([torch.zeros(40)], 2)
    encode = torch.ops.nesterov_pp.encode_differences
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        encode([torch.zeros(40).double()], [torch.zeros(40).double()], codes, scales, 0)
    with pytest.raises(ValueError, match="laid out"):
        encode([torch.zeros(40)], [torch.zeros(80)[::2]], codes, scales, 0)
    with pytest.raises(ValueError, match=r"int8 of shape \[rows, 128\]"):
        encode([torch.zeros(100)], [torch.zeros(100)], codes, scales, 0)
    with pytest.raises(ValueError, match="no row 2"):
        encode([torch.zeros(40)], [torch.zeros(40)], codes, scales, 2)


@pytest.fixture
def asked_again() -> Iterator[None]:
    differences.why_not_triton.cache_clear()
    yield
    differences.why_not_triton.cache_clear()


@pytest.mark.usefixtures("asked_again")
def test_plain_torch_takes_over_where_triton_cannot_compile(monkeypatch):
    def encode(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nsecond line")

    def refused(device: torch.device) -> str | None:
        monkeypatch.setattr(differences, "_triton_kernels", lambda: SimpleNamespace(encode=encode))
        return differences.why_not_triton(device)

    with pytest.warns(RuntimeWarning, match="encoded by plain torch, which is slower: Triton cannot run its kernels"):
        reason = refused(torch.device("cpu"))
    assert reason == (
        "Triton cannot run its kernels (Failed to find C compiler. Please specify via CC environment variable.)"
    )
    on_gpu = [SimpleNamespace(is_cuda=True, device=torch.device("cpu"))]
    assert differences._triton(on_gpu) is None  # type: ignore[arg-type]
    differences.why_not_triton.cache_clear()
    monkeypatch.setattr(differences, "_triton_kernels", lambda: None)
    assert differences.why_not_triton(torch.device("cpu")) == "Triton cannot be imported"


@pytest.mark.usefixtures("asked_again")
def test_triton_is_taken_where_it_runs(monkeypatch):
    kernels = SimpleNamespace(encode=lambda *_: None)
    monkeypatch.setattr(differences, "_triton_kernels", lambda: kernels)
    on_gpu = [SimpleNamespace(is_cuda=True, device=torch.device("cpu"))]
    assert differences._triton(on_gpu) is kernels  # type: ignore[arg-type]
    assert differences._triton([torch.zeros(1)]) is None
