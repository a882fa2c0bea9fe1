"""The forward process, its posterior, conversions between targets, the loss and the bound behind it.

Every function takes tensors first, then ``t``, then ``schedule``. Batches have shape ``(B, …)``; ``t`` is an
int64 tensor ``(B,)`` with values in 1…T (a plain int stands for the whole batch). float32 and float64 are kept;
half precision is promoted to float32, because β_1 = 1e-4 is below its resolution. All functions raise
``ValueError`` on a wrong shape, dtype or time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffbook.gaussian import discretised_log_likelihood, gaussian_log_prob, kl_diagonal
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
    """L_simple on one batch: the mean of (ε - ε_θ(x_t, t))² over batch **and** pixels, :eq:`def-simple-loss`.

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
    return (eps - _predict(model, q_sample(x_0, eps, t, schedule), t)).square().mean()


class VariationalBound(NamedTuple):
    """An upper bound on -log p_θ(x_0) in nats an image, with its terms, :eq:`eq-bound-terms`."""

    total: Tensor  # L_T + the sum of L_t + L_0, (B,)
    L_T: Tensor  # KL from q(x_T | x_0) to N(0, I), (B,)
    L_t: Tensor  # KL from q(x_{t-1} | x_t, x_0) to the model's step, the page's L_{t-1}, at the times t; (B, K)
    L_0: Tensor  # -log p_θ(x_0 | x_1), (B,)
    t: Tensor  # the times of L_t: 2, …, T, or a sample of them, (B, K)


@torch.no_grad()
def variational_bound(
    model: Denoiser,
    x_0: Tensor,
    schedule: NoiseSchedule,
    variance: str = "beta",
    levels: int | None = 256,
    times_per_image: int | None = None,
    parts: Sequence[int] | None = None,
    clip: float | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | Sequence[Tensor] | None = None,
) -> VariationalBound:
    """Minus the ELBO of the reverse model, L_T + Σ_t L_{t-1} + L_0, with fresh noise in each term.

    Its mean over the noise is an upper bound on -log p_θ(x_0). With ``times_per_image`` = K the sum over t is
    estimated without bias: 2…T is cut into K parts, one time is drawn from each part for each image, and its term is
    multiplied by the part's length, :eq:`eq-stratified-sum`. The cost is K + 1 calls of the model, T without sampling.

    Args:
        model: denoiser, ``model(x_t, t) -> eps``.
        x_0: clean data, shape ``(B, …)``.
        variance: σ_t² of the model's steps, ``"beta"`` or ``"beta_tilde"``; β_1 for t = 1 in any case, as β̃_1 = 0.
        levels: grey levels of images in [-1, 1] for L_0, :eq:`def-discretised-likelihood`; None for a density.
        parts: the first times of the K parts, the first of them 2; by default of equal length.
        clip: bound the estimate x̂_0 to [-clip, clip]: another model, whose bound this is then.
        generator: source of times and noise, on the device of ``x_0``.
        noise: ε to replay, ``noise[0]`` for t = 1 and ``noise[i]`` for the i-th of the other times.

    Raises:
        ValueError: an argument outside its domain, x_0 off the grid of ``levels``, a model output of another shape.

    Source: Ho et al. (2020), eqs. 5, 8 and 13.
    """
    if variance not in ("beta", "beta_tilde"):
        raise ValueError(f'variance must be "beta" or "beta_tilde", got {variance!r}')
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clipping, got {clip}")
    x_0, T = _promote("x_0", x_0), schedule.T
    parts = _first_times(parts, times_per_image, T)
    if noise is not None and len(noise) != len(parts) + 1:
        raise ValueError(f"noise must have an entry for t = 1 and each of {len(parts)} other times, got {len(noise)}")

    def noisy(i: int, t: Tensor) -> Tensor:
        """x_t for the i-th call of the model."""
        if noise is None:
            eps = torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        else:
            eps = noise[i].to(x_0)
        return q_sample(x_0, eps, t, schedule)

    t = torch.full((len(x_0),), T, device=x_0.device)
    alpha_bar, zero = schedule.at("alpha_bar", t, x_0), torch.zeros_like(x_0[:1])
    L_T = _per_image(kl_diagonal(alpha_bar.sqrt() * x_0, 1 - alpha_bar, zero, zero + 1))

    t = torch.ones_like(t)
    mean, sigma2 = _model_mean(model, noisy(0, t), t, schedule, clip), schedule.at("beta", t, x_0)
    if levels is None:
        L_0 = -_per_image(gaussian_log_prob(x_0, mean, sigma2))
    else:
        L_0 = -_per_image(discretised_log_likelihood(x_0, mean, sigma2, levels))

    table, L_t = "beta" if variance == "beta" else "posterior_variance", x_0.new_empty(len(x_0), len(parts))
    times = torch.empty(L_t.shape, dtype=torch.int64, device=x_0.device)
    for i, (start, end) in enumerate(pairwise([*parts, T + 1])):
        t = torch.randint(start, end, (len(x_0),), generator=generator, device=x_0.device)
        x_t = noisy(i + 1, t)
        mean, sigma2 = _model_mean(model, x_t, t, schedule, clip), schedule.at(table, t, x_0)
        kl = kl_diagonal(*q_posterior(x_0, x_t, t, schedule), mean, sigma2)
        L_t[:, i], times[:, i] = (end - start) * _per_image(kl), t
    return VariationalBound(L_T + L_t.sum(1) + L_0, L_T, L_t, L_0, times)


def _first_times(parts: Sequence[int] | None, times_per_image: int | None, T: int) -> Sequence[int]:
    """The first times of the parts of 2…T: as given, or of ``times_per_image`` parts of equal length, or 2, 3, …, T."""
    if parts is None:
        K = T - 1 if times_per_image is None else times_per_image
        if K < 1 < T or K > T - 1:
            raise ValueError(f"times_per_image must lie in 1…{T - 1}, got {K}")
        return [2 + i * (T - 1) // K for i in range(K)]
    rising = len(parts) > 0 and parts[0] == 2 and all(a < b for a, b in pairwise([*parts, T + 1]))
    if times_per_image is not None or not rising:
        raise ValueError(f"parts must rise from 2 to at most {T}, without times_per_image, got {list(parts)}")
    return parts


def _model_mean(model: Denoiser, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, clip: float | None) -> Tensor:
    """The mean of p_θ(x_{t-1} | x_t): that of the posterior, with the guess x̂_0 in the place of x_0."""
    guess = x0_from_eps(x_t, _predict(model, x_t, t), t, schedule)
    guess = guess if clip is None else guess.clamp(-clip, clip)
    return q_posterior(guess, x_t, t, schedule)[0]


def _per_image(nats: Tensor) -> Tensor:
    return nats.reshape(len(nats), -1).sum(1)


def _predict(model: Denoiser, x_t: Tensor, t: Tensor) -> Tensor:
    eps = model(x_t, t)
    if eps.shape != x_t.shape:
        raise ValueError(f"the model returned shape {tuple(eps.shape)}, expected {tuple(x_t.shape)}")
    return eps.to(x_t.dtype)


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
