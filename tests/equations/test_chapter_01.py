"""The equations of the chapter "The forward process", each proved by computation.

Most proofs push unit vectors through the package's step: it is linear in x_{t-1} and ε_t, so they give the
exact coefficients of x_0 and of every single ε_s in x_t, and with them all means and variances without any
sampling. What they are compared with is computed here from the formulas of the page, in plain Python.
"""

import itertools
import math

import pytest
import sympy as sp
import torch
from torch.distributions import MultivariateNormal

from diffbook.diffusion import q_step
from diffbook.gaussian import gaussian_log_prob, kl_diagonal
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule

F = torch.float64
SHORT = [0.3, 0.05, 0.2, 0.6, 0.1]  # not monotone, so that a shift of t cannot hide
SCHEDULES = {
    "short": NoiseSchedule(torch.tensor([*SHORT, 0.95, 0.9], dtype=F)),
    "linear": linear_schedule(),
    "cosine": cosine_schedule(),
}


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F), torch.as_tensor(b, dtype=F), rtol=tolerance, atol=1e-13)


def betas(name):
    """β_1, …, β_T by the formulas of the page, in plain Python; entry 0 is 0."""
    if name == "short":
        return [0.0, *SHORT, 0.95, 0.9]
    if name == "linear":
        return [0.0, *(1e-4 + (t - 1) / 999 * (0.02 - 1e-4) for t in range(1, 1001))]
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    return [0.0, *(min(1 - f[t] / f[t - 1], 0.999) for t in range(1, 1001))]


def alpha_bars(name):
    """ᾱ_0, …, ᾱ_T as products in plain Python."""
    return list(itertools.accumulate((1 - b for b in betas(name)), lambda p, a: p * a))


def coefficients(schedule):
    """Matrix K of shape (T+1, T+1): x_t = K[t, 0] x_0 + Σ_s K[t, s] ε_s, from the package's step."""
    unit = torch.eye(schedule.T + 1, dtype=F)
    x, rows = unit[0], [unit[0]]
    for t in range(1, schedule.T + 1):
        x = q_step(x, unit[t], t, schedule)
        rows.append(x)
    return torch.stack(rows)


K = {name: coefficients(schedule) for name, schedule in SCHEDULES.items()}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def two_valued(n):
    """All 2^n outcomes of n independent numbers of mean 0 and variance 1, each outcome equally likely."""
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n)), dtype=F)


# ---- the chain and one step --------------------------------------------------------------------------------


@pytest.mark.equation("markov-factorization")
@pytest.mark.parametrize("x_0", [0.8, -2.0])
def test_joint_density_is_the_product_of_the_steps(x_0):
    """The joint Gaussian of x_1 … x_T given x_0, from exact coefficients, is the product of the steps."""
    k = K["short"]
    path = torch.tensor([0.4, -0.9, 1.3, 0.2, -0.5, 0.7, 0.1], dtype=F)
    joint = MultivariateNormal(k[1:, 0] * x_0, scale_tril=k[1:, 1:]).log_prob(path)
    beta, steps, previous = betas("short"), 0.0, x_0
    for t, x in enumerate(path.tolist(), start=1):
        mean = torch.tensor(math.sqrt(1 - beta[t]) * previous, dtype=F)
        steps += gaussian_log_prob(torch.tensor(x, dtype=F), mean, torch.tensor(beta[t], dtype=F)).item()
        previous = x
    close(joint, steps)


@pytest.mark.equation("markov-factorization")
@pytest.mark.parametrize("t", [2, 4, 7])
def test_the_chain_has_no_memory(t):
    """Exact Gaussian regression of x_t on x_{t-1} and x_0, …, x_{t-2}: only x_{t-1} gets a weight."""
    k = K["short"].clone()
    k[:, 0] *= 1.7  # x_0 with a variance of its own
    covariance = k @ k.T
    weights = torch.linalg.solve(covariance[:t, :t], covariance[:t, t])
    expected = torch.zeros(t, dtype=F)
    expected[t - 1] = math.sqrt(1 - betas("short")[t])
    close(weights, expected)


@pytest.mark.equation("forward-step-sample")
@every_schedule
def test_step_is_the_formula(name):
    """q_step on a batch with a different t each, against the formula in plain Python: float64."""
    schedule, beta = SCHEDULES[name], betas(name)
    t = torch.tensor([1, 2, schedule.T // 2, schedule.T - 1, schedule.T])
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 5, 3, dtype=F, generator=generator)
    expected = [
        [math.sqrt(1 - beta[s]) * a + math.sqrt(beta[s]) * e for a, e in zip(row, noise, strict=True)]
        for s, row, noise in zip(t.tolist(), x.tolist(), eps.tolist(), strict=True)
    ]
    close(q_step(x, eps, t, schedule), expected)


@pytest.mark.equation("forward-step-sample")
@pytest.mark.parametrize("t", [1, 3, 7])
def test_step_draws_from_the_conditional(t):
    """All outcomes of a two-valued noise: mean √(1-β_t) x_{t-1} and variance β_t, exactly."""
    eps = two_valued(1)
    x = q_step(torch.full_like(eps, 0.7), eps, t, SCHEDULES["short"])
    close(x.mean(), math.sqrt(1 - betas("short")[t]) * 0.7)
    close(x.var(correction=0), betas("short")[t])


# ---- variances ---------------------------------------------------------------------------------------------


@pytest.mark.equation("naive-mean", "naive-variance")
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_naive_chain(steps):
    """Every outcome of a chain of two-valued noises: mean and variance, exactly."""
    sigma, mu = [0.3, 1.1, 0.2, 0.7, 0.05], [0.5, -0.2, 1.5, 0.1, 2.0]
    x = two_valued(steps + 1)[:, 0] * 1.3 + 0.4  # data of mean 0.4 and variance 1.69
    for t in range(steps):
        x = x + mu[t] + sigma[t] * two_valued(steps + 1)[:, t + 1]
    close(x.mean(), 0.4 + sum(mu[:steps]))
    close(x.var(correction=0), 1.69 + sum(s**2 for s in sigma[:steps]))


@pytest.mark.equation("step-variance")
@pytest.mark.parametrize("k, beta, v", [(0.9, 0.1, 2.0), (-0.5, 0.3, 0.2), (1.2, 0.05, 1.0)])
def test_variance_after_one_step(k, beta, v):
    """Every outcome of two-valued data and noise: variance k² v + β, exactly."""
    data, noise = two_valued(2).T
    x = k * (3.0 + math.sqrt(v) * data) + math.sqrt(beta) * noise
    close(x.var(correction=0), k**2 * v + beta)


@pytest.mark.equation("variance-preserving")
def test_the_factor_is_unique():
    """k² + β = 1 has just the solutions ±√(1-β), real for β ≤ 1: symbolic."""
    k, beta = sp.symbols("k beta")
    assert sp.solveset(sp.Eq(k**2 + beta, 1), k) == {sp.sqrt(1 - beta), -sp.sqrt(1 - beta)}
    assert not sp.solveset(sp.Eq(k**2 + sp.Rational(3, 2), 1), k, sp.S.Reals)


@pytest.mark.equation("variance-preserving")
@every_schedule
def test_the_package_preserves_variance(name):
    """Exact coefficients of q_step: their squares sum to 1 in every state; that of x_{t-1} is positive."""
    close(K[name].square().sum(1), torch.ones(len(K[name]), dtype=F))
    schedule = SCHEDULES[name]
    one, zero = torch.ones(schedule.T, 1, dtype=F), torch.zeros(schedule.T, 1, dtype=F)
    kept = q_step(one, zero, torch.arange(1, schedule.T + 1), schedule)[:, 0]
    close(kept, [math.sqrt(1 - b) for b in betas(name)[1:]])
    assert (kept > 0).all()


@pytest.mark.equation("fixed-point")
def test_fixed_point():
    """The only fixed point, the distance to it shrinks by k², two special cases of the page: symbolic."""
    k, beta, v = sp.symbols("k beta v", positive=True)
    fixed = sp.solve(sp.Eq(v, k**2 * v + beta), v)
    assert len(fixed) == 1 and sp.simplify(fixed[0] - beta / (1 - k**2)) == 0
    assert sp.simplify((k**2 * v + beta - fixed[0]) - k**2 * (v - fixed[0])) == 0
    assert sp.simplify(fixed[0].subs(k, sp.sqrt(1 - beta))) == 1
    assert sp.simplify(fixed[0].subs(k, 1 - beta) - 1 / (2 - beta)) == 0


@pytest.mark.equation("variance-attraction")
@every_schedule
@pytest.mark.parametrize("v_0", [0.0, 0.25, 1.0, 4.0])
def test_variances_are_pulled_to_one(name, v_0):
    """Exact variances from the coefficients of q_step, for all t; β in plain Python."""
    variance = v_0 * K[name][:, 0].square() + K[name][:, 1:].square().sum(1)
    alpha = torch.tensor([1 - b for b in betas(name)], dtype=F)
    # differences of numbers near 1: compare with 1 added again, to keep their precision
    close(variance[1:], 1 + alpha[1:] * (variance[:-1] - 1))


def covariances(schedule, c_0):
    """Exact covariance matrices of x_0, …, x_T in three dimensions: unit vectors through q_step."""
    unit, zero = torch.eye(3, dtype=F), torch.zeros(3, 3, dtype=F)
    found = [c_0]
    for t in range(1, schedule.T + 1):
        a, b = q_step(unit, zero, t, schedule), q_step(zero, unit, t, schedule)
        found.append(a.T @ found[-1] @ a + b.T @ b)
    return torch.stack(found)


@pytest.mark.equation("covariance-attraction", "covariance-at-t")
@every_schedule
def test_covariances_are_pulled_to_the_identity(name):
    """Exact covariance matrices of correlated data through q_step, for all t; α and ᾱ in plain Python."""
    c_0 = torch.tensor([[2.0, 0.9, -0.3], [0.9, 0.5, 0.1], [-0.3, 0.1, 1.4]], dtype=F)
    c, one = covariances(SCHEDULES[name], c_0), torch.eye(3, dtype=F)
    alpha = torch.tensor([1 - b for b in betas(name)], dtype=F)[:, None, None]
    alpha_bar = torch.tensor(alpha_bars(name), dtype=F)[:, None, None]
    close(c[1:], one + alpha[1:] * (c[:-1] - one))
    close(c, alpha_bar * c_0 + (1 - alpha_bar) * one)


# ---- what is left at time t --------------------------------------------------------------------------------


@pytest.mark.equation("mean-decay")
@every_schedule
def test_mean_given_the_image(name):
    """The coefficient of x_0 in x_t, exact through q_step, is the root of the product of the α, for all t."""
    expected = [math.sqrt(a) for a in alpha_bars(name)]
    close(K[name][:, 0] / torch.tensor(expected, dtype=F), torch.ones(len(expected), dtype=F))
    close(SCHEDULES[name].sqrt_alpha_bar, expected)


@pytest.mark.equation("conditional-variance")
@every_schedule
def test_variance_given_the_image(name):
    """The squared coefficients of the noises in x_t, exact through q_step, sum to 1 - ᾱ_t, for all t."""
    expected = torch.tensor([1 - a for a in alpha_bars(name)], dtype=F)
    close(K[name][:, 1:].square().sum(1), expected)
    close(SCHEDULES[name].sqrt_one_minus_alpha_bar.square(), expected)


@pytest.mark.equation("signal-correlation")
@every_schedule
@pytest.mark.parametrize("variance", [0.35, 1.0, 3.0])
def test_correlation_with_the_image(name, variance):
    """Exact covariance of x_0 and x_t from the coefficients of q_step; ᾱ in plain Python."""
    k = K[name]
    covariance = variance * k[:, 0]
    x_t = variance * k[:, 0].square() + k[:, 1:].square().sum(1)
    a = torch.tensor(alpha_bars(name), dtype=F)
    expected = (a * variance).sqrt() / (a * variance + 1 - a).sqrt()
    close(covariance / (variance * x_t).sqrt(), expected)


@pytest.mark.equation("pooled-snr")
@pytest.mark.parametrize("t", [1, 3, 7])
def test_averages_have_a_larger_snr(t):
    """The mean of 4 pixels through q_step, exact: signal power over noise power is m SNR x̄_0²."""
    schedule, x_0 = SCHEDULES["short"], torch.tensor([0.9, -0.2, 0.4, 0.7], dtype=F)
    m = len(x_0)
    # rows: the image without noise, then one row for each single noise of each pixel and step
    x = torch.cat([x_0[None], torch.zeros(t * m, m, dtype=F)])
    for s in range(1, t + 1):
        eps = torch.zeros_like(x)
        first = 1 + (s - 1) * m
        eps[first : first + m] = torch.eye(m, dtype=F)
        x = q_step(x, eps, s, schedule)
    mean = x.mean(1)
    ratio = mean[0].square() / mean[1:].square().sum()
    a = alpha_bars("short")[t]
    close(ratio, m * a / (1 - a) * x_0.mean() ** 2)
    close(ratio, m * schedule.snr()[t] * x_0.mean() ** 2)


# ---- schedules ---------------------------------------------------------------------------------------------


@pytest.mark.equation("beta-from-alpha-bar")
@every_schedule
def test_beta_from_alpha_bar(name):
    """The package's tables: β is 1 minus the quotient of neighbouring ᾱ, both against plain Python."""
    schedule = SCHEDULES[name]
    close(schedule.beta[1:], 1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1])
    close(schedule.beta, betas(name))
    close(schedule.alpha_bar / torch.tensor(alpha_bars(name), dtype=F), torch.ones(schedule.T + 1, dtype=F))


@pytest.mark.equation("log-snr-sigmoid")
@every_schedule
def test_alpha_bar_from_snr(name):
    """Both forms with the package's snr and log_snr give the ᾱ of plain Python, small ones included."""
    schedule, a = SCHEDULES[name], torch.tensor(alpha_bars(name), dtype=F)[1:]
    snr, log_snr = schedule.snr()[1:], schedule.log_snr()[1:]
    one = torch.ones_like(a)
    close(snr / (1 + snr) / a, one)
    close(1 / (1 + torch.exp(-log_snr)) / a, one)


@pytest.mark.equation("same-signal")
@every_schedule
def test_divided_by_its_signal_the_chain_is_naive(name):
    """Exact coefficients of x_t/√ᾱ_t from q_step: those of a naive chain, and their squares sum to 1/SNR."""
    a, beta = torch.tensor(alpha_bars(name), dtype=F), betas(name)
    y = K[name] / a.sqrt()[:, None]
    close(y[:, 0], torch.ones(len(a), dtype=F))
    sigma = torch.tensor([math.sqrt(b / p) for b, p in zip(beta, a.tolist(), strict=True)], dtype=F)
    naive = torch.tril(sigma.expand(len(a), -1))[:, 1:]  # row t: σ_1 … σ_t, then zeros
    close(y[:, 1:], naive)
    close(naive.square().sum(1)[1:] * SCHEDULES[name].snr()[1:], torch.ones(len(a) - 1, dtype=F))


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
@pytest.mark.equation("alpha-bar-bound")
@pytest.mark.parametrize("steps", [50, 200, 1000])
def test_bound_on_what_is_left(steps):
    """ᾱ_T ≤ exp(-Σβ); the gap in the exponent lies between Σβ²/2 and Σβ²/(2(1-β)): float64."""
    for schedule in (linear_schedule(steps), NoiseSchedule(torch.full((steps,), 0.3)), SCHEDULES["short"]):
        b = schedule.beta
        gap = -b.sum() - torch.log(schedule.alpha_bar[-1])
        assert (b.square() / 2).sum() <= gap <= (b.square() / (2 * (1 - b))).sum()
        assert schedule.alpha_bar[-1] <= torch.exp(-b.sum())


# ---- the distance to pure noise ----------------------------------------------------------------------------

X = torch.linspace(-14, 14, 20_001, dtype=F)
ZERO, ONE = torch.zeros(1, dtype=F), torch.ones(1, dtype=F)


def kl_quadrature(log_q, log_p):
    return torch.trapezoid(log_q.exp() * (log_q - log_p), X)


def forward_law(x_0, a):
    """log q(x_t | x_0) on the grid."""
    return gaussian_log_prob(X, torch.tensor(math.sqrt(a) * x_0, dtype=F), torch.tensor(1 - a, dtype=F))


@pytest.mark.equation("end-kl")
@pytest.mark.parametrize("x_0", [-1.0, 0.3, 2.0])
@pytest.mark.parametrize("a", [1e-3, 0.132, 0.6])
def test_distance_from_noise_given_the_image(x_0, a):
    """The formula against kl_diagonal, and against quadrature of the definition of the divergence."""
    formula = 0.5 * (a * (x_0**2 - 1) - math.log(1 - a))
    mean, variance = torch.tensor(math.sqrt(a) * x_0, dtype=F), torch.tensor(1 - a, dtype=F)
    close(kl_diagonal(mean, variance, ZERO, ONE)[0], formula)
    close(kl_quadrature(forward_law(x_0, a), gaussian_log_prob(X, ZERO, ONE)), formula, 1e-7)


@pytest.mark.equation("kl-split")
@pytest.mark.parametrize("a", [1e-3, 0.132, 0.6, 0.97])
def test_distance_splits_into_marginal_and_information(a):
    """Three images of one pixel, quadrature of all three terms; the information is between 0 and log 3."""
    data = [-1.0, 0.2, 0.9]
    laws = torch.stack([forward_law(x_0, a) for x_0 in data])
    noise = gaussian_log_prob(X, ZERO, ONE)
    marginal = torch.logsumexp(laws, 0) - math.log(3)
    averaged = sum(0.5 * (a * (x_0**2 - 1) - math.log(1 - a)) for x_0 in data) / 3
    entropy_of_marginal = -torch.trapezoid(marginal.exp() * marginal, X)
    entropy_given_image = 0.5 * math.log(2 * math.pi * math.e * (1 - a))
    information = entropy_of_marginal - entropy_given_image
    close(averaged, kl_quadrature(marginal, noise) + information, 1e-7)
    assert 0 <= information <= math.log(3)
