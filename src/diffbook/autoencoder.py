"""Variational autoencoders and their ELBO.

A VAE is anything with the three methods that :func:`elbo` calls: ``encode`` gives q(z | x), ``decode`` the mean f(z),
and ``log_likelihood`` log p(x | z). :class:`VAE` is the convolutional one for images; in :class:`LinearVAE` everything
is Gaussian, so that log p(x) and the true posterior are known exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbook.diffusion import Denoiser, q_posterior, x0_from_eps
from diffbook.gaussian import LOG_2PI, discretised_log_likelihood, gaussian_log_prob, kl_diagonal
from diffbook.schedule import NoiseSchedule
from diffbook.unet import group_norm, zeroed

Layer = Callable[[Tensor], tuple[Tensor, Tensor]]


class LatentVariableModel(Protocol):
    """What :func:`elbo` and :func:`importance_weighted_bound` ask of a model."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor: ...


class ELBO(NamedTuple):
    """A lower bound on log p(x) in nats an image, with its two terms, :eq:`eq-vae-elbo`."""

    total: Tensor  # reconstruction - kl, (B,)
    reconstruction: Tensor  # log p(x | z), (B,)
    kl: Tensor  # KL from q(z | x) to the prior N(0, I), (B,)


def elbo(
    vae: LatentVariableModel, x: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None
) -> ELBO:
    """E_q[log p(x | z)] - KL(q(z | x) ‖ p(z)), with one z an image, :eq:`eq-vae-elbo`.

    z = μ + σ ε is a function of ε (:eq:`eq-vae-reparameterization`), so gradients reach the encoder. The KL
    divergence is exact, :eq:`eq-kl-to-prior`; only the reconstruction is an estimate, without bias.

    Args:
        x: images, shape ``(B, …)``, on the grid of 256 levels in [-1, 1] where the model's likelihood asks for it.
        generator: source of ε, on the device of ``x``.
        noise: ε to replay, of the latents' shape.

    Source: Kingma & Welling (2014), eq. 10.
    """
    mean, variance = vae.encode(x)
    z = _draw(mean, variance, generator, noise)
    reconstruction = vae.log_likelihood(x, z)
    kl = kl_diagonal(mean, variance, torch.zeros_like(mean), torch.ones_like(mean)).flatten(1).sum(1)
    return ELBO(reconstruction - kl, reconstruction, kl)


def importance_weighted_bound(
    vae: LatentVariableModel, x: Tensor, K: int, generator: torch.Generator | None = None
) -> Tensor:
    """log of the mean of K weights p(x | z) p(z) / q(z | x), a lower bound on log p(x) in nats, shape ``(B,)``.

    For K = 1 its mean is the ELBO; it rises with K, towards log p(x), :eq:`eq-importance-weighted-bound`.

    Raises:
        ValueError: K < 1.

    Source: Burda et al. (2016), eq. 8.
    """
    if K < 1:
        raise ValueError(f"K must be at least 1, got {K}")
    mean, variance = vae.encode(x)
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    weights = []
    for _ in range(K):
        z = _draw(mean, variance, generator, None)
        log_ratio = gaussian_log_prob(z, zero, one) - gaussian_log_prob(z, mean, variance)
        weights.append(vae.log_likelihood(x, z) + log_ratio.flatten(1).sum(1))
    return torch.logsumexp(torch.stack(weights), 0) - math.log(K)


class Hierarchy(NamedTuple):
    """A VAE with T layers of latents z_1, …, z_T above the image z_0 = x, and the prior z_T ~ N(0, I).

    :eq:`def-hierarchical-vae`. A layer maps a batch to the mean and the variance of a diagonal Gaussian.
    """

    encoders: Sequence[Layer]  # z_{t-1} to q(z_t | z_{t-1}), for t = 1, …, T
    decoders: Sequence[Layer]  # z_t to p(z_{t-1} | z_t), for t = 2, …, T
    log_likelihood: Callable[[Tensor, Tensor], Tensor]  # x and z_1 to log p(x | z_1), (B,)


def hierarchical_elbo(
    model: Hierarchy,
    x: Tensor,
    generator: torch.Generator | None = None,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """log p(x, z_1 … z_T) - log q(z_1 … z_T | x) of one chain drawn from q, in nats, shape ``(B,)``.

    Its mean is the ELBO, :eq:`eq-hierarchical-elbo`: the same as that of :func:`elbo` for the one layer of a VAE, and
    minus that of :func:`diffbook.diffusion.variational_bound` for :func:`diffusion_as_hierarchy`. Nothing is replaced
    by a closed form: each density of the chain is evaluated at the values drawn.

    Args:
        x: images, shape ``(B, …)``.
        noise: ε to replay, ``noise[t - 1]`` for z_t.

    Source: Ho et al. (2020), eq. 3, with any encoder and layers of any width.
    """
    total, below = x.new_zeros(len(x)), x
    for i, encode in enumerate(model.encoders):
        mean, variance = encode(below)
        z = _draw(mean, variance, generator, None if noise is None else noise[i])
        total = total - gaussian_log_prob(z, mean, variance).flatten(1).sum(1)
        if i == 0:
            total = total + model.log_likelihood(x, z)
        else:
            total = total + gaussian_log_prob(below, *model.decoders[i - 1](z)).flatten(1).sum(1)
        below = z
    return total + gaussian_log_prob(below, torch.zeros_like(below), torch.ones_like(below)).flatten(1).sum(1)


def diffusion_as_hierarchy(
    model: Denoiser,
    schedule: NoiseSchedule,
    variance: str = "beta",
    levels: int | None = 256,
    clip: float | None = None,
) -> Hierarchy:
    """A diffusion model as a hierarchical VAE with z_t = x_t: the encoder is fixed, and no latent is smaller than x.

    The arguments are those of :func:`diffbook.diffusion.variational_bound`.

    Raises:
        ValueError: ``variance`` is neither ``"beta"`` nor ``"beta_tilde"``.
    """
    if variance not in ("beta", "beta_tilde"):
        raise ValueError(f'variance must be "beta" or "beta_tilde", got {variance!r}')

    def encoder(t: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return schedule.sqrt_alpha[t].item() * x, schedule.beta[t].to(x)

    def decoder(t: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        x_0 = x0_from_eps(x_t, model(x_t, torch.full((len(x_t),), t, device=x_t.device)), t, schedule)
        x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
        mean, beta_tilde = q_posterior(x_0, x_t, t, schedule)
        return mean, schedule.beta[t].to(x_t) if variance == "beta" or t == 1 else beta_tilde

    def log_likelihood(x: Tensor, x_1: Tensor) -> Tensor:
        log_prob = gaussian_log_prob if levels is None else partial(discretised_log_likelihood, levels=levels)
        return log_prob(x, *decoder(1, x_1)).flatten(1).sum(1)

    times = range(1, schedule.T + 1)
    return Hierarchy([partial(encoder, t) for t in times], [partial(decoder, t) for t in times[1:]], log_likelihood)


def _draw(mean: Tensor, variance: Tensor, generator: torch.Generator | None, noise: Tensor | None) -> Tensor:
    """z ~ N(mean, variance) by the reparameterization trick."""
    if noise is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    if noise.shape != mean.shape:
        raise ValueError(f"noise must have the latents' shape {tuple(mean.shape)}, got {tuple(noise.shape)}")
    return mean + variance.sqrt() * noise.to(mean)


class Block(nn.Module):
    """x + two convolutions of x; keeps the shape ``(B, C, H, W)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = group_norm(width), zeroed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _down(channels: int, widths: Sequence[int], blocks: int, patch: int) -> list[nn.Module]:
    """Layers from images to features of the coarsest level, ``(B, widths[-1], H, W)``."""
    layers: list[nn.Module] = [nn.PixelUnshuffle(patch), nn.Conv2d(channels * patch**2, widths[0], 3, padding=1)]
    for a, b in itertools.pairwise(widths):
        layers += [*[Block(a) for _ in range(blocks)], nn.Conv2d(a, b, 3, stride=2, padding=1)]
    return [*layers, *[Block(widths[-1]) for _ in range(blocks)], group_norm(widths[-1]), nn.SiLU()]


def _up(channels: int, widths: Sequence[int], blocks: int, patch: int) -> list[nn.Module]:
    """Layers from features of the coarsest level to images."""
    layers: list[nn.Module] = [Block(widths[-1]) for _ in range(blocks)]
    for b, a in itertools.pairwise(reversed(widths)):
        layers += [nn.Conv2d(b, a, 1), nn.Upsample(scale_factor=2), *[Block(a) for _ in range(blocks)]]
    layers += [group_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels * patch**2, 3, padding=1)]
    return [*layers, nn.PixelShuffle(patch)]


def _check(size: int, widths: Sequence[int], blocks: int, patch: int) -> int:
    """By how much height and width shrink in :func:`_down`."""
    if not widths or min(*widths, blocks, patch) < 1:
        raise ValueError(f"need widths, blocks and patch of at least 1, got {tuple(widths)}, {blocks} and {patch}")
    multiple = patch * 2 ** (len(widths) - 1)
    if size % multiple:
        raise ValueError(f"size must be a multiple of {multiple}, got {size}")
    return int(multiple)


class VAE(nn.Module):
    """A convolutional VAE of square images, with a vector of latents.

    q(z | x) = N(μ(x), diag σ²(x)), :eq:`def-vae-encoder`; p(z) = N(0, I); p(x | z) = N(f(z), σ_x² I), integrated over
    the interval of each grey level (:eq:`def-discretised-likelihood`), with one learned σ_x².

    Args:
        channels, size: C of the images, and their height and width.
        widths: channels inside, a number for each level; from level to level height and width are halved.
        blocks: residual blocks a level, in the encoder and again in the decoder.
        latent: d, how many numbers z has.
        patch: fold squares of patch×patch pixels into channels first, and unfold them at the end.
        narrow: channels of the coarsest level where it is flattened.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        widths: Sequence[int],
        blocks: int = 2,
        latent: int = 32,
        patch: int = 1,
        narrow: int = 16,
    ) -> None:
        super().__init__()
        multiple = _check(size, widths, blocks, patch)
        if min(latent, narrow) < 1:
            raise ValueError(f"latent and narrow must be at least 1, got {latent} and {narrow}")
        self.shape, self.latent = (channels, size, size), latent
        coarse = size // multiple
        flat, down, up = (
            narrow * coarse**2,
            _down(channels, widths, blocks, patch),
            _up(channels, widths, blocks, patch),
        )
        self.encoder = nn.Sequential(*down, nn.Conv2d(widths[-1], narrow, 1), nn.Flatten(), nn.Linear(flat, 2 * latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent, flat),
            nn.Unflatten(1, (narrow, coarse, coarse)),
            nn.Conv2d(narrow, widths[-1], 1),
            *up,
        )
        self.log_variance_x = nn.Parameter(torch.tensor(-3.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """μ(x) and σ²(x) of q(z | x), each of shape ``(B, latent)``.

        Raises:
            ValueError: images of another shape.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.exp()

    def decode(self, z: Tensor) -> Tensor:
        """f(z), the mean of p(x | z), shape ``(B, C, H, W)``, for ``z`` of shape ``(B, latent)``.

        Raises:
            ValueError: latents of another shape.
        """
        if z.ndim != 2 or z.shape[1] != self.latent:
            raise ValueError(f"z must have shape (B, {self.latent}), got {tuple(z.shape)}")
        return self.decoder(z)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) in nats an image, shape ``(B,)``; ``x`` on the grid of 256 levels in [-1, 1]."""
        return discretised_log_likelihood(x, self.decode(z), self.log_variance_x.exp()).flatten(1).sum(1)


class SpatialVAE(nn.Module):
    """An autoencoder that compresses images to smaller "images" of latents, for diffusion to work on.

    As :class:`VAE`, but z has a height and a width, ``(B, latent, H / f, W / f)``, and the likelihood is left to the
    loss, where the weight of the KL divergence stands for it, :eq:`eq-compression-likelihood`.

    Args:
        channels, size, widths, blocks, patch: see :class:`VAE`; f = patch · 2^(number of widths - 1).
        latent: channels of z.

    Attributes:
        scale: 1 / std(z) over the training images, which brings the latents to unit variance.
            It is fitted at the end of training and stored with the weights.

    Source: Rombach et al. (2022), section 3.1.
    """

    scale: Tensor

    def __init__(
        self, channels: int, size: int, widths: Sequence[int], blocks: int = 2, latent: int = 4, patch: int = 1
    ) -> None:
        super().__init__()
        f = _check(size, widths, blocks, patch)
        if latent < 1:
            raise ValueError(f"latent must be at least 1, got {latent}")
        self.shape, self.latent_shape = (channels, size, size), (latent, size // f, size // f)
        self.encoder = nn.Sequential(
            *_down(channels, widths, blocks, patch), nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)
        )
        self.decoder = nn.Sequential(nn.Conv2d(latent, widths[-1], 3, padding=1), *_up(channels, widths, blocks, patch))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """μ(x) and σ²(x) of q(z | x), each of shape ``(B, *latent_shape)``, not scaled.

        Raises:
            ValueError: images of another shape.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.exp()

    def decode(self, z: Tensor) -> Tensor:
        """The image of latents that are not scaled, shape ``(B, C, H, W)``.

        Raises:
            ValueError: latents of another shape.
        """
        if z.shape[1:] != self.latent_shape:
            raise ValueError(f"z must have shape (B, {', '.join(map(str, self.latent_shape))}), got {tuple(z.shape)}")
        return self.decoder(z)


@torch.no_grad()
def fit_scale(vae: SpatialVAE, x: Callable[[slice], Tensor], number: int, batch: int = 250) -> None:
    """Set ``vae.scale`` to 1 / std(z) over the images, the noise and all numbers of z, :eq:`def-latent-scale`.

    z = μ(x) + σ(x) ε has the mean E μ and the mean square E[μ² + σ²], :eq:`eq-latent-variance`.

    Args:
        x: gives the images of a slice, such as :meth:`diffbook.data.ImageSet.x`.
        number: of images.
    """
    total = square = count = 0.0
    for start in range(0, number, batch):
        mean, variance = (part.double() for part in vae.encode(x(slice(start, min(start + batch, number)))))
        total += mean.sum().item()
        square += (mean.square() + variance).sum().item()
        count += mean.numel()
    vae.scale.fill_(1 / math.sqrt(square / count - (total / count) ** 2))


class LinearVAE:
    """The VAE in which everything can be computed: p(z) = N(0, I), p(x | z) = N(W z + b, σ_x² I).

    Its p(x) = N(b, W Wᵀ + σ_x² I) and the true posterior p(z | x) are Gaussians, :eq:`eq-linear-vae-marginal` and
    :eq:`eq-linear-vae-posterior`. The encoder is q(z | x) = N(A (x - b), diag v).

    Args:
        W: shape ``(D, d)``.
        b: shape ``(D,)``.
        variance_x: σ_x², a positive scalar.
        A: shape ``(d, D)``.
        v: shape ``(d,)``, positive.

    Raises:
        ValueError: shapes that do not fit, or a variance that is not positive.

    Source: Tipping & Bishop (1999); as a VAE, Lucas et al. (2019).
    """

    def __init__(self, W: Tensor, b: Tensor, variance_x: Tensor, A: Tensor, v: Tensor) -> None:
        D, d = W.shape
        if b.shape != (D,) or A.shape != (d, D) or v.shape != (d,):
            shapes = f"{tuple(W.shape)}, {tuple(b.shape)}, {tuple(A.shape)}, {tuple(v.shape)}"
            raise ValueError(f"need W (D, d), b (D,), A (d, D) and v (d,), got {shapes}")
        if not bool((variance_x > 0).all() and (v > 0).all()):
            raise ValueError("variance_x and v must be positive")
        self.W, self.b, self.variance_x, self.A, self.v = W, b, variance_x, A, v

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(z | x), each of shape ``(B, d)``."""
        return (x - self.b) @ self.A.T, self.v.expand(len(x), -1)

    def decode(self, z: Tensor) -> Tensor:
        """W z + b, shape ``(B, D)``."""
        return z @ self.W.T + self.b

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), a density, in nats, shape ``(B,)``."""
        return gaussian_log_prob(x, self.decode(z), self.variance_x).sum(1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) exactly, in nats, shape ``(B,)``, :eq:`eq-linear-vae-marginal`."""
        covariance = self.W @ self.W.T + self.variance_x * torch.eye(len(self.b)).to(self.W)
        factor = torch.linalg.cholesky(covariance)
        white = torch.linalg.solve_triangular(factor, (x - self.b).T, upper=False)
        return -0.5 * (len(self.b) * LOG_2PI + white.square().sum(0)) - factor.diagonal().log().sum()

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``(B, d)`` and covariance ``(d, d)`` of the true p(z | x), :eq:`eq-linear-vae-posterior`."""
        precision = torch.eye(self.W.shape[1]).to(self.W) + self.W.T @ self.W / self.variance_x
        covariance = torch.linalg.inv(precision)
        return (x - self.b) @ self.W @ covariance / self.variance_x, covariance
