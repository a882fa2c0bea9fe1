"""Exercises of the chapter "What a VAE and a diffusion model share"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffbook.diffusion import q_sample, q_step
from diffbook.exercises.core import Exercise, Mistake
from diffbook.gaussian import gaussian_log_prob
from diffbook.schedule import NoiseSchedule, linear_schedule

_SCHEDULE = linear_schedule()
_SHORT = NoiseSchedule(torch.tensor([0.2, 0.5, 0.4, 0.97]))


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MeanOf = Callable[[Tensor, int], Tensor]
Draw = Callable[[Tensor, Tensor, Sequence[Tensor], int, NoiseSchedule], Tensor]


def _step(x_0: Tensor, below: Tensor, eps: Sequence[Tensor], t: int, c: NoiseSchedule) -> Tensor:
    return q_step(below, eps[t - 1], t, c)


def _jump(x_0: Tensor, below: Tensor, eps: Sequence[Tensor], t: int, c: NoiseSchedule) -> Tensor:
    return q_sample(x_0, eps[t - 1], t, c)


def _encoder(x_t: Tensor, x_0: Tensor, below: Tensor, t: int, c: NoiseSchedule) -> Tensor:
    return gaussian_log_prob(x_t, c.sqrt_alpha[t] * below, c.beta[t])


def _marginal(x_t: Tensor, x_0: Tensor, below: Tensor, t: int, c: NoiseSchedule) -> Tensor:
    return gaussian_log_prob(x_t, c.sqrt_alpha_bar[t] * x_0, 1 - c.alpha_bar[t])


def _walk(
    draw: Draw = _step,
    encoder: Callable[[Tensor, Tensor, Tensor, int, NoiseSchedule], Tensor] = _encoder,
    sign: float = -1.0,
    decoder: float = 1.0,
    prior: float = 1.0,
    turned: bool = False,
    first: int = 1,
    moves: bool = True,
    goal: Callable[[Tensor, Tensor], Tensor] = lambda x_0, below: below,
) -> Callable[[Tensor, Sequence[Tensor], MeanOf, NoiseSchedule], Tensor]:
    """The value of a walk, with other draws or densities, or with weights of its three parts."""

    def answer(x_0: Tensor, eps: Sequence[Tensor], mean_of: MeanOf, c: NoiseSchedule) -> Tensor:
        total, below = torch.zeros_like(x_0), x_0
        for t in range(1, c.T + 1):
            x_t = draw(x_0, below, eps, t, c)
            if t >= first:
                total = total + sign * encoder(x_t, x_0, below, t, c)
            value, mean = (x_t, mean_of(below, t)) if turned else (goal(x_0, below), mean_of(x_t, t))
            total = total + decoder * gaussian_log_prob(value, mean, c.beta[t])
            below = x_t if moves else x_0
        return total + prior * gaussian_log_prob(x_t, torch.zeros_like(x_0), torch.ones_like(x_0))

    return answer


def _mean_of(x_t: Tensor, t: int) -> Tensor:
    return 0.7 * x_t + 0.1 * t


_CHAIN = Exercise(
    key="9.1",
    oracle=_walk(),
    cases=[(_random(6, seed=1), [_random(6, seed=10 + t) for t in range(4)], _mean_of, _SHORT)],
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "no chain",
            _walk(_jump),
            "Each x_t is drawn by itself, given x_0. Of which draw is the density you subtract: given x_0, or below?",
        ),
        Mistake(
            "density of the jump as well",
            _walk(_jump, _marginal),
            "Draw and density now fit, step by step. But q of a whole walk is a product of steps, not of jumps.",
        ),
        Mistake(
            "density of the jump",
            _walk(_step, _marginal),
            "The walk is right. The density to subtract is that of the step from below.",
        ),
        Mistake(
            "step from the start",
            _walk(lambda x_0, below, eps, t, c: q_step(x_0, eps[t - 1], t, c)),
            "The step starts at x_0 every time. Where does the walk stand?",
        ),
        Mistake(
            "jump from below",
            _walk(lambda x_0, below, eps, t, c: q_sample(below, eps[t - 1], t, c)),
            "q_sample adds the noise of all steps up to t. From below only one step is left.",
        ),
        Mistake(
            "noise of one step for all",
            _walk(lambda x_0, below, eps, t, c: q_step(below, eps[0], t, c)),
            "Every step has its own noise: the one of step t has the index t - 1.",
        ),
        Mistake(
            "noise in the wrong order",
            _walk(lambda x_0, below, eps, t, c: q_step(below, eps[-t], t, c)),
            "The walk is right, the order of the noise is not: that of step t has the index t - 1.",
        ),
        Mistake(
            "noise shifted by one",
            _walk(lambda x_0, below, eps, t, c: q_step(below, eps[t % len(eps)], t, c)),
            "The noise of step t has the index t - 1.",
        ),
        Mistake(
            "no noise at all",
            _walk(lambda x_0, below, eps, t, c: c.sqrt_alpha[t] * below),
            "You took the mean of the step. A walk is drawn.",
        ),
        Mistake(
            "missing square root of the noise",
            _walk(lambda x_0, below, eps, t, c: c.sqrt_alpha[t] * below + c.beta[t] * eps[t - 1]),
            "The noise of a step has the standard deviation √β_t.",
        ),
        Mistake(
            "sign of q",
            _walk(sign=1.0),
            "The bound has log p minus log q.",
        ),
        Mistake(
            "all signs turned",
            _walk(sign=1.0, decoder=-1.0, prior=-1.0),
            "This is minus the value asked for: log q minus log p.",
        ),
        Mistake(
            "sign of p",
            _walk(decoder=-1.0),
            "The decoder's steps count with plus. Only q is subtracted.",
        ),
        Mistake(
            "prior forgotten",
            _walk(prior=0.0),
            "The walk of the model starts somewhere. With which density?",
        ),
        Mistake(
            "encoder forgotten",
            _walk(sign=0.0),
            "That is log p alone. The density of the walk that was drawn has to be subtracted.",
        ),
        Mistake(
            "decoder forgotten",
            _walk(decoder=0.0),
            "That has no step of the decoder in it.",
        ),
        Mistake(
            "first step of q left out",
            _walk(first=2),
            "x_1 is a latent too: the density of its draw belongs to q.",
        ),
        Mistake(
            "decoder turned round",
            _walk(turned=True),
            "The decoder's step goes from x_t down to the state below it. Of which of the two is its density?",
        ),
        Mistake(
            "decoder rates the start",
            _walk(goal=lambda x_0, below: x_0),
            "A step of the decoder goes down by one: its density is that of the state below, not of x_0.",
        ),
        Mistake(
            "decoder rates the start, and no chain",
            _walk(_jump, goal=lambda x_0, below: x_0),
            "The decoder was right: its density is that of the state below. Look at the draw.",
        ),
        Mistake(
            "walk that does not move on",
            _walk(moves=False),
            "After a step, below has to become the state that was drawn.",
        ),
        Mistake(
            "variance of the jump",
            _walk(
                encoder=lambda x_t, x_0, below, t, c: gaussian_log_prob(
                    x_t, c.sqrt_alpha[t] * below, 1 - c.alpha_bar[t]
                )
            ),
            "The density is that of one step: its variance is that of one step, too.",
        ),
    ],
)


def _snr(c: NoiseSchedule, t: int) -> Tensor:
    return c.alpha_bar[t] / (1 - c.alpha_bar[t])


def _squares(x: Tensor, guess: Tensor) -> Tensor:
    return (x - guess).square().flatten(1).sum(1)


def _weighted(weight: Callable[[NoiseSchedule, int], Tensor]) -> Callable[[Tensor, Tensor, int, NoiseSchedule], Tensor]:
    """The squared error of the image with another weight."""
    return lambda x, guess, t, c: weight(c, t) * _squares(x, guess)


_IMAGES = [(_random(3, 1, 4, 4, seed=s), _random(3, 1, 4, 4, seed=s + 1)) for s in (2, 4, 6)]

_NOISE_ERROR = Exercise(
    key="9.2",
    oracle=_weighted(_snr),
    cases=[(x, guess, t, _SCHEDULE) for (x, guess), t in zip(_IMAGES, (1, 120, 700), strict=True)],
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "no weight",
            _weighted(lambda c, t: torch.ones(())),
            "That is the error of the image. What is an error of the image worth in units of the noise?",
        ),
        Mistake(
            "ratio upside down",
            _weighted(lambda c, t: 1 / _snr(c, t)),
            "At a late time the image hardly shows in x_t: is an error of the image then a large error of the noise?",
        ),
        Mistake(
            "weight not squared",
            _weighted(lambda c, t: _snr(c, t).sqrt()),
            "An error is multiplied by this factor, a squared error by its square.",
        ),
        Mistake(
            "weight squared",
            _weighted(lambda c, t: _snr(c, t).square()),
            "The factor of the error is a quotient of two roots. What is its square?",
        ),
        Mistake(
            "only the signal",
            _weighted(lambda c, t: c.alpha_bar[t]),
            "The image's factor is there. By what is the noise multiplied in x_t?",
        ),
        Mistake(
            "only the noise",
            _weighted(lambda c, t: 1 / (1 - c.alpha_bar[t])),
            "The noise's factor is there. With which factor does the image stand in x_t?",
        ),
        Mistake(
            "one over the signal",
            _weighted(lambda c, t: 1 / c.alpha_bar[t]),
            "Both factors of x_t take part, and an error of the image is worth more noise where the signal is strong.",
        ),
        Mistake(
            "noise level as weight",
            _weighted(lambda c, t: 1 - c.alpha_bar[t]),
            "Solve the difference for the noise: which of the two factors ends up below?",
        ),
        Mistake(
            "signal not squared",
            _weighted(lambda c, t: c.sqrt_alpha_bar[t] / (1 - c.alpha_bar[t])),
            "Both factors of x_t are roots, and both are squared with the error.",
        ),
        Mistake(
            "noise not squared",
            _weighted(lambda c, t: c.alpha_bar[t] / (1 - c.alpha_bar[t]).sqrt()),
            "Both factors of x_t are roots, and both are squared with the error.",
        ),
        Mistake(
            "noise level multiplied",
            _weighted(lambda c, t: c.alpha_bar[t] * (1 - c.alpha_bar[t])),
            "Solve the difference for the noise: which of the two factors ends up below?",
        ),
        Mistake(
            "α for ᾱ",
            _weighted(lambda c, t: c.alpha[t] / (1 - c.alpha[t])),
            "α belongs to a single step. Signal and noise in x_t have come about in all steps up to t.",
        ),
        Mistake(
            "index shifted by one",
            _weighted(lambda c, t: _snr(c, t + 1)),
            "The tables have T + 1 entries: the entry for time t has the index t.",
        ),
        Mistake(
            "index one too low",
            _weighted(lambda c, t: _snr(c, max(t - 1, 1))),
            "The tables have T + 1 entries: the entry for time t has the index t.",
        ),
        Mistake(
            "weight of the bound",
            _weighted(lambda c, t: 0.5 * (_snr(c, max(t - 1, 1)) - _snr(c, t))),
            "That is the weight that the bound gives to the image. Asked is the squared error of the noise itself.",
        ),
        Mistake(
            "difference of two ratios",
            _weighted(lambda c, t: _snr(c, max(t - 1, 1)) - _snr(c, t)),
            "Such a difference weights the image in the bound. Asked is the squared error of the noise itself.",
        ),
        Mistake(
            "one half",
            _weighted(lambda c, t: 0.5 * _snr(c, t)),
            "There is no one half in a squared norm. Did you take it from a likelihood?",
        ),
        Mistake(
            "logarithm of the ratio",
            _weighted(lambda c, t: _snr(c, t).log()),
            "The weight is the ratio itself, not its logarithm.",
        ),
        Mistake(
            "mean over the pixels",
            lambda x, guess, t, c: _snr(c, t) * _squares(x, guess) / x[0].numel(),
            "A squared norm is a sum over the pixels of an image.",
        ),
        Mistake(
            "root of the sum",
            lambda x, guess, t, c: (_snr(c, t) * _squares(x, guess)).sqrt(),
            "That is the norm. Asked is its square.",
        ),
        Mistake(
            "absolute values",
            lambda x, guess, t, c: _snr(c, t) * (x - guess).abs().flatten(1).sum(1),
            "The differences have to be squared.",
        ),
        Mistake(
            "squares of the sums",
            lambda x, guess, t, c: _snr(c, t) * (x - guess).flatten(1).sum(1).square(),
            "Square each pixel's difference first, then add up.",
        ),
    ],
)

_L_T, _KL = 0.5 * 1e-4 * 784 * 0.3, 16 * (0.6 + 0.2 - 1 + math.log(5))

_TWO_KLS = Exercise(
    key="9.3",
    oracle=(_L_T, _KL),
    tolerance=6e-3,  # 0.0117 or 0.0118, 22.5 or 22.6
    mistakes=[
        Mistake(
            "one half forgotten in both",
            (2 * _L_T, 2 * _KL),
            "The divergence of two Gaussians carries a factor one half.",
        ),
        Mistake(
            "one half forgotten in L_T",
            (2 * _L_T, _KL),
            "The first number: a factor one half stands before everything.",
        ),
        Mistake(
            "one half forgotten in the VAE",
            (_L_T, 2 * _KL),
            "The second number: a factor one half stands before everything.",
        ),
        Mistake(
            "one pixel, one latent",
            (_L_T / 784, _KL / 32),
            "These are nats per number. Asked is the whole image, the whole latent.",
        ),
        Mistake(
            "one pixel",
            (_L_T / 784, _KL),
            "The first number is that of a single pixel. The pixels are independent given the image: add up.",
        ),
        Mistake(
            "one latent",
            (_L_T, _KL / 32),
            "The second number is that of a single latent. There are 32.",
        ),
        Mistake(
            "logarithm not expanded",
            (0.5 * 1e-4 * 784 * (0.3 - 1), _KL),
            "A divergence is never negative. -log(1 - a) is not zero to first order: what does it cancel?",
        ),
        Mistake(
            "only the logarithm",
            (0.5 * 1e-4 * 784, _KL),
            "This is the part of the logarithm. It cancels against another term; what is left?",
        ),
        Mistake(
            "sign of the logarithm in L_T",
            (0.5 * 1e-4 * 784 * (0.3 - 2), _KL),
            "The terms without x cancel: look at the sign of ᾱ_T and at that of the logarithm.",
        ),
        Mistake(
            "cancelling terms added",
            (0.5 * 1e-4 * 784 * 1.3, _KL),
            "One of the terms without x has been lost: -ᾱ_T comes from the variance, +ᾱ_T from the logarithm.",
        ),
        Mistake(
            "root of ᾱ",
            (0.5 * 1e-2 * 784 * 0.3, _KL),
            "The mean √ᾱ_T x is squared in the divergence.",
        ),
        Mistake(
            "ᾱ squared",
            (0.5 * 1e-8 * 784 * 0.3, _KL),
            "The mean is √ᾱ_T x, and its square is what counts.",
        ),
        Mistake(
            "mean square squared",
            (0.5 * 1e-4 * 784 * 0.09, _KL),
            "0.3 is already the mean of the squares.",
        ),
        Mistake(
            "logarithm to base 10",
            (_L_T, 16 * (-0.2 + math.log10(5))),
            "The logarithm is natural.",
        ),
        Mistake(
            "logarithm to base 2",
            (_L_T, 16 * (-0.2 + math.log2(5))),
            "The logarithm is natural.",
        ),
        Mistake(
            "bits",
            (_L_T, _KL / math.log(2)),
            "These are bits. Asked are nats.",
        ),
        Mistake(
            "sign of the logarithm in the VAE",
            (_L_T, 16 * (-0.2 - math.log(5))),
            "A divergence is never negative, and the logarithm of 0.2 is.",
        ),
        Mistake(
            "logarithm of the standard deviation",
            (_L_T, 16 * (-0.2 + math.log(5) / 2)),
            "log σ² is twice log σ. Which of the two stands in the formula?",
        ),
        Mistake(
            "variance forgotten",
            (_L_T, 16 * (0.6 - 1 + math.log(5))),
            "In the second number σ² itself stands beside its logarithm.",
        ),
        Mistake(
            "mean forgotten",
            (_L_T, 16 * (0.2 - 1 + math.log(5))),
            "In the second number the squared mean is missing.",
        ),
        Mistake(
            "one forgotten",
            (_L_T, 16 * (0.8 + math.log(5))),
            "A latent with μ = 0 and σ² = 1 has divergence 0. Does yours?",
        ),
        Mistake(
            "mean squared once more",
            (_L_T, 16 * (0.36 + 0.2 - 1 + math.log(5))),
            "0.6 is μ² already, do not square it again.",
        ),
        Mistake(
            "variance squared",
            (_L_T, 16 * (0.6 + 0.04 - 1 + math.log(25))),
            "0.2 is σ² already, do not square it again.",
        ),
        Mistake(
            "first number rounded too far",
            (0.012, _KL),
            "Right, but give three digits of the first number.",
        ),
        Mistake(
            "second number rounded too far",
            (_L_T, 23.0),
            "Right, but give three digits of the second number.",
        ),
        Mistake(
            "both rounded too far",
            (0.012, 23.0),
            "Right, but give three digits of each.",
        ),
        Mistake(
            "bits in both",
            (_L_T / math.log(2), _KL / math.log(2)),
            "These are bits. Asked are nats.",
        ),
        Mistake(
            "half of L_T",
            (0.5 * _L_T, _KL),
            "The first number: the factor one half counts once.",
        ),
        Mistake(
            "half of the VAE",
            (_L_T, 0.5 * _KL),
            "The second number: the factor one half counts once.",
        ),
        Mistake(
            "nothing left in L_T",
            (0.0, _KL),
            "The terms without x cancel to first order. The term with x does not.",
        ),
        Mistake(
            "root of the squared mean",
            (_L_T, 16 * (math.sqrt(0.6) + 0.2 - 1 + math.log(5))),
            "0.6 is μ², and the formula has μ²: there is no root to take.",
        ),
        Mistake(
            "as many latents as pixels",
            (_L_T, 784 / 32 * _KL),
            "The VAE has 32 latents. The pixels belong to the first number.",
        ),
        Mistake(
            "exchanged",
            (_KL, _L_T),
            "The order asked for is schedule, VAE.",
        ),
    ],
)


def _kl(mean: Tensor, variance: Tensor) -> Tensor:
    return 0.5 * (mean.square() + variance - 1 - variance.log())


def _posteriors(copies: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means and variances over 40 images: twelve kinds of latents, some off, so many of each that every slip shows."""
    noise, flat = _random(40, seed=8), torch.ones(40, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    image = torch.arange(40)
    kinds = [
        (0.9 * noise, 0.19),  # lively
        (0 * flat, 1.0),  # off
        (0 * flat, 1.25),  # only the variance differs from the prior's
        (0 * flat, 0.8),
        (0 * flat, 0.87),  # the same, below the threshold
        (0.17 * flat, 1.0),  # one mean for all images: the prior is missed, so it counts
        (0.12 * noise, 1.0),  # a little below the threshold
        (0.11 * noise, 1.0),
        (0.09 * noise, 1.08),
        (0.16 * noise, 0.9744),  # a little above
        (0.6 * (image < 1), 1.0),  # one image in 40 says something: on average it is off
        (1.0 * (image < 15), 1.0),  # less than half of the images, but on average enough
    ]
    columns = [kind for kind, number in zip(kinds, copies, strict=True) for _ in range(number)]
    mean = torch.stack([m.to(torch.float64) for m, _ in columns], 1)
    return mean, torch.tensor([v for _, v in columns], dtype=torch.float64).expand_as(mean)


def _count(score: Callable[[Tensor, Tensor], Tensor], threshold: float = 0.01) -> Callable[[Tensor, Tensor], int]:
    return lambda mean, variance: int((score(mean, variance) > threshold).sum())


_ACTIVE = Exercise(
    key="9.4",
    oracle=_count(lambda m, v: _kl(m, v).mean(0)),
    cases=[_posteriors((1, 1, 2, 2, 1, 4, 2, 1, 2, 2, 1, 1)), _posteriors((1, 1, 2, 3, 1, 3, 2, 1, 1, 2, 2, 1))],
    mistakes=[
        Mistake(
            "sum over the images",
            _count(lambda m, v: _kl(m, v).sum(0)),
            "With more images more latents would become active. Take a mean.",
        ),
        Mistake(
            "average over the latents",
            _count(lambda m, v: _kl(m, v).mean(1)),
            "That counts images. Average over the images, which are the first axis, and count latents.",
        ),
        Mistake(
            "pairs counted",
            _count(_kl),
            "That counts pairs of image and latent. First average over the images.",
        ),
        Mistake(
            "active for some image",
            _count(lambda m, v: _kl(m, v).max(0).values),
            "One image in which a latent says something is not enough: take the mean over the images.",
        ),
        Mistake(
            "idle latents counted",
            lambda m, v: int((_kl(m, v).mean(0) <= 0.01).sum()),
            "Those are the latents that are off.",
        ),
        Mistake(
            "divergence of the averages",
            _count(lambda m, v: _kl(m.mean(0), v.mean(0))),
            "Averaged means are near zero for every latent. First the divergence, then the average.",
        ),
        Mistake(
            "one half forgotten",
            _count(lambda m, v: 2 * _kl(m, v).mean(0)),
            "The divergence has a factor one half. Near the threshold it decides.",
        ),
        Mistake(
            "logarithm of the standard deviation",
            _count(lambda m, v: 0.5 * (m.square() + v - 1 - v.sqrt().log()).mean(0)),
            "The logarithm is that of the variance.",
        ),
        Mistake(
            "variance of the means",
            _count(lambda m, v: m.var(0)),
            "That is another measure of activity. Asked is the divergence.",
        ),
        Mistake(
            "all latents counted",
            lambda m, v: m.shape[1],
            "Compare the divergence with the threshold. Has yours all its terms? That of the prior itself is 0.",
        ),
        Mistake(
            "variance taken for the standard deviation",
            _count(lambda m, v: _kl(m, v.square()).mean(0)),
            "`variance` is σ² already, do not square it again.",
        ),
        Mistake(
            "mean square of the means",
            _count(lambda m, v: m.square().mean(0)),
            "The divergence has the variance in it as well.",
        ),
        Mistake(
            "only the means",
            _count(lambda m, v: 0.5 * m.square().mean(0)),
            "The divergence has the variance in it as well.",
        ),
        Mistake(
            "only the variances",
            _count(lambda m, v: _kl(torch.zeros_like(m), v).mean(0)),
            "The divergence has the mean in it as well.",
        ),
        Mistake(
            "small variance taken for activity",
            _count(lambda m, v: 1 - v.mean(0)),
            "Average the divergence, not its ingredients.",
        ),
        Mistake(
            "logarithm forgotten",
            _count(lambda m, v: 0.5 * (m.square() + v - 1).mean(0)),
            "A divergence is never negative. Look at the logarithm: is it there, with its minus sign?",
        ),
        Mistake(
            "variance forgotten",
            _count(lambda m, v: 0.5 * (m.square() - 1 - v.log()).mean(0)),
            "The variance stands beside its logarithm.",
        ),
        Mistake(
            "logarithm to base 2",
            _count(lambda m, v: 0.5 * (m.square() + v - 1 - v.log2()).mean(0)),
            "The logarithm is natural.",
        ),
        Mistake(
            "bits",
            _count(lambda m, v: _kl(m, v).mean(0) / math.log(2)),
            "The threshold is in nats, and so is the divergence.",
        ),
        Mistake(
            "median over the images",
            _count(lambda m, v: _kl(m, v).median(0).values),
            "A latent may speak of few images and much. Take the mean.",
        ),
        Mistake(
            "share in place of count",
            lambda m, v: (_kl(m, v).mean(0) > 0.01).double().mean(),
            "That is the share of latents that are active. How many are they?",
        ),
        Mistake(
            "sum of the divergences",
            lambda m, v: _kl(m, v).mean(0).sum(),
            "That is the divergence of the whole latent. Compare each with the threshold, and count.",
        ),
        Mistake(
            "list in place of count",
            lambda m, v: int((_kl(m, v).mean(0) > 0.01).nonzero().sum()),
            "You added up the numbers of the latents. How many are there?",
        ),
    ],
)


def _angle(u: Tensor, w: Tensor) -> Tensor:
    return torch.acos(u @ w / (u.norm() * w.norm()))


Weights = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def _path(weights: Weights, angle: Callable[[Tensor, Tensor], Tensor] = _angle) -> Callable[..., Tensor]:
    def answer(u: Tensor, w: Tensor, r: float) -> Tensor:
        a, b = weights(angle(u, w), r)
        return a * u + b * w

    return answer


def _arc(omega: Tensor, r: float) -> tuple[Tensor, Tensor]:
    return torch.sin((1 - r) * omega) / torch.sin(omega), torch.sin(r * omega) / torch.sin(omega)


def _line(omega: Tensor, r: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(1 - r), torch.tensor(r)


def _rescaled(u: Tensor, w: Tensor, r: float) -> Tensor:
    point = (1 - r) * u + r * w
    return point * u.norm() / point.norm()


_SLERP = Exercise(
    key="9.5",
    oracle=_path(_arc),
    cases=[(_random(5, seed=20), _random(5, seed=21), 0.25), (_random(9, seed=22), _random(9, seed=23), 0.6)],
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "straight line",
            _path(_line),
            "That is the line, whose middle is too short. The weights of the arc are sines.",
        ),
        Mistake(
            "ends exchanged",
            _path(lambda omega, r: _arc(omega, 1 - r)),
            "At r = 0 the arc should be at u.",
        ),
        Mistake(
            "not divided by the sine",
            _path(lambda omega, r: tuple(w * torch.sin(omega) for w in _arc(omega, r))),  # type: ignore[arg-type, return-value]
            "At r = 0 the result must be u itself. What is it now?",
        ),
        Mistake(
            "right angle assumed",
            _path(lambda omega, r: _arc(torch.tensor(math.pi / 2, dtype=torch.float64), r)),
            "In few dimensions the angle is not a right one. Compute it.",
        ),
        Mistake(
            "norms forgotten in the cosine",
            _path(_arc, lambda u, w: torch.acos(u @ w)),
            "A cosine is a product of unit vectors.",
        ),
        Mistake(
            "cosine for angle",
            _path(_arc, lambda u, w: torch.cos(_angle(u, w))),
            "The cosine of the angle is not yet the angle.",
        ),
        Mistake(
            "norms squared in the cosine",
            _path(_arc, lambda u, w: torch.acos(u @ w / (u @ u * (w @ w)))),
            "In the cosine the norms stand without a square.",
        ),
        Mistake(
            "sine for arc cosine",
            _path(_arc, lambda u, w: torch.asin(u @ w / (u.norm() * w.norm()))),
            "From a cosine the angle comes by acos.",
        ),
        Mistake(
            "cosines for sines",
            _path(lambda omega, r: (torch.cos(r * omega), torch.cos((1 - r) * omega))),
            "At r = 0 the weight of w must vanish.",
        ),
        Mistake(
            "quarter turn",
            _path(lambda omega, r: (torch.cos(r * omega), torch.sin(r * omega))),
            "That is right for a right angle. At r = 1 the weight of u must vanish for every angle.",
        ),
        Mistake(
            "line blown up to the norm of u",
            _rescaled,
            "This stays on the sphere if the norms are equal, but it does not walk evenly. The weights are sines.",
        ),
        Mistake(
            "unit vectors blended",
            lambda u, w, r: _path(_arc)(u / u.norm(), w / w.norm(), r),
            "The norms belong into the cosine only. At r = 0 the result must be u, with its length.",
        ),
        Mistake(
            "unit arc with the norm of u",
            lambda u, w, r: u.norm() * _path(_arc)(u / u.norm(), w / w.norm(), r),
            "At r = 1 the result must be w, with its own length. The norms belong into the cosine only.",
        ),
        Mistake(
            "norm on a straight line",
            lambda u, w, r: ((1 - r) * u.norm() + r * w.norm()) * _path(_arc)(u / u.norm(), w / w.norm(), r),
            "A sensible path, but not the one asked for: the sines stand before u and w themselves.",
        ),
        Mistake(
            "only the second divided by the sine",
            _path(lambda omega, r: (torch.sin((1 - r) * omega), torch.sin(r * omega) / torch.sin(omega))),
            "Both sines are divided by that of the whole angle. Did you forget brackets?",
        ),
        Mistake(
            "divided by the angle",
            _path(lambda omega, r: (torch.sin((1 - r) * omega) / omega, torch.sin(r * omega) / omega)),
            "Divide by the sine of the whole angle. At r = 0 the result must be u itself.",
        ),
        Mistake(
            "difference in place of sum",
            _path(lambda omega, r: (_arc(omega, r)[0], -_arc(omega, r)[1])),
            "At r = 1 the result must be w, not its opposite.",
        ),
        Mistake(
            "brackets around 1 - r forgotten",
            _path(lambda omega, r: (torch.sin(1 - r * omega) / torch.sin(omega), _arc(omega, r)[1])),
            "The share 1 - r as a whole is multiplied by the angle.",
        ),
        Mistake(
            "one norm squared in the cosine",
            _path(_arc, lambda u, w: torch.acos(u @ w / (u @ u))),
            "The cosine has the norm of u and the norm of w, once each.",
        ),
        Mistake(
            "sine of the share",
            _path(lambda omega, r: (torch.tensor(math.sin(1 - r)), torch.tensor(math.sin(r)))),
            "The share r is multiplied by the angle before the sine.",
        ),
        Mistake(
            "sines not of multiples",
            _path(lambda omega, r: ((1 - r) * torch.sin(omega), r * torch.sin(omega))),
            "The share r stands inside the sine.",
        ),
        Mistake(
            "spread of variance",
            _path(lambda omega, r: (torch.tensor(1 - r).sqrt(), torch.tensor(r).sqrt())),
            "These weights keep the variance of independent noises, but they are not those of the arc.",
        ),
    ],
)

EXERCISES = [_CHAIN, _NOISE_ERROR, _TWO_KLS, _ACTIVE, _SLERP]
