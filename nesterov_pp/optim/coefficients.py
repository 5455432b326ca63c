"""Each rule's scalars for one step, in double precision.

Step ``t`` counts from 1. ``scale`` multiplies the gradient (clipping, averaging over microbatches, -1 to maximise).
"""

from __future__ import annotations

from nesterov_pp.kernels import Coefficients


def nadam(
    t: int,
    mu_product: float,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum_decay: float,
    decoupled: bool,
    horizon: float = 1.0,
    scale: float = 1.0,
) -> tuple[Coefficients, float]:
    """Return the scalars of NAdam as in ``torch.optim.NAdam``, the practical form of Eq. 10 of arXiv 2505.01099.

    With ``mu_t = beta1 (1 - 0.96^(t psi) / 2)``, ``psi = momentum_decay``, and ``Pi_t`` the product of mu_1 ... mu_t::

        c_grad = lr (1 - mu_t) / (1 - Pi_t)        c_momentum = lr mu_{t+1} / (1 - Pi_t mu_{t+1})

    ``(1 - mu_t)`` is the discount of the late gradient, ``mu_{t+1} m`` the look-ahead, which reaches one update ahead.
    For a ``horizon`` of s updates, each mu in the two coefficients, but not in the products, is multiplied by
    ``beta1^(s - 1)``, the decay of m over the remaining updates (derived as for ``nag``, for a constant denominator).

    Returns the coefficients and ``Pi_t``; ``mu_product`` is ``Pi_{t-1}``.
    """
    mu = beta1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta1 * (1.0 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = mu_product * mu
    further = beta1 ** (horizon - 1.0)
    row = Coefficients(
        grad_scale=scale,
        l2=0.0 if decoupled else weight_decay,
        beta1_complement=1.0 - beta1,
        beta2_complement=1.0 - beta2,
        decay=lr * weight_decay if decoupled else 0.0,
        c_grad=lr * (1.0 - mu * further) / (1.0 - product),
        c_momentum=lr * (mu_next * further) / (1.0 - product * mu_next),
        inv_bias2=1.0 / (1.0 - beta2**t),
        eps=eps,
    )
    return row, product


def adamw(
    t: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> Coefficients:
    """Return the scalars of AdamW (arXiv 1711.05101) as in torch: ``c_grad = 0``, ``c_momentum = lr / (1 - beta1^t)``.

    The root ``s`` of ``1 - beta2^t`` is moved from the denominator, ``c_momentum m / (sqrt(v) / s + eps)``, into the
    other scalars: a ``v`` close to the largest number would overflow if it were divided before its root is taken.
    """
    root = (1.0 - beta2**t) ** 0.5
    return Coefficients(
        grad_scale=scale,
        l2=0.0,
        beta1_complement=1.0 - beta1,
        beta2_complement=1.0 - beta2,
        decay=lr * weight_decay,
        c_grad=0.0,
        c_momentum=lr * root / (1.0 - beta1**t),
        inv_bias2=1.0,
        eps=eps * root,
    )


def nag(
    *,
    lr: float,
    gamma: float,
    gamma_next: float,
    weight_decay: float,
    horizon: float = 1.0,
    scale: float = 1.0,
) -> Coefficients:
    """Return the scalars of discounted Nesterov momentum (Eq. 10 of arXiv 2505.01099), stored in look-ahead form.

    With ``d_t = gamma_t (w_t - w_{t-1})``, Eq. 10 is ``w_{t+1} = w_t + d_t - lr (1 - gamma_t) g_t``, where the gradient
    is taken at a late ``w + d``. The stored tensor is ``theta_t = w_t + d_t``. With
    ``m_t = gamma_t m_{t-1} + (1 - gamma_t) g_t``, it follows::

        theta_{t+1} = theta_t - lr ((1 - gamma_t) g_t + gamma_{t+1} m_t)

    A ``horizon`` of s updates looks further ahead: ``theta = w - lr (gamma + ... + gamma^s) m``. For constant gamma, lr
    and s, the same elimination of w puts ``gamma^s`` in place of gamma in both coefficients (derived here; it is the
    spike compensation of arXiv 2003.11666, discounted). With s = 0, the step is plain momentum.
    """
    return Coefficients(
        grad_scale=scale,
        l2=0.0,
        beta1_complement=1.0 - gamma,
        beta2_complement=0.0,
        decay=lr * weight_decay,
        c_grad=lr * (1.0 - gamma**horizon),
        c_momentum=lr * gamma_next**horizon,
        inv_bias2=1.0,
        eps=0.0,
    )


def lion(*, lr: float, beta1: float, beta2: float, weight_decay: float, scale: float = 1.0) -> Coefficients:
    """Return the scalars of Lion (arXiv 2302.06675).

    The step has size ``lr`` and direction ``sign(beta1 m + (1 - beta1) g)``, with the ``m`` from before the step; ``m``
    itself decays by ``beta2``.
    """
    return Coefficients(
        grad_scale=scale,
        l2=0.0,
        beta1_complement=1.0 - beta2,
        beta2_complement=0.0,
        decay=lr * weight_decay,
        c_grad=1.0 - beta1,
        c_momentum=beta1,
        inv_bias2=lr,
        eps=0.0,
    )
