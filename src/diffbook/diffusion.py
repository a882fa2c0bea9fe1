"""The forward process, its posterior, conversions between targets, and the loss.

Every function takes tensors first, then ``t``, then ``schedule``. Batches have shape ``(B, …)``; ``t`` is an
int64 tensor ``(B,)`` with values in 1…T (a plain int stands for the whole batch). float32 and float64 are kept;
half precision is promoted to float32, because β_1 = 1e-4 is below its resolution. All functions raise
``ValueError`` on a wrong shape, dtype or time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffbook.schedule import NoiseSchedule, check_time

Denoiser = Callable[[Tensor, Tensor], Tensor]


def q_step(x_prev: Tensor, eps: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """One forward step, x_t = √(1-β_t) x_{t-1} + √β_t ε, :eq:`eq-forward-step-sample`.

    Args:
        x_prev: x_{t-1}, shape ``(B, …)``.
        eps: standard normal noise of the same shape.
        t: the time that is reached, shape ``(B,)``.

    Source: Ho et al. (2020), eq. 2.
    """
    x_prev, eps = _check_pair("x_prev", x_prev, "eps", eps)
    t = check_time(t, x_prev, schedule)
    return schedule.at("sqrt_alpha", t, x_prev) * x_prev + schedule.at("sqrt_beta", t, x_prev) * eps


def q_sample(x_0: Tensor, eps: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """Jump from x_0 to x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, :eq:`eq-forward-sample`.

    Args:
        x_0: clean data, shape ``(B, …)``.
        eps: standard normal noise of the same shape.
        t: times, shape ``(B,)``.

    Source: Ho et al. (2020), eq. 4.
    """
    x_0, eps = _check_pair("x_0", x_0, "eps", eps)
    t = check_time(t, x_0, schedule)
    return schedule.at("sqrt_alpha_bar", t, x_0) * x_0 + schedule.at("sqrt_one_minus_alpha_bar", t, x_0) * eps


def q_posterior(x_0: Tensor, x_t: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), :eq:`eq-posterior-mean` and :eq:`eq-posterior-variance`.

    Returns:
        The mean, shape ``(B, …)``, and the variance β̃_t, shape ``(B, 1, …, 1)``.

    Source: Ho et al. (2020), eqs. 6 and 7.
    """
    x_0, x_t = _check_pair("x_0", x_0, "x_t", x_t)
    t = check_time(t, x_t, schedule)
    mean = schedule.at("posterior_mean_x_0", t, x_t) * x_0 + schedule.at("posterior_mean_x_t", t, x_t) * x_t
    return mean, schedule.at("posterior_variance", t, x_t)


def x0_from_eps(x_t: Tensor, eps: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """The x_0 that gives x_t with the noise ε: (x_t - √(1-ᾱ_t) ε) / √ᾱ_t, :eq:`eq-x0-from-eps`."""
    x_t, eps = _check_pair("x_t", x_t, "eps", eps)
    t = check_time(t, x_t, schedule)
    signal, noise = schedule.at("sqrt_alpha_bar", t, x_t), schedule.at("sqrt_one_minus_alpha_bar", t, x_t)
    return (x_t - noise * eps) / signal


def eps_from_x0(x_t: Tensor, x_0: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """The noise that leads from x_0 to x_t: (x_t - √ᾱ_t x_0) / √(1-ᾱ_t), :eq:`eq-eps-from-x0`."""
    x_t, x_0 = _check_pair("x_t", x_t, "x_0", x_0)
    t = check_time(t, x_t, schedule)
    signal, noise = schedule.at("sqrt_alpha_bar", t, x_t), schedule.at("sqrt_one_minus_alpha_bar", t, x_t)
    return (x_t - signal * x_0) / noise


def v_target(x_0: Tensor, eps: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """The velocity v = √ᾱ_t ε - √(1-ᾱ_t) x_0, :eq:`eq-v-target` (Salimans & Ho 2022, section 4)."""
    x_0, eps = _check_pair("x_0", x_0, "eps", eps)
    t = check_time(t, x_0, schedule)
    return schedule.at("sqrt_alpha_bar", t, x_0) * eps - schedule.at("sqrt_one_minus_alpha_bar", t, x_0) * x_0


def eps_from_v(x_t: Tensor, v: Tensor, t: Tensor | int, schedule: NoiseSchedule) -> Tensor:
    """ε = √ᾱ_t v + √(1-ᾱ_t) x_t, the inverse of :func:`v_target`, :eq:`eq-eps-from-v`."""
    x_t, v = _check_pair("x_t", x_t, "v", v)
    t = check_time(t, x_t, schedule)
    return schedule.at("sqrt_alpha_bar", t, x_t) * v + schedule.at("sqrt_one_minus_alpha_bar", t, x_t) * x_t


def simple_loss(
    model: Denoiser, x_0: Tensor, schedule: NoiseSchedule, generator: torch.Generator | None = None
) -> Tensor:
    """L_simple on one batch: the mean of (ε - ε_θ(x_t, t))² over batch **and** pixels.

    Draws t uniformly from 1…T and ε from N(0, I). The paper's squared norm is D times this mean, for data
    with D numbers a sample.

    Args:
        model: denoiser, ``model(x_t, t) -> eps``.
        x_0: clean data, shape ``(B, …)``.
        generator: source of t and ε, on the device of ``x_0``.

    Returns:
        A scalar.

    Source: Ho et al. (2020), eq. 14 and algorithm 1.
    """
    x_0 = _promote("x_0", x_0)
    t = torch.randint(1, schedule.T + 1, (len(x_0),), generator=generator, device=x_0.device)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
    predicted = model(q_sample(x_0, eps, t, schedule), t)
    if predicted.shape != eps.shape:
        raise ValueError(f"the model returned shape {tuple(predicted.shape)}, expected {tuple(eps.shape)}")
    return (eps - predicted.to(eps.dtype)).square().mean()


def _promote(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, scaled to [-1, 1] for images; got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{name} must have shape (B, …), got a scalar")
    return x if x.dtype == torch.float64 else x.float()


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _promote(name_a, a), _promote(name_b, b)
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype:
        raise ValueError(f"{name_a} and {name_b} must have the same dtype, got {a.dtype} and {b.dtype}")
    return a, b
