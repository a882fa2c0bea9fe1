"""Proofs of the equations of the chapter "The reverse process"."""

import math

import pytest
import sympy as sp
import torch

from diffbook.diffusion import eps_from_v, q_posterior, q_sample, q_step, v_target, x0_from_eps
from diffbook.gaussian import GaussianMixture, gaussian_log_prob
from diffbook.sampling import ddpm_sample_steps
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule

SCHEDULES = [
    linear_schedule(),
    cosine_schedule(),
    cosine_schedule(7),
    NoiseSchedule(torch.tensor([0.3, 0.5, 0.4, 0.97])),
]
X = torch.linspace(-12, 12, 24_001, dtype=torch.float64)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(weights, means, variances):
    return GaussianMixture(numbers(*weights), numbers(*means)[:, None], numbers(*variances)[:, None])


TWO = mixture((0.6, 0.4), (-0.8, 1.2), (0.04, 0.04))  # mean 0, variance 1
THREE = mixture((0.2, 0.5, 0.3), (-1.1, 0.2, 0.9), (0.02, 0.3, 0.1))  # variance < 1


def times(schedule):
    T = schedule.T
    return sorted({1, 2, 3, T // 3 or 1, T - 1, T})


def by_hand(schedule, t):
    """α_t, β_t, ᾱ_t, ᾱ_{t-1} as Python numbers, from the β_s alone."""
    alpha = [1 - b for b in schedule.beta.tolist()]
    return alpha[t], 1 - alpha[t], math.prod(alpha[1 : t + 1]), math.prod(alpha[1:t])


def marginal(world, t, schedule):
    return world.after(math.sqrt(by_hand(schedule, t)[2]), 1 - by_hand(schedule, t)[2])


def exact_step(world, x_t, t, schedule):
    """q(x_{t-1} | x_t) on the grid X by Bayes' rule and quadrature alone: density, mean, variance."""
    alpha, beta, _, _ = by_hand(schedule, t)
    log_joint = marginal(world, t - 1, schedule).log_prob(X[:, None]) + gaussian_log_prob(
        numbers(x_t), math.sqrt(alpha) * X, numbers(beta)
    )
    joint = log_joint.exp()
    q = joint / torch.trapezoid(joint, X)
    mean = torch.trapezoid(q * X, X)
    return q, mean, torch.trapezoid(q * (X - mean) ** 2, X)


def x_0_given(world, x_t, t, schedule):
    """Mean and variance of x_0 given x_t, by quadrature over x_0."""
    a = by_hand(schedule, t)[2]
    joint = (world.log_prob(X[:, None]) + gaussian_log_prob(numbers(x_t), math.sqrt(a) * X, numbers(1 - a))).exp()
    q = joint / torch.trapezoid(joint, X)
    mean = torch.trapezoid(q * X, X)
    return mean, torch.trapezoid(q * (X - mean) ** 2, X)


def average_variance(world, t, schedule):
    """E over x_t of Var[x_{t-1} | x_t], with `posterior`, by quadrature over x_t."""
    alpha, beta, _, _ = by_hand(schedule, t)
    x_t = X[::5]
    w, m, v = marginal(world, t - 1, schedule).posterior(x_t[:, None], math.sqrt(alpha), beta)
    w, m, v = w, m[:, :, 0], v[:, 0]
    mean = (w * m).sum(1)
    variance = (w * (v + (m - mean[:, None]) ** 2)).sum(1)
    q = marginal(world, t, schedule).log_prob(x_t[:, None]).exp()
    return torch.trapezoid(q * variance, x_t)


@pytest.mark.equation("reverse-bayes")
@pytest.mark.parametrize("world", [TWO, THREE])
def test_reverse_bayes(world):
    """Quadrature: q(x_{t-1}) is the integral over x_0, and `posterior` equals Bayes' rule with it."""
    schedule, x_t = SCHEDULES[3], 0.4
    for t in (2, 3, 4):
        alpha, beta, _, a_before = by_hand(schedule, t)
        # q(x_{t-1}) by the integral over x_0, not by the closed form
        at = numbers(-1.0, 0.0, 0.7)
        p_0 = world.log_prob(X[:, None]).exp()
        jump = gaussian_log_prob(at[:, None], math.sqrt(a_before) * X, numbers(1 - a_before)).exp()
        before = torch.trapezoid(p_0 * jump, X, dim=1)
        torch.testing.assert_close(world.at(t - 1, schedule).log_prob(at[:, None]).exp(), before, rtol=1e-9, atol=0)
        after = marginal(world, t, schedule).log_prob(numbers(x_t)[:, None]).exp()
        bayes = gaussian_log_prob(numbers(x_t), math.sqrt(alpha) * at, numbers(beta)).exp() * before / after
        w, m, v = world.at(t - 1, schedule).posterior(numbers(x_t)[:, None], math.sqrt(alpha), beta)
        ours = GaussianMixture(w[0], m[0], v).log_prob(at[:, None]).exp()
        torch.testing.assert_close(ours, bayes, rtol=1e-9, atol=0)


@pytest.mark.equation("reverse-kl-rate")
def test_reverse_kl_rate_constant():
    """Symbolic: the cubic without mean, tilt and change of variance is u³ - 3u; its size gives κ²/12."""
    u, kappa = sp.symbols("u kappa", real=True)
    a, b, c = sp.symbols("a b c")

    def expectation(polynomial):
        g = sp.exp(-(u**2) / 2) / sp.sqrt(2 * sp.pi)
        return sp.integrate(sp.expand(polynomial) * g, (u, -sp.oo, sp.oo))

    cubic = u**3 + a * u**2 + b * u + c
    found = sp.solve([expectation(cubic * u**k) for k in range(3)], [a, b, c], dict=True)
    assert found == [{a: 0, b: -3, c: 0}]
    assert sp.simplify(expectation((kappa / 6 * cubic.subs(found[0])) ** 2) / 2 - kappa**2 / 12) == 0


@pytest.mark.equation("reverse-kl-rate")
@pytest.mark.parametrize("x_t", [-0.3, 0.15, 0.7])
def test_reverse_kl_rate_on_a_mixture(x_t):
    """Quadrature: exact divergence / ((β/α)³ f'''² / 12) goes to 1 in proportion to β as β falls."""
    before = TWO.after(math.sqrt(0.9), 0.1)
    off = []
    for beta in (1e-3, 2.5e-4, 6.25e-5):
        w, m, v = before.posterior(numbers(x_t)[:, None], math.sqrt(1 - beta), beta)
        exact = GaussianMixture(w[0], m[0], v)
        mean, variance = exact.moments()
        x = mean + variance.sqrt() * torch.linspace(-12, 12, 4001, dtype=torch.float64)
        log_p, log_g = exact.log_prob(x[:, None]), gaussian_log_prob(x, mean, variance)
        # subtracting p - g, whose integral is 0, keeps the small divergence free of rounding
        kl = torch.trapezoid(log_p.exp() * (log_p - log_g) - log_p.exp() + log_g.exp(), x)
        c = numbers(x_t / math.sqrt(1 - beta)).requires_grad_()
        f = before.log_prob(c[:, None]).sum()
        for _ in range(3):
            (f,) = torch.autograd.grad(f.sum(), c, create_graph=True)
        off.append((kl / ((beta / (1 - beta)) ** 3 * f**2 / 12) - 1).abs().item())
    assert off[2] < 0.02
    assert off[0] / off[1] == pytest.approx(4, rel=0.4) and off[1] / off[2] == pytest.approx(4, rel=0.4)


@pytest.mark.equation("posterior-mean", "posterior-variance")
def test_posterior_symbolically():
    """Symbolic: the product of the two densities is, up to a factor free of x_{t-1}, N(mean, variance)."""
    x, x_t, x_0 = sp.symbols("x x_t x_0", real=True)
    alpha, before = sp.symbols("alpha abar", positive=True)  # α_t and ᾱ_{t-1}
    beta, now = 1 - alpha, alpha * before
    exponent = -((x_t - sp.sqrt(alpha) * x) ** 2) / (2 * beta) - (x - sp.sqrt(before) * x_0) ** 2 / (2 * (1 - before))
    variance = (1 - before) / (1 - now) * beta
    mean = sp.sqrt(before) * beta / (1 - now) * x_0 + sp.sqrt(alpha) * (1 - before) / (1 - now) * x_t
    assert sp.simplify(sp.diff(exponent + (x - mean) ** 2 / (2 * variance), x)) == 0


@pytest.mark.equation("posterior-mean", "posterior-variance")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_in_code(schedule):
    """Exact: `q_posterior` against 1/a and b/a of the completed square, from the β_s alone; and t = 1."""
    x_0, x_t = random(6, 2, seed=1), random(6, 2, seed=2)
    for t in times(schedule):
        alpha, beta, _, before = by_hand(schedule, t)
        mean, variance = q_posterior(x_0, x_t, t, schedule)
        if t == 1:
            torch.testing.assert_close(mean, x_0, rtol=1e-12, atol=1e-12)
            assert (variance == 0).all() and variance.shape == (6, 1)
            continue
        a = alpha / beta + 1 / (1 - before)
        b = math.sqrt(alpha) * x_t / beta + math.sqrt(before) * x_0 / (1 - before)
        torch.testing.assert_close(mean, b / a, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(variance, torch.full_like(variance, 1 / a), rtol=1e-9, atol=0)


@pytest.mark.equation("reverse-mean", "reverse-variance")
@pytest.mark.parametrize("world", [TWO, THREE])
def test_moments_of_the_reverse_step(world):
    """Quadrature: moments of q(x_{t-1} | x_t) by Bayes on a grid, against those of x_0 given x_t."""
    schedule = SCHEDULES[3]
    for t in (2, 3, 4):
        for x_t in (-0.7, 0.1, 1.3):
            _, mean, variance = exact_step(world, x_t, t, schedule)
            x_0_mean, x_0_variance = x_0_given(world, x_t, t, schedule)
            formula, beta_tilde = q_posterior(x_0_mean.reshape(1, 1), numbers(x_t)[:, None], t, schedule)
            assert mean.item() == pytest.approx(formula.item(), abs=1e-9)
            _, beta, now, before = by_hand(schedule, t)
            weight = math.sqrt(before) * beta / (1 - now)
            expected = beta_tilde.item() + weight**2 * x_0_variance.item()
            assert variance.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.equation("optimal-variance")
@pytest.mark.parametrize("world", [TWO, THREE])
def test_optimal_variance(world):
    """Quadrature: β̃ + w² E Var[x_0|x_t] is E Var[x_{t-1}|x_t]; a grid of σ² has its best likelihood there."""
    for schedule, t in ((SCHEDULES[0], 5), (SCHEDULES[0], 300), (SCHEDULES[3], 2), (SCHEDULES[3], 4)):
        _, beta, now, before = by_hand(schedule, t)
        w, m, v = world.posterior(X[:, None], math.sqrt(now), 1 - now)
        m, v = m[:, :, 0], v[:, 0]
        mean = (w * m).sum(1)
        q = marginal(world, t, schedule).log_prob(X[:, None]).exp()
        uncertain = torch.trapezoid(q * (w * (v + (m - mean[:, None]) ** 2)).sum(1), X).item()
        tilde = schedule.posterior_variance[t].item()
        best = tilde + (math.sqrt(before) * beta / (1 - now)) ** 2 * uncertain
        assert best == pytest.approx(average_variance(world, t, schedule).item(), rel=1e-6)

    # the best σ² of the expected log-density, found by trying: samples and their own errors
    schedule, t, generator = SCHEDULES[3], 3, torch.Generator().manual_seed(8)
    x_0 = world.sample(200_000, generator)
    eps = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64)
    x_prev = q_sample(x_0, eps[0], t - 1, schedule)
    x_t = q_step(x_prev, eps[1], t, schedule)
    model = world.denoiser(schedule)
    mean = q_posterior(x0_from_eps(x_t, model(x_t, torch.full((200_000,), t)), t, schedule), x_t, t, schedule)[0]
    tried = average_variance(world, t, schedule) * torch.linspace(0.9, 1.1, 41, dtype=torch.float64)
    likelihood = torch.stack([gaussian_log_prob(x_prev, mean, s).mean() for s in tried])
    # a mean of 200,000 squares is known to about 0.3 %; the grid has steps of 0.5 %
    assert abs(int(likelihood.argmax()) - 20) <= 3


@pytest.mark.equation("variance-bounds")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_variance_bounds(schedule):
    """Quadrature: β̃_t ≤ σ*² ≤ β_t on two worlds; equality for white noise and for a point; fails above 1."""
    for t in times(schedule):
        _, beta, _, _ = by_hand(schedule, t)
        tilde = schedule.posterior_variance[t].item()
        for world in (TWO, THREE) if beta > 1e-3 else ():
            if t > 1:
                assert tilde < average_variance(world, t, schedule).item() < beta * (1 + 1e-9)
        white = average_variance(mixture((1.0,), (0.0,), (1.0,)), t, schedule).item()
        assert white == pytest.approx(beta, rel=1e-7)
        if t > 1:
            wide = average_variance(mixture((1.0,), (0.0,), (2.0,)), t, schedule).item()
            assert wide > beta * (1 - 1e-9) and (t > 3 or wide > beta * (1 + 1e-5))
            point = average_variance(mixture((1.0,), (0.3,), (1e-13,)), t, schedule).item()
            assert point == pytest.approx(tilde, rel=1e-6)


@pytest.mark.equation("variance-bounds")
def test_variance_bound_proof():
    """Symbolic: the guess √α x_t of x_{t-1} has the error β²V + αβ, which is β at V = 1 and grows with V."""
    alpha, V = sp.symbols("alpha V", positive=True)
    beta = 1 - alpha
    # x' - √α (√α x' + √β ε): coefficients of x' and of ε, which are independent
    error = (1 - alpha) ** 2 * V + (sp.sqrt(alpha) * sp.sqrt(beta)) ** 2
    assert sp.simplify(error - (beta**2 * V + alpha * beta)) == 0
    assert sp.simplify(error.subs(V, 1) - beta) == 0
    assert sp.simplify(sp.diff(error, V) - beta**2) == 0


@pytest.mark.equation("mean-from-eps")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mean_from_eps(schedule):
    """Exact: the formula against `q_posterior` at `x0_from_eps`, and against a step of the sampler."""
    x_t, eps = random(4, 3, seed=3), random(4, 3, seed=4)
    for t in times(schedule):
        alpha, beta, now, before = by_hand(schedule, t)
        formula = (x_t - beta / math.sqrt(1 - now) * eps) / math.sqrt(alpha)
        # x_0 = (x_t - …)/√ᾱ_t amplifies rounding where ᾱ_t is tiny, and its weight takes it back
        ours = q_posterior(x0_from_eps(x_t, eps, t, schedule), x_t, t, schedule)[0]
        torch.testing.assert_close(ours, formula, rtol=1e-8, atol=1e-8)
        grid = [t, t - 1] if t > 1 else [t]
        z = random(4, 3, seed=5)
        for variance, sigma2 in (("beta", beta), ("beta_tilde", (1 - before) / (1 - now) * beta)):
            step = next(
                ddpm_sample_steps(
                    lambda x, _: eps, x_t, schedule, times=grid, variance=variance, noise=[z, z][: len(grid)]
                )
            )
            expected = formula + (math.sqrt(sigma2) * z if t > 1 else 0)
            torch.testing.assert_close(step.x, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.equation("mean-from-eps")
def test_mean_from_eps_symbolically():
    """Symbolic: the posterior mean at x_0 = (x_t - √(1-ᾱ) ε)/√ᾱ; two forms with other roots differ."""
    x_t, eps = sp.symbols("x_t eps", real=True)
    alpha, before = sp.symbols("alpha abar", positive=True)
    beta, now = 1 - alpha, alpha * before
    x_0 = (x_t - sp.sqrt(1 - now) * eps) / (sp.sqrt(alpha) * sp.sqrt(before))
    mean = sp.sqrt(before) * beta / (1 - now) * x_0 + sp.sqrt(alpha) * (1 - before) / (1 - now) * x_t
    right = (x_t - beta / sp.sqrt(1 - now) * eps) / sp.sqrt(alpha)
    assert sp.simplify(mean - right) == 0
    for wrong in (beta / (1 - now), sp.sqrt(beta) / (1 - now)):
        assert sp.simplify(mean - (x_t - wrong * eps) / sp.sqrt(alpha)) != 0


@pytest.mark.equation("v-target", "eps-from-v")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_velocity(schedule):
    """Exact: (x_t, v) is a rotation of (x_0, ε) with angle arccos √ᾱ_t; `eps_from_v` turns it back."""
    x_0, eps = random(5, 2, seed=6), random(5, 2, seed=7)
    for t in times(schedule):
        angle = math.acos(math.sqrt(by_hand(schedule, t)[2]))
        turn = torch.tensor(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64
        )
        x_t, v = torch.einsum("ij,jbk->ibk", turn, torch.stack([x_0, eps]))
        # near ᾱ = 1 the angle itself is known to about 1e-12 only
        torch.testing.assert_close(q_sample(x_0, eps, t, schedule), x_t, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(v_target(x_0, eps, t, schedule), v, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(eps_from_v(x_t, v, t, schedule), eps, rtol=1e-9, atol=1e-9)
        a, b = math.cos(angle), math.sin(angle)
        torch.testing.assert_close(a * x_t - b * v, x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.equation("step-noise")
@pytest.mark.parametrize("world", [TWO, THREE])
def test_step_noise(world):
    """Quadrature: E[ε_t | x_t] over the exact q(x_{t-1} | x_t), against √β/√(1-ᾱ) times `denoiser`."""
    schedule = SCHEDULES[3]
    model = world.denoiser(schedule)
    for t in (2, 3, 4):
        alpha, beta, now, _ = by_hand(schedule, t)
        for x_t in (-0.9, 0.1, 1.2):
            q, _, _ = exact_step(world, x_t, t, schedule)
            step_noise = (x_t - math.sqrt(alpha) * X) / math.sqrt(beta)
            left = torch.trapezoid(q * step_noise, X).item()
            best = model(numbers(x_t)[:, None], torch.tensor([t])).item()
            assert left == pytest.approx(math.sqrt(beta / (1 - now)) * best, abs=1e-9)


@pytest.mark.equation("step-noise")
def test_step_noise_correlation():
    """Exact: the coefficients of ε_1 … ε_t in x_t, from `q_step`, give corr(ε, ε_t) = √(β_t/(1-ᾱ_t))."""
    schedule = cosine_schedule(7)
    unit = torch.eye(schedule.T + 1, dtype=torch.float64)
    x = unit[:1]  # row of coefficients of x_0, ε_1, …, ε_T
    for t in range(1, schedule.T + 1):
        x = q_step(x, unit[t : t + 1], t, schedule)
        now = by_hand(schedule, t)[2]
        total = (x[0, 1:]) / math.sqrt(1 - now)  # ε as a combination of the ε_s
        assert total.square().sum().item() == pytest.approx(1, rel=1e-9)
        expected = math.sqrt(by_hand(schedule, t)[1] / (1 - now))
        assert total[t - 1].item() == pytest.approx(expected, rel=1e-9)
