"""The theory of late gradients in numbers: the largest stable step, the decay of errors, the look-ahead's direction.

Parts of this package need scipy: ``pip install 'nesterov-pp[analysis]'``.
"""

from nesterov_pp.analysis import delays
from nesterov_pp.analysis.alignment import AlignmentMeter, cosine, lookahead_cosines, noise_cosine
from nesterov_pp.analysis.basis import late_on_a_quadratic, preconditioned_curvature
from nesterov_pp.analysis.convex import (
    Objective,
    Trajectory,
    convex_rule,
    envelope_power,
    log_cosh,
    measured_power,
    quadratic,
    safe_convex_step,
    simulate,
)
from nesterov_pp.analysis.delays import Delay
from nesterov_pp.analysis.mean_square import max_mean_square_step, mean_square_radius
from nesterov_pp.analysis.rules import LOOKING_AHEAD, RULES, LinearRule, linear_rule
from nesterov_pp.analysis.sdde import Damping, critical_root, damping, fastest_rate, roots, stability_edge
from nesterov_pp.analysis.stability import characteristic_polynomial, fastest_step, max_stable_step, spectral_radius

__all__ = [
    "LOOKING_AHEAD",
    "RULES",
    "AlignmentMeter",
    "Damping",
    "Delay",
    "LinearRule",
    "Objective",
    "Trajectory",
    "characteristic_polynomial",
    "convex_rule",
    "cosine",
    "critical_root",
    "damping",
    "delays",
    "envelope_power",
    "fastest_rate",
    "fastest_step",
    "late_on_a_quadratic",
    "linear_rule",
    "log_cosh",
    "lookahead_cosines",
    "max_mean_square_step",
    "max_stable_step",
    "mean_square_radius",
    "measured_power",
    "noise_cosine",
    "preconditioned_curvature",
    "quadratic",
    "roots",
    "safe_convex_step",
    "simulate",
    "spectral_radius",
    "stability_edge",
]
