"""Fréchet distance, features, bits per dimension, neighbours, drawing."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch

from diffbook.autoencoder import importance_weighted_bound
from diffbook.classifier import Classifier
from diffbook.data import fashion_subset
from diffbook.diffusion import variational_bound
from diffbook.evaluation import (
    accuracy,
    bits_per_dim,
    bound_in_bits,
    bound_sums,
    decode_images,
    draw_images,
    frechet_distance,
    frechet_jackknife,
    geometric_parts,
    image_features,
    importance_in_bits,
    importance_sums,
    nearest_neighbours,
    precision_recall,
    shuffled,
)
from diffbook.recipes import RECIPES, stream
from diffbook.sampling import as_eps, guided
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


def test_frechet_jackknife_knows_its_bias_and_its_error():
    """Two sets from one distribution: the distance is all bias. From two: shifted by 1 in each of 4 dimensions, 4."""
    for shift, truth in ((0.0, 0.0), (1.0, 4.0)):
        found = []
        for seed in range(40):
            g = torch.Generator().manual_seed(seed)
            a, b = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (300, 500))
            found.append(frechet_jackknife(a + shift, b, groups=10))
            assert found[-1].value == frechet_distance(a + shift, b)
        values, errors, biases = torch.tensor(found, dtype=torch.float64).T
        # tr C (1/N + 1/M) for the means alone, and more for the covariances
        assert biases.mean() > 4 * (1 / 300 + 1 / 500) and biases.mean() < 3 * 4 * (1 / 300 + 1 / 500)
        assert abs((values - biases).mean() - truth) < 4 * values.std() / math.sqrt(40)
        if truth:  # at a distance of 0 the distance is not linear in the moments, and its error means nothing
            assert errors.mean() == pytest.approx(values.std().item(), rel=0.3)


def test_a_sorted_set_is_shuffled_before_the_jackknife():
    """Two kinds of images, 3 standard deviations apart: in order, the jackknife takes their difference for error."""
    kinds = 3.0 * (torch.arange(400) >= 200).double()[:, None]
    a, b = gaussian(400, 2, 0) + kinds, gaussian(400, 2, 1) + kinds + 1
    mixed = frechet_jackknife(shuffled(a), shuffled(b))
    assert mixed.value == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert torch.equal(shuffled(a), shuffled(a)) and not torch.equal(shuffled(a), a)
    assert torch.equal(shuffled(a).sort(0).values, a.sort(0).values)
    assert frechet_jackknife(a, b).standard_error > 3 * mixed.standard_error


def test_frechet_jackknife_of_few_and_bad_input():
    a = gaussian(4, 2, 0)
    assert math.isfinite(frechet_jackknife(a, gaussian(30, 2, 1)).standard_error)
    with pytest.raises(ValueError, match="two groups and four samples, got 1 groups of 4 and 4"):
        frechet_jackknife(a, a, groups=1)
    with pytest.raises(ValueError, match="two groups and four samples, got 20 groups of 4 and 3"):
        frechet_jackknife(a, a[1:])


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
    others = [draw(sampler="dpmpp"), draw(sampler="ddpm")]
    assert all(not torch.allclose(other, x, atol=1e-3) for other in others)
    assert torch.allclose(draw(sampler="ddpm", batch=4), others[1], atol=1e-4)
    with pytest.raises(ValueError, match="unknown sampler 'euler'; there are ddim, dpmpp, ddpm"):
        draw(sampler="euler")


def test_the_classifier_that_comes_with_the_package():
    """It loads by its name and is as good on the bundled test images as its card says (2.3 % is 3 standard errors)."""
    network, recipe = load_model("fashion-classifier")
    card = json.loads((source_of("fashion-classifier").with_suffix(".json")).read_text())
    assert recipe.name == card["recipe"]["name"] == "fashion-classifier"
    stated = card["quality"][0]["accuracy"]
    assert stated > 0.91 and abs(accuracy(network, fashion_subset("test")) - stated) < 0.023


def test_precision_and_recall_of_points_on_a_line():
    """By hand, k = 1: balls around 0, 1, 3 reach 1, 1, 2 and cover [-1, 5]; those around 4, 4.5 cover [3.5, 5]."""
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[4.0], [4.5]])
    assert precision_recall(real, fake, k=1) == (1.0, 0.0)
    fake = torch.tensor([[5.5], [4.5], [-1.0]])  # reach 1, 1, 5.5: [3.5, 6.5] and [-6.5, 4.5]
    assert precision_recall(real, fake, k=1) == (pytest.approx(2 / 3), 1.0)
    assert precision_recall(fake, real, k=1) == (1.0, pytest.approx(2 / 3))
    with pytest.raises(ValueError, match="k = 3"):
        precision_recall(real, fake, k=3)
    with pytest.raises(ValueError, match="need features"):
        precision_recall(real, torch.zeros(3, 2))


def test_precision_and_recall_of_large_sets():
    """Missing half: precision stays, recall falls by half; copies of few points: recall falls to 0."""
    real = torch.cat([gaussian(600, 2, 0), gaussian(600, 2, 0, shift=100.0)])
    precision, recall = precision_recall(real, real[:600])
    assert precision == 1 and recall == pytest.approx(0.5, abs=0.01)
    assert precision_recall(real, real[:5].repeat(240, 1))[1] < 0.02
    assert precision_recall(real, real + 1e4) == (0, 0)


def test_geometric_parts():
    assert geometric_parts(1000, 1) == [2] and geometric_parts(2, 5) == [2]
    for T, K in ((1000, 20), (1000, 300), (10, 4), (3, 9)):
        parts = geometric_parts(T, K)
        assert parts[0] == 2 and parts[-1] <= T and len(parts) <= K and parts == sorted(set(parts))
    assert len(geometric_parts(1000, 20)) == 20
    with pytest.raises(ValueError, match="got T = 1 and K = 3"):
        geometric_parts(1, 3)


def test_bound_sums_go_on_where_they_stopped_and_give_bits():
    recipe, images = RECIPES["fashion-smoke"], fashion_subset("test")
    network, x, y = recipe.build().eval(), images.x(slice(250)), images.labels[:250]
    parts = geometric_parts(recipe.T, 3)
    whole = list(bound_sums(network, recipe, x, y, "beta", parts, seed=1))
    assert [row[0] for row in whole] == [100, 100, 50]
    assert list(bound_sums(network, recipe, x, y, "beta", parts, seed=1, skip=1)) == whole[1:]
    assert list(bound_sums(network, recipe, x[:200], y[:200], "beta", parts, seed=1)) == whole[:2]
    assert next(bound_sums(network, recipe, x, y, "beta", parts, seed=2)) != whole[0]
    denoiser = as_eps(guided(network, y[200:]), recipe.noise_schedule(), recipe.predicts)
    keywords = {"parts": parts, "clip": 1.0, "generator": stream(1, "bound", 200)}
    bound = variational_bound(denoiser, x[200:], recipe.noise_schedule(), **keywords)
    assert whole[2][1] == pytest.approx(bound.total.sum().item(), rel=1e-5)
    bits = bound_in_bits(whole[2:], 784)
    per_image = bits_per_dim(bound.total.double(), 784)
    assert bits["bits_per_dim"] == pytest.approx(per_image.mean().item(), rel=1e-5)
    assert bits["standard_error"] == pytest.approx(per_image.std().item() / math.sqrt(50), rel=1e-3)
    assert bits["L_T"] + bits["L_t"] + bits["L_0"] == pytest.approx(bits["bits_per_dim"], rel=1e-5)


def test_importance_sums_go_on_where_they_stopped_and_give_bits():
    vae, x = RECIPES["fashion-vae"].build().eval(), fashion_subset("test").x(slice(150))
    whole = list(importance_sums(vae, x, 3, seed=1))
    assert [row[0] for row in whole] == [100, 50]
    assert list(importance_sums(vae, x, 3, seed=1, skip=1)) == whole[1:]
    assert next(importance_sums(vae, x, 3, seed=2)) != whole[0]
    with torch.no_grad():
        bound = -importance_weighted_bound(vae, x[100:], 3, stream(1, "bound", 100)).double()
    bits, per_image = importance_in_bits(whole[1:], 784), bits_per_dim(bound, 784)
    assert bits["bits_per_dim"] == pytest.approx(per_image.mean().item(), rel=1e-6)
    assert bits["standard_error"] == pytest.approx(per_image.std().item() / math.sqrt(50), rel=1e-4)


def test_decoded_images_do_not_depend_on_the_batch():
    vae = RECIPES["fashion-vae"].build().eval()
    one, two = (torch.cat(list(decode_images(vae, 7, seed=3, batch=b))) for b in (3, 7))
    assert one.shape == (7, 1, 28, 28) and one.abs().max() <= 1
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, torch.cat(list(decode_images(vae, 7, seed=4))), atol=1e-3)
