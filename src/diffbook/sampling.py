"""From x_T to x_0: the ancestral sampler of DDPM, DDIM, and DPM-Solver++(2M).

A sampler walks an explicit, strictly decreasing list of times. From the time t it steps to s, the *next entry*
of the list, and after the last entry to 0; the step to 0 adds no noise. On the full grid T, …, 1 this is s = t-1;
when times are skipped, α_t becomes ᾱ_t/ᾱ_s, β_t becomes 1 - ᾱ_t/ᾱ_s and β̃_t becomes (1-ᾱ_s)/(1-ᾱ_t) times that.
Coefficients are float64 numbers; the data keeps its own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffbook.diffusion import Denoiser, eps_from_v, eps_from_x0
from diffbook.schedule import NoiseSchedule

Noise = Tensor | Sequence[Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


class SamplingStep(NamedTuple):
    """One step of a sampler: from time ``t`` to time ``s``."""

    t: int
    s: int
    x: Tensor  # x_s, (B, …)
    x_0: Tensor  # the estimate of x_0 made at time t, after clipping, (B, …)


def timesteps(T: int, S: int) -> list[int]:
    """S times from T down to 1, evenly spaced and rounded (ties to even): strictly decreasing.

    Raises:
        ValueError: not 1 ≤ S ≤ T. For S = 1 the list is ``[T]``.
    """
    if not 1 <= S <= T:
        raise ValueError(f"need 1 <= S <= T, got S = {S} and T = {T}")
    if S == 1:
        return [T]
    # Exact fractions: on floats a tie such as 500.5 would be rounded as the machine pleases.
    return [round(T - Fraction(i * (T - 1), S - 1)) for i in range(S)]


def trailing_timesteps(T: int, S: int) -> list[int]:
    """S times from T down to about T/S: all S steps, the one to 0 included, are equally long (up to rounding).

    :func:`timesteps` ends at 1 and spends its last network call where hardly any noise is left. This grid does
    not, and it is the better one for :func:`dpmpp_2m_sample`, whose step to t = 1 would be a huge one in λ.

    Raises:
        ValueError: not 1 ≤ S ≤ T.
    """
    if not 1 <= S <= T:
        raise ValueError(f"need 1 <= S <= T, got S = {S} and T = {T}")
    return [round(T - Fraction(i * T, S)) for i in range(S)]


@torch.no_grad()
def ddpm_sample_steps(
    model: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[int] | None = None,
    variance: str = "beta",
    clip: float | None = None,
    generator: Generators | None = None,
    noise: Noise | None = None,
) -> Iterator[SamplingStep]:
    """:func:`ddpm_sample`, one :class:`SamplingStep` at a time."""
    if variance not in ("beta", "beta_tilde"):
        raise ValueError(f'variance must be "beta" or "beta_tilde", got {variance!r}')
    steps, x = _check_arguments(x_T, schedule, times, clip, noise)
    for i, (t, s) in enumerate(steps):
        a_t, a_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        alpha = a_t / a_s
        beta = 1 - alpha
        x_0, _ = _predict(model, x, t, a_t, clip)
        x = math.sqrt(a_s) * beta / (1 - a_t) * x_0 + math.sqrt(alpha) * (1 - a_s) / (1 - a_t) * x
        if s > 0:
            sigma = math.sqrt(beta if variance == "beta" else (1 - a_s) / (1 - a_t) * beta)
            x = x + sigma * _draw(i, x, generator, noise)
        yield SamplingStep(t, s, x, x_0)


def ddpm_sample(
    model: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[int] | None = None,
    variance: str = "beta",
    clip: float | None = None,
    generator: Generators | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Ancestral sampling: the mean of q(x_s | x_t, x̂_0) plus fresh noise, none in the last step.

    The step is :eq:`eq-skipped-posterior`; with s = t-1 it equals :eq:`eq-ancestral-step`.

    Args:
        model: denoiser, ``model(x_t, t) -> eps``.
        x_T: where to start, shape ``(B, …)``, float32 or float64.
        times: strictly decreasing times in 1…T; all of them by default (see :func:`timesteps`).
        variance: σ_t² of the fresh noise, ``"beta"`` or ``"beta_tilde"``.
        clip: bound the estimate x̂_0 to [-clip, clip] in every step; 1.0 for images, None for no bound.
        generator: source of the noise. A list with one generator a sample makes each sample independent of
            the batch it is in.
        noise: noise to replay instead, ``noise[i]`` of shape ``(B, …)`` for the i-th step; the last step
            needs none.

    Returns:
        x_0, shape ``(B, …)``, in the dtype of ``x_T``.

    Raises:
        ValueError: an argument outside its domain, or a model output of another shape than ``x_T``.

    Source: Ho et al. (2020), algorithm 2; skipped times: Nichol & Dhariwal (2021), section 4.
    """
    return _last(ddpm_sample_steps(model, x_T, schedule, times, variance, clip, generator, noise))


@torch.no_grad()
def ddim_sample_steps(
    model: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[int] | None = None,
    eta: float = 0.0,
    clip: float | None = None,
    generator: Generators | None = None,
    noise: Noise | None = None,
) -> Iterator[SamplingStep]:
    """:func:`ddim_sample`, one :class:`SamplingStep` at a time."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    steps, x = _check_arguments(x_T, schedule, times, clip, noise)
    for i, (t, s) in enumerate(steps):
        a_t, a_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        x_0, eps = _predict(model, x, t, a_t, clip)
        sigma = eta * math.sqrt((1 - a_s) / (1 - a_t) * (1 - a_t / a_s))
        # max: at eta = 1 rounding can leave -1e-17 under the root
        x = math.sqrt(a_s) * x_0 + math.sqrt(max(1 - a_s - sigma**2, 0.0)) * eps
        if sigma > 0:
            x = x + sigma * _draw(i, x, generator, noise)
        yield SamplingStep(t, s, x, x_0)


def ddim_sample(
    model: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[int] | None = None,
    eta: float = 0.0,
    clip: float | None = None,
    generator: Generators | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """DDIM: x_s = √ᾱ_s x̂_0 + √(1-ᾱ_s-σ²) ε̂ + σ z with σ² = η² β̃, :eq:`eq-ddim-step`; deterministic for η = 0.

    Args:
        eta: 0 for the deterministic sampler, 1 for ancestral sampling with σ_t² = β̃_t.

    When x̂_0 is clipped, ε̂ is the noise that leads from the clipped x̂_0 to x_t, so that the two always agree.
    All other arguments, the result and the errors are those of :func:`ddpm_sample`.

    Source: Song, Meng & Ermon (2021), eqs. 12 and 16.
    """
    return _last(ddim_sample_steps(model, x_T, schedule, times, eta, clip, generator, noise))


@torch.no_grad()
def dpmpp_2m_sample_steps(
    model: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[int] | None = None,
    clip: float | None = None,
) -> Iterator[SamplingStep]:
    """:func:`dpmpp_2m_sample`, one :class:`SamplingStep` at a time."""
    steps, x = _check_arguments(x_T, schedule, times, clip, noise=None)
    lambdas = (0.5 * schedule.log_snr()).tolist()  # λ_t = log(√ᾱ_t / √(1-ᾱ_t)), infinite at t = 0
    before: tuple[float, Tensor] | None = None  # h and x̂_0 of the step before
    for t, s in steps:
        a_t, a_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        h = lambdas[s] - lambdas[t]
        x_0, _ = _predict(model, x, t, a_t, clip)
        target = x_0
        if before is not None and s > 0:  # at s = 0, h is infinite and there is nothing to extrapolate to
            r = before[0] / h
            target = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * before[1]
        x = math.sqrt((1 - a_s) / (1 - a_t)) * x - math.sqrt(a_s) * math.expm1(-h) * target
        before = h, x_0
        yield SamplingStep(t, s, x, x_0)


def dpmpp_2m_sample(
    model: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[int] | None = None,
    clip: float | None = None,
) -> Tensor:
    """DPM-Solver++(2M), :eq:`eq-dpmpp-2m`: the probability-flow ODE, second order with one model call a step.

    The first step and the step to t = 0 are of first order, that is, steps of DDIM.

    Arguments, result and errors are those of :func:`ddpm_sample`; as in :func:`ddim_sample`, ``x_T`` alone
    decides the result.

    Source: Lu et al. (2022), DPM-Solver++, algorithm 2.
    """
    return _last(dpmpp_2m_sample_steps(model, x_T, schedule, times, clip))


def _predict(model: Denoiser, x: Tensor, t: int, a_t: float, clip: float | None) -> tuple[Tensor, Tensor]:
    """The model's estimates of x_0 (clipped) and ε at the time t."""
    eps = model(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
    if eps.shape != x.shape:
        raise ValueError(f"the model returned shape {tuple(eps.shape)}, expected {tuple(x.shape)}")
    eps = eps.to(x.dtype)
    x_0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    if clip is not None:
        x_0 = x_0.clamp(-clip, clip)
        eps = (x - math.sqrt(a_t) * x_0) / math.sqrt(1 - a_t)
    return x_0, eps


def _draw(i: int, x: Tensor, generator: Generators | None, noise: Noise | None) -> Tensor:
    """Standard normal noise of the shape of ``x`` for the i-th step: replayed, or fresh."""
    if noise is not None:
        if noise[i].shape != x.shape:
            raise ValueError(f"noise[{i}] has shape {tuple(noise[i].shape)}, expected {tuple(x.shape)}")
        return noise[i].to(x)
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"got {len(generator)} generators for {len(x)} samples; give one a sample")
    rows = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device) for g in generator]
    return torch.stack(rows).to(x.device)


def _check_arguments(
    x_T: Tensor,
    schedule: NoiseSchedule,
    times: Sequence[int] | None,
    clip: float | None,
    noise: Noise | None,
) -> tuple[list[tuple[int, int]], Tensor]:
    """The steps as pairs (t, s), and the state to start from."""
    if not isinstance(x_T, Tensor) or x_T.dtype not in (torch.float32, torch.float64) or x_T.ndim < 1:
        got = f"{x_T.dtype}, shape {tuple(x_T.shape)}" if isinstance(x_T, Tensor) else type(x_T).__name__
        raise ValueError(f"x_T must be a float32 or float64 tensor of shape (B, …), got {got}")
    walk = list(range(schedule.T, 0, -1)) if times is None else [int(t) for t in times]
    if not walk or walk[0] > schedule.T or walk[-1] < 1:
        raise ValueError(f"times must lie in 1…{schedule.T} and not be empty, got {walk}")
    if any(t <= s for t, s in pairwise(walk)):
        raise ValueError(f"times must be strictly decreasing, got {walk}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None for no clipping, got {clip}")
    if noise is not None and len(noise) not in (len(walk) - 1, len(walk)):
        raise ValueError(f"noise must have an entry for each of the first {len(walk) - 1} steps, got {len(noise)}")
    return list(zip(walk, [*walk[1:], 0], strict=True)), x_T


def _last(steps: Iterator[SamplingStep]) -> Tensor:
    for step in steps:
        x = step.x
    return x


def as_eps(model: Denoiser, schedule: NoiseSchedule, predicts: str = "v") -> Denoiser:
    """Turn a model of v, x_0 or ε into a denoiser, ``model(x_t, t) -> eps``, which samplers take.

    Args:
        model: called as ``model(x_t, t)``; a network with conditions is bound to them by :func:`guided` first.
        predicts: what it returns, ``"v"``, ``"x_0"`` or ``"eps"``.

    Raises:
        ValueError: ``predicts`` is none of the three.

    Source: Salimans & Ho (2022), section 4 and appendix D.
    """
    if predicts == "v":
        return lambda x_t, t: eps_from_v(x_t, model(x_t, t).to(x_t.dtype), t, schedule)
    if predicts == "x_0":
        return lambda x_t, t: eps_from_x0(x_t, model(x_t, t).to(x_t.dtype), t, schedule)
    if predicts == "eps":
        return model
    raise ValueError(f'predicts must be "v", "x_0" or "eps", got {predicts!r}')


def guided(model: Callable[..., Tensor], y: Tensor, w: float = 1.0, null: int | None = None) -> Denoiser:
    """Bind classes to a conditional network, with classifier-free guidance: u + w (c - u), :eq:`eq-guidance`.

    Here c is the output for the classes ``y`` and u the output for the null class. w = 1 is plain conditional
    (one network call), w = 0 ignores the classes, w > 1 exaggerates them. The combination is the same for
    networks of ε, v and x_0, because the weights 1 - w and w add up to 1, :eq:`eq-guidance-any-target`.

    Args:
        model: called as ``model(x_t, t, y)``.
        y: the classes, int64, shape ``(B,)``.
        null: the null class; by default ``model.classes``, the number of classes.

    Source: Ho & Salimans (2022), eq. 6; their weight is w - 1, :eq:`eq-guidance-conventions`.

    Raises:
        ValueError: the null class is needed and not known.
    """
    if w == 1:
        return lambda x_t, t: model(x_t, t, y)
    nothing = getattr(model, "classes", None) if null is None else null
    if nothing is None:
        raise ValueError(f"guidance with w = {w} needs the null class: pass null=")

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        labels = torch.cat([y, torch.full_like(y, nothing)])
        c, u = model(torch.cat([x_t, x_t]), torch.cat([t, t]), labels).chunk(2)
        return u + w * (c - u)

    return denoiser
