"""Proofs of the equations of the chapter "Sampling"."""

import math
from itertools import pairwise

import pytest
import sympy as sp
import torch

from diffbook.gaussian import GaussianMixture
from diffbook.sampling import (
    ddim_sample,
    ddim_sample_steps,
    ddpm_sample,
    ddpm_sample_steps,
    dpmpp_2m_sample_steps,
    timesteps,
)
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule

SCHEDULES = [
    linear_schedule(),
    cosine_schedule(),
    cosine_schedule(7),
    NoiseSchedule(torch.tensor([0.3, 0.5, 0.4, 0.97])),
]
LINEAR = SCHEDULES[0]


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(weights, means, variances):
    return GaussianMixture(numbers(*weights), numbers(*means)[:, None], numbers(*variances)[:, None])


TWO = mixture((0.6, 0.4), (-0.8, 1.2), (0.04, 0.04))


def alpha_bar(schedule, t):
    """ᾱ_t as a Python number, from the β_s alone."""
    return math.prod(1 - b for b in schedule.beta[1 : t + 1].tolist())


def curved(x, t):
    """A model that depends on x and on t."""
    return torch.sin(2 * x) + t[:, None] / 1000


def pairs_of(schedule):
    T = schedule.T
    return [(T, T - 1), (T, 1), (T, T // 2), (T // 2, 1), (2, 1)]


def knows(x_0, schedule):
    """The model whose estimate of x_0 is always ``x_0``."""

    def model(x, t):
        a = numbers(*(alpha_bar(schedule, int(k)) for k in t))[:, None]
        return (x - a.sqrt() * x_0) / (1 - a).sqrt()

    return model


@pytest.mark.equation("ancestral-step")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ancestral_step(schedule, variance):
    """Exact: every step of ddpm_sample is the formula, with the noise it was given, and none in the last step."""
    noise, x = random(schedule.T, 3, 1, seed=1), random(3, 1)
    for step in ddpm_sample_steps(curved, x, schedule, variance=variance, noise=noise):
        beta, a, before = schedule.beta[step.t].item(), alpha_bar(schedule, step.t), alpha_bar(schedule, step.t - 1)
        eps = curved(x, torch.full((3,), step.t))
        mean = (x - beta / math.sqrt(1 - a) * eps) / math.sqrt(1 - beta)
        sigma = math.sqrt(beta if variance == "beta" else (1 - before) / (1 - a) * beta)
        z = noise[schedule.T - step.t] if step.t > 1 else 0.0
        torch.testing.assert_close(step.x, mean + sigma * z, rtol=1e-7, atol=1e-9)
        x = step.x
    assert step.t == 1 and step.s == 0


@pytest.mark.equation("ancestral-step")
def test_ancestral_step_is_the_exact_law_for_white_noise():
    """Exact: for x_0 ~ N(0, 1), ε* = √(1-ᾱ_t) x_t and σ² = β_t, every step but the last keeps the variance 1."""
    basis = torch.eye(1001, dtype=torch.float64)
    noise = [basis[:, i : i + 1] for i in range(1, 1001)]
    model = mixture((1.0,), (0.0,), (1.0,)).denoiser(LINEAR)
    for step in ddpm_sample_steps(model, basis[:, :1], LINEAR, noise=noise):
        if step.s > 0:
            assert step.x.square().sum().item() == pytest.approx(1, abs=1e-9)
    assert step.x.square().sum().item() == pytest.approx(1 - LINEAR.beta[1].item(), abs=1e-9)


@pytest.mark.equation("skipped-step")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_skipped_step(schedule):
    """Exact: single steps composed from s to t give the factor √(ᾱ_t/ᾱ_s) and the variance 1 - ᾱ_t/ᾱ_s."""
    for t, s in pairs_of(schedule):
        factor, variance = 1.0, 0.0
        for k in range(s + 1, t + 1):
            beta = schedule.beta[k].item()
            factor, variance = factor * math.sqrt(1 - beta), (1 - beta) * variance + beta
        ratio = schedule.alpha_bar[t].item() / schedule.alpha_bar[s].item()
        assert factor == pytest.approx(math.sqrt(ratio), rel=1e-9)
        assert variance == pytest.approx(1 - ratio, rel=1e-9)


@pytest.mark.equation("skipped-posterior")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_skipped_posterior(schedule):
    """Exact: ddpm_sample's step equals `posterior` of the world of one point, seen through the composed steps."""
    x_0, x_t = 0.5, numbers(-0.7)[:, None]
    for t, s in pairs_of(schedule):
        ratio = alpha_bar(schedule, t) / alpha_bar(schedule, s)
        point = mixture((1.0,), (math.sqrt(alpha_bar(schedule, s)) * x_0,), (1 - alpha_bar(schedule, s),))
        _, mean, variance = point.posterior(x_t, math.sqrt(ratio), 1 - ratio)
        model = knows(x_0, schedule)
        for z in (0.0, 1.0):
            noise = numbers(z)[None, :, None]
            step = next(ddpm_sample_steps(model, x_t, schedule, [t, s], variance="beta_tilde", noise=noise))
            exact = mean[0, 0] + z * variance[0].sqrt()
            torch.testing.assert_close(step.x[0], exact, rtol=1e-7, atol=1e-8)
        step = next(ddpm_sample_steps(model, x_t, schedule, [t, s], variance="beta", noise=noise))
        torch.testing.assert_close(step.x[0], mean[0, 0] + math.sqrt(1 - ratio), rtol=1e-7, atol=1e-8)


@pytest.mark.equation("beta-tilde-bound")
def test_beta_tilde_bound():
    """Symbolic: 1-ᾱ_s minus β̃ is (1-ᾱ_s)² ᾱ_t / (ᾱ_s (1-ᾱ_t)) ≥ 0; and β exceeds 1-ᾱ_s in a real grid."""
    a, b = sp.symbols("a b", positive=True)  # ᾱ_t and ᾱ_s
    tilde = (1 - b) / (1 - a) * (1 - a / b)
    assert sp.simplify(1 - b - tilde - (1 - b) ** 2 * a / (b * (1 - a))) == 0
    a_t, a_s = (cosine_schedule().alpha_bar[t].item() for t in (112, 1))
    assert 1 - a_t / a_s > 100 * (1 - a_s)
    # the sampler stays below the bound: the noise it adds to a known point, over a grid
    noise, x = torch.ones(9, 1, 1, dtype=torch.float64), numbers(0.3)[:, None]
    for schedule in SCHEDULES[:2]:
        still = ddpm_sample_steps(
            knows(0.3, schedule), x, schedule, timesteps(1000, 9), variance="beta_tilde", noise=0 * noise
        )
        first = next(
            ddpm_sample_steps(knows(0.3, schedule), x, schedule, timesteps(1000, 9), "beta_tilde", noise=noise)
        )
        sigma = (first.x - next(still).x).item()
        assert 0 < sigma**2 <= 1 - alpha_bar(schedule, first.s)


@pytest.mark.equation("clip-projection")
def test_clip_projection():
    """Exact: on a grid of estimates and targets, clipping never increases the distance, and the samplers clip so."""
    estimates = torch.linspace(-5, 5, 401, dtype=torch.float64)
    c = torch.linspace(-1, 1, 81, dtype=torch.float64)[:, None]
    step = next(ddim_sample_steps(lambda x, t: 0 * x, estimates[:, None], LINEAR, [1], clip=1.0))
    clipped = step.x_0[:, 0]
    free = next(ddim_sample_steps(lambda x, t: 0 * x, estimates[:, None], LINEAR, [1])).x_0[:, 0]
    assert bool(((clipped - c).abs() <= (free - c).abs()).all())
    assert bool(((clipped - c).abs() < (free - c).abs())[:, free.abs() > 1].all())
    # the noise is computed again from the clipped estimate: together they still give the state
    x, (a_t, a_s) = estimates[:, None], (alpha_bar(LINEAR, t) for t in (500, 200))
    inner = next(ddim_sample_steps(lambda x, t: 0 * x, x, LINEAR, [500, 200], clip=1.0))
    eps = (x - math.sqrt(a_t) * inner.x_0) / math.sqrt(1 - a_t)
    torch.testing.assert_close(inner.x_0, (x / math.sqrt(a_t)).clamp(-1, 1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(inner.x, math.sqrt(a_s) * inner.x_0 + math.sqrt(1 - a_s) * eps, rtol=1e-9, atol=1e-9)
    # with c outside the bounds it can increase: why latents must not be clipped
    assert bool(((clipped - 2.0).abs() > (free - 2.0).abs()).any())


@pytest.mark.equation("ddim-marginals")
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_marginals(schedule, eta):
    """Exact: x_0, the start's noise and each fresh noise as unit vectors: mean and variance are those of q(x_t|x_0)."""
    T = schedule.T
    times = timesteps(T, min(T, 6))
    S, x_0 = len(times), 0.7
    basis = torch.eye(S + 1, dtype=torch.float64)
    a_T = alpha_bar(schedule, T)
    noise = [basis[:, i : i + 1] for i in range(1, S + 1)]

    # the walk is affine in all noises: the part without noise is the mean, the rest are their weights
    start = math.sqrt(a_T) * x_0 * torch.ones(1, 1, dtype=torch.float64)
    means = ddim_sample_steps(knows(x_0, schedule), start, schedule, times, eta=eta, noise=torch.zeros(S, 1, 1))
    full = start + math.sqrt(1 - a_T) * basis[:, :1]
    for mean, step in zip(
        means, ddim_sample_steps(knows(x_0, schedule), full, schedule, times, eta=eta, noise=noise), strict=True
    ):
        a = alpha_bar(schedule, step.s)
        torch.testing.assert_close(mean.x, math.sqrt(a) * x_0 * torch.ones(1, 1).double(), rtol=1e-7, atol=1e-9)
        variance = (step.x - mean.x).square().sum().item()
        assert variance == pytest.approx(1 - a, rel=1e-7, abs=1e-12)


@pytest.mark.equation("ddim-step")
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_step(schedule, eta):
    """Exact: one step of ddim_sample is the formula in plain numbers, for jumps of several lengths and to 0."""
    x, z = random(4, 1, seed=2), random(1, 4, 1, seed=3)
    for t, s in [*pairs_of(schedule), (1, 0), (schedule.T, 0)]:
        a_t, a_s = alpha_bar(schedule, t), alpha_bar(schedule, s)
        eps = curved(x, torch.full((4,), t))
        sigma2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        x_0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        x_s = math.sqrt(a_s) * x_0 + math.sqrt(1 - a_s - sigma2) * eps + math.sqrt(sigma2) * z[0]
        times = [t, s] if s > 0 else [t]
        step = next(ddim_sample_steps(curved, x, schedule, times, eta=eta, noise=z))
        assert step.s == s
        torch.testing.assert_close(step.x_0, x_0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(step.x, x_s, rtol=1e-8, atol=1e-9)


@pytest.mark.equation("ddim-eta-one")
def test_ddim_eta_one():
    """Symbolic: the squared weights of x_t agree; and in code both samplers make the same walk from the same noise."""
    alpha, b = sp.symbols("alpha b", positive=True)  # α_{t|s} and ᾱ_s
    a = alpha * b
    tilde = (1 - b) / (1 - a) * (1 - alpha)
    assert sp.simplify((1 - b - tilde) / (1 - a) - alpha * (1 - b) ** 2 / (1 - a) ** 2) == 0
    # the weight of x_0 follows from that of x_t, which the posterior's own weight obeys
    weight = sp.sqrt(b) * (1 - alpha) / (1 - a)
    assert sp.simplify(weight + alpha * (1 - b) / (1 - a) * sp.sqrt(b) - sp.sqrt(b)) == 0
    for schedule in SCHEDULES[:2]:
        times, noise = timesteps(1000, 15), random(15, 6, 1, seed=4)
        model = TWO.denoiser(schedule)
        one = ddim_sample(model, noise[0], schedule, times, eta=1.0, noise=noise)
        other = ddpm_sample(model, noise[0], schedule, times, variance="beta_tilde", noise=noise)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.equation("blend-variance")
def test_blend_variance():
    """Symbolic: a² + b² is 1 on the arc and 1/2 in the middle of the line. Monte Carlo: 5 standard errors."""
    phi, r = sp.symbols("phi r", real=True)
    assert sp.simplify(sp.cos(phi) ** 2 + sp.sin(phi) ** 2) == 1
    line = (1 - r) ** 2 + r**2
    assert sp.solve(sp.diff(line, r), r) == [sp.Rational(1, 2)] and line.subs(r, sp.Rational(1, 2)) == sp.Rational(1, 2)
    u, w = random(2, 200_000, seed=5)
    for a, b in ((0.6, 0.8), (0.5, 0.5), (0.3, 0.9)):
        variance = (a * u + b * w).var().item()
        assert variance == pytest.approx(a**2 + b**2, abs=5 * (a**2 + b**2) * math.sqrt(2 / 200_000))


@pytest.mark.equation("probability-flow")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_is_eulers_method(schedule):
    """Exact: in y = x/√ᾱ and ς = √(1-ᾱ)/√ᾱ, a step of ddim_sample is y + (ς_s - ς_t) ε̂."""
    x = random(4, 1, seed=6)
    for t, s in [*pairs_of(schedule), (schedule.T, 0)]:
        a_t, a_s = alpha_bar(schedule, t), alpha_bar(schedule, s)
        step = next(ddim_sample_steps(curved, x, schedule, [t, s] if s else [t]))
        slope = curved(x, torch.full((4,), t))
        change = math.sqrt((1 - a_s) / a_s) - math.sqrt((1 - a_t) / a_t)
        y = x / math.sqrt(a_t) + change * slope
        torch.testing.assert_close(step.x / math.sqrt(a_s), y, rtol=1e-8, atol=1e-8)


@pytest.mark.equation("flow-marginals")
def test_flow_marginals():
    """Quadrature: d/dς E[f(x_0 + ς ε)] equals E[f'(y) E[ε|y]] with E[ε|y] = -ς score, for four functions f."""
    y = torch.linspace(-15, 15, 60_001, dtype=torch.float64)
    tests = [
        (torch.sin, torch.cos),
        (lambda v: v**2, lambda v: 2 * v),
        (torch.tanh, lambda v: 1 - torch.tanh(v) ** 2),
        (lambda v: v**3, lambda v: 3 * v**2),
    ]

    def law(noise):
        return TWO.after(1.0, noise**2)

    for noise in (0.1, 0.5, 1.5):
        world, step = law(noise), 1e-4
        density = world.log_prob(y[:, None]).exp()
        velocity = -noise * world.score(y[:, None])[:, 0]
        for f, slope in tests:
            after, before = (
                torch.trapezoid(f(y) * law(noise + d).log_prob(y[:, None]).exp(), y) for d in (step, -step)
            )
            right = torch.trapezoid(slope(y) * velocity * density, y)
            torch.testing.assert_close((after - before) / (2 * step), right, rtol=1e-6, atol=1e-7)


@pytest.mark.equation("flow-marginals")
def test_the_flow_carries_the_marginals_along():
    """Quadrature: evenly spaced quantiles of q(x_T), carried by ddim_sample, are the quantiles of q(x_t) at each t."""
    schedule = LINEAR
    levels = (torch.arange(200, dtype=torch.float64) + 0.5) / 200

    def quantiles(world):
        x = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
        cdf = (world.weights * torch.special.ndtr((x[:, None] - world.means[:, 0]) / world.variances[:, 0].sqrt())).sum(
            1
        )
        i = torch.searchsorted(cdf, levels)
        return x[i - 1] + (levels - cdf[i - 1]) / (cdf[i] - cdf[i - 1]) * (x[i] - x[i - 1])

    x = quantiles(TWO.at(1000, schedule))[:, None]
    for step in ddim_sample_steps(TWO.denoiser(schedule), x, schedule):
        if step.s in (700, 400, 100, 10):
            off = (step.x[:, 0] - quantiles(TWO.at(step.s, schedule))).abs()
            assert off.mean() < 4e-3


@pytest.mark.equation("gaussian-flow")
def test_gaussian_flow():
    """Symbolic: y = C √(s² + ς²) solves the ODE with E[ε|y] = ς y / (s² + ς²); ddim_sample converges to it."""
    C, s, noise = sp.symbols("C s varsigma", positive=True)
    y = C * sp.sqrt(s**2 + noise**2)
    assert sp.simplify(sp.diff(y, noise) - noise * y / (s**2 + noise**2)) == 0
    for s2 in (0.04, 0.25, 2.0):
        world, one = mixture((1.0,), (0.0,), (s2,)), torch.ones(1, 1, dtype=torch.float64)
        # E[ε | y] of the package
        for t in (1, 300, 1000):
            a = alpha_bar(LINEAR, t)
            v = math.sqrt((1 - a) / a)
            ours = world.denoiser(LINEAR)(one, torch.tensor([t])).item()
            assert ours == pytest.approx(v / (s2 + v**2) / math.sqrt(a), rel=1e-8)
        a = alpha_bar(LINEAR, 1000)
        exact = math.sqrt(s2) / math.sqrt(a * s2 + 1 - a)
        found = [ddim_sample(world.denoiser(LINEAR), one, LINEAR, timesteps(1000, S)).item() for S in (125, 250, 500)]
        off = [abs(x / exact - 1) for x in found]
        assert off[2] < 0.02 and off[0] / off[1] == pytest.approx(2, rel=0.1)


@pytest.mark.equation("flow-in-lambda", "flow-solution")
def test_flow_in_lambda():
    """Symbolic: with u = e^λ y and dy/dς = ε, du/dλ = e^λ x̂_0; and its integral is the solution."""
    lam, eps, x_0 = sp.symbols("lambda epsilon x_0", real=True)
    noise_to_signal = sp.exp(-lam)
    y = x_0 + noise_to_signal * eps  # x = √ᾱ x̂_0 + √(1-ᾱ) ε̂, divided by √ᾱ
    du = sp.exp(lam) * y + sp.exp(lam) * eps * sp.diff(noise_to_signal, lam)
    assert sp.simplify(du - sp.exp(lam) * x_0) == 0
    # signal and noise as functions of λ: their squares add up to 1, their quotient is e^λ
    signal, noise = 1 / sp.sqrt(1 + sp.exp(-2 * lam)), 1 / sp.sqrt(1 + sp.exp(2 * lam))
    assert sp.simplify(signal**2 + noise**2 - 1) == 0 and sp.simplify(signal / noise - sp.exp(lam)) == 0
    # the package's λ is half its log-SNR
    for schedule in SCHEDULES:
        for t in (1, schedule.T):
            a = alpha_bar(schedule, t)
            expected = math.log(math.sqrt(a) / math.sqrt(1 - a))
            assert 0.5 * schedule.log_snr()[t].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.equation("flow-in-lambda", "flow-solution")
def test_flow_solution():
    """Quadrature: along the exact flow of a Gaussian, x_s is the integral formula, for jumps of several lengths."""
    s2, C = 0.25, 1.3

    def state(lam):  # x = √ᾱ y on the path y = C √(s² + ς²)
        a = 1 / (1 + torch.exp(-2 * lam))
        return C * (a * s2 + 1 - a).sqrt()

    def estimate(lam):  # E[x_0 | x] = √ᾱ s² x / (ᾱ s² + 1 - ᾱ)
        a = 1 / (1 + torch.exp(-2 * lam))
        return a.sqrt() * s2 * state(lam) / (a * s2 + 1 - a)

    for t, s in ((1000, 500), (500, 490), (300, 1)):
        a_t, a_s = alpha_bar(LINEAR, t), alpha_bar(LINEAR, s)
        ends = [0.5 * math.log(a / (1 - a)) for a in (a_t, a_s)]
        lam = torch.linspace(*ends, 20_001, dtype=torch.float64)
        integral = torch.trapezoid(lam.exp() * estimate(lam), lam)
        x_s = math.sqrt((1 - a_s) / (1 - a_t)) * state(lam[0]) + math.sqrt(1 - a_s) * integral
        torch.testing.assert_close(x_s, state(lam[-1]), rtol=1e-6, atol=0)


@pytest.mark.equation("first-order-step")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_first_order_step_is_ddim(schedule):
    """Exact: the exponential formula equals one step of ddim_sample and the first step of dpmpp_2m_sample."""
    x = random(4, 1, seed=7)
    for t, s in pairs_of(schedule):
        a_t, a_s = alpha_bar(schedule, t), alpha_bar(schedule, s)
        h = math.log(math.sqrt(a_s / (1 - a_s))) - math.log(math.sqrt(a_t / (1 - a_t)))
        ddim = next(ddim_sample_steps(curved, x, schedule, [t, s]))
        formula = math.sqrt((1 - a_s) / (1 - a_t)) * x + math.sqrt(a_s) * (1 - math.exp(-h)) * ddim.x_0
        torch.testing.assert_close(ddim.x, formula, rtol=1e-6, atol=1e-7)
        first = next(dpmpp_2m_sample_steps(curved, x, schedule, [t, s]))
        torch.testing.assert_close(first.x, formula, rtol=1e-6, atol=1e-7)


@pytest.mark.equation("dpmpp-simplify")
def test_dpmpp_simplify():
    """Symbolic: the integral of τ e^τ, the factor of the slope, and the difference h³/12 + O(h⁴)."""
    h, tau = sp.symbols("h tau", positive=True)
    factor = sp.simplify(sp.exp(-h) * sp.integrate(tau * sp.exp(tau), (tau, 0, h)))
    assert sp.simplify(factor - (h - 1 + sp.exp(-h))) == 0
    difference = h - 1 + sp.exp(-h) - h / 2 * (1 - sp.exp(-h))
    assert sp.simplify(sp.series(difference, h, 0, 4).removeO() - h**3 / 12) == 0


@pytest.mark.equation("dpmpp-2m")
@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_dpmpp_2m(schedule):
    """Exact: every inner step of dpmpp_2m_sample is the formula in plain numbers, on a grid of uneven steps."""
    times = [7, 5, 4, 1] if schedule.T == 7 else [990, 700, 430, 150, 40, 3]
    x = random(4, 1, seed=8)
    steps = list(dpmpp_2m_sample_steps(curved, x, schedule, times))
    lam = {t: 0.5 * math.log(alpha_bar(schedule, t) / (1 - alpha_bar(schedule, t))) for t in times}
    for (before, now), (t, s) in zip(pairwise(steps), pairwise(times[1:]), strict=False):
        r = (lam[t] - lam[before.t]) / (lam[s] - lam[t])
        D = (1 + 1 / (2 * r)) * now.x_0 - 1 / (2 * r) * before.x_0
        a_t, a_s = alpha_bar(schedule, t), alpha_bar(schedule, s)
        growth = 1 - math.exp(lam[t] - lam[s])
        x_s = math.sqrt((1 - a_s) / (1 - a_t)) * before.x + math.sqrt(a_s) * growth * D
        torch.testing.assert_close(now.x, x_s, rtol=1e-7, atol=1e-9)
    assert steps[-1].s == 0 and torch.equal(steps[-1].x, steps[-1].x_0)


@pytest.mark.equation("dpmpp-2m")
def test_dpmpp_2m_error_of_one_step():
    """Exact: on the flow of a Gaussian, halving two equal λ-steps divides the second one's error by 8, DDIM's by 4."""
    s2 = 0.25

    def a_of(lam):
        return 1 / (1 + math.exp(-2 * lam))

    def flow(lam):
        a = a_of(lam)
        return math.sqrt(a * s2 + 1 - a)

    errors = {"second": [], "first": []}
    for h in (0.2, 0.1, 0.05):
        # a schedule whose three times lie h apart in λ, the middle one at λ = 0.3, written for the sampler
        lambdas = [0.3 + h, 0.3, 0.3 - h, -4.0]
        alpha_bars = [1.0, *map(a_of, lambdas)]
        schedule = NoiseSchedule(numbers(*(1 - b / a for a, b in pairwise(alpha_bars))))
        model = mixture((1.0,), (0.0,), (s2,)).denoiser(schedule)
        start = numbers(flow(0.3 - h))[:, None]
        # step 3 -> 2 -> 1; the state after the first step is set right, so that only the second step is judged
        first = next(dpmpp_2m_sample_steps(model, start, schedule, [3, 2, 1]))
        steps = dpmpp_2m_sample_steps(model, start, schedule, [3, 2, 1])
        next(steps)
        second = next(steps)
        carried = flow(0.3) - first.x.item()
        # the step is linear in x_t: add what the right state would have added
        slope = math.sqrt((1 - a_of(0.3 + h)) / (1 - a_of(0.3)))
        a = a_of(0.3)
        per_x = math.sqrt(a) * s2 / (a * s2 + 1 - a)
        slope += math.sqrt(a_of(0.3 + h)) * -math.expm1(-h) * 1.5 * per_x
        errors["second"].append(abs(second.x.item() + slope * carried - flow(0.3 + h)))
        errors["first"].append(abs(first.x.item() - flow(0.3)))
    for name, factor in (("second", 8), ("first", 4)):
        for big, small in pairwise(errors[name]):
            assert big / small == pytest.approx(factor, rel=0.15)
