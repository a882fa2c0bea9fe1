"""How good a model is: Fréchet distance, bits per dimension, nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffbook.classifier import Classifier
from diffbook.data import ImageSet
from diffbook.recipes import Diffusion, stream
from diffbook.sampling import as_eps, ddim_sample, guided, timesteps


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


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@torch.no_grad()
def image_features(classifier: Classifier, x: Tensor, batch: int = 500) -> Tensor:
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


def bits_per_dim(nats: float | Tensor, dims: int) -> float | Tensor:
    """Nats per image to bits per dimension: nats / (dims · ln 2), for negative log-likelihoods and their bounds.

    Raises:
        ValueError: dims < 1.
    """
    if dims < 1:
        raise ValueError(f"dims must be at least 1, got {dims}")
    return nats / (dims * math.log(2))


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


def draw_images(
    network: nn.Module, recipe: Diffusion, y: Tensor, steps: int = 20, w: float = 1.0, seed: int = 0, batch: int = 250
) -> Iterator[Tensor]:
    """Draw images of the classes ``y`` with DDIM, a batch at a time.

    The i-th image depends on the seed, i and its class, not on the batch it is in.

    Args:
        y: classes, int64, shape ``(N,)``; the null class for none.
        steps: network calls an image (twice as many with guidance).
        w: weight of the guidance, see :func:`diffbook.sampling.guided`.

    Yields:
        Images, shape ``(B, C, H, W)``, clipped to [-1, 1], on the network's device.
    """
    device = next(network.parameters()).device
    schedule, shape = recipe.noise_schedule(), (recipe.options["channels"], recipe.size, recipe.size)
    for start in range(0, len(y), batch):
        labels = y[start : start + batch].to(device)
        noise = [torch.randn(shape, generator=stream(seed, "image", start + i)) for i in range(len(labels))]
        denoiser = as_eps(guided(network, labels, w), schedule, predicts=recipe.predicts)
        x_T = torch.stack(noise).to(device)
        yield ddim_sample(denoiser, x_T, schedule, timesteps(recipe.T, steps), clip=1.0)
