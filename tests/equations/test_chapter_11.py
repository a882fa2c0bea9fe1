"""Proofs of the equations of the chapter "Latent diffusion"."""

import itertools
import math

import pytest
import sympy as sp
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffbook.diffusion import q_sample, v_target, variational_bound
from diffbook.exercises import exercises
from diffbook.gaussian import gaussian_log_prob, kl_diagonal
from diffbook.latent import LatentDiffusion, Vocabulary, from_latents, to_latents
from diffbook.sampling import ddpm_sample, timesteps, trailing_timesteps
from diffbook.schedule import NoiseSchedule, cosine_schedule
from diffbook.unet import Attention

f64 = torch.float64


def number(value):
    return torch.tensor(value, dtype=f64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def over_noise(function):
    """The mean of a polynomial of degree 2 in ε ~ N(0, 1), exactly: that over ε = ±1."""
    return (function(1.0) + function(-1.0)) / 2


# ---- the nested bound, in a linear-Gaussian world ----------------------------------------------------------------

SHORT = NoiseSchedule(torch.tensor([0.05, 0.2, 0.4, 0.6, 0.7, 0.85], dtype=f64))
W, VARIANCE_X, SCALE = 0.8, 0.05, 1.7  # decoder x = W z + noise; the diffusion model is one of s z
A, V = 1.1, 0.04  # encoder q(z | x) = N(A x, V)
SLOPE = 0.6


def linear_denoiser(x_t, t):
    """Linear, and not the best: the bounds shall have gaps."""
    return SLOPE * x_t * (1 - SHORT.alpha_bar[t]).sqrt()[:, None]


def model_covariance():
    """Of z_0, …, z_T under the model: its steps are linear, so every law is a Gaussian."""
    noise = torch.eye(SHORT.T + 1, dtype=f64)
    rows = [noise[SHORT.T]]
    for t in range(SHORT.T, 0, -1):
        beta, alpha, alpha_bar = (table[t].item() for table in (SHORT.beta, SHORT.alpha, SHORT.alpha_bar))
        factor = (1 - beta / math.sqrt(1 - alpha_bar) * SLOPE * math.sqrt(1 - alpha_bar)) / math.sqrt(alpha)
        rows.append(factor * rows[-1] + math.sqrt(beta) * noise[t - 1])
    z = torch.stack(rows[::-1])
    return z @ z.T


def path_divergence(z_0):
    """KL from q(z_1 … z_T | z_0) to p_θ(z_1 … z_T | z_0), from the two covariances: the gap of the model's ELBO."""
    noise, rows = torch.eye(SHORT.T, dtype=f64), [torch.zeros(SHORT.T, dtype=f64)]
    for t in range(1, SHORT.T + 1):
        rows.append(SHORT.alpha[t].sqrt() * rows[-1] + SHORT.beta[t].sqrt() * noise[t - 1])
    z, S = torch.stack(rows[1:]), model_covariance()
    q = torch.distributions.MultivariateNormal(SHORT.alpha_bar[1:].sqrt() * z_0.squeeze(), z @ z.T)
    rest = S[1:, 1:] - S[1:, :1] @ S[:1, 1:] / S[0, 0]
    p = torch.distributions.MultivariateNormal(S[1:, 0] / S[0, 0] * z_0.squeeze(), rest)
    return torch.distributions.kl_divergence(q, p)


def diffusion_elbo(z_0):
    """The mean over the noise of minus the package's bound, exactly: each term is quadratic in its own noise."""

    def bound(eps):
        noise = [torch.full_like(z_0, eps)] * SHORT.T
        return -variational_bound(linear_denoiser, z_0, SHORT, levels=None, noise=noise).total

    return over_noise(bound)


def entropy(variance):
    """Of a Gaussian, as the page has it."""
    return 0.5 * math.log(2 * math.pi * math.e * variance)


@pytest.mark.equation("nested-bound", "nested-gap", "scaled-density")
@pytest.mark.parametrize("x", [-1.3, 0.0, 0.7])
def test_nested_bound(x):
    """Exact. Decoder, encoder and diffusion model linear: log p(x) is the nested bound plus its two gaps."""
    x, s2 = number([[x]]), SCALE**2
    prior = model_covariance()[0, 0] / s2  # of z: the model's s z, divided by s
    log_p = gaussian_log_prob(x, number([[0.0]]), W**2 * prior + VARIANCE_X).sum()

    def terms(eps):
        z = A * x + math.sqrt(V) * eps
        return torch.stack(
            [
                gaussian_log_prob(x, W * z, number(VARIANCE_X)).sum(),
                (diffusion_elbo(SCALE * z) + math.log(SCALE)).sum(),
                gaussian_log_prob(z, 0 * z, prior).sum(),
            ]
        )

    reconstruction, second, log_prior = over_noise(terms)
    bound = reconstruction + entropy(V) + second
    posterior_variance = 1 / (1 / prior + W**2 / VARIANCE_X)
    posterior = posterior_variance * W * x / VARIANCE_X
    first_gap = kl_diagonal(A * x, number([[V]]), posterior, posterior_variance.reshape(1, 1)).sum()
    second_gap = over_noise(lambda eps: path_divergence(SCALE * (A * x + math.sqrt(V) * eps)))
    assert torch.isclose(log_prior - second, second_gap, rtol=1e-9)
    assert first_gap > 0.01 and second_gap > 0.01
    assert torch.isclose(log_p, bound + first_gap + second_gap, rtol=1e-10)


@pytest.mark.equation("scaled-density")
def test_scaled_density():
    """Quadrature. The density of z from that of z_0 = s z integrates to 1 and has the moments of z_0 / s, d = 2."""
    H, s = 1 / 16, 1.7
    grid = torch.arange(-8, 8 + H / 2, H, dtype=f64)
    z = torch.cartesian_prod(grid, grid)
    mean, variance = number([0.4, -1.0]), number([0.5, 1.5])
    log_p = gaussian_log_prob(s * z, mean, variance).sum(1) + 2 * math.log(s)
    weights = log_p.exp() * H**2
    assert abs(weights.sum() - 1) < 1e-9
    assert torch.allclose(weights @ z, mean / s, atol=1e-9)


@pytest.mark.equation("latent-entropy")
def test_latent_entropy():
    """Exact. The sum over the latents is the entropy of torch.distributions."""
    variance = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=f64) + 0.01
    ours = sum(entropy(v) for v in variance)
    q = torch.distributions.MultivariateNormal(random(7), torch.diag(variance))
    assert math.isclose(ours, q.entropy().item(), rel_tol=1e-12)


@pytest.mark.equation("rate-split")
def test_rate_split():
    """Quadrature. Three images, encoders of different widths, a prior that is not the law of the codes."""
    H = 1 / 256
    z = torch.arange(-8, 8 + H / 2, H, dtype=f64)
    share, mean, variance = number([0.2, 0.5, 0.3]), number([-1.0, 0.3, 1.5]), number([0.04, 0.1, 0.02])
    q = gaussian_log_prob(z, mean[:, None], variance[:, None])
    p = torch.logaddexp(
        gaussian_log_prob(z, number(-0.8), number(0.3)), gaussian_log_prob(z, number(0.9), number(0.6))
    ) - math.log(2)
    aggregated = (share[:, None] * q.exp()).sum(0).log()

    def over_images(log_ratio):
        return (share[:, None] * q.exp() * log_ratio).sum() * H

    information, rest = over_images(q - aggregated), (aggregated.exp() * (aggregated - p)).sum() * H
    assert information > 0.5 and rest > 0.1
    assert torch.isclose(over_images(q - p), information + rest, rtol=1e-9)


@pytest.mark.equation("rate-split")
def test_rate_split_gaussian():
    """Exact. Gaussian images and a linear encoder: both parts in closed form, the left side by kl_diagonal."""
    c, a, v, r = 1.4, 0.9, 0.07, 0.6  # x ~ N(0, c), q(z | x) = N(a x, v), p(z) = N(0, r)
    rate = over_noise(
        lambda eps: kl_diagonal(number([a * math.sqrt(c) * eps]), number([v]), number([0.0]), number([r])).sum()
    )
    information = 0.5 * math.log((a * a * c + v) / v)
    rest = kl_diagonal(number([0.0]), number([a * a * c + v]), number([0.0]), number([r])).sum()
    assert torch.isclose(rate, information + rest, rtol=1e-12)


@pytest.mark.equation("latent-noise")
@pytest.mark.parametrize("t", [1, 20, 500, 1000])
def test_latent_noise(t):
    """Exact. q_sample is linear: its response to the encoder's mean, the encoder's noise and the forward noise."""
    schedule, s, sigma = cosine_schedule(1000), 0.9, 0.02
    unit = torch.eye(3, dtype=f64)  # μ, ε of the encoder, ε of the forward process
    mean, eps_z, eps = unit.T
    response = q_sample(s * (mean + sigma * eps_z), eps, torch.full((3,), t), schedule)
    alpha_bar = schedule.alpha_bar[t]
    measured = (response[0] / s) ** 2 / (response[1] ** 2 + response[2] ** 2)
    assert torch.isclose(measured, alpha_bar / (1 - alpha_bar + alpha_bar * s**2 * sigma**2), rtol=1e-10)


# ---- the whole model ---------------------------------------------------------------------------------------------


class Whole:
    """Stand-ins with exact answers: an autoencoder with a scale, and a network whose v is that of latents N(0, 1)."""

    def __init__(self):
        class Coder(nn.Module):
            latent_shape, scale = (2, 3, 3), torch.tensor(0.4)

            def encode(self, x):
                return 9 * x + 1, torch.ones_like(x)

            def decode(self, z):
                return (z - 1) / 9

        class Network(nn.Module):
            latent, classes = (2, 3, 3), 2

            def __init__(self):
                super().__init__()
                self.stem = nn.Conv2d(2, 2, 1)

            def forward(self, z, t, y=None):
                told = 0 if y is None else (y != 2).sum(1)[:, None, None, None]  # v is larger, the more words are told
                return torch.full_like(z, 0.1) * told - 0.3 * z

        self.coder, self.network, self.words = Coder(), Network(), Vocabulary(["a", "b"], 3)
        self.schedule = cosine_schedule(50)


def test_latents_and_back():
    """Exact. def-latent-diffusion: z_0 is the encoder's mean times s, x the decoder's image of z_0 / s, clipped."""
    coder, x = Whole().coder, 2 * random(1, 2, 3, 3, seed=3).float()
    z_0 = to_latents(coder, x)
    assert torch.allclose(z_0, 0.4 * (9 * x + 1))
    assert x.abs().max() > 1.2 and torch.allclose(from_latents(coder, z_0), x.clamp(-1, 1), atol=1e-6)


def test_sample_is_the_definition():
    """Exact. def-latent-diffusion, written out: noise by seed and place, DPM-Solver++(2M) without clipping, decoder."""
    parts, steps, w = Whole(), 4, 2.5
    model = LatentDiffusion(parts.coder, parts.network, parts.schedule, parts.words)
    drawn = model.sample(["a b", "", "b"], steps=steps, w=w, seed=7, batch=2)
    schedule, expected = parts.schedule, []
    for i, told in enumerate((2, 0, 1)):
        z = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(7 * 1_000_003 + i))
        times, before = [*trailing_timesteps(50, steps), 0], None
        for j, (t, s) in enumerate(itertools.pairwise(times)):
            a, b = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
            v = w * 0.1 * told - 0.3 * z
            guess = math.sqrt(a) * z - math.sqrt(1 - a) * v
            half_log_snr = [0.5 * math.log(c / (1 - c)) if c < 1 else math.inf for c in (a, b)]
            h = half_log_snr[1] - half_log_snr[0]
            used = guess
            if before is not None and j < steps - 1:
                used = guess + (guess - before[0]) * h / (2 * before[1])
            z = math.sqrt((1 - b) / (1 - a)) * z + math.sqrt(b) * (1 - math.exp(-h)) * used
            before = guess, h
        expected.append(((z / 0.4 - 1) / 9).clamp(-1, 1))
    assert torch.allclose(drawn, torch.cat(expected), atol=1e-3)
    assert drawn.abs().median() < 1 and (drawn.abs() == 1).any()


# ---- noise, and back -------------------------------------------------------------------------------------------


@pytest.mark.equation("resampling-distance")
@pytest.mark.parametrize("t", [100, 500, 990])
def test_resampling_distance(t):
    """Quadrature. Four possible latents: the squared distance of z_0 and a draw from q(z_0 | z_t), both by sums."""
    schedule, H = cosine_schedule(1000), 1 / 64
    share, atoms = number([0.1, 0.4, 0.3, 0.2]), number([-2.0, -0.5, 0.4, 1.5])
    alpha_bar = schedule.alpha_bar[t]
    grid = torch.arange(-9, 9 + H / 2, H, dtype=f64)
    log_joint = share.log()[:, None] + gaussian_log_prob(grid, alpha_bar.sqrt() * atoms[:, None], 1 - alpha_bar)
    joint, posterior = log_joint.exp() * H, log_joint.softmax(0)
    apart = (atoms[:, None] - atoms).square()
    distance = torch.einsum("ik,jk,ij->", joint, posterior, apart)
    guess = (posterior * atoms[:, None]).sum(0)
    error = (joint * (atoms[:, None] - guess).square()).sum()
    assert torch.isclose(distance, 2 * error, rtol=1e-9)
    if t == 990:
        variance = (share * atoms.square()).sum() - (share * atoms).sum() ** 2
        assert torch.isclose(distance, 2 * variance, rtol=0.01)


@pytest.mark.equation("resampling-gaussian")
@pytest.mark.parametrize("t", [100, 300, 500, 700, 900])
def test_resampling_gaussian(t):
    """Exact, up to the noise that the last step leaves out. The sampler's linear map, with latents of variance 1."""
    schedule = cosine_schedule(1000)
    times = [t, *(s for s in timesteps(1000, 120) if s < t)]
    alpha_bar = schedule.alpha_bar
    unit = torch.eye(1 + len(times), dtype=f64)  # the start, and the noise of each step

    def denoiser(x_t, t):
        return (1 - alpha_bar[t]).sqrt()[:, None] * x_t  # the best one for variance 1

    z = ddpm_sample(denoiser, unit[:, :1], schedule, times, variance="beta", noise=[u[:, None] for u in unit.T[1:]])
    from_start, fresh = z[0], z[1:].square().sum()
    to_z_0, to_noise = from_start * alpha_bar[t].sqrt() - 1, from_start * (1 - alpha_bar[t]).sqrt()
    distance = to_z_0**2 + to_noise**2 + fresh
    assert torch.isclose(distance, 2 / (1 + schedule.snr()[t]), rtol=3e-3).all()


@pytest.mark.equation("resampling-gaussian")
@pytest.mark.parametrize("v, snr", [(0.3, 2.0), (1.0, 0.5), (4.0, 0.01)])
def test_resampling_gaussian_variance(v, snr):
    """Exact. Twice the error of the best linear guess, from the covariance of z_0 and z_t."""
    alpha_bar = snr / (1 + snr)
    covariance, variance_t = math.sqrt(alpha_bar) * v, alpha_bar * v + 1 - alpha_bar
    assert math.isclose(2 * (v - covariance**2 / variance_t), 2 * v / (1 + v * snr), rel_tol=1e-12)
    answer = exercises()["11.2"].oracle(number([v]), snr)
    assert math.isclose(answer, 2 * v / (1 + v * snr), rel_tol=1e-12)


# ---- losses of different spaces ----------------------------------------------------------------------------------


def floor_of_v(n, v, t, schedule):
    """The least mean squared error of v, a number, if each of the data's numbers is there n times."""
    unit = torch.eye(1 + n, dtype=f64)  # the number, with variance 1, and n noises
    x_0, eps = (math.sqrt(v) * unit[:, :1]).expand(-1, n), unit[:, 1:]
    times = torch.full((1 + n,), t)
    x_t, target = q_sample(x_0, eps, times, schedule), v_target(x_0, eps, times, schedule)
    explained = target.T @ x_t @ torch.linalg.solve(x_t.T @ x_t, x_t.T @ target)
    hidden = math.sqrt(v) * unit[:, :1]
    known = hidden.T @ x_t @ torch.linalg.solve(x_t.T @ x_t, x_t.T @ hidden)
    return (target.T @ target - explained).diagonal().mean(), (v - known).squeeze()


@pytest.mark.equation("v-floor", "repeated-floor")
@pytest.mark.parametrize("n", [1, 4, 64])
@pytest.mark.parametrize("t", [50, 400, 800])
def test_floors(n, t):
    """Exact. q_sample and v_target are linear; the best predictor of v for Gaussians is too."""
    schedule, v = cosine_schedule(1000), 0.7
    floor, unknown = floor_of_v(n, v, t, schedule)
    assert torch.isclose(floor, unknown / (1 - schedule.alpha_bar[t]), rtol=1e-8)
    page = v / ((1 - schedule.alpha_bar[t]) * (1 + n * v * schedule.snr()[t]))
    assert torch.isclose(floor, page, rtol=1e-8)


# ---- costs ---------------------------------------------------------------------------------------------------------


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.equation("conv-flops")
@pytest.mark.parametrize("size, stride, k", [((12, 20), 1, 3), ((16, 8), 2, 3), ((10, 10), 1, 1)])
def test_conv_flops(size, stride, k):
    """Exact. As PyTorch counts them."""
    conv = nn.Conv2d(5, 7, k, stride=stride, padding=k // 2)
    forward = counted(lambda: conv(torch.zeros(1, 5, *size)))
    assert forward == 2 * (size[0] // stride) * (size[1] // stride) * 5 * 7 * k**2
    assert forward == exercises()["11.4"].oracle(*size, 5, 7, k, stride)


@pytest.mark.equation("training-flops")
def test_training_flops():
    """Exact. A convolution and a linear layer, forwards and backwards: three times the forward pass."""
    conv, linear = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 5)
    x = torch.zeros(2, 4, 8, 8, requires_grad=True)

    def forward():
        return linear(conv(x).mean((2, 3))).sum()

    assert counted(lambda: forward().backward()) == 3 * counted(forward)


@pytest.mark.equation("attention-flops", "cost-ratio")
def test_attention_flops():
    """Exact. The book's self-attention, as PyTorch counts its matrix products, at three sizes."""
    C, products = 16, []
    for side in (4, 8, 16):
        attention, N = Attention(C, heads=4), side * side
        with sdpa_kernel(SDPBackend.MATH):
            total = counted(lambda a=attention, s=side: a(torch.zeros(1, C, s, s)))
        assert total == 8 * N * C**2 + 4 * N**2 * C
        products.append(total - 8 * N * C**2)
    assert products[1] == 2**4 * products[0] and products[2] == 4**4 * products[0]


@pytest.mark.equation("cost-ratio")
@pytest.mark.parametrize("f", [2, 4, 8])
def test_cost_ratio(f):
    """Exact. The same convolution on f times smaller sides, as PyTorch counts it."""
    conv = nn.Conv2d(3, 5, 3, padding=1)
    large, small = (counted(lambda s=side: conv(torch.zeros(1, 3, s, s))) for side in (32, 32 // f))
    assert large == f**2 * small


@pytest.mark.equation("break-even")
def test_break_even():
    """Symbolic. At n* both ways cost the same, beyond it the latent one costs less; m models share the autoencoder."""
    A, p, z, m, n = sp.symbols("A p z m n", positive=True)
    (found,) = sp.solve(sp.Eq(m * n * p, A + m * n * z), n)
    assert sp.simplify(found - A / (m * (p - z))) == 0
    saved = sp.diff(m * n * p - (A + m * n * z), n)
    assert saved.subs({m: 2, p: 5, z: 1}) > 0
    assert math.isclose(exercises()["11.5"].oracle(3e6, 40.0, 10.0, 4), 3e6 / (4 * 30.0))


@pytest.mark.equation("sample-cost")
def test_sample_cost():
    """Symbolic. The decoder's share of S calls and a decoding is above one half exactly if S F < F_dec."""
    S, F, D = sp.symbols("S F D", positive=True)
    share = D / (S * F + D)
    assert sp.simplify(share.subs(S, D / F) - sp.Rational(1, 2)) == 0
    assert sp.simplify(sp.diff(share, S) + D * F / (S * F + D) ** 2) == 0
