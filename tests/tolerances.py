"""How far results may be apart: one table for all tests.

One step: four roundings of a value of order one (four machine epsilons), where terms cancel; a run: a hundred. Chosen
from the machine epsilon (1.2e-7 for float32, 2.2e-16 for float64), not from results.
"""

from __future__ import annotations

import torch

ONE_STEP = {torch.float32: {"rtol": 1e-6, "atol": 5e-7}, torch.float64: {"rtol": 1e-14, "atol": 1e-15}}
MANY_STEPS = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-13}}
EXACT = {"rtol": 0.0, "atol": 0.0}
