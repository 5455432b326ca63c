"""The optimizer inside Accelerate, Lightning and the Hugging Face Trainer, against torch's in the same place.

They are not needed for anything else: ``pip install '.[frameworks]'``.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tolerances import MANY_STEPS
from torch.utils.data import DataLoader, TensorDataset

import nesterov_pp as npp

OPTIMIZERS = [(torch.optim.NAdam, {}), (npp.NAdam, {})]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # theirs
]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 8, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin())


def weights(net: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def import_quietly(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision, tmp_path):
    """Gradient accumulation, clipping, a scheduler, and a state that is saved, disturbed and loaded again."""
    accelerate = import_quietly("accelerate")
    results = []
    for optimizer_class, extra in OPTIMIZERS:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        net = model()
        optimizer = optimizer_class(net.parameters(), lr=1e-2, **extra)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=40)
        net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, DataLoader(data(), 4), scheduler)

        def epoch(net=net, optimizer=optimizer, loader=loader, scheduler=scheduler, accelerator=accelerator) -> None:
            for x, y in loader:
                with accelerator.accumulate(net):
                    accelerator.backward((net(x) - y).square().mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(net.parameters(), 0.1)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()

        epoch()
        folder = tmp_path / optimizer_class.__module__
        accelerator.save_state(str(folder))
        epoch()
        end = weights(net)
        accelerator.load_state(str(folder))
        epoch()
        assert all(torch.equal(a, b) for a, b in zip(weights(net), end, strict=True))
        results.append(end)
    torch.testing.assert_close(results[1], results[0], **MANY_STEPS[torch.float32])


def test_lightning(tmp_path):
    """Automatic optimization with its own closure, clipping, a scheduler, and resuming from its checkpoint."""
    lightning = import_quietly("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, optimizer_class, extra) -> None:
            super().__init__()
            self.net, self.optimizer_class, self.extra = model(), optimizer_class, extra

        def training_step(self, batch, _):
            x, y = batch
            return (self.net(x) - y).square().mean()

        def configure_optimizers(self):
            optimizer = self.optimizer_class(self.parameters(), lr=1e-2, **self.extra)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def trainer(epochs: int):
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            gradient_clip_val=0.1,
            accumulate_grad_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    results = []
    for optimizer_class, extra in OPTIMIZERS:
        module = Module(optimizer_class, extra)
        first = trainer(2)
        first.fit(module, DataLoader(data(), 4))
        checkpoint = tmp_path / f"{optimizer_class.__module__}.ckpt"
        first.save_checkpoint(checkpoint)
        resumed = Module(optimizer_class, extra)
        trainer(4).fit(resumed, DataLoader(data(), 4), ckpt_path=checkpoint)
        whole = Module(optimizer_class, extra)
        trainer(4).fit(whole, DataLoader(data(), 4))
        assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
        results.append(weights(whole))
    torch.testing.assert_close(results[1], results[0], **MANY_STEPS[torch.float32])


def test_hugging_face_trainer(tmp_path):
    transformers = import_quietly("transformers")
    import_quietly("accelerate")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, x, labels):
            output = self.net(x)
            return {"loss": (output - labels).square().mean(), "logits": output}

    rows = [{"x": x, "labels": y} for x, y in data()]

    def trainer(net: torch.nn.Module, optimizer_class, extra, folder):
        return transformers.Trainer(
            model=net,
            train_dataset=rows,
            optimizers=(optimizer_class(net.parameters(), lr=1e-2, **extra), None),
            args=transformers.TrainingArguments(
                output_dir=str(folder),
                num_train_epochs=4,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_grad_norm=0.1,
                warmup_steps=3,
                save_steps=6,
                save_strategy="steps",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                seed=0,
            ),
        )

    results = []
    for optimizer_class, extra in OPTIMIZERS:
        folder = tmp_path / optimizer_class.__module__
        whole = Net()
        start = copy.deepcopy(whole)
        trainer(whole, optimizer_class, extra, folder).train()
        trainer(start, optimizer_class, extra, folder).train(resume_from_checkpoint=str(folder / "checkpoint-12"))
        assert all(torch.equal(a, b) for a, b in zip(weights(start), weights(whole), strict=True))
        results.append(weights(whole))
    torch.testing.assert_close(results[1], results[0], **MANY_STEPS[torch.float32])
