"""Exercises of the chapter "The reverse process"."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffbook.diffusion import eps_from_v, q_posterior, x0_from_eps
from diffbook.exercises.core import Exercise, Mistake
from diffbook.schedule import NoiseSchedule, linear_schedule

_SCHEDULE = linear_schedule()


def _images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 2, 3, generator=generator, dtype=torch.float64)


_RATE = Exercise(
    key="3.1",
    oracle=(8.0, 4.0),
    mistakes=[
        Mistake(
            "number of steps forgotten",
            (8.0, 8.0),
            "One step is right. How many steps does the new chain have?",
        ),
        Mistake(
            "number of steps multiplied",
            (8.0, 16.0),
            "One step is right. Twice as many losses are added: does that help or harm?",
        ),
        Mistake(
            "second power",
            (4.0, 2.0),
            "Look at the exponent of the step size once more.",
        ),
        Mistake(
            "first power",
            (2.0, 1.0),
            "You took the loss as proportional to the step size. Which power of it stands in the equation?",
        ),
        Mistake(
            "exponent taken as a factor",
            (6.0, 3.0),
            "The step size is halved first and then raised to a power; the exponent does not multiply.",
        ),
        Mistake(
            "power of the root",
            (2 * math.sqrt(2), math.sqrt(2)),
            "You counted powers of s, but s² is what falls to one half. Look at the exponent in the equation.",
        ),
        Mistake(
            "sixth power",
            (64.0, 32.0),
            "That is the power of s, a standard deviation. The question halves a variance.",
        ),
        Mistake(
            "the factors turned round",
            (1 / 8, 1 / 4),
            "These are the ratios of new to old. The question asks by which factor the losses fall.",
        ),
    ],
)

_BY_HAND = Exercise(
    key="3.2",
    oracle=(3 * math.sqrt(2) / 7, 2 / 7, 3 / 7),
    tolerance=2e-3,
    mistakes=[
        Mistake(
            "missing square root at x_0",
            (3 / 7, 2 / 7, 3 / 7),
            "What multiplies x_0 in the mean of q(x_1 | x_0)?",
        ),
        Mistake(
            "index of the image's weight",
            (3 * math.sqrt(2) / 14, 2 / 7, 3 / 7),
            "The weight of x_0 comes from q(x_1 | x_0). Which index has its ᾱ?",
        ),
        Mistake(
            "missing square root at x_2",
            (3 * math.sqrt(2) / 7, 1 / 7, 3 / 7),
            "What multiplies x_1 in the mean of q(x_2 | x_1)? It enters b once, and the precision squared.",
        ),
        Mistake(
            "weights exchanged",
            (2 / 7, 3 * math.sqrt(2) / 7, 3 / 7),
            "The order asked for is x_0, x_2, variance.",
        ),
        Mistake(
            "standard deviation for variance",
            (3 * math.sqrt(2) / 7, 2 / 7, math.sqrt(3 / 7)),
            "The third number is asked for as a variance: one over the precision, without a root.",
        ),
        Mistake(
            "precision for variance",
            (3 * math.sqrt(2) / 7, 2 / 7, 7 / 3),
            "The coefficient of the square is a precision. How does the variance follow from it?",
        ),
        Mistake(
            "not divided by the precision",
            (math.sqrt(2), 2 / 3, 3 / 7),
            "These are the two parts of b. The mean is b divided by a.",
        ),
        Mistake(
            "step and image confused",
            (3 * math.sqrt(2) / 7, 2 / 7, 0.75),
            "That is β_2, the variance of the forward step. Knowing x_0 as well makes x_1 more certain.",
        ),
        Mistake(
            "x_2 not used",
            (3 * math.sqrt(2) / 7, 2 / 7, 0.5),
            "That is the variance of q(x_1 | x_0). Seeing x_2 as well makes x_1 more certain.",
        ),
    ],
)


def _best_variance(s2: float, t: int, c: NoiseSchedule) -> Tensor:
    a = c.alpha_bar[t]
    return c.posterior_variance[t] + c.posterior_mean_x_0[t] ** 2 / (1 / s2 + a / (1 - a))


_VARIANCE = Exercise(
    key="3.3",
    oracle=_best_variance,
    cases=[(0.25, 2, _SCHEDULE), (4.0, 3, _SCHEDULE), (0.04, 10, _SCHEDULE), (0.5, 100, _SCHEDULE)],
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "weight not squared",
            lambda s2, t, c: (
                c.posterior_variance[t] + c.posterior_mean_x_0[t] / (1 / s2 + c.alpha_bar[t] / (1 - c.alpha_bar[t]))
            ),
            "A factor comes out of a variance in which power?",
        ),
        Mistake(
            "missing square root in the weight",
            lambda s2, t, c: (
                c.posterior_variance[t]
                + c.alpha_bar[t - 1] * c.posterior_mean_x_0[t] ** 2 / (1 / s2 + c.alpha_bar[t] / (1 - c.alpha_bar[t]))
            ),
            "Look up the factor of x_0 in the mean of q(x_{t-1} | x_0): is it ᾱ or its root?",
        ),
        Mistake(
            "index of the weight",
            lambda s2, t, c: (
                c.posterior_variance[t]
                + c.alpha[t] * c.posterior_mean_x_0[t] ** 2 / (1 / s2 + c.alpha_bar[t] / (1 - c.alpha_bar[t]))
            ),
            "The numerator of the weight belongs to the jump from x_0 to x_{t-1}. Which index has its ᾱ?",
        ),
        Mistake(
            "x_t not used",
            lambda s2, t, c: c.posterior_variance[t] + c.posterior_mean_x_0[t] ** 2 * s2,
            "This takes the variance of x_0 before x_t was seen. What remains of it afterwards?",
        ),
        Mistake(
            "data forgotten",
            lambda s2, t, c: c.posterior_variance[t] + c.posterior_mean_x_0[t] ** 2 * (1 - c.alpha_bar[t]),
            "Your answer does not depend on s². It is right for s² = 1 only.",
        ),
        Mistake(
            "image taken as known",
            lambda s2, t, c: c.posterior_variance[t],
            "This is the variance when x_0 is known. Here it is not: which term is missing?",
        ),
        Mistake(
            "prior forgotten",
            lambda s2, t, c: (
                c.posterior_variance[t] + c.posterior_mean_x_0[t] ** 2 * (1 - c.alpha_bar[t]) / c.alpha_bar[t]
            ),
            "Only the observation went into the precision of x_0. The prior has a precision too.",
        ),
        Mistake(
            "factor of the observation forgotten",
            lambda s2, t, c: (
                c.posterior_variance[t] + c.posterior_mean_x_0[t] ** 2 / (1 / s2 + 1 / (1 - c.alpha_bar[t]))
            ),
            "x_t does not show x_0 itself, but a shrunken x_0. How does the factor enter the precision?",
        ),
        Mistake(
            "factor of the observation not squared",
            lambda s2, t, c: (
                c.posterior_variance[t]
                + c.posterior_mean_x_0[t] ** 2 / (1 / s2 + c.sqrt_alpha_bar[t] / (1 - c.alpha_bar[t]))
            ),
            "The factor in front of x_0 in the observation enters the precision in which power?",
        ),
        Mistake(
            "variance added as if it were a precision",
            lambda s2, t, c: (
                c.posterior_variance[t] + c.posterior_mean_x_0[t] ** 2 / (s2 + c.alpha_bar[t] / (1 - c.alpha_bar[t]))
            ),
            "Precisions add. What is the precision of a prior with the variance s²?",
        ),
        Mistake(
            "path forgotten",
            lambda s2, t, c: _best_variance(s2, t, c) - c.posterior_variance[t],
            "Even with x_0 known x_{t-1} would be uncertain. Which term says how much?",
        ),
        Mistake(
            "standard deviation for variance",
            lambda s2, t, c: _best_variance(s2, t, c).sqrt(),
            "The question asks for σ², not for σ.",
        ),
    ],
)


def _mean(x: Tensor, eps: Tensor, t: int, c: NoiseSchedule) -> Tensor:
    return q_posterior(x0_from_eps(x, eps, t, c), x, t, c)[0]


def _mean_from_v(x: Tensor, v: Tensor, t: int, c: NoiseSchedule) -> Tensor:
    return _mean(x, eps_from_v(x, v, t, c), t, c)


def _wrong_mean(k: Callable[[int, NoiseSchedule], Tensor]) -> Callable[[Tensor, Tensor, int, NoiseSchedule], Tensor]:
    """The mean from v with another coefficient in front of ε."""
    return lambda x, v, t, c: (x - k(t, c) * eps_from_v(x, v, t, c)) / c.sqrt_alpha[t]


_FROM_V = Exercise(
    key="3.4",
    oracle=_mean_from_v,
    cases=[(_images(1), _images(2), t, _SCHEDULE) for t in (2, 50, 700)],
    tolerance=1e-7,
    mistakes=[
        Mistake(
            "velocity taken for noise",
            _mean,
            "The output was used as if it were ε. Convert it first.",
        ),
        Mistake(
            "root lost below",
            _wrong_mean(lambda t, c: c.beta[t] / (1 - c.alpha_bar[t])),
            "The conversion is right. At t = 1 the coefficient of ε must be √β_1: is yours?",
        ),
        Mistake(
            "root in the wrong place",
            _wrong_mean(lambda t, c: c.beta[t].sqrt() / (1 - c.alpha_bar[t])),
            "The conversion is right. One root cancels in the coefficient of ε; look where the other is left.",
        ),
        Mistake(
            "noise of the step",
            _wrong_mean(lambda t, c: c.beta[t].sqrt()),
            "You removed all of the total noise as if it had come in this step alone.",
        ),
        Mistake(
            "velocity taken for the image",
            lambda x, v, t, c: q_posterior(v, x, t, c)[0],
            "The output was used as if it were x_0. Convert it first.",
        ),
        Mistake(
            "roots of the rotation forgotten",
            lambda x, v, t, c: _mean(x, c.alpha_bar[t] * v + (1 - c.alpha_bar[t]) * x, t, c),
            "Cosine and sine of the rotation have squares that add up to 1. Yours add up to 1 themselves.",
        ),
        Mistake(
            "all noise removed at once",
            _wrong_mean(lambda t, c: c.sqrt_one_minus_alpha_bar[t]),
            "That removes the noise of all steps. The mean goes back by one step.",
        ),
        Mistake(
            "missing square root in the shrinking",
            lambda x, v, t, c: _mean_from_v(x, v, t, c) / c.sqrt_alpha[t],
            "By which factor did the forward step shrink: by α_t or by its root?",
        ),
        Mistake(
            "shrinking not undone",
            lambda x, v, t, c: _mean_from_v(x, v, t, c) * c.sqrt_alpha[t],
            "The forward step shrinks by √α_t. What has the backward mean to do about it?",
        ),
        Mistake(
            "shrunk once more",
            lambda x, v, t, c: _mean_from_v(x, v, t, c) * c.alpha[t],
            "The forward step multiplied by √α_t. Did you divide?",
        ),
        Mistake(
            "sign of the velocity",
            lambda x, v, t, c: _mean_from_v(x, -v, t, c),
            "Which sign does ε have in the definition of v?",
        ),
        Mistake(
            "image for noise",
            lambda x, v, t, c: _mean(x, c.sqrt_alpha_bar[t] * x - c.sqrt_one_minus_alpha_bar[t] * v, t, c),
            "From v you computed x_0, and then used it as ε.",
        ),
        Mistake(
            "coefficients of the rotation exchanged",
            lambda x, v, t, c: _mean(x, c.sqrt_one_minus_alpha_bar[t] * v + c.sqrt_alpha_bar[t] * x, t, c),
            "Near t = 1, where x_t is nearly the image, v is nearly ε. Is it in your formula?",
        ),
        Mistake(
            "noise added",
            _wrong_mean(lambda t, c: -c.beta[t] / c.sqrt_one_minus_alpha_bar[t]),
            "The mean lies in the direction of less noise.",
        ),
    ],
)


def _backward_step(x: Tensor, eps: Tensor, z: Tensor, t: int, c: NoiseSchedule) -> Tensor:
    return _mean(x, eps, t, c) + c.posterior_variance[t].sqrt() * z


_STEP = Exercise(
    key="3.5",
    oracle=_backward_step,
    cases=[(_images(3), _images(4), _images(5), t, _SCHEDULE) for t in (1, 2, 30, 600)],
    tolerance=1e-7,
    mistakes=[
        Mistake(
            "total noise taken for the noise of the step",
            lambda x, e, z, t, c: (x - c.sqrt_beta[t] * e) / c.sqrt_alpha[t] + c.posterior_variance[t].sqrt() * z,
            "Which share of the total noise came with this step?",
        ),
        Mistake(
            "root lost below",
            lambda x, e, z, t, c: (
                (x - c.beta[t] / (1 - c.alpha_bar[t]) * e) / c.sqrt_alpha[t] + c.posterior_variance[t].sqrt() * z
            ),
            "At t = 1 the coefficient of the noise was right before, √β_1. Now it is not.",
        ),
        Mistake(
            "root in the wrong place",
            lambda x, e, z, t, c: (
                (x - c.sqrt_beta[t] / (1 - c.alpha_bar[t]) * e) / c.sqrt_alpha[t] + c.posterior_variance[t].sqrt() * z
            ),
            "At t = 1 the coefficient of the noise was right before, √β_1. Look at the powers of both factors.",
        ),
        Mistake(
            "share in place of the noise of the step",
            lambda x, e, z, t, c: (
                (x - c.sqrt_beta[t] / c.sqrt_one_minus_alpha_bar[t] * e) / c.sqrt_alpha[t]
                + c.posterior_variance[t].sqrt() * z
            ),
            "This share times eps estimates the noise of the step. With which factor did that noise enter x_t?",
        ),
        Mistake(
            "all noise removed at once",
            lambda x, e, z, t, c: (
                (x - c.sqrt_one_minus_alpha_bar[t] * e) / c.sqrt_alpha[t] + c.posterior_variance[t].sqrt() * z
            ),
            "That removes the noise of all steps. This step should go back by one.",
        ),
        Mistake(
            "correlation squared",
            lambda x, e, z, t, c: (
                (x - c.sqrt_beta[t] * c.beta[t] / (1 - c.alpha_bar[t]) * e) / c.sqrt_alpha[t]
                + c.posterior_variance[t].sqrt() * z
            ),
            "You multiplied by the share of the variance. The estimate needs the correlation.",
        ),
        Mistake(
            "variance for standard deviation",
            lambda x, e, z, t, c: _mean(x, e, t, c) + c.posterior_variance[t] * z,
            "The mean is right. What multiplies z must have β̃_t as its square.",
        ),
        Mistake(
            "another variance",
            lambda x, e, z, t, c: _mean(x, e, t, c) + c.sqrt_beta[t] * z,
            "The mean is right, but the variance is β_t. The exercise asks for β̃_t, which is 0 at t = 1.",
        ),
        Mistake(
            "another variance before the last step",
            lambda x, e, z, t, c: _mean(x, e, t, c) + (c.sqrt_beta[t] * z if t > 1 else 0.0),
            "The mean is right, and so is the last step. But the variance of the others is β_t, not β̃_t.",
        ),
        Mistake(
            "no fresh noise",
            lambda x, e, z, t, c: _mean(x, e, t, c),
            "The mean is right, but it is only the centre of the step.",
        ),
    ],
)

EXERCISES = [_RATE, _BY_HAND, _VARIANCE, _FROM_V, _STEP]
