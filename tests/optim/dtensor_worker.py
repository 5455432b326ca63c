"""Run one of two processes that step sharded parameters: ``dtensor_worker.py SCENARIO RANK STORE``."""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dist_checkpoint
import torch.distributed.checkpoint.state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import nesterov_pp as npp
from nesterov_pp.pipeline.distributed.replicas import check_shards

STEPS = 5


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """Build a model whose 7 and 5 rows split unevenly; the second process has nothing of the last layer's one row."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a batch that is the same on both processes, so that their mean is exact."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(t)).to(dtype)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, dtype=torch.float32) -> None:
    for t in steps:
        optimizer.zero_grad()
        net(batch(t, dtype)).square().mean().backward()
        optimizer.step()


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def shard(net: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    for layer in net:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def assert_equal(sharded: torch.nn.Module, plain: torch.nn.Module) -> None:
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(whole(p), q.detach()), f"{name}: {whole(p)} and {q}"


def fsdp(mesh: DeviceMesh, make: Callable, dtype: torch.dtype = torch.float32) -> None:
    """Check that a sharded run equals the unsharded run bit for bit, before and after a checkpoint."""
    plain, sharded = model(dtype), shard(model(dtype), mesh)
    ours, theirs = make(sharded.parameters()), make(plain.parameters())
    assert ours.backend == "cpu"
    train(sharded, ours, range(STEPS), dtype)
    train(plain, theirs, range(STEPS), dtype)
    assert_equal(sharded, plain)
    assert all(p.to_local().numel() == 0 for p in sharded[4].parameters()) == (dist.get_rank() == 1)
    for p in sharded.parameters():
        assert isinstance(ours.state[p]["exp_avg"], DTensor)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(sharded, ours))
    again = make(sharded.parameters())
    dcp.set_optimizer_state_dict(sharded, again, saved)
    train(sharded, again, range(STEPS, 2 * STEPS), dtype)
    train(plain, theirs, range(STEPS, 2 * STEPS), dtype)
    assert_equal(sharded, plain)


def fsdp_nadam(mesh: DeviceMesh) -> None:
    fsdp(mesh, lambda ps: npp.NAdam(ps, lr=1e-2))


def fsdp_nag(mesh: DeviceMesh) -> None:
    fsdp(mesh, lambda ps: npp.NAG(ps, lr=1e-2))


def fsdp_masters(mesh: DeviceMesh) -> None:
    fsdp(mesh, lambda ps: npp.NAdam(ps, lr=1e-2, master_weights=True), torch.bfloat16)


SMALL = [{"state_dtype": "8bit"}, {"master_weights": "24bit"}, {"state_dtype": "8bit", "master_weights": "24bit"}]


def deep(dtype: torch.dtype) -> torch.nn.Sequential:
    """Build a model whose shards end within a group of 32 elements."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 41), torch.nn.Tanh(), torch.nn.Linear(41, 1)).to(dtype)


def gradient(p: torch.Tensor, seed: int) -> torch.Tensor:
    drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
    return distribute_tensor(drawn, p.device_mesh, p.placements) if isinstance(p, DTensor) else drawn


def fsdp_small_state(mesh: DeviceMesh) -> None:
    """Check that shards are stepped with the bits of plain tensors like them, groups beginning with the shard."""
    for kind in (npp.NAdam, npp.AdamW, npp.NAG, npp.Lion):
        for options in SMALL:
            sharded = shard(deep(torch.bfloat16), mesh)
            plain = [torch.nn.Parameter(p.to_local().detach().clone()) for p in sharded.parameters()]
            ours, theirs = kind(sharded.parameters(), lr=1e-2, **options), kind(plain, lr=1e-2, **options)
            assert ours.backend == "cpu"
            for t in range(STEPS):
                for p, q in zip(sharded.parameters(), plain, strict=True):
                    p.grad = gradient(p, t)
                    q.grad = p.grad.to_local().clone()
                ours.step()
                theirs.step()
            for p, q in zip(sharded.parameters(), plain, strict=True):
                assert torch.equal(p.to_local(), q)
                for name, value in theirs.state[q].items():
                    found = ours.state[p][name]
                    found = found.to_local() if isinstance(found, DTensor) else found
                    assert torch.equal(found.flatten()[: value.numel()], value.flatten()), name


def fsdp_small_state_saved(mesh: DeviceMesh) -> None:
    """Check checkpoints: of shards, bit for bit; from and to wide state; and of other shards, refused."""
    for options in SMALL:
        sharded = shard(deep(torch.bfloat16), mesh)
        first = npp.NAdam(sharded.parameters(), lr=1e-2, **options)
        train(sharded, first, range(STEPS), torch.bfloat16)
        saved = copy.deepcopy(dcp.get_optimizer_state_dict(sharded, first))
        own, weights = copy.deepcopy(first.state_dict()), [p.detach().clone() for p in sharded.parameters()]
        with tempfile.TemporaryDirectory() as folder:
            path = [folder]
            dist.broadcast_object_list(path, src=0)
            dist_checkpoint.save(saved, checkpoint_id=f"{path[0]}/state")
            train(sharded, first, range(STEPS, 2 * STEPS), torch.bfloat16)
            expected = [whole(p) for p in sharded.parameters()]
            read = npp.NAdam(sharded.parameters(), lr=1e-2, **options)
            empty = dcp.get_optimizer_state_dict(sharded, read)
            dist_checkpoint.load(empty, checkpoint_id=f"{path[0]}/state")
            dist.barrier()
        for how in ("dcp", "from disk", "state_dict"):
            with torch.no_grad():
                for p, w in zip(sharded.parameters(), weights, strict=True):
                    p.copy_(w)
            again = npp.NAdam(sharded.parameters(), lr=1e-2, **options)
            if how == "state_dict":
                again.load_state_dict(copy.deepcopy(own))
            else:
                dcp.set_optimizer_state_dict(sharded, again, copy.deepcopy(saved) if how == "dcp" else empty)
            train(sharded, again, range(STEPS, 2 * STEPS), torch.bfloat16)
            assert all(torch.equal(whole(p), e) for p, e in zip(sharded.parameters(), expected, strict=True)), how
        wide = first.widened_state_dict()
        other = npp.NAdam(sharded.parameters(), lr=1e-2, master_weights=True)
        other.load_state_dict(copy.deepcopy(wide))
        back = npp.NAdam(sharded.parameters(), lr=1e-2, **options)
        back.load_state_dict(copy.deepcopy(other.state_dict()))
        for p in sharded.parameters():
            assert back.state[p].keys() == first.state[p].keys()
            assert torch.equal(whole(back.state[p]["exp_avg"]), whole(first.state[p]["exp_avg"]))
        if "state_dtype" in options:
            of_more = copy.deepcopy(own)
            key = next(iter(of_more["state"]))
            scales = of_more["state"][key]["exp_avg_scale"]
            of_more["state"][key]["exp_avg_scale"] = DTensor.from_local(
                torch.cat([scales.to_local()] * 2), mesh, scales.placements, run_check=False
            )
            with pytest.raises(ValueError, match=r"needs the scales of 2 shards .* save what widened_state_dict"):
                back.load_state_dict(of_more)
            elsewhere = copy.deepcopy(own)
            for entries in elsewhere["state"].values():
                if entries["exp_avg"].dim() == 2:
                    entries["exp_avg"] = entries["exp_avg"].redistribute(placements=[Shard(1)])
            with pytest.raises(
                ValueError, match=r"placed as \(Shard\(dim=1\),\), but its parameter as .*widened_state"
            ):
                back.load_state_dict(elsewhere)


def fsdp_stochastic(mesh: DeviceMesh) -> None:
    """Check that a rerun is the same; random bits depend on shards, so there is no unsharded run to compare with."""
    ends = []
    for _ in range(2):
        net = shard(model(torch.bfloat16), mesh)
        train(net, npp.AdamW(net.parameters(), lr=1e-2, stochastic_rounding=True), range(STEPS), torch.bfloat16)
        ends.append([whole(p) for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def clipping(mesh: DeviceMesh) -> None:
    """Check that the norm is that of all shards together, and that replicated or plain parameters count once."""
    plain, sharded = model(), model()
    for layer in sharded[:3]:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    sharded[4].weight = torch.nn.Parameter(distribute_tensor(sharded[4].weight.detach(), mesh, [Replicate()]))
    ours = npp.NAdam(sharded.parameters(), lr=1e-2, max_grad_norm=0.01)
    theirs = npp.NAdam(plain.parameters(), lr=1e-2, max_grad_norm=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad = distribute_tensor(q.grad, mesh, p.placements) if isinstance(p, DTensor) else q.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm, rtol=1e-6, atol=0.0)
    for p, q in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=1e-5, atol=1e-6)


def tensor_parallel(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    split = copy.deepcopy(plain)
    parallelize_module(split, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    ours, theirs = npp.NAdam(split.parameters(), lr=1e-2), torch.optim.NAdam(plain.parameters(), lr=1e-2)
    train(split, ours, range(STEPS))
    train(plain, theirs, range(STEPS))
    assert ours.backend == "cpu"
    for p, q in zip(split.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=1e-5, atol=1e-5)


def ring_of_shards(mesh: DeviceMesh) -> None:
    """Check a late stage with sharded weights: the steps work on the shards and equal those of the whole stage."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    split = copy.deepcopy(plain)
    parallelize_module(split, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    ends = []
    for net in (plain, split):
        stash = npp.WeightStash(net, versions=3)
        optimizer = npp.NAdam(net.parameters(), lr=1e-2, stash=stash)
        assert optimizer.backend == "cpu"
        in_flight = []
        for t in range(10):
            version = stash.newest
            with stash.use(version):
                in_flight.append((version, net(batch(t)).square().mean()))
            if len(in_flight) > 2:
                version, loss = in_flight.pop(0)
                loss.backward()
                optimizer.step(version=version)
        ends.append([whole(p) for p in net.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-5)


def refused_in_pipelines(mesh: DeviceMesh) -> None:
    """Check that fully_shard modules have one version only, and that tensor parallelism is refused in pipelines."""
    with pytest.raises(ValueError, match="fully_shard keeps one version of a module's weights, so a ring of 3"):
        npp.WeightStash(shard(model(), mesh), versions=3)
    npp.WeightStash(shard(model(), mesh), versions=1)
    split = torch.nn.Sequential(torch.nn.Linear(4, 8))
    parallelize_module(split, mesh, {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match="DTensor parameters that are not from fully_shard"):
        check_shards(split)
    stash = npp.WeightStash(split, versions=1)
    with (
        pytest.raises(ValueError, match='linearise_at="newest" cannot follow DTensor weights'),
        stash.use(0, linearise_at="newest"),
    ):
        pass


def nonfinite(mesh: DeviceMesh) -> None:
    """Check that a NaN in one process's shard raises in both processes, before either writes anything."""
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    optimizer = npp.NAdam([p], on_nonfinite="raise")
    grad = torch.ones(4, 2)
    grad[3, 0] = float("nan")
    p.grad = distribute_tensor(grad, mesh, [Shard(0)])
    whose = "parameter 0" if dist.get_rank() == 1 else "another rank"
    with pytest.raises(FloatingPointError, match=whose):
        optimizer.step()
    assert torch.equal(whole(p), torch.ones(4, 2))
    assert float(optimizer.state[p]["step"]) == 0


def scaled(p: torch.nn.Parameter, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Take three steps, the second of which overflows in the last row, which only the second process has."""
    scaler.scale(torch.ones(()))
    for t in range(3):
        grad = torch.arange(8.0).view(4, 2) * scaler.get_scale()
        if t == 1:
            grad[3, 0] = float("inf")
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        else:
            p.grad = grad.chunk(2)[dist.get_rank()].clone()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 500.0
    return whole(p)


def grad_scaler(mesh: DeviceMesh) -> None:
    """Check that an overflow in one process's shard makes both skip the step, and that the weights are torch's."""
    ends = []
    for make in (torch.optim.NAdam, npp.NAdam, lambda ps, **o: npp.NAdam(ps, fused=True, **o)):
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        ends.append(scaled(p, torch.amp.GradScaler("cpu", init_scale=1000.0), make([p], lr=1e-2)))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-5, atol=1e-6)


def sharded_grad_scaler(mesh: DeviceMesh) -> None:
    """Check FSDP1's scaler: parameters are plain tensors, and the scaler tells the other process of the overflow."""
    ends = []
    for cls in (torch.optim.NAdam, npp.NAdam):
        p = torch.nn.Parameter(torch.ones(2, 2))
        scaler = ShardedGradScaler("cpu", init_scale=1000.0, process_group=mesh.get_group())
        optimizer = cls([p], lr=1e-2)
        ends.append(scaled(p, scaler, optimizer))
        assert float(optimizer.state[p]["step"]) == 2
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def gradient_placed_otherwise(mesh: DeviceMesh) -> None:
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)]))
    q = torch.nn.Parameter(torch.zeros(3, 2))
    p.grad = distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Replicate()])
    q.grad = torch.arange(6.0).view(3, 2)
    npp.NAdam([p]).step()
    npp.NAdam([q]).step()
    assert torch.equal(whole(p), q.detach())


SCENARIOS = {
    f.__name__: f
    for f in (
        fsdp_nadam,
        fsdp_nag,
        fsdp_masters,
        fsdp_small_state,
        fsdp_small_state_saved,
        fsdp_stochastic,
        clipping,
        tensor_parallel,
        ring_of_shards,
        refused_in_pipelines,
        nonfinite,
        grad_scaler,
        sharded_grad_scaler,
        gradient_placed_otherwise,
    )
}


def main(names: str, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    run(names.split(","))
    gc.collect()  # a group that something still holds is not destroyed, and its thread may outlive the interpreter
    dist.barrier()
    dist.destroy_process_group()


def run(names: Sequence[str]) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name in names:
        SCENARIOS[name](mesh)
        print(f"passed {name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
