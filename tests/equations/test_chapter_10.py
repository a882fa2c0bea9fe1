"""Proofs of the equations of the chapter "A space for diffusion: the autoencoder"."""

import math

import pytest
import sympy as sp
import torch
from scipy.integrate import quad

from diffbook.autoencoder import SpatialVAE, fit_scale
from diffbook.diffusion import q_sample, x0_from_eps
from diffbook.evaluation import psnr
from diffbook.gaussian import GaussianMixture
from diffbook.latent import from_latents, to_latents
from diffbook.recipes import Compression, stream
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule

f64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def small_vae(seed=0):
    """An autoencoder of 8×8 images with random weights and wide posteriors, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        vae = SpatialVAE(channels=3, size=8, widths=[8], blocks=1, latent=2, patch=4).double()
        for parameter in vae.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return vae.requires_grad_(False)


# ---- the peak signal-to-noise ratio -----------------------------------------------------------------------------


@pytest.mark.equation("psnr-bits")
def test_a_bit_is_worth_six_decibels():
    """Symbolic: the mean square of a uniform error is Δ²/12; exact: `psnr` of evenly filled intervals, five b."""
    e, step, b = sp.symbols("e Delta b", positive=True)
    square = sp.integrate(e**2, (e, -step / 2, step / 2)) / step
    assert sp.simplify(square - step**2 / 12) == 0
    claim = 10 * sp.log(12, 10) + 20 * b * sp.log(2, 10)
    ratio = 10 * sp.log(4 / square.subs(step, 2 / 2**b), 10)
    for bits in (1, 3, 8):
        assert abs(sp.N((ratio - claim).subs(b, bits), 30)) < 1e-25
    n = 4096  # points at the same places in every interval
    for bits in (1, 2, 3, 4, 8):
        width = 2 / 2**bits
        centres = -1 + width * (torch.arange(2**bits, dtype=f64) + 0.5)
        errors = width * ((torch.arange(n, dtype=f64) + 0.5) / n - 0.5)
        x = (centres[:, None] + errors).reshape(1, -1)
        rounded = centres[:, None].expand(-1, n).reshape(1, -1)
        expected = 10 * math.log10(12) + 20 * bits * math.log10(2)
        assert psnr(rounded, x).item() == pytest.approx(expected, abs=1e-6)
        assert expected == pytest.approx(10.79 + 6.02 * bits, abs=0.01)


@pytest.mark.equation("psnr-mean")
def test_the_mean_psnr_is_not_below_that_of_the_mean_error():
    """Exact: mean of `psnr` against the PSNR of the mean error for 200 batches; equal where all errors are."""
    for seed in range(200):
        x = random(5, 3, 4, 4, seed=seed)
        sizes = random(5, 1, 1, 1, seed=seed + 1000).exp()
        y = x + sizes * random(5, 3, 4, 4, seed=seed + 2000)
        pooled = 10 * math.log10(4 / (x - y).square().mean().item())
        assert psnr(x, y).mean().item() > pooled
    equal = x + torch.tensor([0.3, -0.3, 0.3, -0.3, 0.3], dtype=f64)[:, None, None, None]
    pooled = 10 * math.log10(4 / 0.09)
    assert psnr(x, equal).mean().item() == pytest.approx(pooled, abs=1e-9)


# ---- compression --------------------------------------------------------------------------------------------------


@pytest.mark.equation("linear-compression")
def test_the_best_linear_compression_loses_the_small_eigenvalues():
    """Exact: PCA attains the sum of the eigenvalues left out; 200 random affine pairs, best refitted, lose more."""
    N, D, k = 500, 6, 2
    p = random(N, D, seed=1) @ random(D, D, seed=2) + random(D, seed=3)
    lam, U = torch.linalg.eigh((p - p.mean(0)).T.cov(correction=0))
    W = U[:, -k:]
    error = (p - p.mean(0) - (p - p.mean(0)) @ W @ W.T).square().sum(1).mean()
    floor = lam[:-k].sum()
    assert error == pytest.approx(floor.item(), rel=1e-10)
    assert lam[:-k].sum() < 0.9 * lam[: -k + 1].sum()  # one eigenvalue more or less would be seen
    ones = torch.ones(N, 1, dtype=f64)
    for seed in range(200):
        y = torch.cat([p @ random(D, k, seed=seed), ones], 1)  # any encoder, with its best decoder
        fit = y @ torch.linalg.lstsq(y, p).solution
        assert (p - fit).square().sum(1).mean() >= floor - 1e-10
    # Alternating least squares, from a random start, cannot come below, and comes there.
    A = random(D, k, seed=7)
    for _ in range(200):
        y = torch.cat([p @ A, ones], 1)
        back = torch.linalg.lstsq(y, p).solution
        A = torch.linalg.pinv(back[:k])
    y = torch.cat([p @ A, ones], 1)
    fit = y @ torch.linalg.lstsq(y, p).solution
    assert (p - fit).square().sum(1).mean() == pytest.approx(floor.item(), rel=1e-6)


@pytest.mark.equation("compression-likelihood")
@pytest.mark.parametrize("w", [0.05, 1.0])
def test_the_loss_is_an_elbo_with_a_density_of_the_errors(w):
    """Quadrature: D/w times `Compression.loss` plus D log Z is minus the ELBO of one draw, two networks."""
    recipe = Compression(name="", about="", network="SpatialVAE", options={}, images=1, batch=1, lr=1.0, kl_weight=w)
    Z = 2 * quad(lambda e: math.exp(-(e + e * e) / w), 0, 10, points=[w, 5 * w], limit=200)[0]
    for seed in (1, 2):
        vae, x = small_vae(seed), random(4, 3, 8, 8, seed=seed).clamp(-1, 1)
        y = torch.zeros(4, dtype=torch.int64)
        loss = recipe.loss(vae, x, y, stream(0, "noise", seed))
        mean, variance = vae.encode(x)
        noise = torch.randn(mean.shape, generator=stream(0, "noise", seed), dtype=f64)
        e = (x - vae.decode(mean + variance.sqrt() * noise)).flatten(1)
        log_p = (-(e.abs() + e.square()) / w - math.log(Z)).sum(1)
        kl = 0.5 * (mean.square() + variance - 1 - variance.log()).flatten(1).sum(1)
        minus_elbo = (kl - log_p).mean()
        D = x[0].numel()
        assert minus_elbo.item() == pytest.approx((D / w * loss + D * math.log(Z)).item(), rel=1e-9)


# ---- the latent scale ---------------------------------------------------------------------------------------------


@pytest.mark.equation("latent-variance")
def test_the_variance_of_latents_is_between_plus_within():
    """Exact: `fit_scale` is 1/√(Var μ + E σ²); Gauss–Hermite quadrature of z over images and noise agrees."""
    vae, x = small_vae(3), random(50, 3, 8, 8, seed=5).clamp(-1, 1)
    mean, variance = vae.encode(x)
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=f64)  # exact for moments up to the fifth
    weights = torch.tensor([1, 4, 1], dtype=f64) / 6
    z = mean[..., None] + variance.sqrt()[..., None] * nodes
    first = (z * weights).sum(-1).mean()
    second = (z.square() * weights).sum(-1).mean()
    direct = second - first.square()
    assert (mean.var(correction=0) + variance.mean()).item() == pytest.approx(direct.item(), rel=1e-12)
    assert variance.mean() > 0.05 * direct and mean.var() > 0.05 * direct  # both terms count
    assert mean.mean().square() > 1e-3 * direct
    fit_scale(vae, lambda index: x[index], len(x), batch=7)
    assert vae.scale.item() == pytest.approx(direct.rsqrt().item(), rel=1e-6)
    # and the scale acts as the definition says, on the way in and on the way back
    assert torch.allclose(to_latents(vae, x), vae.scale * mean)
    assert torch.allclose(from_latents(vae, to_latents(vae, x)), vae.decode(mean).clamp(-1, 1))


@pytest.mark.equation("channel-variance")
def test_the_variance_over_channels():
    """Exact: the variance over all numbers is the mean of the channels' variances plus the variance of their means."""
    z = random(30, 4, 3, 3, seed=1) * torch.tensor([0.3, 1, 2, 3], dtype=f64)[:, None, None]
    z = z + torch.tensor([1, -2, 0, 4], dtype=f64)[:, None, None]
    channels = z.transpose(0, 1).flatten(1)
    m, v = channels.mean(1), channels.var(1, correction=0)
    total = v.mean() + (m - m.mean()).square().mean()
    assert total.item() == pytest.approx(z.var(correction=0).item(), rel=1e-12)


@pytest.mark.equation("scale-shifts-snr")
@pytest.mark.parametrize("schedule", [cosine_schedule(100), linear_schedule(100, 1e-3, 0.2)], ids=["cosine", "linear"])
@pytest.mark.parametrize("v", [0.25, 4.0])
def test_latents_of_another_variance_have_another_schedule(schedule, v):
    """Exact: `q_sample` of √v u, divided by n_t, is `q_sample` of u under ᾱ', whose SNR is v times as large, all t."""
    a = schedule.alpha_bar
    primed = a * v / (a * v + 1 - a)
    other = NoiseSchedule(1 - primed[1:] / primed[:-1])
    assert torch.allclose(other.alpha_bar, primed, rtol=1e-9, atol=0)
    assert torch.allclose(other.snr()[1:], v * schedule.snr()[1:], rtol=1e-6, atol=0)
    assert torch.allclose(other.log_snr()[1:] - schedule.log_snr()[1:], torch.tensor(math.log(v), dtype=f64), atol=1e-6)
    u, eps = random(2, 5, 2, 3, 3, seed=1)
    for t in range(1, schedule.T + 1):
        n = (a[t] * v + 1 - a[t]).sqrt()
        times = torch.full((5,), t)
        left = q_sample(math.sqrt(v) * u, eps, times, schedule) / n
        assert torch.allclose(left, q_sample(u, eps, times, other), rtol=1e-9, atol=1e-12)


@pytest.mark.equation("scaled-floor")
@pytest.mark.parametrize("v", [0.25, 1.0, 4.0])
def test_what_is_left_unknown_of_gaussian_latents(v):
    """Exact: the variance of z_0 given z_t by the joint Gaussian of both, and by the ideal ε̂, is v/(1 + v SNR)."""
    schedule = cosine_schedule(100)
    world = GaussianMixture(torch.ones(1, dtype=f64), torch.zeros(1, 1, dtype=f64), torch.full((1, 1), v, dtype=f64))
    for t in (1, 20, 50, 80, 99):
        a = schedule.alpha_bar[t].item()
        share = 1 / (1 + v * schedule.snr()[t].item())
        covariance, total = math.sqrt(a) * v, a * v + 1 - a
        assert (v - covariance**2 / total) / v == pytest.approx(share, rel=1e-9)
        # the mixture's own best guess of z_0 is linear in z_t; its error, by the variances of signal and noise
        z_t, times = torch.ones(1, 1, dtype=f64), torch.full((1,), t)
        gain = x0_from_eps(z_t, world.denoiser(schedule)(z_t, times), times, schedule).item()
        error = (1 - gain * math.sqrt(a)) ** 2 * v + gain**2 * (1 - a)
        assert error / v == pytest.approx(share, rel=1e-7)
