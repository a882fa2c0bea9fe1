"""Proofs of the equations of the chapter "Reparameterization"."""

import math

import numpy as np
import pytest
import sympy as sp
import torch

from diffbook.data import fashion_subset
from diffbook.diffusion import eps_from_x0, q_sample, q_step, x0_from_eps
from diffbook.gaussian import GaussianMixture, gaussian_log_prob
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule

SCHEDULE = linear_schedule()
E, MU, C = sp.Symbol("e", real=True), sp.Symbol("mu", real=True), sp.Symbol("c", real=True)
X, SIGMA = sp.Symbol("x", real=True), sp.Symbol("sigma", positive=True)
R, K = sp.Symbol("r", real=True), sp.Symbol("k")
POLYNOMIAL = sum(c * X**n for n, c in enumerate(sp.symbols("c0:6")))
PHI = sp.exp(-(E**2) / 2) / sp.sqrt(2 * sp.pi)
DENSITY = sp.exp(-((X - MU) ** 2) / (2 * SIGMA**2)) / sp.sqrt(2 * sp.pi * SIGMA**2)


def numbers(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expectation(polynomial, *noises):
    """E of a polynomial in independent standard normal ε: E[ε^k] = (k-1)!! for even k, 0 for odd k."""
    total = sp.Integer(0)
    for powers, factor in sp.Poly(sp.expand(polynomial), *noises).terms():
        moments = [sp.factorial2(k - 1) if k % 2 == 0 else sp.Integer(0) for k in powers]
        total += factor * sp.prod(moments)
    return sp.expand(total)


def tilted_expectation(polynomial):
    """E[exp(k(μ+σε)) P(ε)]: completing the square turns it into exp(kμ + k²σ²/2) E[P(ε + kσ)]."""
    a = K * SIGMA
    assert sp.expand(a * E - E**2 / 2 - (a**2 / 2 - (E - a) ** 2 / 2)) == 0
    shifted = sp.sympify(polynomial).subs(E, E + a)
    return sp.exp(K * MU + a**2 / 2) * expectation(shifted, E)


def variance(polynomial, *noises):
    return sp.expand(expectation(polynomial**2, *noises) - expectation(polynomial, *noises) ** 2)


def equal(a, b):
    return sp.simplify(sp.expand(a - b)) == 0


def alpha_bar_by_hand(schedule, t):
    """ᾱ_t as a product of Python numbers, from the β_s alone."""
    return math.prod(1 - schedule.beta[s].item() for s in range(1, t + 1))


def stepped_coefficients(schedule):
    """Row t holds the coefficients of x_0, ε_1, …, ε_T in x_t, from `q_step` on unit vectors."""
    unit = torch.eye(schedule.T + 1, dtype=torch.float64)
    x, rows = unit[:1], [unit[0]]
    for t in range(1, schedule.T + 1):
        x = q_step(x, unit[t : t + 1], t, schedule)
        rows.append(x[0])
    return torch.stack(rows)


@pytest.mark.equation("reparameterization")
def test_reparameterization_density():
    """Symbolic: μ + σ ε has the density N(μ, σ²) by change of variables; so says `gaussian_log_prob`."""
    assert equal(PHI.subs(E, (X - MU) / SIGMA) / SIGMA, DENSITY)
    assert equal(DENSITY.subs(X, MU + SIGMA * E) * SIGMA, PHI)
    point = {X: 0.7, MU: -0.4, SIGMA: 1.7}
    ours = gaussian_log_prob(*numbers(0.7, -0.4, 1.7**2))
    assert ours.item() == pytest.approx(float(sp.log(DENSITY).subs(point)), rel=1e-12)


@pytest.mark.equation("reparameterization")
def test_reparameterization_in_the_sampler():
    """Exact: with one component `GaussianMixture.sample` gives mean + √variance · ε for the drawn ε."""
    mean, var = random(1, 5, seed=1), random(1, 5, seed=2).square() + 0.1
    world = GaussianMixture(torch.ones(1, dtype=torch.float64), mean, var)
    samples = world.sample(200_000, generator=torch.Generator().manual_seed(3))
    standard = GaussianMixture(torch.ones(1).double(), torch.zeros_like(mean), torch.ones_like(var))
    eps = standard.sample(200_000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(samples, mean + var.sqrt() * eps, rtol=1e-12, atol=1e-12)
    # that ε is standard normal: mean within 5 standard errors 1/√n, variance within 5 of √(2/n)
    assert eps.mean(0).abs().max() < 5 / math.sqrt(200_000)
    assert (eps.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 200_000)


@pytest.mark.equation("quadratic-gradients")
def test_quadratic_gradients():
    """Symbolic: E[(x-c)²] = (μ-c)² + σ² from the moments of ε; its derivatives along μ and σ."""
    value = expectation((MU + SIGMA * E - C) ** 2, E)
    assert equal(value, (MU - C) ** 2 + SIGMA**2)
    assert equal(sp.diff(value, MU), 2 * (MU - C))
    assert equal(sp.diff(value, SIGMA), 2 * SIGMA)


@pytest.mark.equation("pathwise-gradient")
def test_pathwise_gradient_of_polynomials():
    """Symbolic: for any polynomial f of degree 5, ∂ E[f(μ+σε)] against E[f'(μ+σε)] and E[f'(μ+σε) ε]."""
    at_sample = {X: MU + SIGMA * E}
    value = expectation(POLYNOMIAL.subs(at_sample), E)
    slope = sp.diff(POLYNOMIAL, X).subs(at_sample)
    assert equal(sp.diff(value, MU), expectation(slope, E))
    assert equal(sp.diff(value, SIGMA), expectation(slope * E, E))


@pytest.mark.equation("pathwise-gradient")
def test_pathwise_gradient_of_exponentials():
    """Symbolic: the same for f(x) = exp(k x) with any complex k, so for sines and cosines too."""
    value = tilted_expectation(1)  # f(μ+σε) = exp(kμ) exp(kσε), and f' = k f
    assert equal(sp.diff(value, MU), K * tilted_expectation(1))
    assert equal(sp.diff(value, SIGMA), K * tilted_expectation(E))


@pytest.mark.equation("pathwise-gradient")
def test_pathwise_gradient_is_what_rsample_computes():
    """Exact: automatic differentiation through `rsample` averages f'(x) and f'(x) ε for the drawn ε."""
    mu = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    x = torch.distributions.Normal(mu, sigma).rsample((1000,))
    along_mu, along_sigma = torch.autograd.grad(torch.sin(x).mean(), (mu, sigma))
    x = x.detach()
    eps = (x - 0.3) / 0.8
    assert along_mu.item() == pytest.approx(torch.cos(x).mean().item(), rel=1e-12)
    assert along_sigma.item() == pytest.approx((torch.cos(x) * eps).mean().item(), rel=1e-12)


@pytest.mark.equation("score-function-gradient")
def test_score_function_gradient_of_polynomials():
    """Symbolic: for any polynomial f of degree 5, ∂ E[f(x)] against E[f(x) ∂ log p(x)], along μ and σ."""
    at_sample = {X: MU + SIGMA * E}
    value = expectation(POLYNOMIAL.subs(at_sample), E)
    for parameter in (MU, SIGMA):
        score = sp.simplify(sp.diff(sp.log(DENSITY), parameter).subs(at_sample))
        assert equal(sp.diff(value, parameter), expectation(POLYNOMIAL.subs(at_sample) * score, E))


@pytest.mark.equation("score-function-gradient")
def test_score_function_gradient_of_exponentials():
    """Symbolic: the same for f(x) = exp(k x) with any complex k, so for sines and cosines too."""
    value = tilted_expectation(1)
    for parameter in (MU, SIGMA):
        score = sp.simplify(sp.diff(sp.log(DENSITY), parameter).subs(X, MU + SIGMA * E))
        assert equal(sp.diff(value, parameter), tilted_expectation(score))


@pytest.mark.equation("score-function-gradient")
def test_score_function_gradient_needs_no_derivative():
    """Quadrature: for a step f the score-function integral is the derivative of the tail probability."""
    mu, sigma, edge = 0.4, 1.3, 1.1
    z = torch.linspace((edge - mu) / sigma, 12, 200_001, dtype=torch.float64)  # f = 1 only beyond the edge
    phi = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    integral_ = torch.trapezoid(z / sigma * phi, z).item()
    h = 1e-4

    def tail(m):
        return 0.5 * math.erfc((edge - m) / sigma / math.sqrt(2))

    assert integral_ == pytest.approx((tail(mu + h) - tail(mu - h)) / (2 * h), rel=1e-6)


@pytest.mark.equation("gaussian-scores")
def test_gaussian_scores():
    """Symbolic from the density, and exact by automatic differentiation of `gaussian_log_prob`."""
    log_density = sp.log(DENSITY)
    assert equal(sp.diff(log_density, MU), (X - MU) / SIGMA**2)
    assert equal(sp.diff(log_density, SIGMA).subs(X, MU + SIGMA * E), (E**2 - 1) / SIGMA)
    mu = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(1.5, dtype=torch.float64)
    along_mu, along_sigma = torch.autograd.grad(gaussian_log_prob(x, mu, sigma.square()), (mu, sigma))
    eps = (1.5 - 0.3) / 0.8
    assert along_mu.item() == pytest.approx(eps / 0.8, rel=1e-12)
    assert along_sigma.item() == pytest.approx((eps**2 - 1) / 0.8, rel=1e-12)


@pytest.mark.equation("score-baseline")
def test_score_baseline():
    """Symbolic: both scores have mean 0; with any constant subtracted the mean is still the gradient."""
    b = sp.Symbol("b", real=True)
    scores = {MU: E / SIGMA, SIGMA: (E**2 - 1) / SIGMA}
    value = expectation((MU + SIGMA * E - C) ** 2, E)
    for parameter, score in scores.items():
        assert equal(expectation(score, E), 0)
        estimate = ((MU + SIGMA * E - C) ** 2 - b) * score
        assert equal(expectation(estimate, E), sp.diff(value, parameter))


def quadratic_estimates(noise, rest=0, baseline=0):
    """Estimates for f(x) = (x-c)² (+ rest) with μ - c = r σ: {(kind, parameter): polynomial in the noise}."""
    distance = SIGMA * (R + noise)
    f = distance**2 + rest - baseline
    return {
        ("pathwise", "mu"): 2 * distance,
        ("pathwise", "sigma"): 2 * distance * noise,
        ("score", "mu"): f * noise / SIGMA,
        ("score", "sigma"): f * (noise**2 - 1) / SIGMA,
    }


@pytest.mark.equation("gradient-variances")
def test_gradient_variances():
    """Symbolic: all six variances from the exact moments of ε; each estimate has the gradient as its mean."""
    plain = quadratic_estimates(E)
    with_baseline = quadratic_estimates(E, baseline=SIGMA**2 * (1 + R**2))
    claims = [
        (plain["pathwise", "mu"], 4),
        (plain["pathwise", "sigma"], 4 * R**2 + 8),
        (plain["score", "mu"], R**4 + 14 * R**2 + 15),
        (plain["score", "sigma"], 2 * R**4 + 60 * R**2 + 74),
        (with_baseline["score", "mu"], 8 * R**2 + 10),
        (with_baseline["score", "sigma"], 40 * R**2 + 56),
    ]
    for k, (estimate, claim) in enumerate(claims):
        assert equal(variance(estimate, E), SIGMA**2 * claim)
        assert equal(expectation(estimate, E), 2 * SIGMA * R if k % 2 == 0 else 2 * SIGMA)


@pytest.mark.equation("gradient-variances-dimension")
@pytest.mark.parametrize("D", [1, 2, 3, 4])
def test_gradient_variances_dimension(D):
    """Symbolic: the three variances from the exact moments of D independent ε, for D = 1, 2, 3, 4."""
    noises = sp.symbols(f"e1:{D + 1}", real=True)
    rest = sum((SIGMA * (R + e)) ** 2 for e in noises[1:])
    m, w = (D - 1) * (1 + R**2), (D - 1) * (4 * R**2 + 2)
    plain = quadratic_estimates(noises[0], rest)
    with_baseline = quadratic_estimates(noises[0], rest, baseline=D * SIGMA**2 * (1 + R**2))
    claims = [
        (plain["pathwise", "mu"], 4),
        (plain["score", "mu"], R**4 + 14 * R**2 + 15 + 2 * m * (R**2 + 3) + m**2 + w),
        (with_baseline["score", "mu"], 8 * R**2 + 10 + w),
    ]
    for estimate, claim in claims:
        assert equal(variance(estimate, *noises), SIGMA**2 * claim)


@pytest.mark.equation("step-gradient")
def test_step_gradient():
    """Symbolic: d/dμ of P(x > c) is the density at c; the mean difference quotient tends to it."""
    tail = sp.erfc((C - MU) / (SIGMA * sp.sqrt(2))) / 2
    assert equal(sp.diff(tail, MU), DENSITY.subs(X, C))
    assert equal(sp.diff(tail, C), -DENSITY.subs(X, C))  # the tail is that of the density
    assert sp.limit(tail.subs({MU: 0, SIGMA: 1}), C, sp.oo) == 0
    h = sp.Symbol("h", positive=True)
    probability_to_jump = tail.subs(MU, MU + h) - tail
    assert equal(sp.limit(probability_to_jump / h, h, 0), DENSITY.subs(X, C))
    density = gaussian_log_prob(*numbers(2.0, 1.0, 2.25)).exp().item()
    assert density == pytest.approx(float(DENSITY.subs({X: 2, MU: 1, SIGMA: 1.5})), rel=1e-12)


@pytest.mark.equation("merge-gaussians")
def test_merge_gaussians_identity():
    """Symbolic: α_t β_{t-1} + β_t = 1 - α_t α_{t-1}; characteristic functions give the law of the sum."""
    a, b = sp.symbols("alpha_t alpha_prev", positive=True)
    assert equal(a * (1 - b) + (1 - a), 1 - a * b)
    # characteristic functions of independent summands multiply; that of N(0, v) is exp(-v k²/2)
    k = sp.Symbol("k", real=True)

    def characteristic(v):
        return sp.exp(-v * k**2 / 2)

    merged = characteristic(a * (1 - b)) * characteristic(1 - a)
    assert sp.simplify(merged / characteristic(1 - a * b)) == 1


@pytest.mark.equation("merge-gaussians")
@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule()], ids=["linear", "cosine"])
def test_merge_gaussians_in_the_steps(schedule):
    """Exact: two `q_step` on unit vectors give √α_t√β_{t-1} and √β_t; squares add up to 1 - α_t α_{t-1}."""
    unit = torch.eye(3, dtype=torch.float64)
    for t in (2, 3, 100, 999, 1000):
        x = q_step(q_step(unit[:1], unit[1:2], t - 1, schedule), unit[2:], t, schedule)[0]
        alpha, beta = 1 - schedule.beta[t].item(), schedule.beta[t].item()
        previous = schedule.beta[t - 1].item()
        expected = [math.sqrt(alpha * (1 - previous)), math.sqrt(alpha * previous), math.sqrt(beta)]
        assert x.tolist() == pytest.approx(expected, rel=1e-12)
        assert x[1:].square().sum().item() == pytest.approx(1 - alpha * (1 - previous), rel=1e-12)


@pytest.mark.equation("forward-marginal")
def test_forward_marginal_induction():
    """Symbolic: base case and induction step of the variance, for arbitrary α and ᾱ."""
    alpha, previous = sp.symbols("alpha alpha_bar_prev", positive=True)
    assert equal(alpha * (1 - previous) + (1 - alpha), 1 - alpha * previous)
    assert equal((alpha * (1 - previous) + (1 - alpha)).subs(previous, 1), 1 - alpha)  # t = 1: ᾱ_0 = 1


@pytest.mark.equation("forward-marginal")
@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule()], ids=["linear", "cosine"])
def test_forward_marginal_from_the_steps(schedule):
    """Exact: coefficients of t `q_step` on unit vectors have mean factor √ᾱ_t and squares 1-ᾱ_t, every t."""
    coefficients = stepped_coefficients(schedule)
    for t in range(1, schedule.T + 1):
        alpha_bar = alpha_bar_by_hand(schedule, t)
        assert coefficients[t, 0].item() == pytest.approx(math.sqrt(alpha_bar), rel=1e-11, abs=1e-14)
        assert coefficients[t, 1:].square().sum().item() == pytest.approx(1 - alpha_bar, rel=1e-11)


@pytest.mark.equation("forward-marginal")
def test_forward_marginal_of_a_mixture():
    """Exact: `GaussianMixture.at` equals t single steps on the mixture, each x → √α_s x + N(0, β_s)."""
    world = GaussianMixture(torch.tensor([1.0, 3.0]).double(), random(2, 3), random(2, 3, seed=1).square())
    stepped = world
    for s in range(1, 301):
        beta = SCHEDULE.beta[s].item()
        stepped = stepped.after(math.sqrt(1 - beta), beta)
        if s in (1, 2, 10, 300):
            jumped = world.at(s, SCHEDULE)
            torch.testing.assert_close(jumped.means, stepped.means, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(jumped.variances, stepped.variances, rtol=1e-12, atol=1e-12)


@pytest.mark.equation("forward-marginal", "forward-sample")
def test_forward_marginal_on_images():
    """Monte Carlo: 200 steps and one jump on 128 real images, three moments within 4 standard errors."""
    x_0 = fashion_subset("test").x(slice(0, 128))
    generator = torch.Generator().manual_seed(0)
    x, t = x_0, 200
    for s in range(1, t + 1):
        x = q_step(x, torch.randn(x.shape, generator=generator), s, SCHEDULE)
    jumped = q_sample(x_0, torch.randn(x.shape, generator=generator), t, SCHEDULE)
    alpha_bar = alpha_bar_by_hand(SCHEDULE, t)
    n = x_0.numel()
    for x_t in (x, jumped):
        z = ((x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)).double()
        # standard errors of the means of z, z² and z⁴: variances 1, 3 - 1 and 105 - 9
        assert abs(z.mean().item()) < 4 / math.sqrt(n)
        assert abs(z.square().mean().item() - 1) < 4 * math.sqrt(2 / n)
        assert abs(z.pow(4).mean().item() - 3) < 4 * math.sqrt(96 / n)


@pytest.mark.equation("forward-sample")
@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule()], ids=["linear", "cosine"])
def test_forward_sample(schedule):
    """Exact: `q_sample` against √ᾱ_t x_0 + √(1-ᾱ_t) ε with ᾱ_t a product of Python numbers; mixed times."""
    t = torch.tensor([1, 2, 3, 10, 100, 500, 999, 1000])
    x_0, eps = random(8, 1, 2, 2, seed=1), random(8, 1, 2, 2, seed=2)
    x_t = q_sample(x_0, eps, t, schedule)
    for i, time in enumerate(t.tolist()):
        alpha_bar = alpha_bar_by_hand(schedule, time)
        expected = math.sqrt(alpha_bar) * x_0[i] + math.sqrt(1 - alpha_bar) * eps[i]
        torch.testing.assert_close(x_t[i], expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(x_t[i : i + 1], q_sample(x_0[i : i + 1], eps[i : i + 1], time, schedule))


@pytest.mark.equation("combined-noise")
def test_combined_noise_telescopes():
    """Symbolic: with arbitrary α_1 … α_6 the squared coefficients of ε̄_t add up to 1."""
    alphas = sp.symbols("a1:7", positive=True)
    alpha_bar = [sp.prod(alphas[:s]) for s in range(7)]
    total = sum(alpha_bar[6] / alpha_bar[s] * (1 - alphas[s - 1]) for s in range(1, 7))
    assert equal(total, 1 - alpha_bar[6])


@pytest.mark.equation("combined-noise")
@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule(100)], ids=["linear", "cosine"])
def test_combined_noise_lands_where_the_steps_land(schedule):
    """Exact: t `q_step` with noises ε_s, and one `q_sample` with ε̄_t, give the same numbers."""
    for t in (1, 2, 30, schedule.T - 1):
        eps, x_0 = random(t, 1, 4, seed=t), random(1, 4, seed=99)
        x = x_0
        for s in range(1, t + 1):
            x = q_step(x, eps[s - 1], s, schedule)
        alpha_bar = [alpha_bar_by_hand(schedule, s) for s in range(t + 1)]
        weights = [math.sqrt(alpha_bar[t] / alpha_bar[s] * schedule.beta[s].item()) for s in range(1, t + 1)]
        combined = sum(w * e for w, e in zip(weights, eps, strict=True)) / math.sqrt(1 - alpha_bar[t])
        torch.testing.assert_close(q_sample(x_0, combined, t, schedule), x, rtol=1e-10, atol=1e-11)


@pytest.mark.equation("x0-from-eps", "eps-from-x0")
def test_conversions_symbolic():
    """Symbolic: both conversions solve x_t = √ᾱ x_0 + √(1-ᾱ) ε, each for its unknown, and uniquely."""
    a = sp.Symbol("a", positive=True)
    x_0, eps, x_t = sp.symbols("x_0 eps x_t", real=True)
    forward = sp.Eq(x_t, sp.sqrt(a) * x_0 + sp.sqrt(1 - a) * eps)
    assert [equal(s, (x_t - sp.sqrt(1 - a) * eps) / sp.sqrt(a)) for s in sp.solve(forward, x_0)] == [True]
    assert [equal(s, (x_t - sp.sqrt(a) * x_0) / sp.sqrt(1 - a)) for s in sp.solve(forward, eps)] == [True]


@pytest.mark.equation("x0-from-eps")
def test_x0_from_eps():
    """Exact: `x0_from_eps` undoes √ᾱ_t x_0 + √(1-ᾱ_t) ε made with ᾱ_t as a product of Python numbers."""
    x_0, eps = random(1, 6, seed=1), random(1, 6, seed=2)
    for t in (1, 2, 10, 300, 1000):
        alpha_bar = alpha_bar_by_hand(SCHEDULE, t)
        x_t = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps
        torch.testing.assert_close(x0_from_eps(x_t, eps, t, SCHEDULE), x_0, rtol=1e-10, atol=1e-10)


@pytest.mark.equation("eps-from-x0")
def test_eps_from_x0():
    """Exact: `eps_from_x0` finds the ε in √ᾱ_t x_0 + √(1-ᾱ_t) ε, ᾱ_t a product of Python numbers."""
    x_0, eps = random(1, 6, seed=1), random(1, 6, seed=2)
    for t in (1, 2, 10, 300, 1000):
        alpha_bar = alpha_bar_by_hand(SCHEDULE, t)
        x_t = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps
        torch.testing.assert_close(eps_from_x0(x_t, x_0, t, SCHEDULE), eps, rtol=1e-10, atol=1e-10)


@pytest.mark.equation("error-amplification")
def test_error_amplification():
    """Exact: an error in ε passes `x0_from_eps` with the factor -√((1-ᾱ_t)/ᾱ_t) = -1/√SNR(t)."""
    x_0, eps, error = random(1, 6, seed=1), random(1, 6, seed=2), 0.1 * random(1, 6, seed=3)
    for t in (1, 2, 10, 300, 1000):
        alpha_bar = alpha_bar_by_hand(SCHEDULE, t)
        x_t = q_sample(x_0, eps, t, SCHEDULE)
        difference = x0_from_eps(x_t, eps + error, t, SCHEDULE) - x_0
        gain = math.sqrt((1 - alpha_bar) / alpha_bar)
        torch.testing.assert_close(difference, -gain * error, rtol=1e-8, atol=1e-10)
        assert gain == pytest.approx(1 / math.sqrt(SCHEDULE.snr()[t].item()), rel=1e-10)


@pytest.mark.equation("slip-variance")
def test_slip_variance():
    """Symbolic: the three total variances for data of variance 1, and where their bounds are met."""
    a, u, eps, x_0 = sp.Symbol("a", positive=True), sp.Symbol("u", positive=True), *sp.symbols("eps x_0")
    power = {"right": sp.Rational(1, 2), "variance as std": 1, "std as variance": sp.Rational(1, 4)}
    total = {k: variance(sp.sqrt(a) * x_0 + (1 - a) ** p * eps, x_0, eps) for k, p in power.items()}
    assert equal(total["right"], 1)
    assert equal(total["variance as std"], 1 - a * (1 - a))
    assert equal(total["variance as std"], sp.Rational(3, 4) + (a - sp.Rational(1, 2)) ** 2)
    assert equal(total["std as variance"], a + sp.sqrt(1 - a))
    in_u = total["std as variance"].subs(a, 1 - u**2)  # u = √(1-ᾱ)
    assert equal(in_u, sp.Rational(5, 4) - (u - sp.Rational(1, 2)) ** 2)
    assert total["variance as std"].subs(a, sp.Rational(1, 2)) == sp.Rational(3, 4)
    assert total["std as variance"].subs(a, sp.Rational(3, 4)) == sp.Rational(5, 4)


def gaussian_world(mean, var):
    m, s2 = (torch.tensor([[v]], dtype=torch.float64) for v in (mean, var))
    return GaussianMixture(torch.ones(1, dtype=torch.float64), m, s2)


@pytest.mark.equation("gaussian-denoiser")
def test_gaussian_denoiser():
    """Symbolic: optimum of the linear loss, error uncorrelated with x_t; as `GaussianMixture.denoiser`."""
    a, b, s, k, u, eps = sp.symbols("a b s k u eps", positive=True)
    x, best = a * s * u + b * eps, b / (a**2 * s**2 + b**2)
    loss = expectation((eps - k * x) ** 2, u, eps)
    assert equal(sp.diff(loss, k).subs(k, best), 0) and sp.diff(loss, k, 2).is_positive
    assert equal(expectation((eps - best * x) * x, u, eps), 0)
    mean, var = 0.7, 0.09
    denoiser = gaussian_world(mean, var).denoiser(SCHEDULE)
    x_t = random(5, 1, seed=4)
    for t in (1, 2, 10, 300, 1000):
        alpha_bar = alpha_bar_by_hand(SCHEDULE, t)
        factor = math.sqrt(1 - alpha_bar) / (alpha_bar * var + 1 - alpha_bar)
        expected = factor * (x_t - math.sqrt(alpha_bar) * mean)
        ours = denoiser(x_t, torch.full((5,), t))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.equation("shifted-loss")
def test_shifted_loss():
    """Quadrature: Gauss-Hermite over x_0 and ε for `GaussianMixture.denoiser` on data of another time."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    mean, var = -0.6, 0.04
    denoiser = gaussian_world(mean, var).denoiser(SCHEDULE)
    x_0 = (mean + math.sqrt(var) * nodes).repeat_interleave(12)[:, None]
    eps = nodes.repeat(12)[:, None]
    weight = (weights[:, None] * weights).flatten()
    for t, i in ((1, 1), (1, 0), (2, 1), (10, 9), (100, 100), (100, 99), (300, 500), (10, 11)):
        alpha_bar, other = alpha_bar_by_hand(SCHEDULE, t), alpha_bar_by_hand(SCHEDULE, i)
        x = x_0 if i == 0 else q_sample(x_0, eps, i, SCHEDULE)
        loss = (eps - denoiser(x, torch.full((144,), t))).square()[:, 0] @ weight
        k = math.sqrt(1 - alpha_bar) / (alpha_bar * var + 1 - alpha_bar)
        a, a_data, b_data = math.sqrt(alpha_bar), math.sqrt(other), math.sqrt(1 - other)
        claim = (1 - k * b_data) ** 2 + k**2 * a_data**2 * var + k**2 * (a_data - a) ** 2 * mean**2
        assert loss.item() == pytest.approx(claim, rel=1e-10)
        if t == i:  # the floor, the smaller the less the data varies
            assert claim == pytest.approx(alpha_bar * var / (alpha_bar * var + 1 - alpha_bar), rel=1e-9)


@pytest.mark.equation("forward-sample")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward_sample_in_half_precision(dtype):
    """Exact: 16-bit images under autocast still get ε times √(1-ᾱ_1), to float32 rounding."""
    eps = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_1 = q_sample(torch.zeros_like(eps), eps, 1, SCHEDULE)
    torch.testing.assert_close(x_1, math.sqrt(1 - alpha_bar_by_hand(SCHEDULE, 1)) * eps.float(), rtol=1e-5, atol=0)
    table = NoiseSchedule(SCHEDULE.beta[1:]).alpha_bar.to(dtype)  # the pitfall: rounded before 1 - ᾱ
    assert (1 - table[1]).item() == 0
