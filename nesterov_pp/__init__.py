"""Asynchronous pipeline training with optimizers that correct late gradients, in one pass over memory per step."""

from nesterov_pp import kernels, methods, optim, pipeline
from nesterov_pp.optim import NAG, AdamW, Lion, NAdam, RotatedAdamW, RotatedNAdam
from nesterov_pp.stash import WeightStash

__version__ = "0.1.0"

__all__ = [
    "NAG",
    "AdamW",
    "Lion",
    "NAdam",
    "RotatedAdamW",
    "RotatedNAdam",
    "WeightStash",
    "__version__",
    "kernels",
    "methods",
    "optim",
    "pipeline",
]
