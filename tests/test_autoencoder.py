"""Variational autoencoders: shapes, bounds and bad input. The equations are proved in tests/equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from diffbook.autoencoder import (
    VAE,
    Block,
    LinearVAE,
    SpatialVAE,
    diffusion_as_hierarchy,
    elbo,
    fit_scale,
    hierarchical_elbo,
    importance_weighted_bound,
)
from diffbook.data import fashion_subset
from diffbook.gaussian import discretised_log_likelihood
from diffbook.recipes import Autoencoding, find_recipe, stream
from diffbook.schedule import linear_schedule

f64 = torch.float64


def small_vae() -> VAE:
    torch.manual_seed(0)
    vae = VAE(channels=1, size=28, widths=[8, 16], blocks=1, latent=4, patch=2, narrow=4)
    for parameter in vae.parameters():  # the last layers start at zero, which would hide errors
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return vae.eval()


def linear_vae(D: int = 5, d: int = 3) -> LinearVAE:
    g = torch.Generator().manual_seed(1)
    W, b, A = (torch.randn(s, generator=g, dtype=f64) for s in ((D, d), (D,), (d, D)))
    v = 0.1 + torch.rand(d, generator=g, dtype=f64)
    return LinearVAE(W, b, torch.tensor(0.3, dtype=f64), 0.3 * A, v)


def test_shapes_and_the_folding_of_pixels() -> None:
    vae = small_vae()
    x = fashion_subset("test").x(slice(6))
    mean, variance = vae.encode(x)
    assert mean.shape == variance.shape == (6, 4)
    assert (variance > 0).all()
    assert vae.decode(mean).shape == x.shape
    assert vae.log_likelihood(x, mean).shape == (6,)
    colour = VAE(channels=3, size=32, widths=[8, 8, 16], blocks=1, latent=5)
    assert colour.decode(colour.encode(torch.rand(2, 3, 32, 32))[0]).shape == (2, 3, 32, 32)


def test_the_encoder_gives_means_and_logarithms_of_variances() -> None:
    vae, x = small_vae(), fashion_subset("test").x(slice(3))
    last = vae.encoder[-1]
    assert isinstance(last, torch.nn.Linear)
    last.weight.data.zero_()
    last.bias.data = torch.tensor([0.5, -2.0, 0.0, 3.0, math.log(4.0), 0.0, math.log(0.01), math.log(9.0)])
    mean, variance = vae.encode(x)
    assert torch.allclose(mean, torch.tensor([0.5, -2.0, 0.0, 3.0]).expand(3, 4))
    assert torch.allclose(variance, torch.tensor([4.0, 1.0, 0.01, 9.0]).expand(3, 4))


def test_elbo_is_reconstruction_minus_kl_as_torch_distributions_say() -> None:
    vae, x = small_vae(), fashion_subset("test").x(slice(5))
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    bound = elbo(vae, x, noise=noise)
    mean, variance = vae.encode(x)
    q = Independent(Normal(mean, variance.sqrt()), 1)
    prior = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    z = mean + variance.sqrt() * noise
    likelihood = discretised_log_likelihood(x, vae.decode(z), vae.log_variance_x.exp()).sum((1, 2, 3))
    assert torch.allclose(bound.kl, kl_divergence(q, prior), rtol=1e-6, atol=1e-6)
    assert torch.allclose(bound.reconstruction, likelihood, rtol=1e-6)
    assert torch.allclose(bound.total, likelihood - kl_divergence(q, prior), rtol=1e-6)


def test_gradients_reach_every_parameter_and_are_finite_on_constant_background() -> None:
    vae = small_vae()
    x = torch.full((2, 1, 28, 28), -1.0)  # the lowest level owns a tail: its likelihood has a separate branch
    x[0, 0, 10:18, 10:18] = 1.0
    (-elbo(vae, x, torch.Generator().manual_seed(0)).total.mean()).backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_same_generator_same_bound() -> None:
    vae, x = small_vae(), fashion_subset("test").x(slice(3))
    one, two = (elbo(vae, x, torch.Generator().manual_seed(5)).total for _ in range(2))
    other = elbo(vae, x, torch.Generator().manual_seed(6)).total
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_linear_vae_agrees_with_torch_distributions() -> None:
    vae = linear_vae()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=f64)
    covariance = vae.W @ vae.W.T + vae.variance_x * torch.eye(5, dtype=f64)
    assert torch.allclose(vae.log_prob(x), MultivariateNormal(vae.b, covariance).log_prob(x), rtol=1e-12)
    # the true posterior by conditioning the joint Gaussian of (z, x), a formula that the class does not use
    gain = vae.W.T @ torch.linalg.inv(covariance)
    mean, posterior = vae.posterior(x)
    assert torch.allclose(mean, (x - vae.b) @ gain.T, rtol=1e-10)
    assert torch.allclose(posterior, torch.eye(3, dtype=f64) - gain @ vae.W, rtol=1e-10, atol=1e-12)


def test_importance_weights_of_the_true_posterior_have_no_variance() -> None:
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=f64)  # orthogonal columns: the posterior is diagonal
    b, variance_x = torch.zeros(3, dtype=f64), torch.tensor(0.5, dtype=f64)
    guess = LinearVAE(W, b, variance_x, torch.zeros(2, 3, dtype=f64), torch.ones(2, dtype=f64))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(4), dtype=f64)
    _, posterior = guess.posterior(x)
    A = posterior @ W.T / variance_x
    exact = LinearVAE(W, b, variance_x, A, posterior.diagonal())
    for K in (1, 3):
        bound = importance_weighted_bound(exact, x, K, torch.Generator().manual_seed(7))
        assert torch.allclose(bound, exact.log_prob(x), rtol=1e-12)


def test_importance_weighted_bound_rises_from_the_elbo_to_log_p() -> None:
    vae = linear_vae()
    x = (torch.randn(1, 5, generator=torch.Generator().manual_seed(8), dtype=f64)).expand(4000, 5)
    g = torch.Generator().manual_seed(9)
    means, errors = [], []
    for K in (1, 4, 64):
        bound = importance_weighted_bound(vae, x, K, g)
        means.append(bound.mean())
        errors.append(bound.std() / math.sqrt(len(bound)))
    exact = elbo(vae, x, g).total
    assert abs(exact.mean() - means[0]) < 3 * math.hypot(errors[0], exact.std() / math.sqrt(len(x)))
    assert means[0] + 3 * errors[0] < means[1] < means[2] < vae.log_prob(x)[0] + 3 * errors[2]
    assert vae.log_prob(x)[0] - means[2] < 0.5 * (vae.log_prob(x)[0] - means[0])


def test_the_loss_of_the_recipe_is_minus_the_elbo_a_number() -> None:
    recipe = find_recipe("fashion-vae")
    assert isinstance(recipe, Autoencoding)
    network, x = recipe.build(), fashion_subset("test").x(slice(4))
    loss = recipe.loss(network, x, torch.zeros(4), stream(0, "test", 0))
    assert isinstance(network, VAE)
    assert torch.allclose(loss, -elbo(network, x, stream(0, "test", 0)).total.mean() / 784)


def test_parameters_match_those_of_the_diffusion_model() -> None:
    vae, unet = (sum(p.numel() for p in find_recipe(n).build().parameters()) for n in ("fashion-vae", "fashion-cpu"))
    assert abs(vae / unet - 1) < 0.01
    assert find_recipe("fashion-vae").images == find_recipe("fashion-cpu").images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": []}, r"widths, blocks and patch of at least 1, got \(\), 2 and 2"),
        ({"widths": [8, 0]}, r"widths, blocks and patch of at least 1, got \(8, 0\), 2 and 2"),
        ({"patch": 0}, r"widths, blocks and patch of at least 1, got \(8, 16\), 2 and 0"),
        ({"blocks": 0}, r"widths, blocks and patch of at least 1, got \(8, 16\), 0 and 2"),
        ({"size": 30}, "size must be a multiple of 4, got 30"),
        ({"latent": 0}, "latent and narrow must be at least 1, got 0 and 16"),
    ],
)
def test_bad_options(change: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"channels": 1, "size": 28, "widths": [8, 16], "patch": 2}
    with pytest.raises(ValueError, match=message):
        VAE(**(options | change))  # type: ignore[arg-type]


def test_bad_input() -> None:
    vae = small_vae()
    with pytest.raises(ValueError, match=r"\(B, 1, 28, 28\), got \(2, 1, 32, 32\)"):
        vae.encode(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 4\), got \(2, 5\)"):
        vae.decode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="grid of 256 levels"):
        elbo(vae, torch.full((1, 1, 28, 28), 0.0))
    with pytest.raises(ValueError, match=r"noise must have the latents' shape \(1, 4\), got \(1, 5\)"):
        elbo(vae, torch.full((1, 1, 28, 28), -1.0), noise=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="K must be at least 1, got 0"):
        importance_weighted_bound(vae, torch.full((1, 1, 28, 28), -1.0), 0)
    good = linear_vae()
    with pytest.raises(ValueError, match="need W"):
        LinearVAE(good.W, good.b, good.variance_x, good.A.T, good.v)
    with pytest.raises(ValueError, match="must be positive"):
        LinearVAE(good.W, good.b, good.variance_x, good.A, torch.tensor([0.1, 0.0, 0.1], dtype=f64))
    with pytest.raises(ValueError, match="must be positive"):
        LinearVAE(good.W, good.b, torch.tensor(0.0), good.A, good.v)


def test_block_adds_two_convolutions() -> None:
    torch.manual_seed(11)
    block = Block(8)
    for parameter in block.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    x = torch.randn(2, 8, 5, 5)
    h = block.conv1(F.silu(block.norm1(x)))
    assert torch.allclose(block(x), x + block.conv2(F.silu(block.norm2(h))), atol=1e-6)


def test_defaults_and_smallest_networks() -> None:
    vae, spatial = VAE(1, 7, [8]), SpatialVAE(1, 7, [8])  # 7 is odd: nothing is folded
    assert vae.latent == 32 and spatial.latent_shape == (4, 7, 7)
    for one, other in ((vae, VAE(1, 7, [8], 2, 32, 1, 16)), (spatial, SpatialVAE(1, 7, [8], 2, 4, 1))):
        assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]
    assert vae.log_variance_x.item() == -3
    assert VAE(1, 4, [4], latent=1, narrow=1).decode(torch.zeros(1, 1)).shape == (1, 1, 4, 4)
    assert SpatialVAE(1, 4, [4], latent=1).decode(torch.zeros(1, 1, 4, 4)).shape == (1, 1, 4, 4)


def test_spatial_vae_has_its_layers() -> None:
    """Widths that all differ, so that no layer can take another's place."""
    model, x = SpatialVAE(3, 16, [4, 8, 16], blocks=1, latent=5, patch=2), torch.zeros(2, 3, 16, 16)
    mean, variance = model.encode(x)
    assert mean.shape == variance.shape == (2, 5, 2, 2) and model.decode(mean).shape == x.shape
    kernels = {m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert kernels == {(1, 1), (3, 3)}
    first, last = model.encoder[1], model.encoder[-1]
    assert isinstance(first, torch.nn.Conv2d) and first.weight.shape == (4, 12, 3, 3)
    assert isinstance(last, torch.nn.Conv2d) and last.weight.shape == (10, 16, 3, 3)


def test_fitted_scale_is_exact() -> None:
    """One over the root of the mean of μ² + σ² minus the squared mean, over all batches, the last one shorter."""
    model, generator = SpatialVAE(1, 4, [4], latent=2), torch.Generator().manual_seed(12)
    mean = 3 + 0.5 * torch.randn(7, 2, 4, 4, generator=generator, dtype=f64)
    variance = torch.rand(7, 2, 4, 4, generator=generator, dtype=f64)
    model.encode = lambda index: (mean[index], variance[index])  # type: ignore[assignment,method-assign]
    fit_scale(model, lambda part: torch.arange(7)[part], 7, batch=3)
    expected = 1 / math.sqrt((mean.square() + variance).mean().item() - mean.mean().item() ** 2)
    assert model.scale.item() == pytest.approx(expected, rel=1e-6)


def test_diffusion_as_hierarchy_takes_images_of_256_levels() -> None:
    model = diffusion_as_hierarchy(lambda x_t, t: torch.zeros_like(x_t), linear_schedule(10, 0.1, 0.9))
    x = fashion_subset("test").x(slice(2))
    assert hierarchical_elbo(model, x, torch.Generator().manual_seed(0)).isfinite().all()


def test_no_variance_of_zero() -> None:
    good = linear_vae()
    with pytest.raises(ValueError, match="must be positive"):
        LinearVAE(good.W, good.b, good.variance_x, good.A, 0 * good.v)
