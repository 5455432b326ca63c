"""The optimizer inside Accelerate, Lightning, Fabric and the Hugging Face Trainer, compared with torch's.

The frameworks are needed for these tests only: ``pip install '.[frameworks]'``.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from tolerances import MANY_STEPS
from torch.utils.data import DataLoader, TensorDataset

import nesterov_pp as npp

OPTIMIZERS = [(torch.optim.NAdam, {}), (npp.NAdam, {})]
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # from the frameworks
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
    """Use gradient accumulation, clipping and a scheduler; save the state, disturb it and load it again."""
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
    """Use automatic optimization with Lightning's closure, clipping, a scheduler, and resuming from its checkpoint."""
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


SCALE = 1000.0
"""The initial loss scale: not a power of two, so that a gradient left scaled or unscaled twice is noticed."""

OVERFLOW = 5
"""The batch whose loss is infinite if losses are scaled; two batches make a step."""


def cpu_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)


def called_steps(optimizer: torch.optim.Optimizer) -> list[float]:
    """Record the norm of the gradients after every call of ``step``, since a closure may compute them."""
    sizes: list[float] = []

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        sizes.append(float(torch.nn.utils.get_total_norm(grads)))

    optimizer.register_step_post_hook(hook)
    return sizes


class Seen(NamedTuple):
    """Results that must equal torch's: ``weights`` and ``sizes`` up to rounding, ``exact`` exactly."""

    weights: list[torch.Tensor]
    sizes: list[float]
    exact: list[Any]


def assert_same(ours: Seen, theirs: Seen, *, fused: bool = False) -> None:
    """Compare with torch; with ``fused``, torch's step writes unscaled gradients, and ours leaves them."""
    assert ours.exact == theirs.exact
    assert len(ours.sizes) == len(theirs.sizes)
    if not fused:
        assert ours.sizes == pytest.approx(theirs.sizes, rel=1e-4)
    torch.testing.assert_close(ours.weights, theirs.weights, **MANY_STEPS[torch.float32])


def mixed_lightning(optimizer_class, extra, precision: str, folder, **clipping: Any) -> Seen:
    """Train two epochs of 6 steps, each with its own rate; with a scaler, one step overflows."""
    lightning = import_quietly("lightning")
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = cpu_scaler() if precision == "16-mixed" else None
    seen: list[Any] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def training_step(self, batch, number):
            x, y = batch
            overflows = scaler is not None and (self.current_epoch, number) == (0, OVERFLOW)
            return (self.net(x) - y).square().mean() * (float("inf") if overflows else 1.0)

        def configure_optimizers(self):
            optimizer = optimizer_class(self.parameters(), lr=1e-2, **extra)
            self.sizes = called_steps(optimizer)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def on_before_optimizer_step(self, optimizer) -> None:
            seen.append(bool(self.net[0].weight.grad.isfinite().all()))

        def on_train_batch_end(self, *_: Any) -> None:
            lr = self.optimizers().param_groups[0]["lr"]
            seen.append((self.global_step, lr, None if scaler is None else scaler.get_scale()))

    module = Module()
    lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        plugins=[MixedPrecision(precision, "cpu", scaler)],
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **clipping,
    ).fit(module, DataLoader(data(), 4))
    return Seen(weights(module.net), module.sizes, seen)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning_clips_in_mixed_precision(precision, algorithm, tmp_path):
    limit = {"norm": 0.1, "value": 0.02}[algorithm]
    clipping = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    theirs, ours = (mixed_lightning(*made, precision, tmp_path, **clipping) for made in OPTIMIZERS)
    assert_same(ours, theirs)
    assert len(ours.sizes) == (11 if precision == "16-mixed" else 12)
    if algorithm == "norm":
        assert max(ours.sizes) <= limit * 1.0001


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_lightning_says_of_fused_ones_what_it_says_of_torchs(precision, tmp_path):
    """Both run without clipping and are refused with clipping, with the same message."""
    both = [(torch.optim.AdamW, {"fused": True}), (npp.AdamW, {"fused": True})]
    theirs, ours = (mixed_lightning(*made, precision, tmp_path) for made in both)
    assert_same(ours, theirs, fused=True)
    said = []
    for made in both:
        with pytest.raises(RuntimeError) as error:
            mixed_lightning(*made, precision, tmp_path, gradient_clip_val=0.1)
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "does not allow for gradient clipping" in said[0]


def mixed_fabric(optimizer_class, extra, precision: str, **limit: float) -> Seen:
    import_quietly("lightning")
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.precision import MixedPrecision

    scaler = cpu_scaler() if precision == "16-mixed" else None
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision(precision, "cpu", scaler)])
    net = model()
    optimizer = optimizer_class(net.parameters(), lr=1e-2, **extra)
    sizes, seen = called_steps(optimizer), []
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    net, optimizer = fabric.setup(net, optimizer)
    for number, (x, y) in enumerate(fabric.setup_dataloaders(DataLoader(data(), 4))):
        last = number % 2 == 1
        with fabric.no_backward_sync(net, enabled=not last):
            loss = (net(x) - y).square().mean()
            fabric.backward(loss * (float("inf") if scaler is not None and number == OVERFLOW else 1.0))
        if last:
            norm = fabric.clip_gradients(net, optimizer, error_if_nonfinite=False, **limit) if limit else None
            seen.append(None if norm is None else bool(norm.isfinite()))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            seen.append((scheduler.get_last_lr(), None if scaler is None else scaler.get_scale()))
    return Seen(weights(net), sizes, seen)


@pytest.mark.parametrize("limit", [{"max_norm": 0.1}, {"clip_val": 0.02}, {}], ids=["norm", "value", "none"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_fabric_clips_in_mixed_precision(precision, limit):
    theirs, ours = (mixed_fabric(*made, precision, **limit) for made in OPTIMIZERS)
    assert_same(ours, theirs)
    assert len(ours.sizes) == (5 if precision == "16-mixed" else 6)


def test_fabric_says_of_fused_ones_what_it_says_of_torchs():
    both = [(torch.optim.AdamW, {"fused": True}), (npp.AdamW, {"fused": True})]
    theirs, ours = (mixed_fabric(*made, "16-mixed") for made in both)
    assert_same(ours, theirs, fused=True)
    said = []
    for made in both:
        with pytest.raises(NotImplementedError) as error:
            mixed_fabric(*made, "16-mixed", max_norm=0.1)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("clip", ["norm", "value", "none"])
def test_accelerate_sees_skipped_steps(clip):
    """Accelerate makes no scaler for fp16 on a CPU, so this test sets the one that its constructor makes on a GPU."""
    accelerate = import_quietly("accelerate")
    results = []
    for optimizer_class, extra in OPTIMIZERS:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16", gradient_accumulation_steps=2)
        accelerator.scaler, accelerator.native_amp = cpu_scaler(), True
        net = model()
        optimizer = optimizer_class(net.parameters(), lr=1e-2, **extra)
        sizes, seen = called_steps(optimizer), []
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        net, optimizer, loader, scheduler = accelerator.prepare(net, optimizer, DataLoader(data(), 4), scheduler)
        for number, (x, y) in enumerate(loader):
            with accelerator.accumulate(net):
                loss = (net(x) - y).square().mean()
                accelerator.backward(loss * (float("inf") if number == OVERFLOW else 1.0))
                if accelerator.sync_gradients and clip == "norm":
                    accelerator.clip_grad_norm_(net.parameters(), 0.1)
                elif accelerator.sync_gradients and clip == "value":
                    accelerator.clip_grad_value_(net.parameters(), 0.02)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            skipped = (optimizer.step_was_skipped, accelerator.optimizer_step_was_skipped)
            seen.append((*skipped, scheduler.get_last_lr(), accelerator.scaler.get_scale()))
        results.append(Seen(weights(net), sizes, seen))
    theirs, ours = results
    assert_same(ours, theirs)
    assert [skipped for skipped, *_ in ours.exact] == [number in (5, 6) for number in range(12)]
    assert len(ours.sizes) == 5
    assert ours.exact[-1][2] == pytest.approx([1e-2 * 0.9**5])


@pytest.mark.parametrize(
    ("given", "precision"),
    [("optimizers", "bf16"), ("optimizer_cls_and_kwargs", "bf16"), ("optimizer_cls_and_kwargs", "fp16")],
)
def test_hugging_face_trainer_in_mixed_precision(given, precision, tmp_path):
    transformers = import_quietly("transformers")
    accelerate = import_quietly("accelerate")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = model(), 0

        def forward(self, x, labels):
            output = self.net(x)
            overflows = precision == "fp16" and self.calls == OVERFLOW
            self.calls += 1
            loss = (output - labels).square().mean() * (float("inf") if overflows else 1.0)
            return {"loss": loss, "logits": output}

    class Watch(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **_: Any) -> None:
            self.seen.append((optimizer.step_was_skipped, lr_scheduler.get_last_lr()))

    results = []
    for optimizer_class, extra in OPTIMIZERS:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        net, watch = Net(), Watch()
        options = {"lr": 1e-2, **extra}
        how = {"optimizer_cls_and_kwargs": (optimizer_class, options)}
        if given == "optimizers":
            how = {"optimizers": (optimizer_class(net.parameters(), **options), None)}
        trainer = transformers.Trainer(
            model=net,
            train_dataset=[{"x": x, "labels": y} for x, y in data()],
            callbacks=[watch],
            **how,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path / optimizer_class.__module__),
                num_train_epochs=1,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_grad_norm=0.1,
                warmup_steps=3,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=precision == "bf16",
                disable_tqdm=True,
                seed=0,
            ),
        )
        if precision == "fp16":
            trainer.accelerator.state._mixed_precision = "fp16"
            trainer.accelerator.scaler, trainer.accelerator.native_amp = cpu_scaler(), True
        sizes = called_steps(trainer.create_optimizer())
        trainer.train()
        results.append(Seen(weights(net), sizes, watch.seen))
    theirs, ours = results
    assert_same(ours, theirs)
    assert [skipped for skipped, _ in ours.exact].count(True) == (precision == "fp16")
