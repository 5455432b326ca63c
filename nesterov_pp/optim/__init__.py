"""Optimizers whose step is one pass over memory."""

from nesterov_pp.optim.adamw import AdamW
from nesterov_pp.optim.base import FusedOptimizer
from nesterov_pp.optim.corrections import DelayCompensation, Discrepancy, GapAware, Prediction
from nesterov_pp.optim.lion import Lion
from nesterov_pp.optim.nadam import NAdam
from nesterov_pp.optim.nag import NAG, convex_schedule
from nesterov_pp.optim.rotated import RotatedAdamW, RotatedNAdam

__all__ = [
    "NAG",
    "AdamW",
    "DelayCompensation",
    "Discrepancy",
    "FusedOptimizer",
    "GapAware",
    "Lion",
    "NAdam",
    "Prediction",
    "RotatedAdamW",
    "RotatedNAdam",
    "convex_schedule",
]
