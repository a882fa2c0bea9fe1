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
                z_0 = z_0.clamp(-1, 1)
            if each:
                z_0 = decode(z_0 / scale).clamp(-1, 1)
            z = math.sqrt(following) * z_0 + math.sqrt(1 - following) * eps
        if each:
            return z
        z = {"divide": z / scale, "times": z * scale}.get(scaled, z)
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


_BREAK_EVEN = Exercise(
    key="11.5",
    oracle=_break_even,
    cases=[(3e6, 40.0, 10.0, 4), (5e5, 12.0, 11.5, 1), (2e7, 300.0, 40.0, 7)],
    mistakes=[
        Mistake(
            "number of models forgotten",
            lambda A, p, z, m: A / (p - z),
            "All models together pay for one autoencoder.",
        ),
        Mistake(
            "an autoencoder for each model",
            lambda A, p, z, m: m * A / (p - z),
            "More models make the share of each smaller, not larger.",
        ),
        Mistake(
            "paid by the price of the pixel model",
            lambda A, p, z, m: A / (m * p),
            "The latent model costs something too. What is saved with each image?",
        ),
        Mistake(
            "paid by the price of the latent model",
            lambda A, p, z, m: A / (m * z),
            "What counts is what is saved with each image.",
        ),
        Mistake(
            "prices added",
            lambda A, p, z, m: A / (m * (p + z)),
            "What is saved with each image is a difference.",
        ),
        Mistake(
            "ratio of the prices",
            lambda A, p, z, m: A / (m * p / z),
            "Set the two costs equal and solve for n: it is a difference that remains.",
        ),
        Mistake(
            "saving instead of time",
            lambda A, p, z, m: m * (p - z) / A,
            "That is upside down: the dearer the autoencoder, the longer it takes.",
        ),
    ],
)

EXERCISES = [_SPLIT, _RESAMPLING, _SAMPLER, _CONV, _BREAK_EVEN]
