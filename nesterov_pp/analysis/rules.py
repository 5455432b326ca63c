"""The update rules on a quadratic, where each of them is a linear filter of late gradients.

Every rule here is the same recurrence with other scalars, the two that the optimizers' pass also takes::

    m_t = gamma m_{t-1} + (1 - gamma) g_t
    theta_{t+1} = theta_t - step (c_grad g_t + c_momentum m_t)          g_t = gradient at theta_{t-tau}

[note: a look-ahead is a share of the fresh gradient]
Let ``w_{t+1} = w_t - step m_t`` and take gradients at ``theta_t = w_t + S (w_t - w_{t-1})``. Then theta follows the
recurrence above with ``c_grad = S (1 - gamma) / gamma`` and ``c_momentum = 1 - c_grad``. Looking ``h`` steps ahead
along the decaying momentum means ``S = gamma + ... + gamma^h``, so ``c_grad = 1 - gamma^h`` and
``c_momentum = gamma^h``: no look-ahead is ``h = 0``, Eq. 10 of arXiv 2505.01099 is ``h = 1``, and plain SGD is the
limit of large ``h``. NAdam, whose ``c_momentum`` grows over training, is a look-ahead whose horizon shrinks: from 69
updates to 1 at beta1 0.99. Derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nesterov_pp.optim import coefficients


@dataclass(frozen=True)
class LinearRule:
    """The scalars of a rule for a step size of 1, in the recurrence at the top of this module."""

    gamma: float
    c_grad: float
    c_momentum: float

    @property
    def gain(self) -> float:
        """The share of a constant gradient that is applied."""
        return self.c_grad + self.c_momentum

    @property
    def horizon(self) -> float:
        """The number of updates nag would have to look ahead to equal this rule up to its gain; infinite for SGD."""
        share = self.c_momentum / self.gain
        return max(0.0, math.log(share) / math.log(self.gamma)) if share > 0.0 and self.gamma > 0.0 else math.inf


def linear_rule(
    name: str = "nag", *, momentum: float = 0.99, horizon: float | None = None, update: int | None = None
) -> LinearRule:
    """Return a rule by name.

    =================  ==================================================================  ================
    name               update                                                              horizon
    =================  ==================================================================  ================
    sgd                ``g``; momentum is not used                                         none
    ema                ``m``: AdamW's direction without its preconditioner                 none
    heavy-ball         ``m / (1 - gamma)``: ``torch.optim.SGD(momentum=gamma)``            none
    nag                discounted Nesterov (Eq. 10 of arXiv 2505.01099)                    any (1)
    nag-undiscounted   nag without the factor ``1 - gamma`` on the gradient                any (1)
    extrapolation      gradients at ``w_t + h (w_t - w_{t-1})``: weight prediction by the  any (1)
                       last displacement (arXiv 2003.11666, LWP-w, as recalled); with
                       ``h = tau`` also the tau-step form of one-step error feedback
                       (arXiv 2606.30634; derived, not in that paper)
    nadam              NAdam with a preconditioner that does not change, and the           none
                       scalars of ``update`` (default: their limit, which is nag's)
    =================  ==================================================================  ================

    Args:
        name: a name from the table above.
        momentum: gamma, in [0, 1); above 0 for extrapolation.
        horizon: number of updates to look ahead, at least 0; need not be whole.
        update: for nadam: the update t = 1, 2, ... whose scalars to use (momentum_decay 0.004).

    Raises:
        ValueError: the name is unknown, or an argument is out of range or does not apply to the rule.
    """
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}; choose one of {', '.join(RULES)}")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must be at least 0 and below 1, not {momentum}")
    if horizon is not None:
        if name not in LOOKING_AHEAD:
            raise ValueError(f"rule {name!r} does not look ahead; leave the horizon out, or choose nag")
        if not 0.0 <= horizon < math.inf:
            raise ValueError(f"horizon must be a number of updates, at least 0, not {horizon}")
    if update is not None and (name != "nadam" or update < 1):
        raise ValueError(f"update must be at least 1 and is for rule 'nadam' only, not {update} for {name!r}")
    if name == "nadam":
        return _nadam(momentum, update)
    return _BUILD[name](momentum, 1.0 if horizon is None else horizon)


def _nag(gamma: float, horizon: float) -> LinearRule:
    share = gamma**horizon
    return LinearRule(gamma, 1.0 - share, share)


def _nag_undiscounted(gamma: float, horizon: float) -> LinearRule:
    rule = _nag(gamma, horizon)
    return LinearRule(gamma, rule.c_grad / (1.0 - gamma), rule.c_momentum / (1.0 - gamma))


def _extrapolation(gamma: float, horizon: float) -> LinearRule:
    if gamma == 0.0:
        raise ValueError("extrapolation needs a momentum above 0")
    c_grad = horizon * (1.0 - gamma) / gamma
    return LinearRule(gamma, c_grad, 1.0 - c_grad)


def _nadam(gamma: float, update: int | None) -> LinearRule:
    if update is None:
        return _nag(gamma, 1.0)
    product = 1.0
    for t in range(1, update + 1):
        row, product = coefficients.nadam(
            t,
            product,
            lr=1.0,
            beta1=gamma,
            beta2=0.999,
            eps=0.0,
            weight_decay=0.0,
            momentum_decay=0.004,
            decoupled=True,
        )
    return LinearRule(gamma, row.c_grad, row.c_momentum)


_BUILD: dict[str, Callable[[float, float], LinearRule]] = {
    "sgd": lambda _gamma, _horizon: LinearRule(0.0, 1.0, 0.0),
    "ema": lambda gamma, _horizon: LinearRule(gamma, 0.0, 1.0),
    "heavy-ball": lambda gamma, _horizon: LinearRule(gamma, 0.0, 1.0 / (1.0 - gamma)),
    "nag": _nag,
    "nag-undiscounted": _nag_undiscounted,
    "extrapolation": _extrapolation,
}
RULES = (*_BUILD, "nadam")
"""Names of the rules."""

LOOKING_AHEAD = ("nag", "nag-undiscounted", "extrapolation")
"""Names of the rules with a horizon."""
