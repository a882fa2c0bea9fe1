"""Proofs of the equations of the chapter "What a VAE and a diffusion model share"."""

import math
from itertools import pairwise

import pytest
import sympy as sp
import torch

from diffbook.autoencoder import (
    Hierarchy,
    LinearVAE,
    diffusion_as_hierarchy,
    elbo,
    hierarchical_elbo,
    importance_weighted_bound,
)
from diffbook.diffusion import eps_from_x0, q_posterior, q_sample, q_step, variational_bound, x0_from_eps
from diffbook.gaussian import (
    GaussianMixture,
    discretised_log_likelihood,
    gaussian_log_prob,
    kl_diagonal,
)
from diffbook.sampling import as_eps
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TWO = GaussianMixture(numbers(0.6, 0.4), numbers(-0.8, 1.2)[:, None], numbers(0.04, 0.04)[:, None])
PAIR = NoiseSchedule(numbers(0.4, 0.99))
ONE = NoiseSchedule(numbers(0.995))
EIGHT = linear_schedule(8, 0.05, 0.85)

# Quadrature over ε: the trapezoidal rule is exact to rounding on a smooth function times the bell.
NODES = torch.linspace(-8.5, 8.5, 171, dtype=torch.float64)
WEIGHTS = gaussian_log_prob(NODES, numbers(0.0), numbers(1.0)).exp() * (NODES[1] - NODES[0])


def wrong_model(world, schedule):
    """A denoiser that is not the best one."""
    star = world.denoiser(schedule)
    return lambda x_t, t: 0.8 * star(x_t, t) + 0.1 * torch.sin(3 * x_t) + 0.05 * t[:, None]


def over_two_noises(function):
    """The mean of function(ε_1, ε_2) over two independent standard normal numbers."""
    first, second = NODES.repeat_interleave(len(NODES)), NODES.repeat(len(NODES))
    return (function(first[:, None], second[:, None]) * torch.outer(WEIGHTS, WEIGHTS).flatten()).sum().item()


def closed_form(model, x, schedule, **keywords):
    """`variational_bound` averaged over ε by quadrature; its total and its terms for one x_0."""
    noise = NODES[:, None].expand(schedule.T, -1, -1)
    bound = variational_bound(model, x.expand(len(NODES), 1), schedule, noise=noise, **keywords)
    return [(v.reshape(len(NODES), -1) * WEIGHTS[:, None]).sum(0) for v in bound[:4]]


@pytest.mark.equation("hierarchical-elbo")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("levels, x_0", [(None, 0.3), (None, -1.1), (256, 51 / 255), (2, -1.0)])
def test_the_walk_has_the_mean_of_the_closed_forms(variance, levels, x_0):
    """Quadrature over both noises at T = 2: the mean of the walk is minus `variational_bound`, in which no walk is."""
    model, x = wrong_model(TWO, PAIR), numbers(x_0)
    chain = diffusion_as_hierarchy(model, PAIR, variance, levels)
    walk = over_two_noises(lambda a, b: hierarchical_elbo(chain, x.expand(len(a), 1), noise=[a, b]))
    bound = closed_form(model, x, PAIR, variance=variance, levels=levels)[0].item()
    assert walk == pytest.approx(-bound, abs=1e-9)


@pytest.mark.equation("hierarchical-elbo")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_the_walk_by_hand(variance, clip):
    """Exact: one walk of three steps in float64, each density from the β_t by the form with ε, in plain Python."""
    c = NoiseSchedule(numbers(0.3, 0.5, 0.98))
    beta = c.beta.tolist()
    x_0, noise = random(4, 1, 1, 2, seed=1), [random(4, 1, 1, 2, seed=s) for s in (2, 3, 4)]

    def model(x_t, t):
        return torch.tanh(x_t) + 0.1 * t[:, None, None, None]

    def log_normal(y, mean, variance):
        return -0.5 * (math.log(2 * math.pi * variance) + (y - mean) ** 2 / variance)

    expected, below, alpha_bar = torch.zeros_like(x_0), x_0, 1.0
    for t in (1, 2, 3):
        alpha, before = 1 - beta[t], alpha_bar
        alpha_bar = alpha * before
        x_t = math.sqrt(alpha) * below + math.sqrt(beta[t]) * noise[t - 1]
        eps = model(x_t, torch.full((4,), t))
        if clip is not None:
            guess = ((x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)).clamp(-clip, clip)
            eps = (x_t - math.sqrt(alpha_bar) * guess) / math.sqrt(1 - alpha_bar)
        mean = (x_t - beta[t] / math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha)
        spread = beta[t] if variance == "beta" or t == 1 else (1 - before) / (1 - alpha_bar) * beta[t]
        expected = expected - log_normal(x_t, math.sqrt(alpha) * below, beta[t]) + log_normal(below, mean, spread)
        below = x_t
    expected = (expected + log_normal(below, 0.0, 1.0)).sum((1, 2, 3))
    chain = diffusion_as_hierarchy(model, c, variance, levels=None, clip=clip)
    torch.testing.assert_close(hierarchical_elbo(chain, x_0, noise=noise), expected, rtol=1e-9, atol=1e-9)
    assert len(chain.encoders) == 3 and len(chain.decoders) == 2


@pytest.mark.equation("hierarchical-elbo")
def test_one_layer_is_the_bound_of_a_vae():
    """Exact and by quadrature: T = 1 is the importance-weighted bound with one sample, and has the ELBO's mean."""
    W, A = numbers(0.8, -0.5)[:, None], numbers(0.4, 0.1)[None]
    vae = LinearVAE(W, numbers(0.1, -0.2), numbers(0.3)[0], A, numbers(0.2))
    model, x = Hierarchy([vae.encode], [], vae.log_likelihood), random(5, 2, seed=3)
    same = importance_weighted_bound(vae, x, 1, torch.Generator().manual_seed(4))
    torch.testing.assert_close(hierarchical_elbo(model, x, torch.Generator().manual_seed(4)), same)
    rows, noise = x.repeat_interleave(len(NODES), 0), NODES.repeat(5)[:, None]
    drawn = (hierarchical_elbo(model, rows, noise=[noise]).reshape(5, -1) * WEIGHTS).sum(1)
    closed = (elbo(vae, rows, noise=noise).total.reshape(5, -1) * WEIGHTS).sum(1)
    torch.testing.assert_close(drawn, closed, rtol=0, atol=1e-9)
    assert (drawn < vae.log_prob(x)).all()


@pytest.mark.equation("hierarchical-elbo")
@pytest.mark.parametrize("levels, x_0", [(None, 0.3), (256, 0.2)])
def test_a_diffusion_model_with_one_layer(levels, x_0):
    """Quadrature: with T = 1 the diffusion model is a VAE, and the bound is L_T + L_0."""
    model, x = wrong_model(TWO, ONE), numbers(x_0)
    chain = diffusion_as_hierarchy(model, ONE, levels=levels)
    walk = hierarchical_elbo(chain, x.expand(len(NODES), 1), noise=[NODES[:, None]])
    total, L_T, _, L_0 = closed_form(model, x, ONE, levels=levels)
    assert (walk * WEIGHTS).sum().item() == pytest.approx(-total.item(), abs=1e-9)
    assert total.item() == pytest.approx(L_T.item() + L_0.item(), abs=1e-9)


@pytest.mark.equation("hierarchical-elbo")
def test_layers_of_any_width():
    """Exact: two layers of other widths than x, linear and Gaussian; a perfect chain gives log p(x) on every walk."""
    # p(z_2) = N(0, 1), p(z_1 | z_2) = N(0.6 z_2, 0.5), p(x | z_1) = N(W z_1, 0.3 I); posteriors by conditioning
    W, walk_noise = numbers(0.8, -0.5, 0.3)[:, None], [random(6, 1, seed=5), random(6, 1, seed=6)]
    prior_1 = 0.36 + 0.5
    vae = LinearVAE(math.sqrt(prior_1) * W, torch.zeros(3).double(), numbers(0.3)[0], W.T, numbers(1.0))
    x = random(6, 3, seed=7)

    def encode_x(x):
        mean, covariance = vae.posterior(x)  # of z_1 / √prior_1
        return math.sqrt(prior_1) * mean, prior_1 * covariance[0].expand(len(x), -1)

    def encode_z(z):
        return 0.6 / prior_1 * z, numbers(1 - 0.36 / prior_1)

    def log_likelihood(x, z):
        return gaussian_log_prob(x, z @ W.T, numbers(0.3)).sum(1)

    model = Hierarchy([encode_x, encode_z], [lambda z: (0.6 * z, numbers(0.5))], log_likelihood)
    values = hierarchical_elbo(model, x, noise=walk_noise)
    torch.testing.assert_close(values, vae.log_prob(x), rtol=1e-9, atol=1e-9)


def test_bad_arguments():
    with pytest.raises(ValueError, match='variance must be "beta" or "beta_tilde", got \'tilde\''):
        diffusion_as_hierarchy(lambda x, t: x, PAIR, "tilde")
    chain = diffusion_as_hierarchy(lambda x, t: x, PAIR, levels=None)
    with pytest.raises(ValueError, match="noise must have the latents' shape"):
        hierarchical_elbo(chain, random(2, 3), noise=[random(2, 3), random(2, 4)])


def test_float32_images_stay_float32():
    chain = diffusion_as_hierarchy(lambda x, t: x, PAIR, levels=None, clip=1.0)
    assert hierarchical_elbo(chain, random(2, 3).float(), torch.Generator().manual_seed(0)).dtype == torch.float32


def test_the_grey_levels_are_passed_on():
    model = wrong_model(TWO, PAIR)
    x, x_1 = numbers(-1.0, 1.0)[:, None], numbers(0.2, -0.4)[:, None]
    chain = diffusion_as_hierarchy(model, PAIR, levels=2)
    mean = x0_from_eps(x_1, model(x_1, torch.ones(2, dtype=torch.int64)), 1, PAIR)
    expected = discretised_log_likelihood(x, mean, PAIR.beta[1], levels=2)[:, 0]
    torch.testing.assert_close(chain.log_likelihood(x, x_1), expected)


# ---- how the estimators scatter ------------------------------------------------------------------------------


@pytest.mark.equation("log-ratio-variance")
def test_log_ratio_variance():
    """Symbolic: mean and variance of log N(y; m, v)/N(y; m + Δ, v) under N(m, v) are Δ²/2v and twice that."""
    xi, m, delta = sp.symbols("xi m Delta", real=True)
    v = sp.symbols("v", positive=True)
    y = m + sp.sqrt(v) * xi
    ratio = sp.expand(((y - m - delta) ** 2 - (y - m) ** 2) / (2 * v))
    moments = [1, 0, 1]  # of a standard normal number

    def mean(f):
        return sum(c * moments[k] for k, c in enumerate(sp.Poly(sp.expand(f), xi).all_coeffs()[::-1]))

    kl = mean(ratio)
    assert sp.simplify(kl - delta**2 / (2 * v)) == 0
    assert sp.simplify(mean(ratio**2) - kl**2 - 2 * kl) == 0


@pytest.mark.equation("log-ratio-variance")
def test_log_ratio_variance_in_the_package():
    """Quadrature: the log ratio of posterior and model step has the mean and half the variance of `kl_diagonal`."""
    model, t = wrong_model(TWO, EIGHT), 4
    x_0, x_t = numbers(0.7)[:, None], numbers(-0.4)[:, None]
    m, v = q_posterior(x_0, x_t, t, EIGHT)
    guess = x0_from_eps(x_t, model(x_t, torch.tensor([t])), t, EIGHT)
    chain = diffusion_as_hierarchy(model, EIGHT, "beta_tilde", levels=None)
    mean_p, v_p = chain.decoders[t - 2](x_t)
    torch.testing.assert_close(mean_p, q_posterior(guess, x_t, t, EIGHT)[0])
    y = (m + v.sqrt() * NODES)[0]
    ratio = gaussian_log_prob(y, m[0], v[0]) - gaussian_log_prob(y, mean_p[0], v_p[0])
    mean = (ratio * WEIGHTS).sum()
    assert mean.item() == pytest.approx(kl_diagonal(m, v, mean_p, v_p).item(), abs=1e-10)
    assert ((ratio - mean).square() * WEIGHTS).sum().item() == pytest.approx(2 * mean.item(), abs=1e-10)


@pytest.mark.equation("walk-variance")
def test_walk_variance():
    """Quadrature over both noises at T = 2: Var[W - C] is 2 L_1 plus the variance of the end's log ratio."""
    model, x = wrong_model(TWO, PAIR), numbers(0.4)
    chain = diffusion_as_hierarchy(model, PAIR, "beta_tilde", levels=None)

    def difference(a, b):
        rows = x.expand(len(a), 1)
        x_1 = q_step(rows, a, 1, PAIR)
        x_2 = q_step(x_1, b, 2, PAIR)
        noise = [a, eps_from_x0(x_2, rows, 2, PAIR)]
        bound = variational_bound(model, rows, PAIR, "beta_tilde", levels=None, noise=noise)
        return -hierarchical_elbo(chain, rows, noise=[a, b]) - bound.total

    mean = over_two_noises(difference)
    variance = over_two_noises(lambda a, b: difference(a, b).square()) - mean**2
    L_1 = closed_form(model, x, PAIR, variance="beta_tilde", levels=None)[2].item()
    end = PAIR.alpha_bar[2]
    x_2 = end.sqrt() * x + (1 - end).sqrt() * NODES
    ratio = gaussian_log_prob(x_2, end.sqrt() * x, 1 - end) - gaussian_log_prob(x_2, numbers(0.0), numbers(1.0))
    at_end = (ratio.square() * WEIGHTS).sum() - (ratio * WEIGHTS).sum().square()
    assert abs(mean) < 1e-9 and at_end > 1e-4
    assert variance == pytest.approx(2 * L_1 + at_end.item(), rel=1e-8)


@pytest.mark.equation("walk-variance")
def test_walk_variance_on_a_longer_chain():
    """Monte Carlo, 40,000 walks of eight steps, standard error 0.9 %: the same with terms of many steps."""
    model, n = wrong_model(TWO, EIGHT), 40_000
    rows, generator = numbers(0.4).expand(n, 1), torch.Generator().manual_seed(8)
    noise = [torch.randn(n, 1, generator=generator, dtype=torch.float64) for _ in range(8)]
    along, x_t = [], rows
    for t in range(1, 9):
        x_t = q_step(x_t, noise[t - 1], t, EIGHT)
        along.append(eps_from_x0(x_t, rows, t, EIGHT))
    bound = variational_bound(model, rows, EIGHT, "beta_tilde", levels=None, noise=along)
    walk = hierarchical_elbo(diffusion_as_hierarchy(model, EIGHT, "beta_tilde", None), rows, noise=noise)
    end = EIGHT.alpha_bar[8]
    x_8 = end.sqrt() * 0.4 + (1 - end).sqrt() * NODES
    ratio = gaussian_log_prob(x_8, end.sqrt() * 0.4, 1 - end) - gaussian_log_prob(x_8, numbers(0.0), numbers(1.0))
    at_end = (ratio.square() * WEIGHTS).sum() - (ratio * WEIGHTS).sum().square()
    predicted = 2 * bound.L_t.sum(1).mean() + at_end
    difference = -walk - bound.total
    deviations = (difference - difference.mean()).square()
    error = deviations.std() / math.sqrt(n)
    assert error < 0.02 * predicted
    assert abs(deviations.mean() - predicted) < 4 * error
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(n)


# ---- reconstruction ------------------------------------------------------------------------------------------


@pytest.mark.equation("decoder-nats")
def test_decoder_nats():
    """Exact: the VAE's density is a squared error with the weight 1/2σ_x² and a constant, by `log_likelihood`."""
    W, A = random(4, 2, seed=9), random(2, 4, seed=10)
    vae = LinearVAE(W, random(4, seed=11), numbers(0.37)[0], A, numbers(0.5, 0.2))
    x, z = random(5, 4, seed=12), random(5, 2, seed=13)
    expected = (x - vae.decode(z)).square().sum(1) / (2 * 0.37) + 4 / 2 * math.log(2 * math.pi * 0.37)
    torch.testing.assert_close(-vae.log_likelihood(x, z), expected, rtol=1e-12, atol=0)


@pytest.mark.equation("eps-is-weighted-x0")
def test_eps_is_weighted_x0_symbolic():
    """Symbolic: solved from x_t = √ᾱ x_0 + √(1-ᾱ) ε for both pairs, the quotient of the squares is ᾱ/(1-ᾱ)."""
    x_0, guess, x_t = sp.symbols("x_0 guess x_t", real=True)
    a = sp.symbols("a", positive=True)
    eps, eps_hat = ((x_t - sp.sqrt(a) * x) / sp.sqrt(1 - a) for x in (x_0, guess))
    assert sp.simplify((eps - eps_hat) ** 2 - a / (1 - a) * (x_0 - guess) ** 2) == 0


@pytest.mark.equation("eps-is-weighted-x0")
@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(), EIGHT])
@pytest.mark.parametrize("predicts", ["eps", "x_0", "v"])
def test_eps_is_weighted_x0(predicts, schedule):
    """Exact, for an arbitrary network that predicts ε, x_0 or v: the errors differ by SNR(t) = ᾱ_t/(1-ᾱ_t)."""
    model = as_eps(lambda x_t, t: torch.sin(3 * x_t) - 0.2, schedule, predicts)
    x_0, eps = random(3, 1, 4, 4, seed=14), random(3, 1, 4, 4, seed=15)
    for t in (1, 2, schedule.T // 2, schedule.T):
        x_t = q_sample(x_0, eps, t, schedule)
        eps_hat = model(x_t, torch.full((3,), t))
        x_0_hat = x0_from_eps(x_t, eps_hat, t, schedule)
        alpha_bar = math.prod(1 - b for b in schedule.beta.tolist()[1 : t + 1])
        snr = alpha_bar / (1 - alpha_bar)
        assert schedule.snr()[t].item() == pytest.approx(snr, rel=1e-9)
        left, right = (eps - eps_hat).square().sum((1, 2, 3)), (x_0 - x_0_hat).square().sum((1, 2, 3))
        torch.testing.assert_close(left, snr * right, rtol=1e-6, atol=0)


@pytest.mark.equation("layer-as-decoder")
@pytest.mark.parametrize("schedule", [EIGHT, cosine_schedule(40)])
def test_layer_as_decoder(schedule):
    """Exact: each L_{t-1} of `variational_bound` with σ_t² = β̃_t is ‖x_0 - x̂_0‖²/2v_t, 1/v_t = SNR(t-1) - SNR(t)."""

    def model(x_t, t):
        return torch.tanh(x_t) - 0.02 * t[:, None]

    x_0, noise = random(4, 3, seed=16), random(schedule.T, 4, 3, seed=17)
    bound = variational_bound(model, x_0, schedule, "beta_tilde", levels=None, noise=noise)
    ratios = [a / (1 - a) for a in schedule.alpha_bar.tolist()[1:]]  # SNR(1), …, SNR(T)
    for i, (before, now) in enumerate(pairwise(ratios)):
        t = i + 2
        x_t = q_sample(x_0, noise[i + 1], t, schedule)
        x_0_hat = x0_from_eps(x_t, model(x_t, torch.full((4,), t)), t, schedule)
        expected = 0.5 * (before - now) * (x_0 - x_0_hat).square().sum(1)
        torch.testing.assert_close(bound.L_t[:, i], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.equation("total-weight")
@pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(), EIGHT])
def test_total_weight(schedule):
    """Exact: the weights of the image's error for t = 2 … T, in the form with β_t and ᾱ_t, telescope."""
    total, alpha_bar = 0.0, 1 - schedule.beta[1].item()
    first = alpha_bar / (1 - alpha_bar)
    for beta in schedule.beta.tolist()[2:]:
        before, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        total += before * beta / (2 * (1 - before) * (1 - alpha_bar))
    assert total == pytest.approx((first - alpha_bar / (1 - alpha_bar)) / 2, rel=1e-9)
    snr = schedule.snr()
    assert total == pytest.approx(((snr[1] - snr[-1]) / 2).item(), rel=1e-9)


# ---- the rate ------------------------------------------------------------------------------------------------


@pytest.mark.equation("learned-prior")
@pytest.mark.parametrize("make", [lambda world, schedule: world.denoiser(schedule), wrong_model])
@pytest.mark.parametrize("x_0", [-1.1, 0.2, 1.2])
def test_learned_prior(make, x_0):
    """Quadrature at T = 2: L_T + L_1 is KL(q(x_1|x_0) ‖ p(x_1)) plus the mean KL of the layer above, not negative."""
    model, h = make(TWO, PAIR), 1 / 32
    x = torch.arange(-8, 8 + h / 2, h, dtype=torch.float64)
    a_1, a_2 = (1 - b for b in PAIR.beta.tolist()[1:])
    eps = model(x[:, None], torch.full(x.shape, 2))[:, 0]
    mean = (x - (1 - a_2) / math.sqrt(1 - a_1 * a_2) * eps) / math.sqrt(a_2)  # of p(x_1 | x_2)
    down = gaussian_log_prob(x[:, None], mean[None], numbers(1 - a_2))  # [x_1, x_2]
    joint = down + gaussian_log_prob(x, numbers(0.0), numbers(1.0))[None]
    p_1 = torch.logsumexp(joint, 1) + math.log(h)
    q_1 = gaussian_log_prob(x, numbers(math.sqrt(a_1) * x_0), numbers(1 - a_1))
    up = gaussian_log_prob(x[None], math.sqrt(a_2) * x[:, None], numbers(1 - a_2))
    to_prior = (q_1.exp() * (q_1 - p_1)).sum().item() * h
    above = (q_1.exp()[:, None] * up.exp() * (up - (joint - p_1[:, None]))).sum().item() * h * h
    _, L_T, L_t, _ = closed_form(model, numbers(x_0), PAIR, levels=None)
    assert above > 1e-7 and to_prior > 1e-3
    assert L_T.item() + L_t.item() == pytest.approx(to_prior + above, abs=1e-8)


# ---- spheres -------------------------------------------------------------------------------------------------


@pytest.mark.equation("norm-concentration", "midpoint-norm")
def test_norms():
    """Symbolic: E u² = 1 and Var u² = 2 by integration, so d and 2d for a sum; the midpoint is √(d/8) of these off."""
    u, w = sp.symbols("u w", real=True)
    d = sp.symbols("d", positive=True)  # odd moments are 0, by symmetry

    def bell(x):
        return sp.exp(-(x**2) / 2) / sp.sqrt(2 * sp.pi)

    moments = [2 * sp.integrate(u**k * bell(u), (u, 0, sp.oo)) if k % 2 == 0 else 0 for k in range(5)]
    square, variance = moments[2], moments[4] - moments[2] ** 2
    assert (square, variance) == (1, 2)
    terms = sp.Poly(((u + w) / 2) ** 2, u, w).terms()
    middle = sum(c * moments[i] * moments[j] for (i, j), c in terms)
    assert middle == sp.Rational(1, 2)
    assert sp.simplify((d * square - d * middle) / sp.sqrt(d * variance) - sp.sqrt(d / 8)) == 0


@pytest.mark.equation("norm-concentration", "midpoint-norm")
@pytest.mark.parametrize("d", [32, 784])
def test_norms_of_draws(d):
    """Monte Carlo, 8,000 draws: mean and variance of ‖u‖², and of the midpoint, within 4 standard errors."""
    n = 8000
    u, w = random(n, d, seed=18), random(n, d, seed=19)
    middle = (0.5 * (u + w)).square().sum(1)
    u = u.square().sum(1)
    assert abs(u.mean() - d) < 4 * math.sqrt(2 * d / n)
    assert abs(u.var() / (2 * d) - 1) < 4 * math.sqrt((2 + 12 / d) / n)
    off = (d - middle.mean()) / u.std()
    assert abs(off - math.sqrt(d / 8)) < 0.04 * math.sqrt(d / 8)


@pytest.mark.equation("slerp-norm")
def test_slerp_norm():
    """Symbolic: the norm of the arc between unit vectors at the angle Ω is 1 for every r; its ends are u and w."""
    r, omega, a, b = sp.symbols("r Omega a b", real=True)
    A, B = sp.sin(a) / sp.sin(a + b), sp.sin(b) / sp.sin(a + b)  # a = (1-r)Ω, b = rΩ
    norm = A**2 + B**2 + 2 * A * B * sp.cos(a + b)
    assert sp.simplify(sp.expand_trig(norm) - 1) == 0
    weights = [sp.sin((1 - r) * omega) / sp.sin(omega), sp.sin(r * omega) / sp.sin(omega)]
    assert [e.subs(r, 0) for e in weights] == [1, 0] and [e.subs(r, 1) for e in weights] == [0, 1]
