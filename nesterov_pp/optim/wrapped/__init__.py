"""Optimizers that take several passes, in plain torch: rules with matrix products, and torch optimizers on a ring."""

from nesterov_pp.optim.wrapped.copies import StepsCopies
from nesterov_pp.optim.wrapped.rotation import BasisRotation

__all__ = ["BasisRotation", "StepsCopies"]
