"""Exercises of the chapter "Training"."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffbook.diffusion import Denoiser, q_sample, simple_loss
from diffbook.exercises.core import Exercise, Mistake
from diffbook.schedule import NoiseSchedule, linear_schedule

_SCHEDULE = linear_schedule()


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _model(x_t: Tensor, t: Tensor) -> Tensor:
    """Some function of x_t and t, so that a wrong x_t and a wrong t both show."""
    scale = (t.float() / 1000).reshape(-1, *[1] * (x_t.ndim - 1))
    return scale * x_t + torch.sin(5 * scale)


def _parts(x_0: Tensor, c: NoiseSchedule, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(1, c.T + 1, (len(x_0),), generator=g)
    return t, torch.randn(x_0.shape, generator=g), g


def _variant(loss: Callable[..., Tensor]) -> Callable[[Denoiser, Tensor, NoiseSchedule, int], Tensor]:
    """The loss of a batch, computed in another way from the same t and ε."""

    def answer(model: Denoiser, x_0: Tensor, c: NoiseSchedule, seed: int) -> Tensor:
        t, eps, g = _parts(x_0, c, seed)
        return loss(model, x_0, c, t, eps, g)

    return answer


def _redrawn(
    draw: Callable[[Tensor, NoiseSchedule, torch.Generator], tuple[Tensor, Tensor]],
) -> Callable[[Denoiser, Tensor, NoiseSchedule, int], Tensor]:
    """The loss of a batch from another t and ε."""

    def answer(model: Denoiser, x_0: Tensor, c: NoiseSchedule, seed: int) -> Tensor:
        t, eps = draw(x_0, c, torch.Generator().manual_seed(seed))
        return (eps - model(q_sample(x_0, eps.expand_as(x_0), t, c), t)).square().mean()

    return answer


def _noise_first(x_0: Tensor, c: NoiseSchedule, g: torch.Generator) -> tuple[Tensor, Tensor]:
    eps = torch.randn(x_0.shape, generator=g)
    return torch.randint(1, c.T + 1, (len(x_0),), generator=g), eps


_ALGORITHM = Exercise(
    key="5.1",
    oracle=lambda model, x_0, c, seed: simple_loss(model, x_0, c, torch.Generator().manual_seed(seed)),
    cases=[(_model, _random(4, 1, 3, 3, seed=s, dtype=torch.float32), _SCHEDULE, s) for s in (1, 2, 3)],
    mistakes=[
        Mistake(
            "two noises",
            _variant(
                lambda m, x, c, t, e, g: (
                    (torch.randn(x.shape, generator=g) - m(q_sample(x, e, t, c), t)).square().mean()
                )
            ),
            "The network is asked for a noise that its input does not contain. How often is noise drawn?",
        ),
        Mistake(
            "two times",
            _variant(
                lambda m, x, c, t, e, g: (
                    (e - m(q_sample(x, e, t, c), torch.randint(1, c.T + 1, t.shape, generator=g))).square().mean()
                )
            ),
            "The network is told another time than the one at which x_t was made.",
        ),
        Mistake(
            "times counted from 0",
            _redrawn(
                lambda x, c, g: (
                    torch.randint(0, c.T, (len(x),), generator=g),
                    torch.randn(x.shape, generator=g),
                )
            ),
            "The first time with noise is 1 and the last is T. What does randint do with its upper end?",
        ),
        Mistake(
            "the last time is never drawn",
            _redrawn(
                lambda x, c, g: (
                    torch.randint(1, c.T, (len(x),), generator=g),
                    torch.randn(x.shape, generator=g),
                )
            ),
            "randint leaves its upper end out, and T belongs to the times.",
        ),
        Mistake(
            "one time for the whole batch",
            _redrawn(
                lambda x, c, g: (
                    torch.randint(1, c.T + 1, (1,), generator=g).expand(len(x)),
                    torch.randn(x.shape, generator=g),
                )
            ),
            "Every image gets a time of its own. This is unbiased too, but the loss jumps from step to step.",
        ),
        Mistake(
            "one noise for the whole batch",
            _redrawn(
                lambda x, c, g: (
                    torch.randint(1, c.T + 1, (len(x),), generator=g),
                    torch.randn(x.shape[1:], generator=g)[None],
                )
            ),
            "Each image needs noise of its own: ask for the shape of the whole batch.",
        ),
        Mistake(
            "uniform noise",
            _redrawn(
                lambda x, c, g: (
                    torch.randint(1, c.T + 1, (len(x),), generator=g),
                    torch.rand(x.shape, generator=g),
                )
            ),
            "rand and randn differ by one letter: which of them is Gaussian?",
        ),
        Mistake(
            "another order of the draws",
            _redrawn(_noise_first),
            "Nothing is wrong with the mathematics. To be compared, the draws must come in the stated order, t first.",
        ),
        Mistake(
            "a sum over the pixels",
            _variant(lambda m, x, c, t, e, g: (e - m(q_sample(x, e, t, c), t)).square().flatten(1).sum(1).mean()),
            "The paper's squared norm is a sum over the pixels. The exercise asks for the mean, as in the package.",
        ),
        Mistake(
            "a sum over everything",
            _variant(lambda m, x, c, t, e, g: (e - m(q_sample(x, e, t, c), t)).square().sum()),
            "The loss should be a mean over batch and pixels.",
        ),
        Mistake(
            "absolute error",
            _variant(lambda m, x, c, t, e, g: (e - m(q_sample(x, e, t, c), t)).abs().mean()),
            "The mean of an absolute value is made small by a median. We want the conditional mean.",
        ),
        Mistake(
            "the image as the target",
            _variant(lambda m, x, c, t, e, g: (x - m(q_sample(x, e, t, c), t)).square().mean()),
            "This trains a network of x_0. The exercise asks for one of ε.",
        ),
        Mistake(
            "the noisy image as the target",
            _variant(lambda m, x, c, t, e, g: (q_sample(x, e, t, c) - m(q_sample(x, e, t, c), t)).square().mean()),
            "x_t is what the network sees. What is it to find in it?",
        ),
        Mistake(
            "the clean image as the input",
            _variant(lambda m, x, c, t, e, g: (e - m(x, t)).square().mean()),
            "The network must see the noise that it is to predict.",
        ),
        Mistake(
            "time scaled",
            _variant(lambda m, x, c, t, e, g: (e - m(q_sample(x, e, t, c), t / c.T)).square().mean()),
            "The networks of this book take the time itself, 1…T.",
        ),
    ],
)


def _weighted(weights: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: weights(q @ k.T) @ v


_ATTENTION = Exercise(
    key="5.2",
    oracle=lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None])[0],
    cases=[tuple(_random(4, 3, seed=10 * i + j) for j in range(3)) for i in (1, 2)],
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "root of d forgotten",
            _weighted(lambda s: s.softmax(1)),
            "The scores have the variance d. By what are they divided?",
        ),
        Mistake(
            "divided by d",
            _weighted(lambda s: (s / 3).softmax(1)),
            "A standard deviation is taken out of a random number, not a variance.",
        ),
        Mistake(
            "multiplied by the root",
            _weighted(lambda s: (s * math.sqrt(3)).softmax(1)),
            "The scores are too large, not too small.",
        ),
        Mistake(
            "root of the number of positions",
            _weighted(lambda s: (s / math.sqrt(4)).softmax(1)),
            "d is how many numbers a query has, q.shape[1].",
        ),
        Mistake(
            "sums to one over the wrong index",
            _weighted(lambda s: (s / math.sqrt(3)).softmax(0)),
            "For one query the weights of all keys add up to 1. Which index of the scores is the key?",
        ),
        Mistake(
            "queries and keys exchanged",
            lambda q, k, v: (k @ q.T / math.sqrt(3)).softmax(1) @ v,
            "Row i of the scores belongs to query i.",
        ),
        Mistake(
            "no softmax",
            _weighted(lambda s: s / math.sqrt(3)),
            "The scores are not yet weights: they may be negative and add up to anything.",
        ),
        Mistake(
            "weights that do not add up to one",
            _weighted(lambda s: (s / math.sqrt(3)).exp()),
            "The numerators are right. What are they divided by?",
        ),
        Mistake(
            "weights transposed",
            lambda q, k, v: (q @ k.T / math.sqrt(3)).softmax(1).T @ v,
            "Row i of the weights belongs to query i, and its columns to the keys: it multiplies v as it is.",
        ),
        Mistake(
            "no root, and the wrong index",
            _weighted(lambda s: s.softmax(0)),
            "Two things: by what are the scores divided, and over which index do the weights add up to 1?",
        ),
        Mistake(
            "residual added",
            lambda q, k, v: v + (q @ k.T / math.sqrt(3)).softmax(1) @ v,
            "The mean alone is asked for; what it is added to is the layer's matter.",
        ),
        Mistake(
            "mean of the keys",
            lambda q, k, v: (q @ k.T / math.sqrt(3)).softmax(1) @ k,
            "The weights are right. What do they average?",
        ),
        Mistake(
            "scaled after the softmax",
            _weighted(lambda s: s.softmax(1) / math.sqrt(3)),
            "Divide the scores, before they become weights.",
        ),
    ],
)

_LOSSES = Exercise(
    key="5.3",
    oracle=(0.01, 0.04),
    tolerance=1e-3,
    mistakes=[
        Mistake(
            "exchanged",
            (0.04, 0.01),
            "Little signal is left. Is the noise or the image easier to tell then?",
        ),
        Mistake(
            "divided",
            (0.25, 0.0625),
            "The loss of v is their sum. Can each part be larger than the sum?",
        ),
        Mistake(
            "roots kept",
            (0.05 * math.sqrt(0.2), 0.05 * math.sqrt(0.8)),
            "The errors have the factors √ᾱ and √(1-ᾱ). What have their squares?",
        ),
        Mistake(
            "squared once too often",
            (0.05 * 0.04, 0.05 * 0.64),
            "ᾱ is the square of the factor of the error already.",
        ),
        Mistake(
            "the same error for all",
            (0.05, 0.05),
            "At a known x_t the three predictions carry the same information, but their errors have different sizes.",
        ),
        Mistake(
            "errors in place of squared errors",
            (0.1, 0.2),
            "These are root mean squares. The question asks for mean squares.",
        ),
        Mistake(
            "divided by the ratio",
            (0.0125, 0.0625),
            "The loss of v is the sum of the two. Is yours? Multiply by ᾱ and by 1-ᾱ.",
        ),
        Mistake(
            "equal halves",
            (0.025, 0.025),
            "The sum is right. At this t the two are not equally hard: what are their factors?",
        ),
        Mistake(
            "signal-to-noise ratio as the factor",
            (0.0125, 0.05),
            "The SNR leads from the error of x_0 to that of ε. You started from the error of v.",
        ),
    ],
)


def _ema(averaged: Tensor, current: Tensor, n: int, decay: float) -> Tensor:
    d = min(decay, (1 + n) / (10 + n))
    return d * averaged + (1 - d) * current


def _mixed(decay: Callable[[int, float], float]) -> Callable[[Tensor, Tensor, int, float], Tensor]:
    return lambda a, c, n, d: decay(n, d) * a + (1 - decay(n, d)) * c


_UPDATE = Exercise(
    key="5.4",
    oracle=_ema,
    cases=[(_random(3, seed=31), _random(3, seed=32), n, 0.99) for n in (0, 7, 5000)],
    tolerance=1e-7,
    mistakes=[
        Mistake(
            "no warm-up",
            _mixed(lambda n, d: d),
            "Right for late steps. With which decay does the first step mix? If you have a fraction, see its brackets.",
        ),
        Mistake(
            "no upper bound",
            _mixed(lambda n, d: (1 + n) / (10 + n)),
            "Right for early steps. Later the decay must not exceed its highest value.",
        ),
        Mistake(
            "the larger of the two",
            _mixed(lambda n, d: max(d, (1 + n) / (10 + n))),
            "With the larger of the two the warm-up never acts when it is needed.",
        ),
        Mistake(
            "decay and its complement exchanged",
            lambda a, c, n, d: _ema(c, a, n, d),
            "A decay near 1 keeps nearly all of the average. Yours keeps nearly all of the current weights.",
        ),
        Mistake(
            "exchanged, and no warm-up",
            lambda a, c, n, d: (1 - d) * a + d * c,
            "A decay near 1 keeps nearly all of the average; and early steps have a smaller decay.",
        ),
        Mistake(
            "steps counted from 1",
            _mixed(lambda n, d: min(d, n / (9 + n))),
            "n is the number of steps before this one: the first has n = 0, and its decay is 1/10.",
        ),
        Mistake(
            "steps counted one too far",
            _mixed(lambda n, d: min(d, (2 + n) / (11 + n))),
            "n is the number of steps before this one: the first has n = 0, and its decay is 1/10.",
        ),
        Mistake(
            "brackets",
            _mixed(lambda n, d: min(d, (1 + n) / 10 + n)),
            "Python divides before it adds: the whole of 10 + n belongs below.",
        ),
        Mistake(
            "running mean",
            lambda a, c, n, d: (n * a + c) / (n + 1),
            "That weighs all steps alike and never forgets the start. What is the decay after n steps?",
        ),
        Mistake(
            "average only",
            lambda a, c, n, d: a,
            "The average never moves. What share of the current weights enters?",
        ),
        Mistake(
            "a sum that grows",
            lambda a, c, n, d: min(d, (1 + n) / (10 + n)) * a + c,
            "The two weights must add up to 1.",
        ),
        Mistake(
            "current weights only",
            lambda a, c, n, d: c,
            "Nothing is averaged here.",
        ),
    ],
)

_FORGET = Exercise(
    key="5.5",
    oracle=(0.99**100, 1 / 2002),
    tolerance=2e-3,
    mistakes=[
        Mistake(
            "the complement",
            (1 - 0.99**100, 2001 / 2002),
            "That is the weight of all that came after the start.",
        ),
        Mistake(
            "linear forgetting",
            (0.0, 1 / 2002),
            "Each step takes one per cent of what is left, not of the start.",
        ),
        Mistake(
            "warm-up forgotten",
            (0.99**100, 0.99**5),
            "The second question has a decay that differs from step to step.",
        ),
        Mistake(
            "one step too many",
            (0.99**101, 1 / 5005),
            "Count the factors: the first of n steps has the number 0, the last n - 1.",
        ),
        Mistake(
            "one step too few",
            (0.99**99, 1 / 2002),
            "Count the factors: after 100 steps there are a hundred of them.",
        ),
        Mistake(
            "a single step",
            (0.99, 5 / 14),
            "That is what one step keeps. The start has gone through all of them.",
        ),
        Mistake(
            "one step too many in the warm-up",
            (0.99**100, 1 / 5005),
            "Count the factors of the warm-up: five steps have the numbers 0 to 4.",
        ),
        Mistake(
            "one step too few in the warm-up",
            (0.99**100, 1 / 715),
            "Count the factors of the warm-up: five steps have the numbers 0 to 4.",
        ),
        Mistake(
            "the last decay alone",
            (0.99**100, 5 / 14),
            "That is what one step keeps. The start has gone through all five.",
        ),
        Mistake(
            "upside down",
            (0.99**100, 2002.0),
            "A weight is at most 1.",
        ),
        Mistake(
            "weight of the newest",
            (0.01, 1 / 2002),
            "That is the weight of the newest weights, not of the oldest.",
        ),
    ],
)

EXERCISES = [_ALGORITHM, _ATTENTION, _LOSSES, _UPDATE, _FORGET]
