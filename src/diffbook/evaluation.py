"""How good a model is: bits per dimension, Fréchet distance, precision and recall, nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffbook.autoencoder import VAE, SpatialVAE, importance_weighted_bound
from diffbook.classifier import CaptionMatcher, Classifier
from diffbook.data import ImageSet
from diffbook.diffusion import variational_bound
from diffbook.latent import from_latents
from diffbook.recipes import Diffusion, stream
from diffbook.sampling import as_eps, ddim_sample, ddpm_sample, dpmpp_2m_sample, timesteps, trailing_timesteps


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians that are fitted to features (Dowson & Landau 1982).

    ‖m_a - m_b‖² + tr(C_a + C_b - 2 (C_a C_b)^½), in float64. With features of an Inception network it is called
    FID (Heusel et al. 2017). It is biased upwards, the more the fewer samples there are: compare only distances
    with the same numbers.

    Args:
        features_a, features_b: shapes ``(N, D)`` and ``(M, D)``.

    Raises:
        ValueError: other shapes, or fewer than two samples.
    """
    a, b = features_a.double(), features_b.double()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need features (N, D) and (M, D) with N, M > 1, got {tuple(a.shape)} and {tuple(b.shape)}")
    C_a, C_b = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(b.shape[1], -1)
    # The trace of (C_a C_b)^½ is the sum of the singular values of C_a^½ C_b^½: no root of a non-symmetric matrix.
    overlap = torch.linalg.svdvals(_root(C_a) @ _root(C_b)).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + C_a.trace() + C_b.trace() - 2 * overlap).item()


class Estimate(NamedTuple):
    """A number estimated from samples."""

    value: float
    standard_error: float
    bias: float  # expected excess of the value; subtract it for an estimate with hardly any bias


def frechet_jackknife(features_a: Tensor, features_b: Tensor, groups: int = 20) -> Estimate:
    """:func:`frechet_distance` with its standard error and bias, by the grouped jackknife.

    Each set in turn is cut into groups of neighbours, and the distance is computed without each of them. How these
    distances scatter tells the standard error; how much larger they are on average, being from fewer samples, tells
    the bias, which falls with one over the number of samples. Neighbours, so that a set with its classes in turn has
    the same classes in every group; a set that is sorted must go through :func:`shuffled` first, or each group misses
    another kind of image, and the standard error comes out much too large.

    Raises:
        ValueError: see :func:`frechet_distance`, fewer than two groups, or fewer than four samples.

    Source: Efron & Stein (1981); the bias of Fréchet distances: Chong & Forsyth (2020).
    """
    if groups < 2 or min(len(features_a), len(features_b)) < 4:
        numbers = f"{groups} groups of {len(features_a)} and {len(features_b)} samples"
        raise ValueError(f"need at least two groups and four samples, got {numbers}")
    value, variance, bias = frechet_distance(features_a, features_b), 0.0, 0.0
    for part, whole in ((features_a, features_b), (features_b, features_a)):
        chunks = part.tensor_split(min(groups, len(part) // 2))
        without = [torch.cat([*chunks[:i], *chunks[i + 1 :]]) for i in range(len(chunks))]
        distances = torch.tensor([frechet_distance(rest, whole) for rest in without], dtype=torch.float64)
        variance += (len(chunks) - 1) * distances.var(correction=0).item()
        bias += (len(chunks) - 1) * (distances.mean().item() - value)
    return Estimate(value, math.sqrt(variance), bias)


def shuffled(features: Tensor) -> Tensor:
    """The rows in random order, always the same one for the same number of rows."""
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@torch.no_grad()
def image_features(classifier: Classifier | CaptionMatcher, x: Tensor, batch: int = 500) -> Tensor:
    """Features of images ``(N, C, H, W)`` in [-1, 1], float32 on the CPU, shape ``(N, D)``.

    Raises:
        ValueError: the classifier is in training mode; or images of another shape.
    """
    if classifier.training:
        raise ValueError("the classifier must be in evaluation mode: call classifier.eval()")
    device = next(classifier.parameters()).device
    return torch.cat([classifier.features(part.to(device)).float().cpu() for part in x.split(batch)])


@torch.no_grad()
def accuracy(classifier: Classifier, images: ImageSet, batch: int = 500) -> float:
    """The share of images whose class the classifier finds.

    Raises:
        ValueError: the classifier is in training mode.
    """
    features = image_features(classifier, images.x(), batch)
    device = next(classifier.parameters()).device
    return (classifier.head(features.to(device)).argmax(1).cpu() == images.labels.cpu()).double().mean().item()


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, shape ``(B,)``: 10 log10(2² / mean square error), :eq:`def-psnr`.

    2 is the width of the range [-1, 1]; one more bit of accuracy is worth 6 dB, :eq:`eq-psnr-bits`.

    Raises:
        ValueError: shapes that differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"images must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(1))


def bits_per_dim(nats: float | Tensor, dims: int) -> float | Tensor:
    """Nats per image to bits per dimension: nats / (dims · ln 2), for negative log-likelihoods and their bounds.

    :eq:`def-bits-per-dim`.

    Raises:
        ValueError: dims < 1.
    """
    if dims < 1:
        raise ValueError(f"dims must be at least 1, got {dims}")
    return nats / (dims * math.log(2))


def geometric_parts(T: int, K: int) -> list[int]:
    """The first times of K parts of 2…T whose lengths grow with t, for :func:`diffbook.diffusion.variational_bound`.

    The terms of the bound fall about like 1/t, so such parts contribute about equally, and one time from each says
    more than one from each of K equal parts. Parts that rounding makes empty are left out.

    Raises:
        ValueError: T < 2 or K < 1.
    """
    if T < 2 or K < 1:
        raise ValueError(f"need T >= 2 and K >= 1, got T = {T} and K = {K}")
    return sorted({round(2 * ((T + 1) / 2) ** (i / K)) for i in range(K)} - {T + 1})


def bound_sums(
    network: nn.Module,
    recipe: Diffusion,
    x: Tensor,
    y: Tensor,
    variance: str,
    parts: list[int],
    seed: int,
    skip: int = 0,
) -> Iterator[list[float]]:
    """The variational bound of images, a hundred at a time, as sums from which :func:`bound_in_bits` makes a result.

    x̂_0 is bounded to [-1, 1], as in :func:`draw_images`; the chain has all T steps. Times and noise are a
    function of the seed and of the place of the hundred in ``x``, on every device, so a computation that was stopped
    goes on, with ``skip``, as if it had not been.

    Args:
        x: images in [-1, 1], on the grid of 256 levels, shape ``(N, C, H, W)``.
        y: classes, int64, shape ``(N,)``; the null class for none.
        variance: σ_t² of the model's steps, ``"beta"`` or ``"beta_tilde"``.
        parts: see :func:`diffbook.diffusion.variational_bound`.
        skip: how many hundreds were done before.

    Yields:
        Number of images, then sums over them, in nats: of the bound, of its square, of L_T, of ΣL_t and of L_0.
    """
    device, schedule = next(network.parameters()).device, recipe.noise_schedule()
    for start in range(100 * skip, len(x), 100):
        labels = y[start : start + 100].to(device)

        def model(x_t: Tensor, t: Tensor, labels: Tensor = labels) -> Tensor:
            return network(x_t.to(device), t.to(device), labels).cpu()

        part, generator = x[start : start + 100].cpu(), stream(seed, "bound", start)
        denoiser = as_eps(model, schedule, recipe.predicts)
        bound = variational_bound(denoiser, part, schedule, variance, parts=parts, clip=1.0, generator=generator)
        terms = (bound.total, bound.total.double().square(), bound.L_T, bound.L_t, bound.L_0)
        yield [len(part), *(term.double().sum().item() for term in terms)]


def bound_in_bits(sums: list[list[float]], dims: int) -> dict[str, float]:
    """Bits per dimension, their standard error and terms, from the sums of :func:`bound_sums`, :eq:`def-bits-per-dim`.

    The images are what is independent, so the standard error is that of a mean over images; it contains what the
    sampled times and noise add.
    """
    n, *totals = (math.fsum(column) for column in zip(*sums, strict=True))
    mean, square, L_T, L_t, L_0 = (total / n for total in totals)
    error = math.sqrt(max(square - mean**2, 0) / max(n - 1, 1))
    values = {"bits_per_dim": mean, "standard_error": error, "L_T": L_T, "L_t": L_t, "L_0": L_0}
    return {name: float(bits_per_dim(value, dims)) for name, value in values.items()}


@torch.no_grad()
def importance_sums(vae: VAE, x: Tensor, K: int, seed: int, skip: int = 0) -> Iterator[list[float]]:
    """Minus the importance-weighted bound of images, a hundred at a time, as sums for :func:`importance_in_bits`.

    Noise is a function of the seed and of the place of the hundred in ``x``; a computation that was stopped goes on
    with ``skip``.

    Args:
        x: images in [-1, 1], on the grid of 256 levels, shape ``(N, C, H, W)``.
        K: samples of z an image, see :func:`diffbook.autoencoder.importance_weighted_bound`.
        skip: how many hundreds were done before.

    Yields:
        Number of images, then the sum of the bounds in nats and that of their squares.
    """
    device = next(vae.parameters()).device
    for start in range(100 * skip, len(x), 100):
        part = x[start : start + 100].to(device)
        bound = -importance_weighted_bound(vae, part, K, stream(seed, "bound", start, device)).double()
        yield [len(part), bound.sum().item(), bound.square().sum().item()]


def importance_in_bits(sums: list[list[float]], dims: int) -> dict[str, float]:
    """Bits per dimension and their standard error over images, from the sums of :func:`importance_sums`."""
    n, total, square = (math.fsum(column) for column in zip(*sums, strict=True))
    error = math.sqrt(max(square / n - (total / n) ** 2, 0) / max(n - 1, 1))
    values = {"bits_per_dim": total / n, "standard_error": error}
    return {name: float(bits_per_dim(value, dims)) for name, value in values.items()}


def precision_recall(features_real: Tensor, features_fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Which share of the samples looks real, and which share of the real images could be a sample.

    A set's region is the union of balls around its points, each as large as the distance to the point's k-th
    neighbour in the set. Precision is the share of ``features_fake`` in the region of ``features_real``, recall the
    other way round, :eq:`def-precision-recall`. Both depend on the numbers of points: compare equal ones.

    Args:
        features_real, features_fake: shapes ``(N, D)`` and ``(M, D)``.

    Raises:
        ValueError: other shapes, or k outside 1…min(N, M) - 1.

    Source: Kynkäänniemi et al. (2019), section 2.
    """
    real, fake = features_real.double(), features_fake.double()
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or not 1 <= k < min(len(real), len(fake)):
        shapes = f"{tuple(real.shape)}, {tuple(fake.shape)}"
        raise ValueError(f"need features (N, D) and (M, D) and 1 <= k < N, M, got {shapes} and k = {k}")
    return _covered(fake, real, k), _covered(real, fake, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """The share of points that lie in a ball around a centre that reaches to the centre's k-th neighbour."""
    # The nearest of all is the centre itself, hence k + 1.
    radius = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(1000)])
    inside = [(torch.cdist(part, centres) <= radius).any(1) for part in points.split(1000)]
    return torch.cat(inside).double().mean().item()


def nearest_neighbours(x: Tensor, reference: Tensor, k: int = 1, batch: int = 500) -> tuple[Tensor, Tensor]:
    """The k nearest images of a reference set, by the root mean square difference of pixels.

    Args:
        x: images ``(N, …)``, reference: images ``(M, …)``, of the same shape and range.

    Returns:
        Distances and indices, each of shape ``(N, k)``, nearest first.

    Raises:
        ValueError: shapes that do not fit, or k outside 1…M.
    """
    if x.shape[1:] != reference.shape[1:] or not 1 <= k <= len(reference):
        raise ValueError(
            f"need images of one shape and 1 <= k <= M, got {tuple(x.shape)}, {tuple(reference.shape)} and k = {k}"
        )
    flat = reference.flatten(1)
    found = [torch.cdist(part.flatten(1), flat).topk(k, largest=False) for part in x.split(batch)]
    distances = torch.cat([f.values for f in found]) / math.sqrt(flat.shape[1])
    return distances, torch.cat([f.indices for f in found])


# By the name that a command takes: the name that a page shows, the function, and its grid of times.
SAMPLERS: dict[str, tuple[str, Callable[..., Tensor], Callable[[int, int], list[int]]]] = {
    "ddim": ("DDIM", ddim_sample, timesteps),
    "dpmpp": ("DPM-Solver++(2M)", dpmpp_2m_sample, trailing_timesteps),
    "ddpm": ("DDPM", ddpm_sample, timesteps),
}


def draw_images(
    network: nn.Module,
    recipe: Diffusion,
    y: Tensor,
    steps: int = 20,
    w: float = 1.0,
    seed: int = 0,
    sampler: str = "ddim",
    batch: int = 250,
    autoencoder: SpatialVAE | None = None,
) -> Iterator[Tensor]:
    """Draw images of the classes ``y``, a batch at a time.

    The i-th image depends on the seed, i and its class, not on the batch it is in.

    Args:
        y: classes, int64, shape ``(N,)``; the null class for none.
        steps: network calls an image (twice as many with guidance).
        w: weight of the guidance, see :func:`diffbook.sampling.guided`.
        sampler: a name in ``SAMPLERS``.
        autoencoder: of the latents that the recipe learns; they are not clipped on the way, and decoded at the end.

    Yields:
        Images, shape ``(B, C, H, W)``, clipped to [-1, 1], on the network's device.

    Raises:
        ValueError: there is no such sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
    device = next(network.parameters()).device
    schedule, shape = recipe.noise_schedule(), (recipe.options["channels"], recipe.size, recipe.size)
    for start in range(0, len(y), batch):
        labels = y[start : start + batch].to(device)
        generators = [stream(seed, "image", start + i) for i in range(len(labels))]
        x_T = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        denoiser = as_eps(recipe.denoiser(network, labels, w), schedule, predicts=recipe.predicts)
        fresh_noise = {"generator": generators} if sampler == "ddpm" else {}
        _, sample, grid = SAMPLERS[sampler]
        clip = 1.0 if autoencoder is None else None
        x_0 = sample(denoiser, x_T, schedule, grid(recipe.T, steps), clip=clip, **fresh_noise)
        yield x_0 if autoencoder is None else from_latents(autoencoder, x_0)


@torch.no_grad()
def decode_images(vae: VAE, number: int, seed: int = 0, batch: int = 250) -> Iterator[Tensor]:
    """Draw z from the prior N(0, I) and decode it: the means f(z), a batch at a time.

    What the model says of pixels is f(z) plus noise of variance σ_x²; as usual the noise is left out.

    Yields:
        Images, shape ``(B, C, H, W)``, clipped to [-1, 1], on the network's device.
    """
    device = next(vae.parameters()).device
    for start in range(0, number, batch):
        numbers = range(start, min(start + batch, number))
        z = torch.stack([torch.randn(vae.latent, generator=stream(seed, "image", i)) for i in numbers])
        yield vae.decode(z.to(device)).clamp(-1, 1)
