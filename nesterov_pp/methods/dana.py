"""DANA (arXiv 1907.11612) in a pipeline, where each stage has one momentum. ``VirtualWorkers`` has DANA with workers.

Sending ``theta - lr gamma sum_j v^j`` to a worker predicts the weights after every worker's next update. A pipeline
stage has one momentum, and its delay takes the place of the number of workers. The result is a prediction by momentum
over the delay with damping gamma (derived here).
"""

from __future__ import annotations

from dataclasses import replace

from nesterov_pp.methods.horizons import over_the_delay
from nesterov_pp.methods.nesterov import NESTEROV_SGD
from nesterov_pp.optim import NAG, DelayCompensation, Prediction
from nesterov_pp.pipeline.recipe import Recipe, register

_SGD = {"momentum": 0.9, "weight_decay": 1e-4}

DANA_ZERO = register(
    Recipe(
        name="dana-zero",
        summary="weights predicted over the delay along the decaying momentum (SGD)",
        reference="arXiv 1907.11612 (pipeline translation derived here)",
        rule=NAG,
        options={**_SGD, "prediction": Prediction("momentum", damping=0.9)},
        horizon=over_the_delay,
        constant_delay=True,
    )
)

# With one momentum, sending gamma v + g is Nesterov's step in its look-ahead form.
DANA_SLIM = register(
    replace(
        NESTEROV_SGD,
        name="dana-slim",
        summary="look-ahead of one step inside the update, without a second copy of the weights (SGD)",
        reference="arXiv 1907.11612 (pipeline translation derived here)",
        options=_SGD,
    )
)

DANA_DC = register(
    replace(
        DANA_ZERO,
        name="dana-dc",
        summary="dana-zero with g + 2 g g (w - w_stash) for g (SGD)",
        options={**DANA_ZERO.options, "correction": DelayCompensation(2.0)},
    )
)
