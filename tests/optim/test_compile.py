"""A training step under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import nesterov_pp as npp


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised by the tracer
@pytest.mark.parametrize("name", ["NAdam", "AdamW", "NAG", "Lion"])
def test_a_compiled_training_step_is_the_eager_one_and_a_changed_lr_does_not_recompile(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(compiled: bool) -> tuple[list[torch.Tensor], list[int]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = getattr(npp, name)(model.parameters(), lr=1e-2)

        def train(x: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = torch.compile(train, backend=counter) if compiled else train
        losses, compilations = [], []
        for t in range(8):
            optimizer.param_groups[0]["lr"] = 1e-2 / (t + 1)
            losses.append(step(torch.randn(4, 8)))
            compilations.append(counter.frame_count)
        return [*losses, *(p.detach() for p in model.parameters())], compilations

    eager, _ = run(compiled=False)
    compiled, compilations = run(compiled=True)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert compilations[-1] > 0
    assert compilations[-1] == compilations[2]
