"""Asynchronous pipeline training with late gradients made harmless, one pass over memory a step."""

from nesterov_pp import kernels, methods, optim, pipeline
from nesterov_pp.optim import NAG, AdamW, Lion, NAdam
from nesterov_pp.stash import WeightStash

__version__ = "0.1.0"

__all__ = [
    "NAG",
    "AdamW",
    "Lion",
    "NAdam",
    "WeightStash",
    "__version__",
    "kernels",
    "methods",
    "optim",
    "pipeline",
]
