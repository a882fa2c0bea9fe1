"""Exercises of the chapter "The loss: from log p(x) to L_simple"."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffbook.exercises.core import Exercise, Mistake
from diffbook.gaussian import discretised_log_likelihood, gaussian_log_prob
from diffbook.schedule import NoiseSchedule, linear_schedule

_SCHEDULE = linear_schedule()

_COIN = Exercise(
    key="4.1",
    oracle=(math.log(0.5), math.log(0.4), 0.8),
    tolerance=7e-3,  # -0.69, -0.92
    mistakes=[
        Mistake(
            "logarithm of the mean",
            (math.log(0.5), math.log(0.5), 0.8),
            "In the second number the mean is taken of logarithms. You took the logarithm of the mean.",
        ),
        Mistake(
            "prior forgotten in p(x)",
            (0.0, math.log(0.4), 0.8),
            "p(x) is the sum of p(z) p(x | z) over both z. Where is p(z)?",
        ),
        Mistake(
            "log q forgotten",
            (math.log(0.5), math.log(0.2), 0.8),
            "The bound is the mean of log p(x, z) minus log q(z). What is log q(z) here?",
        ),
        Mistake(
            "log q added",
            (math.log(0.5), math.log(0.1), 0.8),
            "The bound is the mean of log p(x, z) minus log q(z): mind the sign of the second.",
        ),
        Mistake(
            "gap for bound",
            (math.log(0.5), math.log(1.25), 0.8),
            "The second number you gave is the gap, log p(x) minus the bound. Asked is the bound.",
        ),
        Mistake(
            "gap for bound, with its sign turned",
            (math.log(0.5), math.log(0.8), 0.8),
            "The second number you gave is the bound minus log p(x). Asked is the bound.",
        ),
        Mistake(
            "sum for mean",
            (math.log(0.5), 2 * math.log(0.4), 0.8),
            "An expectation weights each z with its probability q(z). You added the logarithms up.",
        ),
        Mistake(
            "signs of the logarithms",
            (math.log(2), math.log(2.5), 0.8),
            "These are minus the logarithms. Is the logarithm of a probability positive?",
        ),
        Mistake(
            "one z for both",
            (math.log(0.8), math.log(0.4), 0.8),
            "That is log p(x | z = 1). The coin is hidden: add up over both z.",
        ),
        Mistake(
            "logarithm of the posterior",
            (math.log(0.5), math.log(0.4), math.log(0.8)),
            "The third number is asked for as a probability, without a logarithm.",
        ),
        Mistake(
            "odds for probability",
            (math.log(0.5), math.log(0.4), 4.0),
            "4 is the ratio of the two joint probabilities. The q that closes the gap is a law: its values sum to 1.",
        ),
        Mistake(
            "the likelier z for sure",
            (math.log(0.5), math.log(0.4), 1.0),
            "z = 1 explains x better, but z = 0 remains possible. With which law must q agree?",
        ),
        Mistake(
            "logarithms to base 10",
            (math.log10(0.5), math.log10(0.4), 0.8),
            "These are logarithms to base 10. The book's are natural.",
        ),
        Mistake(
            "joint for posterior",
            (math.log(0.5), math.log(0.4), 0.4),
            "0.4 is p(x, z = 1). The q that closes the gap is a law: divide by p(x).",
        ),
        Mistake(
            "the other z",
            (math.log(0.5), math.log(0.4), 0.2),
            "That is the posterior probability of z = 0.",
        ),
        Mistake(
            "q left as it was",
            (math.log(0.5), math.log(0.4), 0.5),
            "With this q there is a gap. For which q is it zero?",
        ),
        Mistake(
            "bits for nats",
            (-1.0, math.log2(0.4), 0.8),
            "These are logarithms to base 2. The book's are natural.",
        ),
        Mistake(
            "logarithms left out",
            (0.5, 0.4, 0.8),
            "The first two numbers are asked for as logarithms.",
        ),
    ],
)

_RATIO = 4 / 7  # β̃_2 / β_2 of the two-step chain
_CONSTANT = 0.5 * (_RATIO - 1 - math.log(_RATIO))

_BY_HAND = Exercise(
    key="4.2",
    oracle=(12 / 7, _CONSTANT),
    tolerance=4e-3,  # 1.71
    mistakes=[
        Mistake(
            "one half forgotten",
            (24 / 7, 2 * _CONSTANT),
            "Both parts of the divergence of two Gaussians carry a factor one half.",
        ),
        Mistake(
            "weight twice too large",
            (24 / 7, _CONSTANT),
            "The squared distance of the means is divided by twice the variance. (Or did you take ᾱ_2 for α_2?)",
        ),
        Mistake(
            "one half forgotten in the constant",
            (12 / 7, 2 * _CONSTANT),
            "The part without the means carries a factor one half as well.",
        ),
        Mistake(
            "β not squared",
            (16 / 7, _CONSTANT),
            "The coefficient of the noise in the mean is squared, its β_t with it; only one of the two then cancels.",
        ),
        Mistake(
            "a root left",
            (0.75 / (0.5 * math.sqrt(0.875)), _CONSTANT),
            "The root of 1 - ᾱ_t is squared as well.",
        ),
        Mistake(
            "another variance",
            (3.0, 0.0),
            "That is right for σ_t² = β̃_t. The exercise takes β_t.",
        ),
        Mistake(
            "index of ᾱ, or another variance",
            (3.0, _CONSTANT),
            "This weight has the ᾱ of t - 1, as it stands in β̃_t. Here σ_t² is β_t, and the ᾱ that of t.",
        ),
        Mistake(
            "1 - ᾱ forgotten",
            (1.5, _CONSTANT),
            "The coefficient of the noise has a root of 1 - ᾱ_t below. Where is its square?",
        ),
        Mistake(
            "ᾱ for 1 - ᾱ",
            (12.0, _CONSTANT),
            "Under the root in the coefficient of the noise stands 1 - ᾱ_t.",
        ),
        Mistake(
            "β² not divided by σ²",
            (9 / 7, _CONSTANT),
            "The weight has σ_t² below, and here it is β_t.",
        ),
        Mistake(
            "ratio of standard deviations",
            (12 / 7, 0.5 * (math.sqrt(_RATIO) - 1 - math.log(_RATIO) / 2)),
            "The constant takes the ratio of the variances, without a root.",
        ),
        Mistake(
            "logarithm to base 10",
            (12 / 7, 0.5 * (_RATIO - 1 - math.log10(_RATIO))),
            "The logarithm is natural.",
        ),
        Mistake(
            "α forgotten",
            (3 / 7, _CONSTANT),
            "The mean is divided by √α_t. What does this make of the square?",
        ),
        Mistake(
            "root of α",
            (0.75 / (2 * 0.5 * 0.875), _CONSTANT),
            "The mean is divided by √α_t, and the weight belongs to its square.",
        ),
        Mistake(
            "ratio upside down",
            (12 / 7, 0.5 * (1 / _RATIO - 1 + math.log(_RATIO))),
            "In the divergence from q to p the variance of q stands above.",
        ),
        Mistake(
            "sign of the logarithm",
            (12 / 7, 0.5 * (_RATIO - 1 + math.log(_RATIO))),
            "A divergence is never negative. Look at the sign of the logarithm.",
        ),
        Mistake(
            "constant forgotten",
            (12 / 7, 0.0),
            "The two variances differ, β̃_2 is not β_2, so the divergence is not zero even for a perfect prediction.",
        ),
        Mistake(
            "exchanged",
            (_CONSTANT, 12 / 7),
            "The order asked for is weight, constant.",
        ),
    ],
)


def _pixels(*levels: int) -> Tensor:
    return 2 * torch.tensor(levels, dtype=torch.float64) / 255 - 1


def _interval(
    x: Tensor,
    mean: Tensor,
    scale: Tensor,
    half: float = 1 / 255,
    lower_tail: bool = True,
    upper_tail: bool = True,
) -> Tensor:
    """log of the probability of an interval around x, with or without the tails."""
    upper, lower = torch.special.ndtr((x - mean + half) / scale), torch.special.ndtr((x - mean - half) / scale)
    upper = torch.where((x > 0.999) & torch.tensor(upper_tail), 1.0, upper)
    lower = torch.where((x < -0.999) & torch.tensor(lower_tail), 0.0, lower)
    return torch.log(upper - lower)


def _complement(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log of what black and white get if their tails are exchanged: all but what belongs to them."""
    return torch.log(torch.special.ndtr((torch.where(x > 0, x - mean + 1 / 255, mean - x + 1 / 255)) / variance.sqrt()))


_LEVEL_CASES: list[tuple[Tensor, Tensor, Tensor]] = [
    (_pixels(3, 100, 127, 254), _pixels(9, 99, 128, 250), torch.tensor(0.002, dtype=torch.float64)),
    (_pixels(0, 128, 255), _pixels(2, 130, 250), torch.tensor(0.0009, dtype=torch.float64)),
    (_pixels(0, 255, 0, 255), _pixels(1, 254, 255, 0) * 0.8, torch.tensor(0.3, dtype=torch.float64)),
]

_LEVEL = Exercise(
    key="4.4",
    oracle=discretised_log_likelihood,
    cases=_LEVEL_CASES,
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "tails not given away",
            lambda x, m, v: _interval(x, m, v.sqrt(), lower_tail=False, upper_tail=False),
            "Add up the probabilities of all 256 levels. What is missing, and which levels should get it?",
        ),
        Mistake(
            "upper tail forgotten",
            lambda x, m, v: _interval(x, m, v.sqrt(), upper_tail=False),
            "Black has its tail. And white?",
        ),
        Mistake(
            "lower tail forgotten",
            lambda x, m, v: _interval(x, m, v.sqrt(), lower_tail=False),
            "White has its tail. And black?",
        ),
        Mistake(
            "variance for standard deviation",
            lambda x, m, v: _interval(x, m, v),
            "The argument of Φ is a distance in units of the standard deviation.",
        ),
        Mistake(
            "interval twice as wide",
            lambda x, m, v: _interval(x, m, v.sqrt(), half=2 / 255),
            "2/255 is the distance of two levels. How far does the interval reach to each side?",
        ),
        Mistake(
            "interval half as wide",
            lambda x, m, v: _interval(x, m, v.sqrt(), half=0.5 / 255),
            "That would be right for pixels in [0, 1]. Here they lie in [-1, 1].",
        ),
        Mistake(
            "256 intervals between 256 levels",
            lambda x, m, v: _interval(x, m, v.sqrt(), half=1 / 256),
            "256 levels from -1 to 1: how many gaps are between them, and how wide is one?",
        ),
        Mistake(
            "density",
            lambda x, m, v: gaussian_log_prob(x, m, v),
            "That is the log of a density. A pixel's probability is an integral over its interval.",
        ),
        Mistake(
            "density times width",
            lambda x, m, v: gaussian_log_prob(x, m, v) + math.log(2 / 255),
            "Density times width is a good approximation inside, but black and white own a tail each.",
        ),
        Mistake(
            "tails exchanged, or the distance turned round",
            lambda x, m, v: torch.where(x.abs() > 0.999, _complement(x, m, v), _interval(x, m, v.sqrt())),
            "Inside all is right. White owns everything above its interval's lower end, black everything below its "
            "upper end. (Or is your argument of Φ mean minus x?)",
        ),
        Mistake(
            "black and white for sure",
            lambda x, m, v: torch.where(x.abs() > 0.999, 0.0, _interval(x, m, v.sqrt())),
            "You gave black and white the probability 1. Each owns one tail and its interval, not the whole line.",
        ),
        Mistake(
            "interval beside the level",
            lambda x, m, v: _interval(x, m - 1 / 255, v.sqrt()),
            "The interval reaches as far below the level as above it. Yours begins at the level.",
        ),
        Mistake(
            "lower end forgotten",
            lambda x, m, v: torch.log(torch.where(x > 0.999, 1.0, torch.special.ndtr((x - m + 1 / 255) / v.sqrt()))),
            "That is the probability of this level or any darker one. Subtract what lies below the interval.",
        ),
        Mistake(
            "logarithm forgotten",
            lambda x, m, v: _interval(x, m, v.sqrt()).exp(),
            "The probability is right. Asked is its logarithm.",
        ),
        Mistake(
            "bits for nats",
            lambda x, m, v: _interval(x, m, v.sqrt()) / math.log(2),
            "That is the logarithm to base 2. The book's are natural.",
        ),
    ],
)


def _random(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, 2, 4, generator=generator, dtype=torch.float64)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).sum(1)


def _weight(t: int, c: NoiseSchedule) -> Tensor:
    return c.beta[t] / (2 * c.alpha[t] * (1 - c.alpha_bar[t]))


def _constant(ratio: Tensor) -> Tensor:
    return 0.5 * (ratio - 1 - torch.log(ratio))


def _nats(
    weight: Callable[[int, NoiseSchedule], Tensor] = _weight,
    pixels: float = 8,
    mean: bool = False,
    per_pixel: Callable[[Tensor], Tensor] = _constant,
) -> Callable[[Tensor, Tensor, int, NoiseSchedule], Tensor]:
    """L_{t-1} with another weight, another constant or count of it, or a mean for a sum."""

    def answer(a: Tensor, b: Tensor, t: int, c: NoiseSchedule) -> Tensor:
        ratio = c.posterior_variance[t] / c.beta[t]
        return weight(t, c) * _squares(a, b) / (8 if mean else 1) + pixels * per_pixel(ratio)

    return answer


_STEP = Exercise(
    key="4.3",
    oracle=_nats(),
    cases=[(_random(1), _random(2), t, _SCHEDULE) for t in (2, 3, 40, 700)],
    tolerance=1e-7,
    mistakes=[
        Mistake(
            "constant forgotten",
            _nats(pixels=0),
            "The squared error is right. But the variances of the two Gaussians differ as well.",
        ),
        Mistake(
            "constant once an image",
            _nats(pixels=1),
            "The squared error is right. The other part is there for every pixel.",
        ),
        Mistake(
            "mean for sum",
            _nats(mean=True),
            "The divergence of two laws with independent pixels is the sum over the pixels.",
        ),
        Mistake(
            "everything as a mean over pixels",
            _nats(mean=True, pixels=1),
            "These are nats per pixel. Asked are nats per image.",
        ),
        Mistake(
            "another variance",
            _nats(lambda t, c: c.beta[t] ** 2 / (2 * c.posterior_variance[t] * c.alpha[t] * (1 - c.alpha_bar[t])), 0),
            "That is right for σ_t² = β̃_t. The exercise takes β_t.",
        ),
        Mistake(
            "index of ᾱ, or another variance",
            _nats(lambda t, c: c.beta[t] / (2 * c.alpha[t] * (1 - c.alpha_bar[t - 1]))),
            "This weight has the ᾱ of t - 1, as it stands in β̃_t. Here σ_t² is β_t, and the ᾱ that of t.",
        ),
        Mistake(
            "1 - ᾱ forgotten",
            _nats(lambda t, c: _weight(t, c) * (1 - c.alpha_bar[t])),
            "The coefficient of the noise has a root of 1 - ᾱ_t below. Where is its square?",
        ),
        Mistake(
            "ᾱ for 1 - ᾱ",
            _nats(lambda t, c: _weight(t, c) * (1 - c.alpha_bar[t]) / c.alpha_bar[t]),
            "The weight has 1 - ᾱ_t below, not ᾱ_t.",
        ),
        Mistake(
            "ᾱ for α",
            _nats(lambda t, c: _weight(t, c) * c.alpha[t] / c.alpha_bar[t]),
            "The mean is divided by the root of α_t, that of one step. You took ᾱ_t.",
        ),
        Mistake(
            "α once too often",
            _nats(lambda t, c: _weight(t, c) / c.alpha[t]),
            "The mean is divided by √α_t, so its square by α_t, once.",
        ),
        Mistake(
            "constant for every pixel of the batch",
            _nats(pixels=24),
            "D is the number of pixels of one image. You counted those of the whole batch.",
        ),
        Mistake(
            "one half forgotten in the constant",
            _nats(pixels=16),
            "The squared error is right. The part without the means carries a factor one half as well.",
        ),
        Mistake(
            "constant subtracted",
            _nats(pixels=-8),
            "The squared error is right. A divergence is positive also where the means agree: mind the sign of C_t.",
        ),
        Mistake(
            "ratio upside down",
            _nats(per_pixel=lambda ratio: 0.5 * (1 / ratio - 1 + torch.log(ratio))),
            "In the divergence from q to p the variance of q stands above.",
        ),
        Mistake(
            "sign of the logarithm",
            _nats(per_pixel=lambda ratio: 0.5 * (ratio - 1 + torch.log(ratio))),
            "C_t is never negative. Look at the sign of the logarithm.",
        ),
        Mistake(
            "ratio of standard deviations",
            _nats(per_pixel=lambda ratio: 0.5 * (ratio.sqrt() - 1 - 0.5 * torch.log(ratio))),
            "The constant takes the ratio of the variances, without a root.",
        ),
        Mistake(
            "norm not squared",
            lambda a, b, t, c: _nats()(a, b, t, c) + _weight(t, c) * (_squares(a, b).sqrt() - _squares(a, b)),
            "The weight belongs to the square of the norm.",
        ),
        Mistake(
            "weight of the step before",
            _nats(lambda t, c: _weight(t - 1, c)),
            "L_{t-1} belongs to the step from t to t - 1. Whose β, α and ᾱ does the weight have?",
        ),
        Mistake(
            "weight dropped",
            _nats(lambda t, c: torch.ones(()).double()),
            "That is the square of L_simple. Here the weight is needed.",
        ),
        Mistake(
            "one half forgotten",
            _nats(lambda t, c: 2 * _weight(t, c)),
            "The squared distance of two means is divided by twice the variance.",
        ),
        Mistake(
            "β not squared",
            _nats(lambda t, c: _weight(t, c) / c.beta[t]),
            "β_t² over σ_t² = β_t leaves one β_t.",
        ),
        Mistake(
            "β² not divided by σ²",
            _nats(lambda t, c: _weight(t, c) * c.beta[t]),
            "The weight has σ_t² below, and here it is β_t.",
        ),
        Mistake(
            "a root left",
            _nats(lambda t, c: _weight(t, c) * (1 - c.alpha_bar[t]).sqrt()),
            "The coefficient of the noise is squared, its root of 1 - ᾱ_t with it.",
        ),
        Mistake(
            "α forgotten",
            _nats(lambda t, c: _weight(t, c) * c.alpha[t]),
            "The mean is divided by √α_t. What does this make of the square?",
        ),
        Mistake(
            "bits for nats",
            lambda a, b, t, c: _nats()(a, b, t, c) / math.log(2),
            "These are bits. Asked are nats.",
        ),
    ],
)


_Nats = Callable[[float, float, Tensor, NoiseSchedule, int], Tensor]
_Bits = Callable[[float, float, Tensor, Tensor, NoiseSchedule, int], Tensor]


def _bits(nats: _Nats, shift: int = 1) -> _Bits:
    """Bits per dimension of a bound that is put together from its parts in some way; the weight has ᾱ_{t - shift}."""

    def answer(L_T: float, L_0: float, mse: Tensor, t: Tensor, schedule: NoiseSchedule, D: int) -> Tensor:
        weight = schedule.beta[t] / (2 * schedule.alpha[t] * (1 - schedule.alpha_bar[t - shift]))
        return nats(L_T, L_0, weight * mse, schedule, D) / (D * math.log(2))

    return answer


_BOUND = Exercise(
    key="4.5",
    oracle=_bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + (c.T - 1) * D * terms.mean()),
    cases=[
        (0.5, 900.0, torch.tensor([0.9, 0.3, 0.02], dtype=torch.float64), torch.tensor([3, 200, 900]), _SCHEDULE, 784),
        (7.0, 40.0, torch.tensor([0.8, 0.7], dtype=torch.float64), torch.tensor([2, 50]), _SCHEDULE, 12),
    ],
    tolerance=1e-7,
    mistakes=[
        Mistake(
            "mean for sum over the pixels",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + (c.T - 1) * terms.mean()),
            "mse is a mean over the pixels. What does the divergence of an image need?",
        ),
        Mistake(
            "mean for sum over the times",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + D * terms.mean()),
            "The pixels are added up now. But the bound is a sum over T - 1 times, too, and you have their mean.",
        ),
        Mistake(
            "means for both sums",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + terms.mean()),
            "Now the factor for the times is gone as well. Both the pixels and the times have to be added up.",
        ),
        Mistake(
            "T for T - 1",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + c.T * D * terms.mean()),
            "Over how many times does the sum run? The time t = 1 has its own term.",
        ),
        Mistake(
            "only the sampled times added up",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + D * terms.sum()),
            "The sum over the few times that were drawn is not the sum over all.",
        ),
        Mistake(
            "times counted twice",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + (c.T - 1) * D * terms.sum()),
            "T - 1 times the mean estimates the sum. You took T - 1 times the sum over the drawn times.",
        ),
        Mistake(
            "a sum for the mean over the times, the pixels forgotten",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + terms.sum()),
            "The mean over the times, times T - 1, was right as it stood. The slip is in the pixels.",
        ),
        Mistake(
            "times counted twice, the pixels forgotten",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + (c.T - 1) * terms.sum()),
            "The mean over the times, times T - 1, was right as it stood. The slip is in the pixels.",
        ),
        Mistake(
            "T for T - 1, the pixels forgotten",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + c.T * terms.mean()),
            "T - 1 was right: the time t = 1 has its own term. The slip is in the pixels.",
        ),
        Mistake(
            "pixels counted twice",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + (c.T - 1) * D * D * terms.mean()),
            "One factor D turns the mean over the pixels into a sum. You have two.",
        ),
        Mistake(
            "weight of another variance",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + (c.T - 1) * terms.mean(), shift=0),
            "The weight was right for σ_t² = β̃_t; 1 - ᾱ_t in it belongs to σ_t² = β_t. Look elsewhere.",
        ),
        Mistake(
            "weight of another variance, the pixels right",
            _bits(lambda L_T, L_0, terms, c, D: L_T + L_0 + (c.T - 1) * D * terms.mean(), shift=0),
            "The pixels are added up now. But the weight was right as it stood: 1 - ᾱ_t in it belongs to σ_t² = β_t.",
        ),
        Mistake(
            "L_T left out",
            _bits(lambda L_T, L_0, terms, c, D: L_0 + (c.T - 1) * D * terms.mean()),
            "The sum is right, but the end of the chain is missing from the bound.",
        ),
        Mistake(
            "L_0 left out",
            _bits(lambda L_T, L_0, terms, c, D: L_T + (c.T - 1) * D * terms.mean()),
            "The sum is right, but the likelihood of the pixels is missing from the bound.",
        ),
        Mistake(
            "L_0 and L_T counted for every pixel",
            _bits(lambda L_T, L_0, terms, c, D: D * (L_T + L_0 + (c.T - 1) * terms.mean())),
            "L_T and L_0 are given for the whole image already; only mse is a mean over pixels.",
        ),
        Mistake(
            "nats for bits",
            _bits(lambda L_T, L_0, terms, c, D: math.log(2) * (L_T + L_0 + (c.T - 1) * D * terms.mean())),
            "These are nats per dimension now. Asked are bits.",
        ),
        Mistake(
            "bits per image",
            _bits(lambda L_T, L_0, terms, c, D: D * (L_T + L_0 + (c.T - 1) * D * terms.mean())),
            "These are bits per image. Asked are bits per dimension.",
        ),
    ],
)

EXERCISES = [_COIN, _BY_HAND, _STEP, _LEVEL, _BOUND]
