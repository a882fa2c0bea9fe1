"""Exercises of the chapter "Latent diffusion"."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffbook.exercises.core import Exercise, Mistake


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


_MEAN, _VARIANCE = 0.6, 0.01
_CONSTANT = 0.5 * math.log(2 * math.pi)
_ENTROPY = 0.5 * math.log(2 * math.pi * math.e * _VARIANCE)
_CROSS = 0.5 * math.log(2 * math.pi) + 0.5 * (_MEAN**2 + _VARIANCE)


def _split(entropy: float = _ENTROPY, cross: float = _CROSS) -> tuple[float, float, float]:
    """Both parts, one of them wrong, and the divergence that follows from them."""
    return entropy, cross, cross - entropy


_SPLIT = Exercise(
    key="11.1",
    oracle=(_ENTROPY, _CROSS, _CROSS - _ENTROPY),
    tolerance=2e-3,
    mistakes=[
        Mistake(
            "standard deviation in the entropy",
            (0.5 * _ENTROPY + 0.25 * math.log(2 * math.pi * math.e), _CROSS, _CROSS - _ENTROPY),
            "In the logarithm of the entropy stands the variance.",
        ),
        Mistake(
            "sign of the entropy",
            (-_ENTROPY, _CROSS, _CROSS - _ENTROPY),
            "A density that is narrow enough has values above 1, and a negative entropy.",
        ),
        Mistake(
            "entropy added",
            (_ENTROPY, _CROSS, _CROSS + _ENTROPY),
            "The divergence is the mean of log q - log p. With which sign does the entropy enter?",
        ),
        Mistake(
            "sign of the cross entropy",
            (_ENTROPY, -_CROSS, _CROSS - _ENTROPY),
            "The cross entropy is minus the mean of log p.",
        ),
        Mistake(
            "sign of the divergence",
            (_ENTROPY, _CROSS, _ENTROPY - _CROSS),
            "A divergence is never negative.",
        ),
        Mistake(
            "variance of q left out of the cross entropy",
            (_ENTROPY, _CROSS - 0.5 * _VARIANCE, _CROSS - 0.5 * _VARIANCE - _ENTROPY),
            "The mean of z² under q has two parts.",
        ),
        Mistake(
            "mean left out of the cross entropy",
            (_ENTROPY, _CROSS - 0.5 * _MEAN**2, _CROSS - 0.5 * _MEAN**2 - _ENTROPY),
            "The mean of z² under q has two parts.",
        ),
        Mistake(
            "constant left out",
            (
                0.5 * math.log(_VARIANCE),
                0.5 * (_MEAN**2 + _VARIANCE),
                0.5 * (_MEAN**2 + _VARIANCE - math.log(_VARIANCE)),
            ),
            "The constants do not cancel: the entropy has 2πe, the cross entropy 2π.",
        ),
        Mistake(
            "entropy without e",
            (_ENTROPY - 0.5, _CROSS, _CROSS - _ENTROPY + 0.5),
            "The mean of (z - m)²/(2σ²) under q is one half. It belongs to the entropy.",
        ),
        Mistake(
            "sign of the entropy, and the divergence from it",
            _split(entropy=-_ENTROPY),
            "A density that is narrow enough has values above 1, and a negative entropy.",
        ),
        Mistake(
            "standard deviation in the entropy, and the divergence from it",
            _split(entropy=0.5 * _ENTROPY + 0.25 * math.log(2 * math.pi * math.e)),
            "In the logarithm of the entropy stands the variance.",
        ),
        Mistake(
            "sign of the cross entropy, and the divergence from it",
            _split(cross=-_CROSS),
            "The cross entropy is minus the mean of log p. And a divergence is never negative.",
        ),
        Mistake(
            "variance squared",
            _split(_ENTROPY + 0.5 * math.log(_VARIANCE), _CROSS + 0.5 * (_VARIANCE**2 - _VARIANCE)),
            "The second number of a normal distribution is its variance in this book, not its standard deviation.",
        ),
        Mistake(
            "variance squared in the entropy",
            _split(entropy=_ENTROPY + 0.5 * math.log(_VARIANCE)),
            "The second number of a normal distribution is its variance in this book, not its standard deviation.",
        ),
        Mistake(
            "mean not squared in the cross entropy",
            _split(cross=_CROSS + 0.5 * (_MEAN - _MEAN**2)),
            "The mean of z² is the square of the mean, plus the variance.",
        ),
        Mistake(
            "standard deviation in the cross entropy",
            _split(cross=_CROSS + 0.5 * (math.sqrt(_VARIANCE) - _VARIANCE)),
            "The mean of z² is the square of the mean, plus the variance.",
        ),
        Mistake(
            "half forgotten in the cross entropy",
            _split(cross=_CROSS + 0.5 * (_MEAN**2 + _VARIANCE)),
            "In the exponent of a normal density stands half of the square.",
        ),
        Mistake(
            "constant left out of the cross entropy",
            _split(cross=_CROSS - _CONSTANT),
            "The density of the prior has a constant, and the entropy has it too.",
        ),
        Mistake(
            "the other direction",
            _split(_CONSTANT + 0.5, 0.5 * math.log(2 * math.pi * _VARIANCE) + (1 + _MEAN**2) / (2 * _VARIANCE)),
            "The means are over q, the encoder's density. Over p it is another divergence.",
        ),
        Mistake(
            "entropy of the prior",
            _split(entropy=_CONSTANT + 0.5),
            "Asked is the entropy of q, the narrow one.",
        ),
        Mistake(
            "bits",
            tuple(value / math.log(2) for value in (_ENTROPY, _CROSS, _CROSS - _ENTROPY)),
            "Asked are nats: the logarithm is natural.",
        ),
        Mistake(
            "cross entropy and entropy exchanged",
            (_CROSS, _ENTROPY, _CROSS - _ENTROPY),
            "The entropy is that of q alone and knows nothing of the mean.",
        ),
    ],
)

Flops = Callable[..., float]


def _conv(H: int, W: int, C_in: int, C_out: int, k: int, stride: int) -> float:
    return 2 * (H // stride) * (W // stride) * C_in * C_out * k**2


def _conv_mistakes() -> list[Mistake]:
    def times(factor: Flops) -> Flops:
        return lambda H, W, a, b, k, s: _conv(H, W, a, b, k, s) * factor(H, W, a, b, k, s)

    listed: list[tuple[str, Flops, str]] = [
        (
            "multiplications only",
            lambda H, W, a, b, k, s: 0.5,
            "Each product is added to a sum. That counts as an operation too.",
        ),
        (
            "places of the input",
            lambda H, W, a, b, k, s: s**2,
            "Work is done for each place of the output. How many has it, with this stride?",
        ),
        (
            "stride taken once",
            lambda H, W, a, b, k, s: s,
            "The stride divides the height and the width.",
        ),
        (
            "side of the filter not squared",
            lambda H, W, a, b, k, s: 1 / k,
            "A filter of side k has k² places.",
        ),
        (
            "filter forgotten",
            lambda H, W, a, b, k, s: 1 / k**2,
            "Each output number looks at k² places of the input.",
        ),
        (
            "one output channel",
            lambda H, W, a, b, k, s: 1 / b,
            "Each output channel has a filter of its own.",
        ),
        (
            "one input channel",
            lambda H, W, a, b, k, s: 1 / a,
            "A filter looks at all channels of the input.",
        ),
        (
            "channels added",
            lambda H, W, a, b, k, s: (a + b) / (a * b),
            "Every output channel looks at every input channel.",
        ),
        (
            "parameters in place of operations",
            lambda H, W, a, b, k, s: 1 / (2 * (H // s) * (W // s)),
            "That is the number of weights. Each is used at every place.",
        ),
        (
            "one row of places",
            lambda H, W, a, b, k, s: 1 / (H // s),
            "The output has a height and a width.",
        ),
        (
            "one column of places",
            lambda H, W, a, b, k, s: 1 / (W // s),
            "The output has a height and a width.",
        ),
        (
            "a training step",
            lambda H, W, a, b, k, s: 3,
            "Asked is the forward pass alone.",
        ),
        (
            "no padding",
            lambda H, W, a, b, k, s: ((H - k) // s + 1) * ((W - k) // s + 1) / ((H // s) * (W // s)),
            "The padding is such that with stride 1 the output has as many places as the input.",
        ),
        (
            "bias counted",
            lambda H, W, a, b, k, s: 1 + 1 / (2 * a * k**2),
            "The formula counts products and the sums of them; the bias is left out.",
        ),
        (
            "one addition less",
            lambda H, W, a, b, k, s: 1 - 1 / (2 * a * k**2),
            "Strictly, n products need n - 1 additions. By custom each product counts with one.",
        ),
        (
            "multiplications only, stride taken once",
            lambda H, W, a, b, k, s: 0.5 * s,
            "Two things: additions count too, and the stride divides the height and the width.",
        ),
        (
            "multiplications only, side of the filter not squared",
            lambda H, W, a, b, k, s: 0.5 / k,
            "Two things: additions count too, and a filter of side k has k² places.",
        ),
        (
            "multiplications only, places of the input",
            lambda H, W, a, b, k, s: 0.5 * s**2,
            "Two things: additions count too, and work is done for each place of the output.",
        ),
        (
            "stride the wrong way",
            lambda H, W, a, b, k, s: s**4,
            "A stride of 2 makes the output smaller.",
        ),
    ]
    return [Mistake(kind, times(factor), advice) for kind, factor, advice in listed]


_CONV = Exercise(
    key="11.4",
    oracle=_conv,
    cases=[(12, 20, 5, 7, 3, 1), (64, 32, 3, 48, 3, 2), (8, 16, 128, 96, 1, 1), (16, 24, 6, 4, 5, 2)],
    mistakes=_conv_mistakes(),
)


def _distance(v: Tensor, snr: float) -> Tensor:
    return (2 * v / (1 + v * snr)).sum()


_RESAMPLING = Exercise(
    key="11.2",
    oracle=_distance,
    cases=[
        (_random(5, seed=1).square() + 0.1, 0.7),
        (_random(3, seed=2).square() + 0.2, 12.0),
        (_random(4, seed=3).square() + 0.1, 0.02),
    ],
    mistakes=[
        Mistake(
            "the error of the best guess",
            lambda v, r: _distance(v, r) / 2,
            "That is the distance of z_0 to the mean of the posterior. z' is not the mean, it is drawn.",
        ),
        Mistake(
            "not added up",
            lambda v, r: (2 * v / (1 + v * r))[0] + 0 * r,
            "That is the first number only. The squared distance is the sum over all numbers.",
        ),
        Mistake(
            "mean of the error of the guess",
            lambda v, r: (v / (1 + v * r)).mean(),
            "Two things: the sum over the numbers is asked, and z' is drawn too, it is not the best guess.",
        ),
        Mistake(
            "variance in the place of the precision",
            lambda v, r: (2 / (v + r)).sum(),
            "Precisions add, and that of the prior is 1/v.",
        ),
        Mistake(
            "ratio alone",
            lambda v, r: len(v) * 2 / r,
            "That is what the observation tells without the prior. z_0 was drawn from a law that is known.",
        ),
        Mistake(
            "squared once more",
            lambda v, r: (2 * v / (1 + v * r)).square().sum(),
            "Each term is a mean square already.",
        ),
        Mistake(
            "distance of unrelated latents",
            lambda v, r: (2 * v).sum() + 0 * r,
            "That is what remains if nothing is known of z_0. Here z_t is known.",
        ),
        Mistake(
            "mean over the numbers",
            lambda v, r: (2 * v / (1 + v * r)).mean(),
            "The squared distance of two vectors is the sum over their numbers.",
        ),
        Mistake(
            "variance of the posterior with the noise of the image",
            lambda v, r: (2 / (1 + v * r)).sum(),
            "Precisions add: one of the prior, one of the observation. Write both for variance v.",
        ),
        Mistake(
            "mean variance for all",
            lambda v, r: len(v) * 2 * v.mean() / (1 + v.mean() * r),
            "Each number has its own posterior. First the formula, then the sum.",
        ),
        Mistake(
            "ratio upside down",
            lambda v, r: (2 * v / (1 + v / r)).sum(),
            "With a large signal-to-noise ratio z_0 is known well, and the distance is small.",
        ),
        Mistake(
            "variance forgotten beside the ratio",
            lambda v, r: (2 * v / (1 + r)).sum(),
            "A number with a large variance is seen better in the same noise.",
        ),
        Mistake(
            "variance of the guess",
            lambda v, r: (2 * v * v * r / (1 + v * r)).sum(),
            "That is how much the best guess varies. Asked is what is unknown: the two add up to v.",
        ),
        Mistake(
            "distance, not squared",
            lambda v, r: _distance(v, r).sqrt(),
            "Asked is the squared distance.",
        ),
        Mistake(
            "difference counted once",
            lambda v, r: (v + v / (1 + v * r)).sum(),
            "Given z_t, both z_0 and z' have the variance of the posterior.",
        ),
        Mistake(
            "standard deviations added",
            lambda v, r: (2 * (v / (1 + v * r)).sqrt()).sum(),
            "Variances of independent variables add, not standard deviations.",
        ),
        Mistake(
            "standard deviations added and squared",
            lambda v, r: (4 * v / (1 + v * r)).sum(),
            "Variances of independent variables add: two of them.",
        ),
        Mistake(
            "root of the ratio",
            lambda v, r: (2 * v / (1 + v * math.sqrt(r))).sum(),
            "The signal-to-noise ratio is one of variances already.",
        ),
        Mistake(
            "ratio squared",
            lambda v, r: (2 * v / (1 + v * r**2)).sum(),
            "The signal-to-noise ratio is one of variances already.",
        ),
    ],
)


def _denoiser(z: Tensor, alpha_bar: float) -> Tensor:
    """Of ε, for latents of variance 4 around 1/2."""
    variance = 4 * alpha_bar + 1 - alpha_bar
    return math.sqrt(1 - alpha_bar) * (z - 0.5 * math.sqrt(alpha_bar)) / variance


def _decode(z: Tensor) -> Tensor:
    return torch.tanh(0.7 * z) + 0.1 * z


def _draw(
    clip: bool = False,
    scaled: str = "divide",
    each: bool = False,
    bound: bool = True,
    edge: str = "one",
) -> Callable[..., Tensor]:
    """The sampler of the exercise, with faults to choose from."""

    def answer(
        denoiser: Callable[[Tensor, float], Tensor],
        decode: Callable[[Tensor], Tensor],
        z: Tensor,
        alpha_bars: list[float],
        scale: float,
    ) -> Tensor:
        if scaled == "start":
            z = z * scale
        for now, following in zip(alpha_bars, [*alpha_bars[1:], 1.0], strict=True):
            eps = denoiser(z, now)
            z_0 = (z - math.sqrt(1 - now) * eps) / math.sqrt(now)
            if clip:
                side = 1 / scale if edge == "inverse" else 1.0
                z_0 = z_0.clamp(-side, side)
            if scaled == "step":
                z_0 = z_0 / scale
            if each:
                z_0 = decode(z_0 / scale).clamp(-1, 1)
            z = math.sqrt(following) * z_0 + math.sqrt(1 - following) * eps
        if each:
            return z
        z = {"divide": z / scale, "times": z * scale}.get(scaled, z)
        if edge == "decoder":
            z = z.clamp(-1, 1)
        return decode(z).clamp(-1, 1) if bound else decode(z)

    return answer


_SAMPLER = Exercise(
    key="11.3",
    oracle=_draw(),
    cases=[
        (_denoiser, _decode, 3 * _random(2, 6, seed=5), [0.3, 0.5, 0.8, 0.97], 1.6),
        (_denoiser, _decode, 3 * _random(3, 4, seed=6), [0.2, 0.5, 0.9], 0.55),
    ],
    mistakes=[
        Mistake(
            "nothing repaired",
            _draw(clip=True, scaled="no"),
            "Two faults: it does something that only images need, and leaves out something that the decoder needs.",
        ),
        Mistake(
            "still clipped",
            _draw(clip=True),
            "The scale is right now. Another line treats z as an image: latents have no bounds, not at the end either.",
        ),
        Mistake(
            "scale still left out",
            _draw(scaled="no"),
            "The estimate is free now. But is z, at the end, what the encoder made, or a multiple of it?",
        ),
        Mistake(
            "multiplied by the scale",
            _draw(scaled="times"),
            "The diffusion model knows z_0 = s μ. The decoder wants μ.",
        ),
        Mistake(
            "clipped and multiplied by the scale",
            _draw(clip=True, scaled="times"),
            "Latents have no bounds; and z_0 = s μ, but the decoder wants μ.",
        ),
        Mistake(
            "start scaled",
            _draw(scaled="start"),
            "z_T is noise of variance 1 in the space of the scaled latents. The scale acts before the decoder only.",
        ),
        Mistake(
            "clipped before the decoder",
            _draw(edge="decoder"),
            "Only pictures have bounds. What the encoder makes has none, and so what the decoder gets has none.",
        ),
        Mistake(
            "clipped to one over the scale",
            _draw(clip=True, edge="inverse"),
            "With wider or narrower bounds the estimate is still bounded. A latent has no bounds at all.",
        ),
        Mistake(
            "divided in each step",
            _draw(scaled="step"),
            "All latents on the way have the scale. It is taken off once, before the decoder.",
        ),
        Mistake(
            "nothing clipped and no scale",
            _draw(scaled="no", bound=False),
            "The picture has bounds, and stays clipped. And the decoder wants μ, the diffusion model knows s μ.",
        ),
        Mistake(
            "picture not clipped, latents clipped",
            _draw(clip=True, bound=False),
            "Just the other way round: the picture has bounds, latents have none.",
        ),
        Mistake(
            "multiplied by the scale, picture not clipped",
            _draw(scaled="times", bound=False),
            "The picture has bounds. And the decoder wants μ: how does it come out of s μ?",
        ),
        Mistake(
            "picture not clipped",
            _draw(bound=False),
            "The picture has bounds, and the decoder may step over them.",
        ),
        Mistake(
            "decoded at every step",
            _draw(each=True),
            "The decoder is called once. On the way everything stays a latent.",
        ),
    ],
)


def _break_even(autoencoder: float, pixel: float, latent: float, models: int) -> float:
    return autoencoder / (models * (pixel - latent)) if pixel > latent else math.inf


def _break_even_mistakes() -> list[Mistake]:
    """Each wrong formula twice: with infinity for a latent model that is not the cheaper one, and without."""
    formulas: list[tuple[str, Callable[[float, float, float, int], float], str]] = [
        (
            "number of models forgotten",
            lambda A, p, z, m: A / (p - z),
            "All models together pay for one autoencoder.",
        ),
        (
            "an autoencoder for each model",
            lambda A, p, z, m: m * A / (p - z),
            "More models make the share of each smaller, not larger.",
        ),
        (
            "paid by the price of the pixel model",
            lambda A, p, z, m: A / (m * p),
            "The latent model costs something too. What is saved with each image?",
        ),
        (
            "paid by the price of the latent model",
            lambda A, p, z, m: A / (m * z),
            "What counts is what is saved with each image.",
        ),
        (
            "prices added",
            lambda A, p, z, m: A / (m * (p + z)),
            "What is saved with each image is a difference.",
        ),
        (
            "ratio of the prices",
            lambda A, p, z, m: A / (m * p / z),
            "Set the two costs equal and solve for n: it is a difference that remains.",
        ),
        (
            "saving instead of time",
            lambda A, p, z, m: m * (p - z) / A,
            "That is upside down: the dearer the autoencoder, the longer it takes.",
        ),
        (
            "prices exchanged",
            lambda A, p, z, m: A / (m * (z - p)),
            "Saved is what pixels cost more. A number of images is not negative.",
        ),
    ]

    def or_never(formula: Callable[[float, float, float, int], float]) -> Callable[[float, float, float, int], float]:
        return lambda A, p, z, m: formula(A, p, z, m) if p > z else math.inf

    listed = [Mistake(kind, or_never(formula), advice) for kind, formula, advice in formulas]
    listed += [
        Mistake(f"{kind}, and no infinity", formula, f"{advice} And if the latent model is the dearer one?")
        for kind, formula, advice in formulas
    ]
    listed += [
        Mistake(
            "no infinity",
            lambda A, p, z, m: A / (m * (p - z)),
            "If the latent model is not the cheaper one, nothing is saved. Does the autoencoder ever get paid?",
        ),
        Mistake(
            "zero in place of never",
            lambda A, p, z, m: _break_even(A, p, z, m) if p > z else 0.0,
            "After 0 images means at once. A dearer latent model never pays for the autoencoder.",
        ),
        Mistake(
            "size of the difference",
            lambda A, p, z, m: A / (m * abs(p - z)),
            "If the latent model is the dearer one, nothing is saved, and the autoencoder is never paid.",
        ),
    ]
    return listed


_BREAK_EVEN = Exercise(
    key="11.5",
    oracle=_break_even,
    cases=[(3e6, 40.0, 10.0, 4), (5e5, 12.0, 11.5, 1), (2e7, 300.0, 40.0, 7), (3e6, 10.0, 40.0, 2)],
    mistakes=_break_even_mistakes(),
)

EXERCISES = [_SPLIT, _RESAMPLING, _SAMPLER, _CONV, _BREAK_EVEN]
