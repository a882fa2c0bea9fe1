"""Fréchet distance, features, bits per dimension, neighbours, drawing."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from diffbook.classifier import Classifier
from diffbook.data import fashion_subset
from diffbook.evaluation import (
    accuracy,
    bits_per_dim,
    draw_images,
    frechet_distance,
    image_features,
    nearest_neighbours,
)
from diffbook.recipes import RECIPES
from diffbook.weights import load_model, source_of


def gaussian(n, d, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def oracle(a, b):
    """The textbook formula with scipy's square root of the (not symmetric) product."""
    a, b = a.double().numpy(), b.double().numpy()
    C_a, C_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(C_a @ C_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(C_a + C_b - 2 * root))


@pytest.mark.parametrize("seed, d", [(0, 3), (1, 16), (2, 64)])
def test_frechet_distance_equals_the_textbook_formula(seed, d):
    a, b = gaussian(300, d, seed), gaussian(200, d, seed + 10, scale=1.3, shift=0.7)
    assert frechet_distance(a, b) == pytest.approx(oracle(a, b), rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_of_one_dimension_is_known():
    """(m_a - m_b)² + (s_a - s_b)²."""
    a, b = gaussian(50, 1, 0, shift=2.0), gaussian(60, 1, 1, scale=3.0)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_with_fewer_samples_than_features():
    a = gaussian(20, 40, 0)
    assert abs(frechet_distance(a, a)) < 1e-6 * a.square().sum().item()
    assert frechet_distance(a.float(), a.float() + 1) == pytest.approx(40, rel=1e-4)


@pytest.mark.parametrize("a, b", [((5, 3), (5, 4)), ((5,), (5,)), ((1, 3), (5, 3))])
def test_frechet_distance_of_wrong_shapes(a, b):
    with pytest.raises(ValueError, match="need features"):
        frechet_distance(torch.zeros(a), torch.zeros(b))


def test_features_and_accuracy():
    torch.manual_seed(0)
    classifier, images = Classifier(), fashion_subset("test")
    x = images.x(slice(30))
    with pytest.raises(ValueError, match="evaluation mode"):
        image_features(classifier, x)
    with pytest.raises(ValueError, match="evaluation mode"):
        accuracy(classifier, images)
    classifier.eval()
    features = image_features(classifier, x, batch=7)
    assert features.shape == (30, 128) and not features.requires_grad
    assert torch.allclose(features, classifier.features(x), atol=1e-5)
    expected = (classifier(images.x()).argmax(1) == images.labels).double().mean().item()
    assert accuracy(classifier, images) == pytest.approx(expected)


def test_bits_per_dim():
    assert bits_per_dim(784 * math.log(2), 784) == pytest.approx(1)
    assert bits_per_dim(784 * math.log(256), 784) == pytest.approx(8)  # uniform over 256 values
    assert torch.allclose(bits_per_dim(torch.tensor([0.0, 2.0]), 2), torch.tensor([0.0, 1 / math.log(2)]))
    with pytest.raises(ValueError, match="dims must be at least 1, got 0"):
        bits_per_dim(1.0, 0)


def test_nearest_neighbours():
    reference = fashion_subset("test").x()
    x = reference[[5, 3]].clone()
    x[0, 0, 0, 0] += 0.28
    distances, index = nearest_neighbours(x, reference, k=2, batch=1)
    assert index[:, 0].tolist() == [5, 3]
    assert distances[0, 0].item() == pytest.approx(0.01, rel=0.05) and distances[1, 0].item() < 1e-3
    brute = (reference - x[0]).square().flatten(1).mean(1).sqrt().sort()
    assert torch.allclose(distances[0], brute.values[:2], atol=1e-3) and index[0, 1] == brute.indices[1]
    with pytest.raises(ValueError, match="k = 1001"):
        nearest_neighbours(x, reference, k=1001)
    with pytest.raises(ValueError, match="images of one shape"):
        nearest_neighbours(x[:, :, 1:], reference)


def test_an_image_does_not_depend_on_its_batch():
    recipe = replace(RECIPES["fashion-smoke"], seed=3)
    network = recipe.build().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    y = torch.arange(6)

    def draw(**keywords):
        return torch.cat(list(draw_images(network, recipe, y, steps=3, **keywords)))

    x = draw()
    assert x.shape == (6, 1, 28, 28) and x.abs().max() <= 1
    assert torch.allclose(draw(batch=4), x, atol=1e-4)
    assert not torch.allclose(draw(seed=1), x, atol=1e-1)
    assert not torch.allclose(draw(w=4.0), x, atol=1e-4)


def test_the_classifier_that_comes_with_the_package():
    """It loads by its name and is as good on the bundled test images as its card says (2.3 % is 3 standard errors)."""
    network, recipe = load_model("fashion-classifier")
    card = json.loads((source_of("fashion-classifier").with_suffix(".json")).read_text())
    assert recipe.name == card["recipe"]["name"] == "fashion-classifier"
    stated = card["quality"][0]["accuracy"]
    assert stated > 0.91 and abs(accuracy(network, fashion_subset("test")) - stated) < 0.023
