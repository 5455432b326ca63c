"""Published methods, as recipes made of existing parts. Importing this package registers them."""

# In the order in which methods are listed.
# isort: off
from nesterov_pp.methods.nesterov import NESTEROV, NESTEROV_HORIZON, NESTEROV_NO_STASH, NESTEROV_SGD
from nesterov_pp.methods.rotated import NESTEROV_ROTATED, PIPEDREAM_ROTATED
from nesterov_pp.methods.pipedream import PIPEDREAM, PIPEDREAM_LR
from nesterov_pp.methods.two_versions import ONE_STEP_EF, ONE_STEP_EF_MUON, ONE_STEP_EF_NADAM, PIPEDREAM_2BW
from nesterov_pp.methods.synchronous import (
    GPIPE,
    GPIPE_1,
    GPIPE_1_MUON,
    GPIPE_1_NADAM,
    GPIPE_1_ROTATED,
    GPIPE_1_ROTATED_NADAM,
    GPIPE_MUON,
    GPIPE_NADAM,
    GPIPE_ROTATED,
    GPIPE_ROTATED_NADAM,
)
from nesterov_pp.methods.pipemare import PIPEMARE
from nesterov_pp.methods.prediction import LWP, SPECTRAIN, XPIPE
from nesterov_pp.methods.compensation import DC_ASGD, GAP_AWARE, LR_SECOND_ORDER, STALENESS_AWARE
from nesterov_pp.methods.forecasts import FFT_FORECAST, POLY_FORECAST
from nesterov_pp.methods.dana import DANA_DC, DANA_SLIM, DANA_ZERO
from nesterov_pp.methods.accumulation import GBA, PACI
from nesterov_pp.methods.basis_rotation import BASIS_ROTATION, BASIS_ROTATION_LIGHT
from nesterov_pp.methods.swarm import SWARM
# isort: on

__all__ = [
    "BASIS_ROTATION",
    "BASIS_ROTATION_LIGHT",
    "DANA_DC",
    "DANA_SLIM",
    "DANA_ZERO",
    "DC_ASGD",
    "FFT_FORECAST",
    "GAP_AWARE",
    "GBA",
    "GPIPE",
    "GPIPE_1",
    "GPIPE_1_MUON",
    "GPIPE_1_NADAM",
    "GPIPE_1_ROTATED",
    "GPIPE_1_ROTATED_NADAM",
    "GPIPE_MUON",
    "GPIPE_NADAM",
    "GPIPE_ROTATED",
    "GPIPE_ROTATED_NADAM",
    "LR_SECOND_ORDER",
    "LWP",
    "NESTEROV",
    "NESTEROV_HORIZON",
    "NESTEROV_NO_STASH",
    "NESTEROV_ROTATED",
    "NESTEROV_SGD",
    "ONE_STEP_EF",
    "ONE_STEP_EF_MUON",
    "ONE_STEP_EF_NADAM",
    "PACI",
    "PIPEDREAM",
    "PIPEDREAM_2BW",
    "PIPEDREAM_LR",
    "PIPEDREAM_ROTATED",
    "PIPEMARE",
    "POLY_FORECAST",
    "SPECTRAIN",
    "STALENESS_AWARE",
    "SWARM",
    "XPIPE",
]
