"""Exercises of the chapter "Sampling"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffbook.exercises.core import Exercise, Mistake
from diffbook.schedule import NoiseSchedule, linear_schedule

_SCHEDULE = linear_schedule()


def _images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 2, 3, generator=generator, dtype=torch.float64)


_JUMP = Exercise(
    key="6.1",
    oracle=(0.4, 0.6, 0.09375),
    tolerance=4e-3,  # three digits are enough
    mistakes=[
        Mistake(
            "jump taken from 0",
            (0.36, 0.64, 0.1),
            "These belong to the jump from 0 to t. The walk starts its jump at s.",
        ),
        Mistake(
            "product for quotient",
            (0.36 * 0.9, 1 - 0.36 * 0.9, 0.1 / 0.64 * (1 - 0.36 * 0.9)),
            "What is kept up to t is what is kept up to s, times what the jump keeps. Solve for the jump.",
        ),
        Mistake(
            "difference for quotient",
            (0.54, 0.46, 0.1 / 0.64 * 0.46),
            "What several steps keep is a product, so what some of them keep is a quotient, not a difference.",
        ),
        Mistake(
            "difference for β",
            (0.4, 0.54, 0.1 / 0.64 * 0.54),
            "α is right. β is what the jump does not keep.",
        ),
        Mistake(
            "quotient upside down",
            (2.5, -1.5, 0.1 / 0.64 * -1.5),
            "A jump cannot keep more than there was. Which of the two ᾱ is the larger one?",
        ),
        Mistake(
            "factor of the posterior upside down",
            (0.4, 0.6, 3.84),
            "Knowing the image makes x_s more certain: the third number must be smaller than the second.",
        ),
        Mistake(
            "ᾱ in the factor in place of 1-ᾱ",
            (0.4, 0.6, 1.5),
            "The factor of the posterior variance compares the noise at s with the noise at t, not the signals.",
        ),
        Mistake(
            "posterior variance is that of the jump",
            (0.4, 0.6, 0.6),
            "The third number is the variance if x_0 is known as well. It is smaller.",
        ),
        Mistake(
            "noise at s for the posterior variance",
            (0.4, 0.6, 0.1),
            "That is the variance of x_s given x_0 alone. Seeing x_t as well makes x_s a little more certain.",
        ),
        Mistake(
            "standard deviations for variances",
            (0.4, math.sqrt(0.6), math.sqrt(0.09375)),
            "β and β̃ are variances: no root.",
        ),
        Mistake(
            "root of α",
            (math.sqrt(0.4), 0.6, 0.09375),
            "α is asked for, not the factor √α that multiplies the state.",
        ),
        Mistake(
            "noise at t left out",
            (0.4, 0.6, 0.06),
            "The factor of the posterior variance is a quotient of two noises. You have used one of them.",
        ),
        Mistake(
            "noise at t in the factor",
            (0.4, 0.6, 0.384),
            "At s = 0 the image is known and the variance must be 0. Which noise makes it so?",
        ),
        Mistake(
            "factor alone",
            (0.4, 0.6, 0.15625),
            "The third number is the quotient of the noises alone. It has still to be multiplied by β of the jump.",
        ),
        Mistake(
            "what the jump keeps as the factor",
            (0.4, 0.6, 0.24),
            "The factor of the posterior variance is a quotient of noises, 1 - ᾱ, not of signals.",
        ),
        Mistake(
            "variances exchanged",
            (0.4, 0.09375, 0.6),
            "The second number is the variance of the jump, the third one that of the way back.",
        ),
        Mistake(
            "quotient of the roots",
            (math.sqrt(0.4), 1 - math.sqrt(0.4), 0.15625 * (1 - math.sqrt(0.4))),
            "ᾱ is a product of the α, not of their roots: the quotient needs no root.",
        ),
    ],
)

_BY_HAND = Exercise(
    key="6.2",
    oracle=(0.7, 0.32),
    tolerance=1e-3,
    mistakes=[
        Mistake(
            "sign of the noise in the estimate",
            ((0.1 - 0.32) / 0.6, 0.8 * (0.1 - 0.32) / 0.6 - 0.24),
            "The predicted noise is negative, and it is subtracted. What does subtracting a negative number do?",
        ),
        Mistake(
            "noise subtracted again",
            (0.7, 0.56 + 0.24),
            "The estimate is right. On the way to s the noise is put back in, with its own sign.",
        ),
        Mistake(
            "noise not put back",
            (0.7, 0.56),
            "The estimate is right. Some noise belongs to time s, and it is missing.",
        ),
        Mistake(
            "went all the way",
            (0.7, 0.7),
            "The estimate is right. But the step goes to s, where noise is still in the state.",
        ),
        Mistake(
            "noise of time t put back",
            (0.7, 0.56 - 0.32),
            "The estimate is right. How much noise belongs to time s?",
        ),
        Mistake(
            "roots of s exchanged, or those of t taken",
            (0.7, 0.42 - 0.32),
            "The estimate is right. At s the signal is stronger than at t: which of the roots is its factor?",
        ),
        Mistake(
            "missing square roots",
            ((0.1 + 0.64 * 0.4) / 0.36, 0.64 * (0.1 + 0.64 * 0.4) / 0.36 - 0.36 * 0.4),
            "In x_t stand the roots of ᾱ and of 1-ᾱ, not the numbers themselves.",
        ),
        Mistake(
            "missing square roots at s",
            (0.7, 0.64 * 0.7 - 0.36 * 0.4),
            "The estimate is right. At s stand the roots of ᾱ and of 1-ᾱ.",
        ),
        Mistake(
            "not divided by the signal's factor",
            (0.42, 0.8 * 0.42 - 0.24),
            "You removed the noise. What is left is the image in a shrunken form.",
        ),
        Mistake(
            "the two results exchanged",
            (0.32, 0.7),
            "The order asked for is: estimate of x_0, then x_s.",
        ),
        Mistake(
            "s and t exchanged",
            ((0.1 + 0.24) / 0.8, 0.6 * (0.1 + 0.24) / 0.8 - 0.32),
            "That is the step upwards. The state is at t, where ᾱ is 0.36.",
        ),
        Mistake(
            "roots exchanged at t",
            ((0.1 + 0.24) / 0.8, 0.34 - 0.24),
            "At t there is more noise than signal: which of the two roots is the larger one?",
        ),
        Mistake(
            "missing square root of the signal",
            (0.42 / 0.36, 0.8 * 0.42 / 0.36 - 0.24),
            "The numerator of the estimate is right. With which factor does the image stand in x_t?",
        ),
        Mistake(
            "missing square root of the noise",
            ((0.1 + 0.64 * 0.4) / 0.6, 0.8 * (0.1 + 0.64 * 0.4) / 0.6 - 0.24),
            "With which factor does ε stand in x_t? It is not its square.",
        ),
        Mistake(
            "signal at s without root",
            (0.7, 0.64 * 0.7 - 0.24),
            "The estimate is right. At s one of the two factors lacks its root.",
        ),
        Mistake(
            "noise at s without root",
            (0.7, 0.56 - 0.36 * 0.4),
            "The estimate is right. At s one of the two factors lacks its root.",
        ),
        Mistake(
            "signal of time t",
            (0.7, 0.42 - 0.24),
            "The estimate is right, and so is the noise put back. How much signal belongs to time s?",
        ),
        Mistake(
            "estimate not scaled at s",
            (0.7, 0.7 - 0.24),
            "The estimate is right. In x_s the image stands with a factor too.",
        ),
        Mistake(
            "noise of the jump",
            (0.7, 0.56 - 0.4 * math.sqrt(1 - 0.36 / 0.64)),
            "That is the noise which the jump from s to t adds. Which noise is in x_s?",
        ),
        Mistake(
            "room left for fresh noise",
            (0.7, 0.56 - 0.4 * math.sqrt(0.36 - 0.36 / 0.64 * (1 - 0.36 / 0.64))),
            "This keeps room for fresh noise, as for η = 1. Here η is 0: all of the old noise is kept.",
        ),
    ],
)


def _ddim(x: Tensor, eps: Tensor, t: int, s: int, c: NoiseSchedule) -> Tensor:
    a_t, a_s = c.alpha_bar[t], c.alpha_bar[s]
    return a_s.sqrt() * (x - (1 - a_t).sqrt() * eps) / a_t.sqrt() + (1 - a_s).sqrt() * eps


Factor = Callable[[Tensor, Tensor], Tensor]


def _wrong_ddim(signal: Factor, noise: Factor) -> Callable[[Tensor, Tensor, int, int, NoiseSchedule], Tensor]:
    """The step with other factors of x̂_0 and ε̂ at s, as functions of ᾱ_t and ᾱ_s."""

    def step(x: Tensor, eps: Tensor, t: int, s: int, c: NoiseSchedule) -> Tensor:
        a_t, a_s = c.alpha_bar[t], c.alpha_bar[s]
        x_0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
        return signal(a_t, a_s) * x_0 + noise(a_t, a_s) * eps

    return step


def _wrong_estimate(estimate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The step with another estimate of x_0, as a function of x_t, ε̂ and ᾱ_t."""

    def step(x: Tensor, eps: Tensor, t: int, s: int, c: NoiseSchedule) -> Tensor:
        a_s = c.alpha_bar[s]
        return a_s.sqrt() * estimate(x, eps, c.alpha_bar[t]) + (1 - a_s).sqrt() * eps

    return step


def _beta_tilde(a_t: Tensor, a_s: Tensor) -> Tensor:
    return (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)


_STEP = Exercise(
    key="6.3",
    oracle=_ddim,
    cases=[(_images(1), _images(2), t, s, _SCHEDULE) for t, s in ((1000, 900), (300, 250), (40, 3), (7, 0))],
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "noise not put back",
            _wrong_ddim(lambda a, b: b.sqrt(), lambda a, b: 0 * a),
            "The estimate and its factor are right. Which noise belongs to time s?",
        ),
        Mistake(
            "noise of time t put back",
            _wrong_ddim(lambda a, b: b.sqrt(), lambda a, b: (1 - a).sqrt()),
            "The signal is that of time s, but the noise is still that of time t.",
        ),
        Mistake(
            "signal of time t",
            _wrong_ddim(lambda a, b: a.sqrt(), lambda a, b: (1 - b).sqrt()),
            "The noise is that of time s, but the signal still that of time t.",
        ),
        Mistake(
            "missing square roots at s",
            _wrong_ddim(lambda a, b: b, lambda a, b: 1 - b),
            "The estimate is right. The squares of the two factors at s must add up to 1.",
        ),
        Mistake(
            "missing square root of the signal",
            _wrong_ddim(lambda a, b: b, lambda a, b: (1 - b).sqrt()),
            "The squares of the two factors at s must add up to 1. One of them lacks its root.",
        ),
        Mistake(
            "missing square root of the noise",
            _wrong_ddim(lambda a, b: b.sqrt(), lambda a, b: 1 - b),
            "The squares of the two factors at s must add up to 1. Look at the one of the noise.",
        ),
        Mistake(
            "noise subtracted again",
            _wrong_ddim(lambda a, b: b.sqrt(), lambda a, b: -(1 - b).sqrt()),
            "On the way to s noise is put back in. Which sign has it?",
        ),
        Mistake(
            "factors exchanged",
            _wrong_ddim(lambda a, b: (1 - b).sqrt(), lambda a, b: b.sqrt()),
            "At s = 0 your result is the noise. It should be the image.",
        ),
        Mistake(
            "went all the way",
            _wrong_ddim(lambda a, b: 1 + 0 * a, lambda a, b: 0 * a),
            "That is the estimate of x_0. The step stops at s.",
        ),
        Mistake(
            "noise of the jump",
            _wrong_ddim(lambda a, b: b.sqrt(), lambda a, b: (1 - a / b).sqrt()),
            "That is the noise which the jump from s to t adds. Which noise is in x_s?",
        ),
        Mistake(
            "room left for fresh noise",
            _wrong_ddim(lambda a, b: b.sqrt(), lambda a, b: (1 - b - _beta_tilde(a, b)).clamp(min=0).sqrt()),
            "This keeps room for fresh noise, as for η = 1, but adds none. The exercise asks for η = 0.",
        ),
        Mistake(
            "not divided by the signal's factor",
            _wrong_estimate(lambda x, e, a: x - (1 - a).sqrt() * e),
            "You removed the noise from x_t. What is left is the image times which factor?",
        ),
        Mistake(
            "missing square roots in the estimate",
            _wrong_estimate(lambda x, e, a: (x - (1 - a) * e) / a),
            "The factors at s are right. In the estimate stand the roots of ᾱ_t and of 1-ᾱ_t.",
        ),
        Mistake(
            "missing square root below",
            _wrong_estimate(lambda x, e, a: (x - (1 - a).sqrt() * e) / a),
            "The factors at s are right. With which factor does the image stand in x_t?",
        ),
        Mistake(
            "missing square root of the noise in the estimate",
            _wrong_estimate(lambda x, e, a: (x - (1 - a) * e) / a.sqrt()),
            "The factors at s are right. With which factor does ε stand in x_t?",
        ),
        Mistake(
            "sign of the noise in the estimate",
            _wrong_estimate(lambda x, e, a: (x + (1 - a).sqrt() * e) / a.sqrt()),
            "To estimate the image, the noise has to go. Look at its sign in the estimate.",
        ),
        Mistake(
            "only the noise divided",
            _wrong_estimate(lambda x, e, a: x - (1 - a).sqrt() * e / a.sqrt()),
            "In the estimate the whole difference is divided by the signal's factor. Look at your brackets.",
        ),
        Mistake(
            "multiplied in place of divided",
            _wrong_estimate(lambda x, e, a: a.sqrt() * (x - (1 - a).sqrt() * e)),
            "With the noise removed, √ᾱ_t times the image is left. How do you get the image?",
        ),
        Mistake(
            "factors exchanged in the estimate",
            _wrong_estimate(lambda x, e, a: (x - a.sqrt() * e) / (1 - a).sqrt()),
            "The factors at s are right. In x_t the image stands with √ᾱ_t and the noise with √(1-ᾱ_t).",
        ),
        Mistake(
            "estimate clipped",
            _wrong_estimate(lambda x, e, a: ((x - (1 - a).sqrt() * e) / a.sqrt()).clamp(-1, 1)),
            "The formula is right. But the exercise says nothing of bounds: do not clip.",
        ),
        Mistake(
            "estimate not scaled at s",
            _wrong_ddim(lambda a, b: 1 + 0 * a, lambda a, b: (1 - b).sqrt()),
            "The noise is that of time s. In x_s the image stands with a factor too.",
        ),
        Mistake(
            "s and t exchanged",
            lambda x, e, t, s, c: _ddim(x, e, s, t, c),
            "That is the step upwards, from s to t. The state is given at t.",
        ),
        Mistake(
            "one time back only",
            lambda x, e, t, s, c: _ddim(x, e, t, t - 1, c),
            "You stepped to t - 1. The step goes to s.",
        ),
        Mistake(
            "α for ᾱ",
            lambda x, e, t, s, c: c.sqrt_alpha[s] * (x - c.sqrt_beta[t] * e) / c.sqrt_alpha[t] + c.sqrt_beta[s] * e,
            "α belongs to a single step. Signal and noise in x_t have come about in all steps up to t.",
        ),
        Mistake(
            "index shifted by one",
            lambda x, e, t, s, c: _ddim(x, e, t - 1, max(s - 1, 0), c),
            "The tables have T + 1 entries: the entry for time t has the index t.",
        ),
    ],
)

Model = Callable[[Tensor, int], Tensor]
Pairs = Callable[[Sequence[int], int], list[tuple[int, int]]]


def _model(x: Tensor, t: int) -> Tensor:
    """A model that depends on the state and on the time."""
    return torch.sin(2 * x) + t / 1000


def _asked_at_s(model: Model, x: Tensor, times: Sequence[int], c: NoiseSchedule) -> Tensor:
    for t, s in pairwise([*times, 0]):
        x = _ddim(x, model(x, s), t, s, c)
    return x


def _along(pairs: Pairs) -> Callable[[Model, Tensor, Sequence[int], NoiseSchedule], Tensor]:
    """DDIM along pairs (t, s) that are made from the list of times and T."""

    def sample(model: Model, x: Tensor, times: Sequence[int], c: NoiseSchedule) -> Tensor:
        for t, s in pairs(times, c.T):
            x = _ddim(x, model(x, t), t, s, c)
        return x

    return sample


_STRIDE = Exercise(
    key="6.4",
    oracle=_along(lambda times, T: list(pairwise([*times, 0]))),
    cases=[(_model, _images(3), times, _SCHEDULE) for times in ([1000, 700, 200], [1000, 600, 300, 1], [900, 5])],
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "stride in place of the next entry",
            _along(lambda times, T: [(t, max(t - T // len(times), 0)) for t in times]),
            "The state is brought to a time at which the network is not asked. From where must s be taken?",
        ),
        Mistake(
            "stride by the gaps of an even list",
            _along(lambda times, T: [(t, max(t - (T - 1) // (len(times) - 1), 0)) for t in times]),
            "Another stride helps for one kind of list only. From where must s be taken?",
        ),
        Mistake(
            "stride of the first gap",
            _along(lambda times, T: [(t, max(t - (times[0] - times[1]), 0)) for t in times]),
            "The gaps of a list need not be equal. From where must s be taken?",
        ),
        Mistake(
            "one time back only",
            _along(lambda times, T: [(t, t - 1) for t in times]),
            "The loop jumps on to the next entry, but the state has gone back by one time only.",
        ),
        Mistake(
            "last step missing",
            _along(lambda times, T: list(pairwise(times))),
            "The pairs are right, but the walk stops at the last entry of the list. Where should it end?",
        ),
        Mistake(
            "last step to 1",
            _along(lambda times, T: list(pairwise([*times, 1]))),
            "All pairs but the last are right. At which time is there no noise at all?",
        ),
        Mistake(
            "first entry left out",
            _along(lambda times, T: list(pairwise([*times[1:], 0]))),
            "The walk must start where x is: at the first entry of the list.",
        ),
        Mistake(
            "straight to 0",
            _along(lambda times, T: [(t, 0) for t in times]),
            "Each step went all the way to the estimate of x_0. Only the last one should.",
        ),
        Mistake(
            "stride by one gap less",
            _along(lambda times, T: [(t, max(t - T // (len(times) - 1), 0)) for t in times]),
            "Another stride does not help: the gaps of a list need not be equal. From where must s be taken?",
        ),
        Mistake(
            "stride of the first entry",
            _along(lambda times, T: [(t, max(t - times[0] // len(times), 0)) for t in times]),
            "Another stride does not help: the gaps of a list need not be equal. From where must s be taken?",
        ),
        Mistake(
            "last step by one time",
            _along(lambda times, T: list(pairwise([*times, times[-1] - 1]))),
            "All pairs but the last are right. At which time is there no noise at all?",
        ),
        Mistake(
            "entry before for entry after",
            _along(lambda times, T: list(zip(times, [T, *times[:-1]], strict=True))),
            "The entry before t in the list is a later time. The walk goes down.",
        ),
        Mistake(
            "last step back to the first entry",
            _along(lambda times, T: list(pairwise([*times, times[0]]))),
            "All pairs but the last are right. After the last entry the list does not start again.",
        ),
        Mistake(
            "list turned around",
            _along(lambda times, T: list(pairwise([*sorted(times), 0]))),
            "The list is already in the order of the walk, from noise to image.",
        ),
        Mistake(
            "network asked at s",
            _asked_at_s,
            "The pairs are right. At which of the two times is the state when the network is asked?",
        ),
    ],
)


def _lambda(c: NoiseSchedule, t: int) -> Tensor:
    return 0.5 * (c.alpha_bar[t] / (1 - c.alpha_bar[t])).log()


Solver = Callable[[Tensor, Tensor, Tensor, int, int, int, NoiseSchedule], Tensor]


def _solver(
    weight: Factor,
    half: float = 1.0,
    ratio: Factor = lambda a_t, a_s: ((1 - a_s) / (1 - a_t)).sqrt(),
    signal: Callable[[Tensor], Tensor] = torch.sqrt,
    growth: Callable[[Tensor], Tensor] = lambda h: 1 - (-h).exp(),
) -> Solver:
    """The update with another weight of x̂_0 - x̂_0^before as a function of h_before and h, or other factors."""

    def step(x: Tensor, x_0: Tensor, x_0_before: Tensor, before: int, t: int, s: int, c: NoiseSchedule) -> Tensor:
        h_before, h = half * (_lambda(c, t) - _lambda(c, before)), half * (_lambda(c, s) - _lambda(c, t))
        D = x_0 + weight(h_before, h) * (x_0 - x_0_before)
        a_t, a_s = c.alpha_bar[t], c.alpha_bar[s]
        return ratio(a_t, a_s) * x + signal(a_s) * growth(h) * D

    return step


def _extrapolate(h_before: Tensor, h: Tensor) -> Tensor:
    return h / (2 * h_before)


def _in_t(x: Tensor, x_0: Tensor, x_0_before: Tensor, before: int, t: int, s: int, c: NoiseSchedule) -> Tensor:
    weight = (t - s) / (2 * (before - t))
    return _solver(lambda b, h: weight * torch.ones_like(h))(x, x_0, x_0_before, before, t, s, c)


_SECOND_ORDER = Exercise(
    key="6.5",
    oracle=_solver(_extrapolate),
    cases=[
        (_images(4), _images(5), _images(6), *times, _SCHEDULE)
        for times in ((1000, 800, 650), (500, 450, 200), (60, 31, 1))
    ],
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "first order",
            _solver(lambda b, h: 0 * h),
            "This is a step of DDIM: the estimate at the time before is not used.",
        ),
        Mistake(
            "half forgotten",
            _solver(lambda b, h: h / b),
            "This extrapolates by a whole step. Which factor had the slope?",
        ),
        Mistake(
            "r upside down",
            _solver(lambda b, h: b / (2 * h)),
            "The longer the step, the further to extrapolate. Is r the quotient that you have used?",
        ),
        Mistake(
            "equal steps assumed",
            _solver(lambda b, h: 0.5 * torch.ones_like(h)),
            "This is right when both steps are equally long in λ. Here they are not.",
        ),
        Mistake(
            "equal steps and a whole step ahead",
            _solver(lambda b, h: torch.ones_like(h)),
            "The weights 2 and -1 extrapolate by a whole step, and assume equal steps in λ.",
        ),
        Mistake(
            "sign of the extrapolation",
            _solver(lambda b, h: -h / (2 * b)),
            "Your D lies on the side of the older estimate. It should lie beyond the newer one.",
        ),
        Mistake(
            "steps measured in t",
            _in_t,
            "r is a quotient of steps in λ, not in t.",
        ),
        Mistake(
            "whole log-SNR",
            _solver(_extrapolate, half=2.0),
            "λ is half the log-SNR. r does not notice a factor 2, but the exponential does.",
        ),
        Mistake(
            "sign of the step",
            _solver(_extrapolate, growth=lambda h: 1 - h.exp()),
            "λ grows on the way to the image, so h is positive. Look at the sign in the exponent.",
        ),
        Mistake(
            "sign of the second term",
            _solver(_extrapolate, growth=lambda h: (-h).exp() - 1),
            "1 - exp(-h) is positive: the step moves towards the estimate.",
        ),
        Mistake(
            "exponential not subtracted from 1",
            _solver(_extrapolate, growth=lambda h: (-h).exp()),
            "With a very long step the result should be √ᾱ_s D. What is the limit of your factor?",
        ),
        Mistake(
            "exponent of the integral",
            _solver(_extrapolate, growth=lambda h: h.exp() - 1),
            "In front of the integral stands a factor that belongs to time s. Which exponent is left?",
        ),
        Mistake(
            "missing square root of the noise",
            _solver(_extrapolate, ratio=lambda a_t, a_s: (1 - a_s) / (1 - a_t)),
            "The factor of x_t is a quotient of standard deviations.",
        ),
        Mistake(
            "missing square root of the signal",
            _solver(_extrapolate, signal=lambda a_s: a_s),
            "With which factor does the image stand in x_s?",
        ),
        Mistake(
            "signals for noise levels",
            _solver(_extrapolate, ratio=lambda a_t, a_s: (a_s / a_t).sqrt()),
            "The factor of x_t is the quotient of the noise levels, not that of the signals.",
        ),
        Mistake(
            "noise levels upside down",
            _solver(_extrapolate, ratio=lambda a_t, a_s: ((1 - a_t) / (1 - a_s)).sqrt()),
            "There is less noise at s than at t. Does your factor of x_t shrink the noise?",
        ),
        Mistake(
            "the two estimates exchanged",
            lambda x, x_0, x_0_before, before, t, s, c: _solver(_extrapolate)(x, x_0_before, x_0, before, t, s, c),
            "x_0 is the estimate at t, x_0_before the older one. Which of them is extrapolated?",
        ),
        Mistake(
            "not simplified",
            _solver(lambda b, h: (h - 1 + (-h).exp()) / (1 - (-h).exp()) / b),
            "This is of second order too. But the formula has h/2 (1 - exp(-h)) in place of h - 1 + exp(-h).",
        ),
        Mistake(
            "step before counted from the end",
            _solver(lambda b, h: h / (2 * (b + h))),
            "The two estimates lie h_before apart, from the time before to t, not to s.",
        ),
        Mistake(
            "product for quotient",
            _solver(lambda b, h: h * b / 2),
            "The slope is a difference of estimates over a difference of λ. Where does h_before stand?",
        ),
        Mistake(
            "length of the step left out",
            _solver(lambda b, h: 1 / (2 * b)),
            "The slope is right. How far along it do you have to go?",
        ),
        Mistake(
            "slope not divided",
            _solver(lambda b, h: h / 2),
            "A difference of two estimates is no slope yet. By what has it to be divided?",
        ),
        Mistake(
            "2 above in place of below",
            _solver(lambda b, h: 2 * h / b),
            "Extrapolate by half a step, not by two.",
        ),
        Mistake(
            "signal of time t",
            lambda x, x_0, old, before, t, s, c: _solver(_extrapolate, signal=lambda a_s: c.alpha_bar[t].sqrt())(
                x, x_0, old, before, t, s, c
            ),
            "The factor of D belongs to the end of the step.",
        ),
        Mistake(
            "noise for the signal",
            _solver(_extrapolate, signal=lambda a_s: (1 - a_s).sqrt()),
            "D is an estimate of the image. With which factor does the image stand in x_s?",
        ),
        Mistake(
            "sign before the exponential",
            _solver(_extrapolate, growth=lambda h: 1 + (-h).exp()),
            "For a step of no length, h = 0, the result must be x_t. What does your factor of D say then?",
        ),
        Mistake(
            "exponential left out",
            _solver(_extrapolate, growth=lambda h: h),
            "1 - exp(-h) is about h for short steps only. These are not short.",
        ),
    ],
)

EXERCISES = [_JUMP, _BY_HAND, _STEP, _STRIDE, _SECOND_ORDER]
