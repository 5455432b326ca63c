"""Optimizers of several passes, in plain torch: matrix products, and any optimizer of torch on a ring."""

from nesterov_pp.optim.wrapped.copies import StepsCopies
from nesterov_pp.optim.wrapped.rotation import BasisRotation

__all__ = ["BasisRotation", "StepsCopies"]
