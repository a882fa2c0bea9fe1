"""Exercises of the chapter "Variational autoencoders and the ELBO"."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffbook.exercises.core import Exercise, Mistake


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)


_KL = Exercise(
    key="8.1",
    oracle=_kl,
    cases=[
        (_random(3, 4, seed=1), _random(3, 4, seed=2)),
        (0.3 * _random(2, 5, seed=3), 0.5 * _random(2, 5, seed=4) - 2),
    ],
    mistakes=[
        Mistake(
            "mean over the latents",
            lambda m, s: _kl(m, s) / m.shape[1],
            "The divergence of independent coordinates is the sum of theirs. A mean has another weight in the loss.",
        ),
        Mistake(
            "half forgotten",
            lambda m, s: 2 * _kl(m, s),
            "Every term of the sum is right. What stands in front of it?",
        ),
        Mistake(
            "half forgotten, and a mean over the latents",
            lambda m, s: 2 * _kl(m, s) / m.shape[1],
            "Two things: what stands in front of the sum, and is it a sum?",
        ),
        Mistake(
            "all images added up",
            lambda m, s: _kl(m, s).sum() * torch.ones(len(m), dtype=m.dtype),
            "Each image has its own divergence. Over which of the two dimensions does the sum run?",
        ),
        Mistake(
            "wrong sign",
            lambda m, s: -_kl(m, s),
            "A KL divergence is never negative. Look at the sign of every term.",
        ),
        Mistake(
            "logarithm for the variance",
            lambda m, s: 0.5 * (m**2 + s - 1 - s).sum(1),
            "The second term is the variance. You are given its logarithm.",
        ),
        Mistake(
            "standard deviation for the variance",
            lambda m, s: 0.5 * (m**2 + (0.5 * s).exp() - 1 - s).sum(1),
            "The second term is the variance, not its root.",
        ),
        Mistake(
            "standard deviation in both terms",
            lambda m, s: 0.5 * (m**2 + (0.5 * s).exp() - 1 - 0.5 * s).sum(1),
            "In the equation stand the variance and the logarithm of the variance: no roots, no halves of logarithms.",
        ),
        Mistake(
            "logarithm of the standard deviation",
            lambda m, s: 0.5 * (m**2 + s.exp() - 1 - 0.5 * s).sum(1),
            "The last term is the logarithm of the variance, so it needs no half of its own.",
        ),
        Mistake(
            "log-variance taken for the log of the standard deviation",
            lambda m, s: 0.5 * (m**2 + (2 * s).exp() - 1 - 2 * s).sum(1),
            "What is given is the logarithm of the variance, not that of the standard deviation.",
        ),
        Mistake(
            "sign of the logarithm",
            lambda m, s: 0.5 * (m**2 + s.exp() - 1 + s).sum(1),
            "A tiny variance says very much. Does your result grow when the variance goes to 0?",
        ),
        Mistake(
            "mean not squared",
            lambda m, s: 0.5 * (m + s.exp() - 1 - s).sum(1),
            "The sign of the mean cannot matter, by symmetry of the prior.",
        ),
        Mistake(
            "mean left out",
            lambda m, s: 0.5 * (s.exp() - 1 - s).sum(1),
            "A narrow law far from 0 is far from the prior. Where does the mean enter?",
        ),
        Mistake(
            "variance left out",
            lambda m, s: 0.5 * (m**2 - 1 - s).sum(1),
            "For mean 0 and variance 1 the two laws are the same, and the result is 0. Which term is missing?",
        ),
        Mistake(
            "logarithm left out",
            lambda m, s: 0.5 * (m**2 + s.exp() - 1).sum(1),
            "A tiny variance says very much. Which term would tell?",
        ),
        Mistake(
            "half on the first term only",
            lambda m, s: (0.5 * m**2 + s.exp() - 1 - s).sum(1),
            "The half stands in front of all four terms.",
        ),
        Mistake(
            "log-variance taken for the standard deviation",
            lambda m, s: 0.5 * (m**2 + s**2 - 1 - (s**2).log()).sum(1),
            "What is given is the logarithm of the variance. It may be negative; a standard deviation may not.",
        ),
        Mistake(
            "sign of the one",
            lambda m, s: 0.5 * (m**2 + s.exp() + 1 - s).sum(1),
            "For mean 0 and variance 1 the two laws are the same. What should the result be?",
        ),
        Mistake(
            "one left out",
            lambda m, s: 0.5 * (m**2 + s.exp() - s).sum(1),
            "For mean 0 and variance 1 the two laws are the same. What should the result be?",
        ),
        Mistake(
            "minus one outside of the sum",
            lambda m, s: 0.5 * ((m**2 + s.exp() - s).sum(1) - 1),
            "Each latent has its own minus one.",
        ),
        Mistake(
            "divergence the other way round",
            lambda m, s: 0.5 * ((1 + m**2) / s.exp() - 1 + s).sum(1),
            "That is the divergence from the prior to the encoder. Samples come from the encoder.",
        ),
        Mistake(
            "mean on the encoder's scale",
            lambda m, s: 0.5 * (m**2 / s.exp() + s.exp() - 1 - s).sum(1),
            "The distance of the means is measured on the scale of the second law, here the prior.",
        ),
    ],
)


_POSTERIOR = Exercise(
    key="8.2",
    oracle=(1.0, 0.5, 0.5 * (3 - math.log(2))),
    tolerance=6e-3,  # two digits after the point are enough
    mistakes=[
        Mistake(
            "divergence the other way round",
            (1.0, 0.5, 0.5 * (0.5 - 1 + math.log(2) + 1)),
            "The posterior is right. Samples come from q, so q stands first.",
        ),
        Mistake(
            "sign of the logarithm in the gap",
            (1.0, 0.5, 0.5 * (3 + math.log(2))),
            "The posterior is right. The covariance of the posterior is the inverse of G: which sign has log det G?",
        ),
        Mistake(
            "means left out of the gap",
            (1.0, 0.5, 0.5 * (1 - math.log(2))),
            "The posterior is right. Its mean is not that of q: that costs something as well.",
        ),
        Mistake(
            "means not on the scale of the posterior",
            (1.0, 0.5, 0.5 * (2 - math.log(2))),
            "The posterior is right. The distance of the means is measured on the scale of the second law: mind G.",
        ),
        Mistake(
            "half forgotten in the gap",
            (1.0, 0.5, 3 - math.log(2)),
            "The posterior is right. What stands in front of the bracket?",
        ),
        Mistake(
            "gap with a logarithm left out",
            (1.0, 0.5, 1.5),
            "The posterior is right. In the gap stands the logarithm of a ratio of variances as well.",
        ),
        Mistake(
            "ratio of the variances upside down",
            (1.0, 0.5, 0.5 * (0.5 - 1 + math.log(2) + 2)),
            "The posterior is right. In the gap stands the variance of q over that of the posterior.",
        ),
        Mistake(
            "sign of the gap",
            (1.0, 0.5, -0.5 * (3 - math.log(2))),
            "The posterior is right. The gap is a KL divergence, and those are never negative.",
        ),
        Mistake(
            "divergence to the prior",
            (1.0, 0.5, 0.0),
            "The posterior is right. q is the prior here; the gap is its divergence to the true posterior.",
        ),
        Mistake(
            "logarithm to the base 2",
            (1.0, 0.5, 1.0),
            "The posterior is right. Nats need the natural logarithm.",
        ),
        Mistake(
            "logarithm to the base 10",
            (1.0, 0.5, 0.5 * (3 - math.log10(2))),
            "The posterior is right. Nats need the natural logarithm.",
        ),
        Mistake(
            "bits for nats",
            (1.0, 0.5, 0.5 * (3 - math.log(2)) / math.log(2)),
            "The posterior is right. The gap was asked for in nats.",
        ),
        Mistake(
            "standard deviation of the posterior",
            (1.0, math.sqrt(0.5), 0.5 * (3 - math.log(2))),
            "Mean and gap are right. Asked for is the variance, not its root.",
        ),
        Mistake(
            "W left out of the mean",
            (0.5, 0.5, 0.5 * (1 - math.log(2) + 0.5)),
            "The variance is right. W stands in the mean as well as in G.",
        ),
        Mistake(
            "precision for the variance",
            (1.0, 2.0, 0.5 * (3 - math.log(2))),
            "G is one over the variance.",
        ),
        Mistake(
            "precision for the variance, everywhere",
            (4.0, 2.0, 0.5 * (0.5 - 1 + math.log(2) + 8)),
            "G is a precision: seeing the pixel must make the variance smaller than the 1 of the prior.",
        ),
        Mistake(
            "standard deviation for the variance of the pixel",
            (1.6, 0.2, 0.5 * (5 * 1 - 1 - math.log(5) + 5 * 1.6**2)),
            "N(mean, variance): the 4 in p(x | z) is the variance itself. And W enters G with which power?",
        ),
        Mistake(
            "root of the variance taken",
            (4 / 3, 1 / 3, 0.5 * (3 - 1 - math.log(3) + 3 * (4 / 3) ** 2)),
            "N(mean, variance): the 4 in p(x | z) is the variance itself, not its square.",
        ),
        Mistake(
            "W not squared in G",
            (4 / 3, 2 / 3, 0.5 * (1.5 - 1 - math.log(1.5) + 1.5 * (4 / 3) ** 2)),
            "In G stands the product of W with itself.",
        ),
        Mistake(
            "prior left out",
            (2.0, 1.0, 2.0),
            "Without the prior z would be half of x. The prior pulls it towards 0 and adds 1 to the precision.",
        ),
        Mistake(
            "mean not divided by the variance of the pixel",
            (4.0, 0.5, 0.5 * (1 - math.log(2) + 32)),
            "The variance is right. In the mean the pixel is weighed by its own precision.",
        ),
        Mistake(
            "G left out of the mean",
            (2.0, 0.5, 0.5 * (1 - math.log(2) + 8)),
            "The variance is right. The mean has it as a factor.",
        ),
        Mistake(
            "pixel and latent mixed up",
            (0.0, 8.0, 0.5 * (3 - math.log(2))),
            "N(0, 8) is the law of the pixel. Asked for is the law of z once x is known.",
        ),
    ],
)


_HIDDEN_BETA = Exercise(
    key="8.3",
    oracle=(0.5, 392.0, 12.25),
    tolerance=1e-6,
    mistakes=[
        Mistake(
            "two forgotten",
            (1.0, 784.0, 24.5),
            "The quotients are right. In the log-density the squared error has a factor with a 2 in it.",
        ),
        Mistake(
            "two on the wrong side",
            (2.0, 1568.0, 49.0),
            "The quotients are right. Solve c / a = 2 β σ² for the product.",
        ),
        Mistake(
            "quotient upside down",
            (0.5, 1 / 1568, 32 / 1568),
            "A mean over 784 pixels makes the squared error small against the KL. Does β grow or shrink?",
        ),
        Mistake(
            "quotient upside down, two forgotten",
            (1.0, 1 / 784, 32 / 784),
            "Compare the weights again: which one grows when the other is divided by 784? And there is a 2.",
        ),
        Mistake(
            "mean over the latents the wrong way",
            (0.5, 392.0, 392.0 * 32),
            "Averaging the KL over the latents makes its weight smaller, not larger.",
        ),
        Mistake(
            "mean over the latents forgotten",
            (0.5, 392.0, 392.0),
            "In the third loss the KL divergence is averaged as well.",
        ),
        Mistake(
            "third quotient upside down",
            (0.5, 392.0, 32 / 1568),
            "In the third loss c is 1/32 and a is 1/784. Which one stands above?",
        ),
        Mistake(
            "two forgotten in the third",
            (0.5, 392.0, 24.5),
            "The first two are right. The 2 belongs to the third as well.",
        ),
        Mistake(
            "means taken to cancel",
            (0.5, 392.0, 0.5),
            "The two means divide by different numbers: 784 and 32.",
        ),
        Mistake(
            "pixels forgotten in the third",
            (0.5, 392.0, 1 / 64),
            "In the third loss both terms are averaged, and the squared error over many more numbers.",
        ),
        Mistake(
            "order of the losses",
            (0.5, 12.25, 392.0),
            "The order asked for is: sum and sum, mean and sum, mean and mean.",
        ),
        Mistake(
            "side for the pixels",
            (0.5, 14.0, 28 / 64),
            "The mean runs over all pixels of the image, not over a row.",
        ),
        Mistake(
            "square root taken",
            (math.sqrt(0.5), math.sqrt(392), 3.5),
            "Asked for is β σ², not its root.",
        ),
    ],
)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _loss(
    pixels: Callable[[Tensor], Tensor] = lambda p: p.sum(1).mean(),
    latents: Callable[[Tensor], Tensor] = lambda k: k.sum(1).mean(),
    sign: float = 1.0,
    half: float = 0.5,
    constant: bool = True,
    std: bool = False,
) -> Loss:
    """Minus the ELBO, with the choices that people get wrong."""

    def loss(x: Tensor, f: Tensor, mean: Tensor, variance: Tensor, variance_x: Tensor) -> Tensor:
        spread = variance_x.sqrt() if std else variance_x
        log_p = -half * ((x - f) ** 2 / spread + (torch.log(2 * math.pi * spread) if constant else 0))
        return -pixels(log_p) + sign * latents(0.5 * (mean**2 + variance - 1 - variance.log()))

    return loss


_minus_elbo = _loss()


def _case(seed: int, B: int, D: int, d: int, variance_x: float) -> tuple[Tensor, ...]:
    x, f = _random(2, B, D, seed=seed)
    mean, log_variance = _random(2, B, d, seed=seed + 100)
    return x, f, mean, log_variance.exp(), torch.tensor(variance_x, dtype=torch.float64)


_PLANTED = Exercise(
    key="8.4",
    oracle=_minus_elbo,
    cases=[_case(1, 3, 6, 2, 0.3), _case(2, 4, 5, 3, 2.0)],
    mistakes=[
        Mistake(
            "mean over the pixels",
            _loss(pixels=torch.mean),
            "The log-likelihood of an image is the sum over its pixels. Only the batch is averaged.",
        ),
        Mistake(
            "mean over pixels and over latents",
            _loss(pixels=torch.mean, latents=torch.mean),
            "Two means do not cancel: they divide by different numbers. Sum both, then average over the batch.",
        ),
        Mistake(
            "mean over the latents",
            _loss(latents=torch.mean),
            "The reconstruction is right now. The divergence was right before: a sum over the latents.",
        ),
        Mistake(
            "all divided by the number of pixels",
            lambda x, f, mean, variance, variance_x: _minus_elbo(x, f, mean, variance, variance_x) / x.shape[1],
            "A good loss, with the right weights. But asked for are the nats of an image, not of a pixel.",
        ),
        Mistake(
            "sum over the batch",
            _loss(pixels=torch.sum, latents=torch.sum),
            "The weights are right. The result should be averaged over the batch.",
        ),
        Mistake(
            "reconstruction summed over the batch",
            _loss(pixels=torch.sum),
            "Over the pixels a sum, over the batch a mean. Here the batch was added up too.",
        ),
        Mistake(
            "divergence summed over the batch",
            _loss(latents=torch.sum),
            "The reconstruction is right now. Over the latents a sum, over the batch a mean.",
        ),
        Mistake(
            "divergence multiplied by the pixels",
            lambda x, f, mean, variance, variance_x: (
                _minus_elbo(x, f, mean, variance, variance_x)
                + (x.shape[1] - 1) * 0.5 * (mean**2 + variance - 1 - variance.log()).sum(1).mean()
            ),
            "Only the log-likelihood was too small. The divergence needs no factor.",
        ),
        Mistake(
            "constant once an image",
            lambda x, f, mean, variance, variance_x: (
                _minus_elbo(x, f, mean, variance, variance_x)
                - 0.5 * (x.shape[1] - 1) * torch.log(2 * math.pi * variance_x)
            ),
            "Every pixel has its own constant, so an image has D of them.",
        ),
        Mistake(
            "sum over the batch in place of the pixels",
            _loss(pixels=lambda p: p.sum(0).mean()),
            "The first dimension is the batch. Over which one is the log-likelihood a sum?",
        ),
        Mistake(
            "sign of the divergence",
            _loss(sign=-1.0),
            "In minus the ELBO the divergence is a price: it stands with a plus.",
        ),
        Mistake(
            "wrong sign",
            lambda x, f, mean, variance, variance_x: -_minus_elbo(x, f, mean, variance, variance_x),
            "That is the ELBO, which is to be raised. A loss is to be lowered.",
        ),
        Mistake(
            "constant left out",
            _loss(constant=False),
            "The weights are right. The constant is asked for as well, and σ_x² needs it to be learned.",
        ),
        Mistake(
            "half left out",
            _loss(half=1.0),
            "The half in front of the log-density has gone.",
        ),
        Mistake(
            "standard deviation for the variance",
            _loss(std=True),
            "`variance_x` is a variance, and a variance is what the density needs.",
        ),
        Mistake(
            "divergence left out",
            _loss(sign=0.0),
            "That is the reconstruction alone. What is the price of the latents?",
        ),
    ],
)


def _bound(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def _log_weights(K: int, B: int, seed: int) -> tuple[Tensor]:
    return ((-1800 + 4 * _random(K, B, seed=seed)).float(),)


_BOUND = Exercise(
    key="8.5",
    oracle=_bound,
    cases=[_log_weights(5, 3, seed=6), _log_weights(8, 2, seed=7)],
    tolerance=1e-6,  # relative to 1,800: about two thousandths of a nat, a few roundings of float32
    mistakes=[
        Mistake(
            "K forgotten",
            lambda log_w: torch.logsumexp(log_w, 0),
            "That is the logarithm of the sum of the weights. Asked for is that of their mean.",
        ),
        Mistake(
            "mean of the logarithms",
            lambda log_w: log_w.mean(0),
            "The mean of the logarithms is the ELBO again. Here the mean stands inside of the logarithm.",
        ),
        Mistake(
            "K added",
            lambda log_w: torch.logsumexp(log_w, 0) + math.log(len(log_w)),
            "To divide by K is to subtract a logarithm.",
        ),
        Mistake(
            "divided by K after the logarithm",
            lambda log_w: torch.logsumexp(log_w, 0) / len(log_w),
            "The weights are divided by K, inside of the logarithm. What becomes of a quotient there?",
        ),
        Mistake(
            "K itself subtracted",
            lambda log_w: torch.logsumexp(log_w, 0) - len(log_w),
            "A factor 1/K becomes a logarithm when it leaves the logarithm.",
        ),
        Mistake(
            "number of images for K",
            lambda log_w: torch.logsumexp(log_w, 0) - math.log(log_w.shape[1]),
            "K is the number of weights of an image: the first dimension.",
        ),
        Mistake(
            "all images in one",
            lambda log_w: (torch.logsumexp(log_w.flatten(), 0) - math.log(log_w.numel())) * torch.ones(log_w.shape[1]),
            "Each image has its own bound. Over which dimension runs the sum?",
        ),
        Mistake(
            "largest weight",
            lambda log_w: log_w.max(0).values,
            "The largest weight says most, but the mean is taken over all K.",
        ),
        Mistake(
            "largest weight over K",
            lambda log_w: log_w.max(0).values - math.log(len(log_w)),
            "The other weights count too. `torch.logsumexp` adds them up.",
        ),
        Mistake(
            "maximum not added back",
            lambda log_w: (log_w - log_w.max(0).values).exp().mean(0).log(),
            "You took the largest logarithm out before the exponential. It must come back after the logarithm.",
        ),
        Mistake(
            "underflow",
            lambda log_w: log_w.exp().mean(0).log(),
            "exp(-1800) is 0 in floating point, and log(0) is minus infinity. Stay in the logarithms.",
        ),
    ],
)

EXERCISES = [_KL, _POSTERIOR, _HIDDEN_BETA, _PLANTED, _BOUND]
