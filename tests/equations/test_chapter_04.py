"""Proofs of the equations of the chapter "The loss: from log p(x) to L_simple"."""

import math

import pytest
import sympy as sp
import torch

from diffbook.diffusion import (
    eps_from_x0,
    q_posterior,
    q_sample,
    q_step,
    simple_loss,
    v_target,
    variational_bound,
    x0_from_eps,
)
from diffbook.gaussian import GaussianMixture, gaussian_log_prob, kl_diagonal
from diffbook.sampling import as_eps
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(weights, means, variances):
    return GaussianMixture(numbers(*weights), numbers(*means)[:, None], numbers(*variances)[:, None])


TWO = mixture((0.6, 0.4), (-0.8, 1.2), (0.04, 0.04))
THREE = mixture((0.2, 0.5, 0.3), (-1.1, 0.2, 0.9), (0.03, 0.3, 0.1))
EIGHT = linear_schedule(8, 0.05, 0.85)
FOUR = NoiseSchedule(numbers(0.3, 0.5, 0.4, 0.97))
PAIR = NoiseSchedule(numbers(0.4, 0.99))

# The trapezoidal rule on a smooth density that vanishes at both ends is exact to rounding once the step is below
# about the narrowest standard deviation, here √0.03; logarithms ask for a finer one.
H = 1 / 32
X = torch.arange(-8, 8 + H / 2, H, dtype=torch.float64)


def log_normal(x, mean, variance):
    return gaussian_log_prob(x, mean, numbers(variance))


def by_hand(schedule, t):
    """α_t, β_t, ᾱ_t, ᾱ_{t-1} as Python numbers, from the β_s alone."""
    alpha = [1 - b for b in schedule.beta.tolist()]
    return alpha[t], 1 - alpha[t], math.prod(alpha[1 : t + 1]), math.prod(alpha[1:t])


def wrong_model(world, schedule):
    """A denoiser that is not the best one."""
    star = world.denoiser(schedule)
    return lambda x_t, t: 0.8 * star(x_t, t) + 0.1 * torch.sin(3 * x_t) + 0.05 * t[:, None]


MODELS = [lambda world, schedule: world.denoiser(schedule), wrong_model]


def log_q(world, schedule, t):
    """log q(x_t) on the grid."""
    a = by_hand(schedule, t)[2]
    return world.after(math.sqrt(a), 1 - a).log_prob(X[:, None])


def log_forward(schedule, t):
    """log q(x_t | x_{t-1}) on the grid, [x_{t-1}, x_t]."""
    alpha, beta, _, _ = by_hand(schedule, t)
    return log_normal(X[None], math.sqrt(alpha) * X[:, None], beta)


def log_model(model, schedule, t):
    """log p(x_{t-1} | x_t) on the grid, [x_{t-1}, x_t], with σ² = β; the mean in the form with ε."""
    alpha, beta, now, _ = by_hand(schedule, t)
    eps = model(X[:, None], torch.full(X.shape, t))[:, 0]
    mean = (X - beta / math.sqrt(1 - now) * eps) / math.sqrt(alpha)
    return log_normal(X[:, None], mean[None], beta)


def model_marginals(model, schedule):
    """log p(x_t) of the model's chain on the grid, for t = 0 … T, by quadrature from p(x_T) down."""
    log_p = {schedule.T: log_normal(X, numbers(0.0), 1.0)}
    for t in range(schedule.T, 0, -1):
        log_p[t - 1] = torch.logsumexp(log_model(model, schedule, t) + log_p[t], 1) + math.log(H)
    return log_p


NODES = torch.linspace(-9, 9, 241, dtype=torch.float64)
NODE_WEIGHTS = log_normal(NODES, numbers(0.0), 1.0).exp() * (NODES[1] - NODES[0])


def exact_bound(model, x_0, schedule, **keywords):
    """`variational_bound` averaged over ε by quadrature: the nodes are its replayed noise."""
    rows = x_0.repeat_interleave(len(NODES))[:, None]
    noise = NODES.repeat(len(x_0))[:, None].expand(schedule.T, -1, -1)
    bound = variational_bound(model, rows, schedule, levels=None, noise=noise, **keywords)
    return [(v.reshape(len(x_0), len(NODES), -1) * NODE_WEIGHTS[:, None]).sum(1).squeeze(1) for v in bound[:4]]


def kl_of_forward_steps(model, schedule):
    """Σ_t E KL(q(x_t | x_{t-1}) ‖ p(x_t | x_{t-1})) as a function of x_0 on the grid, from T down."""
    log_p, total = model_marginals(model, schedule), torch.zeros_like(X)
    for t in range(schedule.T, 0, -1):
        q = log_forward(schedule, t)
        p = log_model(model, schedule, t) + log_p[t][None] - log_p[t - 1][:, None]
        total = (q.exp() * (q - p + total[None])).sum(1) * H
    return total


@pytest.mark.equation("elbo", "elbo-gap", "bound-terms")
@pytest.mark.parametrize("make", MODELS)
def test_the_bound_from_its_definition(make):
    """Quadrature over both x_1 and x_2 at T = 2: E_q[log p/q], the KL to the posterior, and `variational_bound`."""
    model = make(TWO, PAIR)
    chosen = range(208, 305, 24)
    x_0 = X[list(chosen)]
    _, _, now, _ = by_hand(PAIR, 1)
    log_p0, elbo, gap = model_marginals(model, PAIR)[0][list(chosen)], [], []
    for i, x in enumerate(x_0):
        log_q_path = log_normal(X, math.sqrt(now) * x, 1 - now)[:, None] + log_forward(PAIR, 2)  # [x_1, x_2]
        first = log_model(model, PAIR, 1)[chosen[i]]  # log p(x_0 | x_1)
        log_joint = log_normal(X, numbers(0.0), 1.0)[None] + log_model(model, PAIR, 2) + first[:, None]
        path = log_q_path.exp() * H * H
        elbo.append((path * (log_joint - log_q_path)).sum())
        gap.append((path * (log_q_path - (log_joint - log_p0[i]))).sum())
    elbo, gap = torch.stack(elbo), torch.stack(gap)
    assert (elbo < log_p0 - 1e-2).all()
    torch.testing.assert_close(log_p0 - elbo, gap, rtol=0, atol=1e-9)
    torch.testing.assert_close(-exact_bound(model, x_0, PAIR)[0], elbo, rtol=0, atol=1e-9)


@pytest.mark.equation("elbo", "elbo-gap", "gap-terms")
@pytest.mark.parametrize("schedule", [EIGHT, FOUR])
@pytest.mark.parametrize("world", [TWO, THREE])
@pytest.mark.parametrize("make", MODELS)
def test_the_gap(make, world, schedule):
    """Quadrature: log p(x_0) + bound = Σ_t E KL(q(x_t|x_{t-1}) ‖ p(x_t|x_{t-1})) > 0, for each x_0."""
    model = make(world, schedule)
    x_0 = X[176:337:16]
    gap = model_marginals(model, schedule)[0][176:337:16] + exact_bound(model, x_0, schedule)[0]
    assert (gap > 1e-3).all()
    torch.testing.assert_close(gap, kl_of_forward_steps(model, schedule)[176:337:16], rtol=0, atol=1e-8)


@pytest.mark.equation("bound-terms")
@pytest.mark.parametrize("schedule", [EIGHT, FOUR, linear_schedule(), cosine_schedule(50)])
def test_telescoping_along_a_path(schedule):
    """Exact: along random paths log q(x_1 … x_T | x_0) = log q(x_T | x_0) + Σ_{t≥2} log q(x_{t-1} | x_t, x_0)."""
    x_0 = random(20, 1, seed=1)
    path = [x_0]
    for t in range(1, schedule.T + 1):
        path.append(q_step(path[-1], random(20, 1, seed=100 + t), t, schedule))
    steps = sum(
        log_normal(path[t], math.sqrt(by_hand(schedule, t)[0]) * path[t - 1], by_hand(schedule, t)[1])
        for t in range(1, schedule.T + 1)
    )
    end = by_hand(schedule, schedule.T)[2]
    backward = log_normal(path[-1], math.sqrt(end) * x_0, 1 - end)
    for t in range(2, schedule.T + 1):
        backward = backward + gaussian_log_prob(path[t - 1], *q_posterior(x_0, path[t], t, schedule))
    torch.testing.assert_close(steps, backward, rtol=1e-7, atol=1e-7)


@pytest.mark.equation("expected-gap")
@pytest.mark.parametrize("schedule", [EIGHT, FOUR])
@pytest.mark.parametrize("world", [TWO, THREE])
@pytest.mark.parametrize("make", MODELS)
def test_the_expected_gap(make, world, schedule):
    """Quadrature: E[log q(x_0) + bound] = KL at the end + Σ_{t≥1} E KL of the exact to the model's step, to 1e-8."""
    model = make(world, schedule)
    q_0 = log_q(world, schedule, 0)
    left = (q_0.exp() * (q_0 + exact_bound(model, X, schedule)[0])).sum() * H
    q_T = log_q(world, schedule, schedule.T)
    right = (q_T.exp() * (q_T - log_normal(X, numbers(0.0), 1.0))).sum() * H
    for t in range(1, schedule.T + 1):
        log_joint = log_q(world, schedule, t - 1)[:, None] + log_forward(schedule, t)
        exact_step = log_joint - log_q(world, schedule, t)[None]
        right += (log_joint.exp() * (exact_step - log_model(model, schedule, t))).sum() * H * H
    assert left.item() == pytest.approx(right.item(), abs=1e-8) and right > 0.05


@pytest.mark.equation("term-floor")
@pytest.mark.parametrize("schedule", [EIGHT, FOUR])
@pytest.mark.parametrize("make", MODELS)
def test_floor_of_each_term(make, schedule):
    """Quadrature: E L_{t-1} - E KL(exact step ‖ model) is I(x_0;x_{t-1}) - I(x_0;x_t), by entropies; and the ends."""
    model = make(TWO, schedule)
    q_0 = log_q(TWO, schedule, 0)
    _, L_T, L_t, L_0 = exact_bound(model, X, schedule)
    mean = {t: (q_0.exp() * L_t[:, t - 2]).sum() * H for t in range(2, schedule.T + 1)}
    mean[1], mean["T"] = (q_0.exp() * L_0).sum() * H, (q_0.exp() * L_T).sum() * H

    def entropy(t):
        q = log_q(TWO, schedule, t)
        return -(q.exp() * q).sum() * H

    def information(t):
        return entropy(t) - 0.5 * math.log(2 * math.pi * math.e * (1 - by_hand(schedule, t)[2]))

    for t in range(1, schedule.T + 1):
        log_joint = log_q(TWO, schedule, t - 1)[:, None] + log_forward(schedule, t)
        exact_step = log_joint - log_q(TWO, schedule, t)[None]
        excess = (log_joint.exp() * (exact_step - log_model(model, schedule, t))).sum() * H * H
        floor = entropy(0) - information(1) if t == 1 else information(t - 1) - information(t)
        assert (mean[t] - excess).item() == pytest.approx(floor.item(), abs=1e-8)
        assert t == 1 or floor > 0
    q_T = log_q(TWO, schedule, schedule.T)
    end = (q_T.exp() * (q_T - log_normal(X, numbers(0.0), 1.0))).sum() * H
    assert (mean["T"] - end).item() == pytest.approx(information(schedule.T).item(), abs=1e-8)


SCHEDULES = [linear_schedule(100, 1e-3, 0.2), cosine_schedule(60), EIGHT, FOUR]


def constant(schedule, t, sigma2):
    _, beta, now, before = by_hand(schedule, t)
    ratio = (1 - before) / (1 - now) * beta / sigma2
    return 0.5 * (ratio - 1 - math.log(ratio))


@pytest.mark.equation("mean-weight", "eps-weight", "x0-v-weight")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_four_forms_of_a_term(schedule, variance):
    """Exact: `variational_bound` of three kinds of model, against the weights by hand and kl of torch.distributions."""
    D, x_0 = 6, random(3, 6, seed=1)
    wrong = random(schedule.T, 3, D, seed=2)  # what the model puts out at each time, a function of t alone
    noise = random(schedule.T, 3, D, seed=3)
    for predicts in ("eps", "x_0", "v"):
        model = as_eps(lambda x_t, t: wrong[t[0] - 1], schedule, predicts)
        bound = variational_bound(model, x_0, schedule, variance, levels=None, noise=noise)
        for t in sorted({2, 3, schedule.T // 2 + 1, schedule.T - 1, schedule.T}):
            alpha, beta, now, before = by_hand(schedule, t)
            sigma2 = beta if variance == "beta" else (1 - before) / (1 - now) * beta
            eps = noise[t - 1]
            x_t = q_sample(x_0, eps, t, schedule)
            snr, snr_before = now / (1 - now), before / (1 - before)
            weight, target = {
                "eps": (beta**2 / (2 * sigma2 * alpha * (1 - now)), eps),
                "x_0": (before * beta**2 / (2 * sigma2 * (1 - now) ** 2), x_0),
                "v": (before * beta**2 / (2 * sigma2 * (1 - now)), v_target(x_0, eps, t, schedule)),
            }[predicts]
            if variance == "beta_tilde" and t < schedule.T and predicts == "x_0":
                assert weight == pytest.approx((snr_before - snr) / 2, rel=1e-6)
            ours = bound.L_t[:, t - 2] - D * constant(schedule, t, sigma2)
            by_weight = weight * (target - wrong[t - 1]).square().sum(1)
            torch.testing.assert_close(ours, by_weight, rtol=1e-6, atol=1e-9)
            # and the form with means, whole, by another library
            guess = x0_from_eps(x_t, model(x_t, torch.full((3,), t)), t, schedule)
            mean_q, mean_p = (q_posterior(x, x_t, t, schedule)[0] for x in (x_0, guess))
            tilde = (1 - before) / (1 - now) * beta
            normals = [
                torch.distributions.Normal(m, torch.full_like(m, math.sqrt(v)))
                for m, v in ((mean_q, tilde), (mean_p, sigma2))
            ]
            whole = torch.distributions.kl_divergence(*normals).sum(1)
            by_means = D * constant(schedule, t, sigma2) + (mean_q - mean_p).square().sum(1) / (2 * sigma2)
            torch.testing.assert_close(whole, by_means, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(bound.L_t[:, t - 2], by_means, rtol=1e-6, atol=1e-9)


@pytest.mark.equation("eps-weight")
def test_values_of_the_weight():
    """Exact: with σ² = β of the linear schedule the weight is 0.273, 0.0101, 0.0102 at t = 2, 100, 1000."""
    schedule = linear_schedule()
    parts, x_0 = [2, 3, 100, 101, 1000], numbers(0.3)[:, None]  # 2, 100 and 1000 by themselves
    bound = variational_bound(
        lambda x, t: torch.ones_like(x), x_0, schedule, levels=None, parts=parts, noise=torch.zeros(6, 1, 1)
    )
    for i, t, value in ((0, 2, 0.273), (2, 100, 0.0101), (4, 1000, 0.0102)):
        ours = bound.L_t[0, i].item() - constant(schedule, t, schedule.beta[t].item())
        assert bound.t[0, i] == t and ours == pytest.approx(value, rel=5e-3)


@pytest.mark.equation("eps-weight")
def test_weight_symbolically():
    """Symbolic: the squared coefficient of ε in the mean over 2σ²; at t = 1 the weight is that of a density's L_0."""
    alpha, now, sigma2 = sp.symbols("alpha abar sigma2", positive=True)
    eps, guess, x_t = sp.symbols("eps guess x_t", real=True)
    beta = 1 - alpha

    def mean(e):
        return (x_t - beta / sp.sqrt(1 - now) * e) / sp.sqrt(alpha)

    weight = beta**2 / (2 * sigma2 * alpha * (1 - now))
    assert sp.simplify((mean(eps) - mean(guess)) ** 2 / (2 * sigma2) - weight * (eps - guess) ** 2) == 0
    # t = 1: ᾱ_1 = α_1, σ_1² = β_1, and x_0 - mean = (guess - eps) √β/√α
    assert sp.simplify(weight.subs({now: alpha, sigma2: beta}) - 1 / (2 * alpha)) == 0
    schedule = EIGHT
    noise = random(8, 1, 4, seed=5)
    bound = variational_bound(lambda x, t: 0 * x, random(1, 4), schedule, levels=None, noise=noise)
    beta_1 = schedule.beta[1].item()
    by_weight = noise[0].square().sum().item() / (2 * (1 - beta_1)) + 2 * math.log(2 * math.pi * beta_1)
    assert bound.L_0.item() == pytest.approx(by_weight, rel=1e-9)


@pytest.mark.equation("mean-weight")
def test_kl_of_two_variances_symbolically():
    """Symbolic: the closed form of two Gaussians splits into a part without the means and d²/(2σ²)."""
    d, tilde, sigma2 = sp.symbols("d tilde sigma2", positive=True)
    x = sp.symbols("x", real=True)
    q = sp.exp(-(x**2) / (2 * tilde)) / sp.sqrt(2 * sp.pi * tilde)
    log_ratio = sp.log(sigma2 / tilde) / 2 - x**2 / (2 * tilde) + (x - d) ** 2 / (2 * sigma2)
    kl = sp.integrate(sp.expand(q * sp.expand(log_ratio)), (x, -sp.oo, sp.oo))
    ratio = tilde / sigma2
    formula = sp.Rational(1, 2) * (ratio - 1 - sp.log(ratio)) + d**2 / (2 * sigma2)
    assert sp.simplify(sp.expand_log(kl - formula, force=True)) == 0
    ours = kl_diagonal(numbers(0.3), numbers(0.2), numbers(0.7), numbers(0.5)).item()
    assert ours == pytest.approx(float(formula.subs({d: 0.4, tilde: 0.2, sigma2: 0.5})), rel=1e-9)


@pytest.mark.equation("loss-floor")
@pytest.mark.parametrize("world", [TWO, THREE])
@pytest.mark.parametrize("make", MODELS)
def test_floor_of_the_loss(make, world):
    """Quadrature over x_0 and ε: E(ε - ε_θ)² = ᾱ/(1-ᾱ) E Var[x_0|x_t] + E(ε* - ε_θ)², for each t; `simple_loss`."""
    schedule, model = EIGHT, make(world, EIGHT)
    star = world.denoiser(schedule)
    p_0, losses = world.log_prob(X[:, None]).exp() * H, []
    for t in range(1, schedule.T + 1):
        now = by_hand(schedule, t)[2]
        x_t = math.sqrt(now) * X[:, None] + math.sqrt(1 - now) * NODES[None]  # [x_0, ε]
        time = torch.full((x_t.numel(),), t)
        error = (NODES[None] - model(x_t.reshape(-1, 1), time).reshape(x_t.shape)).square()
        loss = (p_0[:, None] * NODE_WEIGHTS * error).sum()
        q = log_q(world, schedule, t).exp() * H
        w, m, v = world.posterior(X[:, None], math.sqrt(now), 1 - now)
        mean = (w * m[:, :, 0]).sum(1)
        uncertain = (w * (v[:, 0] + (m[:, :, 0] - mean[:, None]) ** 2)).sum(1)
        time = torch.full(X.shape, t)
        excess = (star(X[:, None], time) - model(X[:, None], time))[:, 0].square()
        floor = now / (1 - now) * (q * uncertain).sum()
        assert loss.item() == pytest.approx((floor + (q * excess).sum()).item(), abs=1e-9)
        losses.append(loss.item())
    generator = torch.Generator().manual_seed(4)
    found = torch.stack([simple_loss(model, world.sample(5000, generator), schedule, generator) for _ in range(40)])
    assert abs(found.mean().item() - sum(losses) / 8) < 4 * found.std().item() / math.sqrt(40)


@pytest.mark.equation("loss-floor")
def test_variance_of_the_noise_given_the_state():
    """Exact: ε is an affine function of x_0 at a fixed x_t, so Var[ε | x_t] = ᾱ/(1-ᾱ) Var[x_0 | x_t]."""
    x_t = numbers(0.4)[:, None]
    for t in (1, 3, 8):
        now = by_hand(EIGHT, t)[2]
        slope = eps_from_x0(x_t, x_t * 0 + 1, t, EIGHT) - eps_from_x0(x_t, x_t * 0, t, EIGHT)
        assert slope.item() ** 2 == pytest.approx(now / (1 - now), rel=1e-9)
