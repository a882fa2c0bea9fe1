"""Exercises of the chapter "The forward process"."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffbook.diffusion import q_step
from diffbook.exercises.core import Exercise, Mistake
from diffbook.schedule import NoiseSchedule, linear_schedule


def _images(seed: int) -> Tensor:
    return torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def _step_cases() -> list[tuple[Any, ...]]:
    schedule = linear_schedule()
    return [(_images(t), _images(t + 1), t, schedule) for t in (1, 250, 1000)]


def _combine(x_prev: Tensor, eps: Tensor, shrink: Tensor, noise: Tensor) -> Tensor:
    return shrink.item() * x_prev + noise.item() * eps


def _shifted_step(x_prev: Tensor, eps: Tensor, t: int, s: NoiseSchedule) -> Tensor:
    return _combine(x_prev, eps, s.sqrt_alpha[t - 1], s.sqrt_beta[t - 1])


def _jump(x_prev: Tensor, eps: Tensor, t: int, s: NoiseSchedule) -> Tensor:
    return _combine(x_prev, eps, s.sqrt_alpha_bar[t], s.sqrt_one_minus_alpha_bar[t])


_STEP = Exercise(
    key="1.1",
    oracle=q_step,
    cases=_step_cases(),
    mistakes=[
        Mistake(
            "missing square root on the noise",
            lambda x, e, t, s: _combine(x, e, s.sqrt_alpha[t], s.beta[t]),
            "beta_t is the variance of the added noise. Which variance does c * eps have?",
        ),
        Mistake(
            "missing square root on the image",
            lambda x, e, t, s: _combine(x, e, s.alpha[t], s.sqrt_beta[t]),
            "Compare your factor of x_prev with the mean in the definition of the step.",
        ),
        Mistake(
            "missing square roots on both",
            lambda x, e, t, s: _combine(x, e, s.alpha[t], s.beta[t]),
            "Both coefficients multiply a random number, so they work like standard deviations.",
        ),
        Mistake(
            "no shrinking",
            lambda x, e, t, s: x + s.sqrt_beta[t].item() * e,
            "The previous state has to get paler before the noise comes on top.",
        ),
        Mistake(
            "coefficients exchanged",
            lambda x, e, t, s: _combine(x, e, s.sqrt_beta[t], s.sqrt_alpha[t]),
            "One step is small: which of the two terms should be nearly untouched?",
        ),
        Mistake(
            "shifted t",
            _shifted_step,
            "The table has an entry for time 0, so the number on the page is the index in the code.",
        ),
        Mistake(
            "shifted t in the factor of the image",
            lambda x, e, t, s: _combine(x, e, s.sqrt_alpha[t - 1], s.sqrt_beta[t]),
            "Both coefficients belong to the same step. Compare the two indices in your code.",
        ),
        Mistake(
            "beta taken as a standard deviation",
            lambda x, e, t, s: _combine(x, e, (1 - s.beta[t] ** 2).sqrt(), s.beta[t]),
            "Your step keeps variance 1, but with noise of variance beta_t². The definition says N(mean, variance).",
        ),
        Mistake(
            "root of beta, not of 1 - beta",
            lambda x, e, t, s: _combine(x, e, 1 - s.sqrt_beta[t], s.sqrt_beta[t]),
            "In the factor of the image, which comes first: the difference or the root?",
        ),
        Mistake(
            "wrong sign of the noise",
            lambda x, e, t, s: _combine(x, e, s.sqrt_alpha[t], -s.sqrt_beta[t]),
            "Its distribution would be the same, but for this eps the formula asks for the other sign.",
        ),
        Mistake(
            "many steps at once",
            _jump,
            "You used the product of all factors up to t. One step needs the factor of this t only.",
        ),
    ],
)


def _sigma(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


_ONE_NOISE = Exercise(
    key="1.2",
    oracle=lambda v_0, sigma: v_0 + sigma.sum() ** 2,
    cases=[(0.35, _sigma(0.1, 0.2, 0.4)), (1.0, _sigma(0.3, 0.3, 0.3, 0.3)), (2.0, _sigma(0.5, 0.05))],
    mistakes=[
        Mistake(
            "noises taken as independent",
            lambda v_0, sigma: v_0 + (sigma**2).sum(),
            "This is the answer for fresh noise in each step. Here all steps add multiples of one noise.",
        ),
        Mistake(
            "standard deviation for variance",
            lambda v_0, sigma: v_0 + sigma.sum(),
            "You found the coefficient of the noise. Which variance does a noise with this coefficient have?",
        ),
        Mistake(
            "variance of the data left out",
            lambda v_0, sigma: sigma.sum() ** 2,
            "x_T has a second random term besides the noise.",
        ),
        Mistake(
            "data and noise added as standard deviations",
            lambda v_0, sigma: (math.sqrt(v_0) + sigma.sum()) ** 2,
            "Standard deviations add only if it is one and the same random number. Is x_0 that?",
        ),
        Mistake(
            "all sigma taken as equal",
            lambda v_0, sigma: v_0 + len(sigma) * (sigma**2).sum(),
            "For equal steps you are right. Which number multiplies the noise if they differ?",
        ),
        Mistake(
            "variance of the data squared",
            lambda v_0, sigma: v_0**2 + sigma.sum() ** 2,
            "v_0 is a variance already, not a standard deviation.",
        ),
        Mistake(
            "squared twice",
            lambda v_0, sigma: v_0 + (sigma**2).sum() ** 2,
            "sigma holds standard deviations; it looks as if you squared them before and after the sum.",
        ),
    ],
)

_FACTOR = Exercise(
    key="1.3",
    oracle=lambda beta, c: math.sqrt(1 - beta / c),
    cases=[(0.02, 0.25), (0.3, 0.5), (0.2, 4.0), (0.1, 2.0)],
    mistakes=[
        Mistake(
            "missing square root",
            lambda beta, c: 1 - beta / c,
            "A factor k changes a variance by which factor?",
        ),
        Mistake(
            "unit variance kept instead",
            lambda beta, c: math.sqrt(1 - beta),
            "This factor keeps variance 1. Go back to the equation before a value for v was put in.",
        ),
        Mistake(
            "product for quotient",
            lambda beta, c: math.sqrt(1 - beta * c),
            "Solve for k² once more: by what do you divide the whole equation?",
        ),
        Mistake(
            "not divided by the variance",
            lambda beta, c: math.sqrt(abs(c - beta)),
            "You have c - beta = k² times something. What is that something?",
        ),
        Mistake(
            "divided by the variance after the root",
            lambda beta, c: math.sqrt(abs(c - beta)) / c,
            "First divide, then take the root; a divisor that leaves a root changes.",
        ),
        Mistake(
            "square root of the term, not of the difference",
            lambda beta, c: 1 - math.sqrt(beta / c),
            "The root has to be taken of the whole right-hand side.",
        ),
    ],
)


def _planted(beta: Tensor, t: int) -> Tensor:
    return torch.sqrt(torch.cumprod(1 - beta, dim=0)[t])


def _table(beta: Tensor) -> Tensor:
    return torch.cumprod(torch.cat([torch.ones(1, dtype=beta.dtype), 1 - beta]), dim=0)


def _signal_cases() -> list[tuple[Any, ...]]:
    beta = linear_schedule().beta[1:]
    few = torch.tensor([0.1, 0.2, 0.4, 0.5], dtype=torch.float64)
    return [(few, 1), (few, 3), (beta, 1), (beta, 500), (beta, 999)]


_SIGNAL = Exercise(
    key="1.4",
    oracle=lambda beta, t: _table(beta)[t].sqrt(),
    cases=_signal_cases(),
    mistakes=[
        Mistake(
            "shifted t",
            _planted,
            "For t = 1 the answer may depend on one number of the schedule only. Count how many it takes in.",
        ),
        Mistake(
            "shifted t the other way",
            lambda beta, t: _table(beta)[t - 1].sqrt(),
            "For t = 1 your answer is 1, as if no step had been taken: now it is one step too few.",
        ),
        Mistake(
            "missing square root",
            lambda beta, t: _table(beta)[t],
            "The product is right. But the mean is multiplied by the roots of its factors.",
        ),
        Mistake(
            "first entry taken for time 0",
            lambda beta, t: torch.prod(1 - beta[1 : t + 1]).sqrt(),
            "You take in the right number of factors, but beta_1 is not among them. Which index has it here?",
        ),
        Mistake(
            "first step left out",
            lambda beta, t: torch.prod(1 - beta[1:t]).sqrt(),
            "For t = 1 your answer is 1, as if no step had been taken. Which entry of beta is beta_1?",
        ),
        Mistake(
            "product over all steps",
            lambda beta, t: _table(beta)[-1].sqrt(),
            "Your answer does not depend on t: the product has to stop there.",
        ),
        Mistake(
            "factor of one step",
            lambda beta, t: (1 - beta[t - 1]).sqrt(),
            "This is the factor of step t alone. The mean has been through all the steps before it too.",
        ),
        Mistake(
            "sum for product",
            lambda beta, t: (1 - beta[:t].sum()).clamp(min=0).sqrt(),
            "Factors that act one after the other multiply; adding up the beta is right for tiny ones only.",
        ),
        Mistake(
            "factor of the noise",
            lambda beta, t: (1 - _table(beta)[t]).sqrt(),
            "This multiplies the noise. The factor of the image is asked for.",
        ),
    ],
)


def _respaced(alpha_bar: Tensor, times: Tensor) -> Tensor:
    return 1 - alpha_bar[times[1:]] / alpha_bar[times[:-1]]


def _respaced_cases() -> list[tuple[Any, ...]]:
    schedule = linear_schedule()
    return [
        (schedule.alpha_bar, torch.arange(0, 1001, 100)),
        (schedule.alpha_bar, torch.tensor([0, 1, 7, 350, 351, 1000])),
    ]


_RESPACED = Exercise(
    key="1.5",
    oracle=_respaced,
    cases=_respaced_cases(),
    mistakes=[
        Mistake(
            "old steps taken over",
            lambda a, times: 1 - a[times[1:]] / a[times[1:] - 1],
            "You kept the old beta at the kept times. A new step does the work of the steps left out too.",
        ),
        Mistake(
            "betas added up",
            lambda a, times: torch.stack([(1 - a[i + 1 : j + 1] / a[i:j]).sum() for i, j in pairwise(times)]),
            "The sum of the beta in between is right to first order only. What multiplies exactly?",
        ),
        Mistake(
            "one old step left out at the beginning",
            lambda a, times: 1 - a[times[1:]] / a[times[:-1] + 1],
            "For two kept times that are neighbours your beta is 0. Where does the new step start?",
        ),
        Mistake(
            "one old step left out at the end",
            lambda a, times: 1 - a[times[1:] - 1] / a[times[:-1]],
            "For two kept times that are neighbours your beta is 0. Where does the new step arrive?",
        ),
        Mistake(
            "old beta times the number of steps",
            lambda a, times: (1 - a[times[1:]] / a[times[1:] - 1]) * times.diff(),
            "That is the rescaling of the text: near for small beta, not exact. What multiplies exactly?",
        ),
        Mistake(
            "difference for quotient",
            lambda a, times: a[times[:-1]] - a[times[1:]],
            "The new values follow from the old ones by multiplication, so compare them by a quotient.",
        ),
        Mistake(
            "the factor instead of the noise variance",
            lambda a, times: 1 - _respaced(a, times),
            "This is the new alpha; beta is asked for.",
        ),
        Mistake(
            "a square root too many",
            lambda a, times: 1 - (1 - _respaced(a, times)).sqrt(),
            "The root belongs to the factor of the image; the products in the table are without it.",
        ),
        Mistake(
            "quotient upside down",
            lambda a, times: 1 - a[times[:-1]] / a[times[1:]],
            "Your results are negative, and beta is a variance. Which of the two entries is the larger one?",
        ),
        Mistake(
            "counted from the clean image",
            lambda a, times: 1 - a[times[1:]],
            "You have the noise since time 0. The step begins at the previous kept time.",
        ),
    ],
)

EXERCISES = [_STEP, _ONE_NOISE, _FACTOR, _SIGNAL, _RESPACED]
