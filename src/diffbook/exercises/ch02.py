"""Exercises of the chapter "Reparameterization"."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffbook.diffusion import q_sample, q_step, x0_from_eps
from diffbook.exercises.core import Exercise, Mistake
from diffbook.schedule import NoiseSchedule, linear_schedule

_SCHEDULE = linear_schedule()


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _images(seed: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 2, 3, generator=generator, dtype=torch.float64)


def _sample_gaussian(mean: Tensor, variance: Tensor, eps: Tensor) -> Tensor:
    return mean + variance.sqrt() * eps


_SAMPLE = Exercise(
    key="2.1",
    oracle=_sample_gaussian,
    cases=[
        (_vector(0.0, 3.0, -2.0), _vector(4.0, 0.25, 9.0), _vector(1.0, -2.0, 0.5)),
        (_vector(1.0, 1.0), _vector(0.01, 100.0), _vector(-0.7, 1.3)),
    ],
    mistakes=[
        Mistake(
            "variance for standard deviation",
            lambda m, v, e: m + v * e,
            "What is the variance of σ ε when ε has variance 1? Compare it with the one asked for.",
        ),
        Mistake(
            "variance squared",
            lambda m, v, e: m + v.square() * e,
            "To get from a variance to a standard deviation you went the wrong way.",
        ),
        Mistake(
            "mean scaled as well",
            lambda m, v, e: v.sqrt() * (m + e),
            "Scale first, then shift: with ε = 0 the result has to be the mean itself.",
        ),
        Mistake(
            "divided by the standard deviation",
            lambda m, v, e: m + e / v.sqrt(),
            "A larger variance must spread the samples further. Does it in your function?",
        ),
        Mistake(
            "noise subtracted",
            lambda m, v, e: m - v.sqrt() * e,
            "The distribution is right, for -ε is as normal as ε; but the book's convention, on which "
            "all later equations rely, adds the noise.",
        ),
    ],
)


def _score_wrt_variance(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return ((x - mean).square() / variance - 1) / (2 * variance)


_SCORE = Exercise(
    key="2.2",
    oracle=_score_wrt_variance,
    cases=[
        (_vector(0.3, -1.0, 2.0), _vector(0.0, 1.0, -1.0), _vector(1.0, 4.0, 0.25)),
        (_vector(5.0, 5.0), _vector(4.0, 5.0), _vector(9.0, 2.0)),
    ],
    mistakes=[
        Mistake(
            "normalising constant forgotten",
            lambda x, m, v: (x - m).square() / (2 * v.square()),
            "The density has a factor in front of the exponential. Does that factor depend on the variance?",
        ),
        Mistake(
            "derivative with respect to the standard deviation",
            lambda x, m, v: ((x - m).square() / v - 1) / v.sqrt(),
            "This is the derivative along σ. The question asks for the one along v = σ².",
        ),
        Mistake(
            "derivative with respect to the mean",
            lambda x, m, v: (x - m) / v,
            "This is the derivative along μ, with the variance held fixed. Here it is the other way round.",
        ),
        Mistake(
            "one power of the variance missing",
            lambda x, m, v: 0.5 * ((x - m).square() / v - 1 / v),
            "Differentiate 1/v once more: which power of v comes out?",
        ),
        Mistake(
            "sign of the first term",
            lambda x, m, v: ((x - m).square() / v + 1) / (2 * v),
            "The logarithm of 1/√(2πv) falls as v grows.",
        ),
        Mistake(
            "sign of the quadratic term",
            lambda x, m, v: -((x - m).square() / v + 1) / (2 * v),
            "Far from the mean a larger variance makes x more likely. Which sign has the derivative of -1/v?",
        ),
        Mistake(
            "factor ½ of the logarithm lost",
            lambda x, m, v: (x - m).square() / (2 * v.square()) - 1 / v,
            "The density has 1/√(2πv) in front, with a root. What does the root become in the logarithm?",
        ),
    ],
)


def _jump(s: int, t: int, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    ratio = schedule.alpha_bar[t] / schedule.alpha_bar[s]
    return ratio.sqrt(), 1 - ratio


def _jump_shifted(s: int, t: int, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    return _jump(s - 1, t, schedule)


_JUMP = Exercise(
    key="2.3",
    oracle=_jump,
    cases=[(100, 300, _SCHEDULE), (1, 2, _SCHEDULE), (500, 1000, _SCHEDULE), (299, 300, _SCHEDULE)],
    mistakes=[
        Mistake(
            "missing square root",
            lambda s, t, c: (c.alpha_bar[t] / c.alpha_bar[s], 1 - c.alpha_bar[t] / c.alpha_bar[s]),
            "The variance is right. The other number multiplies x_s: look again at what multiplies x_0.",
        ),
        Mistake(
            "standard deviation for variance",
            lambda s, t, c: (_jump(s, t, c)[0], _jump(s, t, c)[1].sqrt()),
            "The second number is what multiplies ε. The question asks for the second argument of N(·, ·).",
        ),
        Mistake(
            "difference instead of quotient",
            lambda s, t, c: (_jump(s, t, c)[0], c.alpha_bar[s] - c.alpha_bar[t]),
            "Try s = t - 1, where the variance must be β_t. The noise in x_s shrinks on its way to t.",
        ),
        Mistake(
            "jump from 0 instead of from s",
            lambda s, t, c: (c.alpha_bar[t].sqrt(), 1 - c.alpha_bar[t]),
            "This is q(x_t | x_0). Which factors α of the product have already been used up at the time s?",
        ),
        Mistake(
            "as if the schedule began at s",
            lambda s, t, c: (c.alpha_bar[t - s].sqrt(), 1 - c.alpha_bar[t - s]),
            "You took the first t - s steps of the schedule. The steps that lead from s to t are others.",
        ),
        Mistake(
            "shifted by one",
            _jump_shifted,
            "From s to t there are t - s steps. Is the one with α_s, from s - 1 to s, among them?",
        ),
        Mistake(
            "both ends shifted by one",
            lambda s, t, c: _jump(s - 1, t - 1, c),
            "You have the right number of steps. Which is the first that leads away from x_s, which the last?",
        ),
        Mistake(
            "quotient of the variances",
            lambda s, t, c: (_jump(s, t, c)[0], (1 - c.alpha_bar[t]) / (1 - c.alpha_bar[s])),
            "The factors of the steps multiply, the variances of the noise do not. Write down two steps and see.",
        ),
        Mistake(
            "one minus the factor",
            lambda s, t, c: (_jump(s, t, c)[0], 1 - _jump(s, t, c)[0]),
            "Data of variance 1 must keep variance 1. What does your factor do to a variance?",
        ),
        Mistake(
            "factor and variance exchanged",
            lambda s, t, c: _jump(s, t, c)[::-1],
            "Both numbers are right. The question asks for the factor first.",
        ),
    ],
    tolerance=1e-7,
)


def _combine(eps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The single noise of the jump: start the steps at x_0 = 0 and divide what arrives."""
    x = torch.zeros_like(eps[:1])
    for t in range(1, len(eps) + 1):
        x = q_step(x, eps[t - 1 : t], t, schedule)
    return (x / schedule.sqrt_one_minus_alpha_bar[len(eps)])[0]


def _weighted(eps: Tensor, weights: Tensor) -> Tensor:
    return torch.tensordot(weights.to(eps), eps, dims=1)


def _weights(eps: Tensor, schedule: NoiseSchedule, shift: int = 0) -> Tensor:
    """√(ᾱ_t/ᾱ_s) √β_s for s = 1…t, not yet divided by √(1-ᾱ_t)."""
    t = len(eps)
    passed = schedule.alpha_bar[1 - shift : t + 1 - shift]
    return (schedule.alpha_bar[t] / passed * schedule.beta[1 : t + 1]).sqrt()


def _weights_from_entry_0(eps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The weights with ᾱ_{s-1} and β_{s-1} for ᾱ_s and β_s: ε_s paired with entry s - 1 of both tables."""
    t = len(eps)
    return (schedule.alpha_bar[t] / schedule.alpha_bar[:t] * schedule.beta[:t]).sqrt()


_COMBINE = Exercise(
    key="2.4",
    oracle=_combine,
    # the long case first: many wrong weights hardly differ from the right ones at t = 1
    cases=[(_images(2, 300), _SCHEDULE), (_images(1, 7), _SCHEDULE), (_images(0, 1), _SCHEDULE)],
    mistakes=[
        Mistake(
            "not normalised",
            lambda e, c: _weighted(e, _weights(e, c)),
            "This is the noise as it lies in x_t. ε̄ is what it is a multiple of: it must have variance 1.",
        ),
        Mistake(
            "missing square root",
            lambda e, c: _weighted(e, _weights(e, c).square() / (1 - c.alpha_bar[len(e)])),
            "These are the shares of the steps in the *variance*. What are the factors of the ε_s?",
        ),
        Mistake(
            "divided by the variance",
            lambda e, c: _weighted(e, _weights(e, c) / (1 - c.alpha_bar[len(e)])),
            "To give a sum of variance V the variance 1, by what must it be divided?",
        ),
        Mistake(
            "shrinking forgotten",
            lambda e, c: _weighted(e, (c.beta[1 : len(e) + 1] / (1 - c.alpha_bar[len(e)])).sqrt()),
            "The noise of step s passes through all later steps, and each of them multiplies it.",
        ),
        Mistake(
            "shifted by one",
            lambda e, c: _weighted(e, _weights(e, c, shift=1) / (1 - c.alpha_bar[len(e)]).sqrt()),
            "Which is the first step that shrinks ε_s: step s, which adds it, or step s + 1?",
        ),
        Mistake(
            "tables read one entry too early",
            lambda e, c: _weighted(e, _weights_from_entry_0(e, c) / (1 - c.alpha_bar[len(e)]).sqrt()),
            "With a single step your function returns 0. Which entry of the tables belongs to eps[0]?",
        ),
        Mistake(
            "shrunk by the wrong steps",
            lambda e, c: _weighted(
                e, (c.alpha_bar[1 : len(e) + 1] * c.beta[1 : len(e) + 1] / (1 - c.alpha_bar[len(e)])).sqrt()
            ),
            "You multiply ε_s by the factors of the steps up to s. Which steps does it go through?",
        ),
        Mistake(
            "shrunk by all steps",
            lambda e, c: _weighted(
                e, (c.alpha_bar[len(e)] * c.beta[1 : len(e) + 1] / (1 - c.alpha_bar[len(e)])).sqrt()
            ),
            "Only x_0 goes through all t steps. When does ε_s come in?",
        ),
        Mistake(
            "all steps weighted equally",
            lambda e, c: e.sum(0) / math.sqrt(len(e)),
            "That would be right if every step added the same variance and none shrank what is there.",
        ),
    ],
)


def _at(table: Tensor, t: Tensor, x: Tensor) -> Tensor:
    return table[t].reshape(-1, *[1] * (x.ndim - 1)).to(x)


def _estimate(x_t: Tensor, eps: Tensor, t: Tensor, c: NoiseSchedule, noise: Any, signal: Any) -> Tensor:
    """(x_t - noise(ᾱ) ε) / signal(ᾱ)."""
    a = _at(c.alpha_bar, t, x_t)
    return (x_t - noise(a) * eps) / signal(a)


_ESTIMATE = Exercise(
    key="2.5",
    oracle=x0_from_eps,
    cases=[
        (_images(3, 3), _images(4, 3), torch.tensor([1, 20, 100]), _SCHEDULE),
        (_images(5, 3), _images(6, 3), torch.tensor([300, 600, 1000]), _SCHEDULE),
    ],
    mistakes=[
        Mistake(
            "missing square root on the signal",
            lambda x, e, t, c: _estimate(x, e, t, c, lambda a: (1 - a).sqrt(), lambda a: a),
            "The noise is taken away correctly. Do you divide by what multiplies x_0 in x_t?",
        ),
        Mistake(
            "missing square root on the noise",
            lambda x, e, t, c: _estimate(x, e, t, c, lambda a: 1 - a, lambda a: a.sqrt()),
            "1 - ᾱ_t is the variance of the noise in x_t. What multiplies ε?",
        ),
        Mistake(
            "both square roots missing",
            lambda x, e, t, c: _estimate(x, e, t, c, lambda a: 1 - a, lambda a: a),
            "Neither factor is a standard deviation: compare both with the equation for x_t.",
        ),
        Mistake(
            "noise added",
            lambda x, e, t, c: _estimate(x, e, t, c, lambda a: -(1 - a).sqrt(), lambda a: a.sqrt()),
            "x_t holds the noise already. Solving for x_0 takes it to the other side.",
        ),
        Mistake(
            "root at the wrong place",
            lambda x, e, t, c: _estimate(x, e, t, c, lambda a: 1 - a.sqrt(), lambda a: a.sqrt()),
            "The noise in x_t has variance 1 - ᾱ_t. Is the square of your factor of ε that?",
        ),
        Mistake(
            "not divided",
            lambda x, e, t, c: _estimate(x, e, t, c, lambda a: (1 - a).sqrt(), torch.ones_like),
            "Without its noise, x_t is still paler than x_0.",
        ),
        Mistake(
            "divided too early",
            lambda x, e, t, c: x / _at(c.sqrt_alpha_bar, t, x) - _at(c.sqrt_one_minus_alpha_bar, t, x) * e,
            "The whole difference is divided, not only its first term.",
        ),
        Mistake(
            "shifted by one",
            lambda x, e, t, c: _estimate(x, e, t - 1, c, lambda a: (1 - a).sqrt(), lambda a: a.sqrt()),
            "At t = 1 your function returns x_t unchanged. Which entry of the table belongs to the time t?",
        ),
    ],
)


def _noisy(x_0: Tensor, eps: Tensor, t: Tensor, c: NoiseSchedule, shift: int = 0) -> Tensor:
    a = _at(c.alpha_bar, t + shift, x_0)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


_BATCH = Exercise(
    key="2.6",
    oracle=q_sample,
    # t = T is left out: there the planted slip stops with an IndexError, which would give it away
    cases=[
        (_images(7, 3), _images(8, 3), torch.tensor([1, 2, 10]), _SCHEDULE),
        (_images(9, 3), _images(10, 3), torch.tensor([100, 500, 999]), _SCHEDULE),
    ],
    mistakes=[
        Mistake(
            "one step too far",
            lambda x, e, t, c: _noisy(x, e, t, c, 1),
            "Your images at t carry the noise of time t + 1. Print the first entry of your table.",
        ),
        Mistake(
            "one step too early",
            lambda x, e, t, c: _noisy(x, e, t, c, -1),
            "At t = 1 your images carry no noise at all. Print the entry that you look up there.",
        ),
        Mistake(
            "α_t for ᾱ_t",
            lambda x, e, t, c: _at(c.sqrt_alpha, t, x) * x + _at(c.sqrt_beta, t, x) * e,
            "These are the factors of a single step. The jump needs the product of all factors so far.",
        ),
        Mistake(
            "variance for standard deviation",
            lambda x, e, t, c: _at(c.sqrt_alpha_bar, t, x) * x + (1 - _at(c.alpha_bar, t, x)) * e,
            "The index is right, the factor of ε is not: it should have 1 - ᾱ_t as its square.",
        ),
        Mistake(
            "signal and noise exchanged",
            lambda x, e, t, c: _at(c.sqrt_one_minus_alpha_bar, t, x) * x + _at(c.sqrt_alpha_bar, t, x) * e,
            "At small t the image should be nearly clean.",
        ),
    ],
)

EXERCISES = [_SAMPLE, _SCORE, _JUMP, _COMBINE, _ESTIMATE, _BATCH]
