"""Exercises of the chapter "A space for diffusion: the autoencoder"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffbook.exercises.core import Exercise, Mistake


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().flatten(1).mean(1)


def _mean_psnr(x: Tensor, y: Tensor) -> Tensor:
    return 10 * (4 / _mse(x, y)).log10().mean()


def _pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Images, and reconstructions whose errors differ from image to image."""
    x = _random(*shape, seed=seed).clamp(-1, 1)
    sizes = 0.03 * 3.0 ** torch.arange(shape[0], dtype=torch.float64)
    return x, x + sizes[:, None, None, None] * _random(*shape, seed=seed + 50)


_PSNR = Exercise(
    key="10.1",
    oracle=_mean_psnr,
    cases=[_pair(1, 3, 3, 4, 4), _pair(2, 2, 1, 5, 3)],
    mistakes=[
        Mistake(
            "PSNR of the mean error",
            lambda x, y: 10 * (4 / _mse(x, y).mean()).log10(),
            "The worst image rules your number. First a PSNR for each image, then the mean.",
        ),
        Mistake(
            "PSNR of the mean error, and a peak of 1",
            lambda x, y: 10 * (1 / _mse(x, y).mean()).log10(),
            "Two things: where is the mean over the images, and how far apart are -1 and 1?",
        ),
        Mistake(
            "peak of 1",
            lambda x, y: 10 * (1 / _mse(x, y)).log10().mean(),
            "The images lie in [-1, 1]. What is the largest possible difference, and what is its square?",
        ),
        Mistake(
            "peak not squared",
            lambda x, y: 10 * (2 / _mse(x, y)).log10().mean(),
            "The mean squared error is compared with the square of the largest difference.",
        ),
        Mistake(
            "peak of 255",
            lambda x, y: 10 * (255**2 / _mse(x, y)).log10().mean(),
            "255 belongs to images of bytes. These lie in [-1, 1].",
        ),
        Mistake(
            "natural logarithm",
            lambda x, y: 10 * (4 / _mse(x, y)).log().mean(),
            "Decibels have the logarithm to the base 10.",
        ),
        Mistake(
            "factor 20 for a square",
            lambda x, y: 20 * (4 / _mse(x, y)).log10().mean(),
            "20 belongs to a quotient of amplitudes. Yours is one of squares.",
        ),
        Mistake(
            "factor 20, and the peak not squared",
            lambda x, y: 20 * (2 / _mse(x, y)).log10().mean(),
            "With 20 both sides of the quotient are amplitudes: the peak, and the root of the mean squared error.",
        ),
        Mistake(
            "factor 10 for a quotient of amplitudes",
            lambda x, y: 10 * (2 / _mse(x, y).sqrt()).log10().mean(),
            "10 belongs to a quotient of squares. You took the roots of both.",
        ),
        Mistake(
            "factor of ten forgotten",
            lambda x, y: (4 / _mse(x, y)).log10().mean(),
            "That is in bel. A decibel is a tenth of it, so the number is larger.",
        ),
        Mistake(
            "upside down",
            lambda x, y: -_mean_psnr(x, y),
            "A better image should have a larger PSNR. Which of the two stands in the denominator?",
        ),
        Mistake(
            "sum over the pixels",
            lambda x, y: 10 * (4 / (x - y).square().flatten(1).sum(1)).log10().mean(),
            "The error of a pixel counts, so the squares are averaged over the image.",
        ),
        Mistake(
            "absolute error",
            lambda x, y: 10 * (4 / (x - y).abs().flatten(1).mean(1)).log10().mean(),
            "The errors are squared before they are averaged.",
        ),
        Mistake(
            "one PSNR for each image",
            lambda x, y: 10 * (4 / _mse(x, y)).log10().sum(),
            "The result is the mean over the images, not their sum.",
        ),
        Mistake(
            "means exchanged",
            lambda x, y: 10 * (4 / (x - y).square().mean(0)).log10().mean(),
            "You averaged over the images inside of the logarithm, over the pixels outside. It is the other way round.",
        ),
        Mistake(
            "PSNR of every pixel",
            lambda x, y: 10 * (4 / (x - y).square()).log10().mean(),
            "A pixel has no PSNR. Average the squares over an image before the logarithm.",
        ),
    ],
)

_LEVEL = 2 / 255

_WEIGHT = Exercise(
    key="10.2",
    oracle=(0.0025, 2 * _LEVEL**2),
    mistakes=[
        Mistake(
            "factor two forgotten",
            (0.005, _LEVEL**2),
            "The Gaussian's exponent is the squared error divided by twice the variance. Look at the 2 again.",
        ),
        Mistake(
            "factor two forgotten in the second",
            (0.0025, _LEVEL**2),
            "The first is right. Solve the same equation for w: where does the 2 go?",
        ),
        Mistake(
            "factor two on the wrong side",
            (0.01, 0.5 * _LEVEL**2),
            "β σ² is c divided by 2a. Is a larger weight the larger variance, or half of it?",
        ),
        Mistake(
            "second a quarter of what it should be",
            (0.0025, 0.5 * _LEVEL**2),
            "The first is right. In the second the 2 changes sides; and neighbouring levels are 2/255 apart.",
        ),
        Mistake(
            "standard deviation for the variance",
            (0.0025, 2 * _LEVEL),
            "One grey level is the standard deviation. What is the variance?",
        ),
        Mistake(
            "standard deviation for the variance, and the factor two forgotten",
            (0.005, _LEVEL),
            "Two things: a grey level is a standard deviation, and there is a 2 in the Gaussian's exponent.",
        ),
        Mistake(
            "square root taken",
            (0.05, 2 * _LEVEL**2),
            "The second is right. The first asks for the variance, and you gave its root.",
        ),
        Mistake(
            "standard deviations for variances",
            (0.05, 2 * _LEVEL),
            "w is twice a variance. You gave a root in the first, and left out a square in the second.",
        ),
        Mistake(
            "order exchanged",
            (2 * _LEVEL**2, 0.0025),
            "Both numbers are right. First the variance, then the weight.",
        ),
        Mistake(
            "divided by the numbers of the image",
            (0.0025 / 12288, 2 * 12288 * _LEVEL**2),
            "Both terms are divided by D, so the quotient does not know D.",
        ),
        Mistake(
            "multiplied by the numbers of the image",
            (0.0025 * 12288, 2 * _LEVEL**2 / 12288),
            "Both terms are divided by D, so the quotient does not know D.",
        ),
        Mistake(
            "Laplace for Gauss",
            (2 * 0.005**2, _LEVEL / math.sqrt(2)),
            "That would be right for the absolute error alone. Here it is the squared error.",
        ),
    ],
)

Batches = Sequence[tuple[Tensor, Tensor]]


def _all(batches: Batches) -> tuple[Tensor, Tensor]:
    means, variances = zip(*batches, strict=True)
    return torch.cat([m.flatten() for m in means]), torch.cat([v.flatten() for v in variances])


def _variance(batches: Batches) -> Tensor:
    mean, variance = _all(batches)
    return (mean.square() + variance).mean() - mean.mean().square()


def _scale(batches: Batches) -> Tensor:
    return _variance(batches).rsqrt()


def _average(function: Callable[[Batches], Tensor]) -> Callable[[Batches], Tensor]:
    """The mean over the batches of what a function says of each."""
    return lambda batches: torch.stack([function([batch]) for batch in batches]).mean()


def _mean_over_batches(batches: Batches) -> Tensor:
    first = torch.stack([m.mean() for m, _ in batches]).mean()
    second = torch.stack([(m.square() + v).mean() for m, v in batches]).mean()
    return (second - first.square()).rsqrt()


def _batches(seed: int) -> Batches:
    """Batches of three sizes, with means and spreads of their own."""
    return [
        (
            0.5 * i + (1 + 0.4 * i) * _random(size, 2, 2, seed=seed + i),
            (0.6 * _random(size, 2, 2, seed=seed + i + 9)).exp(),
        )
        for i, size in enumerate((4, 2, 3))
    ]


_FIT = Exercise(
    key="10.3",
    oracle=_scale,
    cases=[(_batches(1),), (_batches(30),)],
    mistakes=[
        Mistake(
            "variance of the encoder left out",
            lambda b: _all(b)[0].var(correction=0).rsqrt(),
            "That is the spread of the means alone. A drawn z also varies around its mean.",
        ),
        Mistake(
            "divided by n - 1",
            lambda b: (_all(b)[0].var() + _all(b)[1].mean()).rsqrt(),
            "Nearly: `var` divides by n - 1 unless you say correction=0. For few numbers it can be seen.",
        ),
        Mistake(
            "standard deviation in the place of the variance",
            lambda b: ((_all(b)[0].square() + _all(b)[1].sqrt()).mean() - _all(b)[0].mean().square()).rsqrt(),
            "What is added to the mean square is a variance, not its root.",
        ),
        Mistake(
            "variance squared",
            lambda b: ((_all(b)[0].square() + _all(b)[1].square()).mean() - _all(b)[0].mean().square()).rsqrt(),
            "You are given the variance σ² already. It needs no square.",
        ),
        Mistake(
            "mean not subtracted",
            lambda b: (_all(b)[0].square() + _all(b)[1]).mean().rsqrt(),
            "One over the root of the mean square. A variance is measured from the mean.",
        ),
        Mistake(
            "mean not squared",
            lambda b: ((_all(b)[0].square() + _all(b)[1]).mean() - _all(b)[0].mean()).rsqrt(),
            "From the mean square the square of the mean is subtracted.",
        ),
        Mistake(
            "mean of the batches' scales",
            _average(_scale),
            "A mean of 1/std is not 1/std of everything: the means of the batches differ, and roots do not add up.",
        ),
        Mistake(
            "mean of the batches' standard deviations",
            lambda b: 1 / _average(lambda one: _variance(one).sqrt())(b),
            "What the batches differ in is missing. Add up sums, and divide once, at the end.",
        ),
        Mistake(
            "mean of the batches' variances",
            lambda b: _average(_variance)(b).rsqrt(),
            "The variance between the means of the batches is missing. Add up sums, and divide once, at the end.",
        ),
        Mistake(
            "all batches weighted alike",
            _mean_over_batches,
            "A mean of means counts small batches as much as large ones. Add up sums and numbers.",
        ),
        Mistake(
            "first batch only",
            lambda b: _scale(b[:1]),
            "That is the scale of the first batch. The others scatter around it, as the pitfall shows.",
        ),
        Mistake(
            "last batch only",
            lambda b: _scale(b[-1:]),
            "Only the last batch counts in your result. Is a sum started anew in the loop?",
        ),
        Mistake(
            "standard deviation for its inverse",
            lambda b: _variance(b).sqrt(),
            "That is std(z). Multiplied by what does z have the standard deviation 1?",
        ),
        Mistake(
            "root forgotten",
            lambda b: 1 / _variance(b),
            "One over the variance. A scale multiplies z, so the variance gets its square.",
        ),
        Mistake(
            "variance for its inverse root",
            _variance,
            "That is the variance of z. Multiplied by what does z have the variance 1?",
        ),
    ],
)


def _noisy(
    signal: Callable[[float], float] = lambda s: s,
    noise: Callable[[float], float] = lambda s: 1.0,
    root: bool = True,
    encoder: Callable[[float], float] = lambda s: s,
    std: bool = True,
) -> Callable[..., Tensor]:
    """z_t, with the choices that people get wrong."""

    def z_t(mean: Tensor, variance: Tensor, eps_z: Tensor, eps: Tensor, alpha_bar: float, scale: float) -> Tensor:
        a, b = (math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)) if root else (alpha_bar, 1 - alpha_bar)
        spread = (variance.sqrt() if std else variance) * eps_z
        return a * (signal(scale) * mean + encoder(scale) * spread) + b * noise(scale) * eps

    return z_t


def _case(seed: int, alpha_bar: float, scale: float) -> tuple[Tensor | float, ...]:
    mean, eps_z, eps = _random(3, 2, 4, 2, 2, seed=seed)
    return mean, (_random(2, 4, 2, 2, seed=seed + 1) - 1).exp(), eps_z, eps, alpha_bar, scale


_BUG = Exercise(
    key="10.4",
    oracle=_noisy(),
    cases=[_case(1, 0.7, 0.18215), _case(5, 0.1, 2.5)],
    mistakes=[
        Mistake(
            "noise scaled with the signal",
            _noisy(noise=lambda s: s),
            "Signal and noise are multiplied by the same number, so their ratio is what it was without the scale.",
        ),
        Mistake(
            "divided by the scale after the noise",
            _noisy(signal=lambda s: 1 / s, noise=lambda s: 1 / s, encoder=lambda s: 1 / s),
            "Still signal and noise are treated alike. And the scale multiplies on the way in.",
        ),
        Mistake(
            "divided by the scale",
            _noisy(signal=lambda s: 1 / s, encoder=lambda s: 1 / s),
            "It acts at the right place now. But z is multiplied by 1/std(z) here; the division comes before decoding.",
        ),
        Mistake(
            "scaled twice",
            _noisy(signal=lambda s: s * s, encoder=lambda s: s * s),
            "The latents are multiplied by the scale two times.",
        ),
        Mistake(
            "scaled twice, and the noise once",
            _noisy(signal=lambda s: s * s, encoder=lambda s: s * s, noise=lambda s: s),
            "You scaled the latents, and the scale at the end is still there.",
        ),
        Mistake(
            "scale left out",
            _noisy(signal=lambda s: 1.0, encoder=lambda s: 1.0),
            "Now nothing is scaled. The latents should be, before the noise comes.",
        ),
        Mistake(
            "only the noise scaled",
            _noisy(signal=lambda s: 1.0, encoder=lambda s: 1.0, noise=lambda s: s),
            "The other way round: the scale belongs to the latents.",
        ),
        Mistake(
            "only the mean scaled",
            _noisy(encoder=lambda s: 1.0),
            "A drawn z is scaled as a whole, with the encoder's noise in it.",
        ),
        Mistake(
            "only the encoder's noise scaled",
            _noisy(signal=lambda s: 1.0),
            "A drawn z is scaled as a whole, with its mean.",
        ),
        Mistake(
            "variance of the encoder scaled as its standard deviation",
            _noisy(encoder=math.sqrt),
            "A number multiplies z by s, so its standard deviation by s and its variance by the square of s.",
        ),
        Mistake(
            "root of the scale",
            _noisy(signal=math.sqrt, encoder=math.sqrt),
            "The scale is one over a standard deviation already. It needs no root.",
        ),
        Mistake(
            "missing square roots of the schedule",
            _noisy(root=False),
            "The scale is at its place now. The factors of signal and noise had their roots, and should keep them.",
        ),
        Mistake(
            "variance for the standard deviation",
            _noisy(std=False),
            "The scale is at its place now. The encoder's noise is multiplied by a standard deviation.",
        ),
    ],
)

EXERCISES = [_PSNR, _WEIGHT, _FIT, _BUG]
