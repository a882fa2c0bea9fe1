"""Gaussian formulas, and the exact worlds that test everything else.

Where the data distribution is a Gaussian mixture, or a finite set of points, all that a diffusion model has to
learn is known in closed form: q(x_t), its score, the optimal denoiser ε* and the posterior of x_0. Models,
samplers and losses are checked against these.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffbook.schedule import NoiseSchedule, check_time

LOG_2PI = math.log(2 * math.pi)


def gaussian_log_prob(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, variance) of each number by itself, in nats, :eq:`def-gaussian`.

    Args:
        x, mean, variance: tensors that broadcast; variances are positive.

    Raises:
        ValueError: a variance that is not positive.
    """
    _check_positive("variance", variance)
    return -0.5 * (LOG_2PI + torch.log(variance) + (x - mean).square() / variance)


def kl_diagonal(mean_q: Tensor, var_q: Tensor, mean_p: Tensor, var_p: Tensor) -> Tensor:
    """KL(N(mean_q, var_q) ‖ N(mean_p, var_p)) of diagonal Gaussians, each dimension by itself, in nats.

    Sum over the dimensions for the divergence of the joint distribution, :eq:`eq-gaussian-kl`.

    Args:
        mean_q, var_q, mean_p, var_p: tensors that broadcast; variances are positive.

    Raises:
        ValueError: a variance that is not positive.
    """
    _check_positive("var_q", var_q)
    _check_positive("var_p", var_p)
    ratio = var_q / var_p
    return 0.5 * (ratio - 1 - torch.log(ratio) + (mean_q - mean_p).square() / var_p)


def discretised_log_likelihood(x: Tensor, mean: Tensor, variance: Tensor, levels: int = 256) -> Tensor:
    """Log-probability of pixel values under N(mean, variance) integrated over each value's interval, in nats.

    The values x = 2 k / (levels - 1) - 1, k = 0 … levels - 1, own the interval of width 2 / (levels - 1) around
    them; the first and the last own the tails as well, so that the probabilities of all levels add up to 1,
    :eq:`def-discretised-likelihood`.

    Args:
        x: pixel values in [-1, 1] on that grid, any shape.
        mean, variance: tensors that broadcast against ``x``; variances are positive.

    Raises:
        ValueError: values off the grid, or a variance that is not positive.

    Source: Ho et al. (2020), eq. 13.
    """
    _check_positive("variance", variance)
    k = (x + 1) * (levels - 1) / 2
    if bool((~((k - k.round()).abs() < 1e-3) | (k.round() < 0) | (k.round() > levels - 1)).any()):
        raise ValueError(f"x must lie on the grid of {levels} levels in [-1, 1]")
    half, std = 1 / (levels - 1), torch.sqrt(variance)
    upper, lower = (x - mean + half) / std, (x - mean - half) / std
    upper = torch.where(k.round() == levels - 1, torch.inf, upper)
    lower = torch.where(k.round() == 0, -torch.inf, lower)
    # P = Φ(upper) - Φ(lower); far in a tail both are nearly 1, so mirror the interval to the lower tail first,
    # and subtract in logarithms: log(e^a - e^b) = a + log(1 - e^(b-a)).
    mirror = upper + lower > 0
    upper, lower = torch.where(mirror, -lower, upper), torch.where(mirror, -upper, lower)
    a, b = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return a + torch.log(-torch.expm1(b - a))


class GaussianMixture:
    """A mixture of Gaussians with diagonal covariances, closed under the forward process.

    Args:
        weights: shape ``(K,)``, positive; scaled to sum to 1.
        means: shape ``(K, D)``.
        variances: shape ``(K, D)``, positive.

    Raises:
        ValueError: shapes that do not fit, or weights or variances that are not positive.
    """

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor) -> None:
        if means.ndim != 2 or variances.shape != means.shape or weights.shape != means.shape[:1]:
            raise ValueError(
                "need weights (K,), means (K, D), variances (K, D), got "
                f"{tuple(weights.shape)}, {tuple(means.shape)}, {tuple(variances.shape)}"
            )
        _check_positive("weights", weights)
        _check_positive("variances", variances)
        self.weights, self.means, self.variances = weights / weights.sum(), means, variances

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` samples, shape ``(n, D)``."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        eps = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.variances[k].sqrt() * eps

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each dimension, shapes ``(D,)``."""
        w = self.weights[:, None]
        mean = (w * self.means).sum(0)
        return mean, (w * (self.variances + (self.means - mean).square())).sum(0)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats for ``x`` of shape ``(B, D)``, shape ``(B,)``."""
        return torch.logsumexp(self._log_joint(x), dim=1)

    def score(self, x: Tensor) -> Tensor:
        """∇_x log p(x), shape ``(B, D)``."""
        responsibility = torch.softmax(self._log_joint(x), dim=1)[:, :, None]
        return (responsibility * (self.means - x[:, None]) / self.variances).sum(1)

    def after(self, scale: float | Tensor, variance: float | Tensor) -> GaussianMixture:
        """The distribution of scale · x + N(0, variance), again a mixture, :eq:`eq-gaussian-affine`."""
        return GaussianMixture(self.weights, scale * self.means, scale**2 * self.variances + variance)

    def at(self, t: int, schedule: NoiseSchedule) -> GaussianMixture:
        """The exact marginal q(x_t) when x_0 is drawn from this mixture, :eq:`eq-forward-marginal`."""
        if not 0 <= t <= schedule.T:
            raise ValueError(f"t must lie in 0…{schedule.T}, got {t}")
        alpha_bar = schedule.alpha_bar[t].item()
        return self.after(math.sqrt(alpha_bar), 1 - alpha_bar)

    def posterior(self, y: Tensor, scale: float | Tensor, variance: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The distribution of x, drawn from this mixture, given y = scale · x + N(0, variance).

        With scale √ᾱ_t and variance 1-ᾱ_t it is p(x_0 | x_t); for the mixture q(x_{t-1}), scale √α_t and
        variance β_t it is the exact reverse step q(x_{t-1} | x_t), :eq:`eq-reverse-bayes`. Each component is a product
        of two Gaussians, :eq:`eq-gaussian-product`.

        Args:
            y: shape ``(B, D)``.

        Returns:
            Weights ``(B, K)``, means ``(B, K, D)`` and variances ``(K, D)`` of the mixture.
        """
        weights = torch.softmax(self.after(scale, variance)._log_joint(y), dim=1)
        precision = 1 / self.variances + scale**2 / variance
        means = (self.means / self.variances + scale * y[:, None] / variance) / precision
        return weights, means, 1 / precision

    def denoiser(self, schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
        """The optimal denoiser ε*(x_t, t) = E[ε | x_t] = -√(1-ᾱ_t) ∇ log q(x_t), for ``x_t`` of ``(B, D)``."""

        def eps_star(x_t: Tensor, t: Tensor) -> Tensor:
            t = check_time(t, x_t, schedule)
            eps = torch.empty_like(x_t)
            for time in t.unique().tolist():
                rows = t == time
                noise = math.sqrt(1 - schedule.alpha_bar[time].item())
                eps[rows] = -noise * self.at(time, schedule).score(x_t[rows])
            return eps

        return eps_star

    def _log_joint(self, x: Tensor) -> Tensor:
        """log of weight times density for each component, shape ``(B, K)``."""
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x must have shape (B, {self.means.shape[1]}), got {tuple(x.shape)}")
        return torch.log(self.weights) + gaussian_log_prob(x[:, None], self.means, self.variances).sum(2)


class IdealDenoiser:
    """The denoiser that minimises L_simple when the data are finitely many points, each equally likely.

    E[x_0 | x_t] is then a softmax-weighted mean of the points. Sampling with it returns training images: what
    a network adds to this is generalisation.

    Args:
        data: the points, shape ``(N, …)``, float32 or float64.
    """

    def __init__(self, data: Tensor, schedule: NoiseSchedule) -> None:
        if data.ndim < 2 or not data.is_floating_point():
            raise ValueError(f"data must be floating-point of shape (N, …), got {data.dtype}, {tuple(data.shape)}")
        self.data, self.schedule = data, schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """ε*(x_t, t) for ``x_t`` of shape ``(B, …)`` and times ``(B,)``."""
        t = check_time(t, x_t, self.schedule)
        points, x = self.data.flatten(1), x_t.flatten(1)
        alpha_bar = self.schedule.at("alpha_bar", t, x)
        # |x - √ᾱ p|² up to |x|², which is the same for all points and drops out of the softmax
        distance = alpha_bar * points.square().sum(1) - 2 * alpha_bar.sqrt() * x @ points.T
        noise = self.schedule.at("sqrt_one_minus_alpha_bar", t, x)
        x_0 = torch.softmax(-distance / (2 * noise.square()), dim=1) @ points
        return ((x - alpha_bar.sqrt() * x_0) / noise).reshape(x_t.shape)


def _check_positive(name: str, value: Tensor) -> None:
    if not bool((value > 0).all()):
        raise ValueError(f"{name} must be positive, the smallest is {value.min().item():g}")
