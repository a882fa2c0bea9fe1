"""Proofs of the equations of the chapter "Evaluation"."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import sympy as sp
import torch

from diffbook.diffusion import variational_bound
from diffbook.evaluation import bits_per_dim, frechet_distance, frechet_jackknife
from diffbook.gaussian import GaussianMixture, IdealDenoiser, discretised_log_likelihood
from diffbook.schedule import NoiseSchedule, linear_schedule

DELTA = 2 / 255


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, seed):
    root = random(d, d, seed=seed)
    return root @ root.T / d + 0.05 * torch.eye(d, dtype=torch.float64)


def root(C):
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.sqrt() @ vectors.T


def cloud(m, C):
    """2 D points whose mean is exactly m and whose covariance is exactly C."""
    D = len(m)
    L = torch.linalg.cholesky(C).T * math.sqrt((2 * D - 1) / 2)
    return torch.cat([m + L, m - L])


def bells(weights, centres, s):
    return GaussianMixture(weights, centres[:, None], torch.full_like(centres, s**2)[:, None])


# ---- likelihood ------------------------------------------------------------------------------------------------


@pytest.mark.equation("density-unbounded")
def test_bells_on_the_grey_levels():
    """Exact, by the package's mixture: the inequality at all levels and widths, and equality as s goes to 0."""
    k = torch.arange(0, 256, 5)
    centres, weights = 2 * k.double() / 255 - 1, random(len(k)).square() + 0.01
    weights = weights / weights.sum()
    for s in (1.0, 0.1, 1e-2, 1e-3, 1e-6):
        density = bells(weights, centres, s).log_prob(centres[:, None])
        bound = weights.log() - math.log(s) - 0.5 * math.log(2 * math.pi)
        assert (density >= bound - 1e-9).all()
    assert torch.allclose(density, bound, atol=1e-9) and density.min() > 3


@pytest.mark.equation("dequantisation")
@pytest.mark.parametrize("spread, gap", [(30, 1e-3), (3, 0.05), (1, 1.0), (0.3, 4)])
def test_dequantisation_is_a_lower_bound(spread, gap):
    """Quadrature over the cube in two dimensions: never above the exact probability, and close for wide Gaussians."""
    s, mean = spread * DELTA, numbers(0.1, -0.2)
    u = ((torch.arange(400, dtype=torch.float64) + 0.5) / 400 - 0.5) * DELTA
    for k in ((128, 128), (141, 101), (139, 105)):
        x = 2 * numbers(*k) / 255 - 1
        exact = discretised_log_likelihood(x, mean, numbers(s**2)).sum()
        z = (x[:, None] + u - mean[:, None]) / s
        # the density is a product, so the mean of its logarithm over the square is a sum of two means
        log_density = (-0.5 * z.square() - math.log(s) - 0.5 * math.log(2 * math.pi)).mean(1).sum()
        bound = log_density + 2 * math.log(DELTA)
        assert bound <= exact + 1e-12
        near = (x - mean).abs().max() < 3 * s
        assert not near or exact - bound < gap


@pytest.mark.equation("dequantisation")
def test_dequantisation_is_exact_for_a_density_that_is_constant_in_the_cells():
    """Exact: a histogram in three dimensions."""
    P = torch.softmax(random(4), 0)
    density = P / DELTA  # of one dimension
    k = (0, 3, 2)
    bound = sum(density[i].log() for i in k) + 3 * math.log(DELTA)
    assert math.isclose(bound.item(), sum(P[i].log() for i in k).item(), rel_tol=1e-12)


@pytest.mark.equation("bits-units")
def test_units():
    """Exact: uniform over 256 cells is 8 bits in every scale; a stretched Gaussian loses log a in each dimension."""
    for a in (1.0, 127.5, 0.5):
        width = a * DELTA
        nats = -math.log(256 * width)  # the log-density, per pixel
        assert math.isclose(bits_per_dim(-nats, 1) - math.log2(width), 8, rel_tol=1e-12)
    assert math.isclose(-math.log2(DELTA), math.log2(127.5)) and f"{math.log2(127.5):.2f}" == "6.99"
    D, a, x = 5, 127.5, random(5)
    before = scipy.stats.norm.logpdf(x.numpy(), 0, 0.3).sum()
    after = scipy.stats.norm.logpdf(a * x.numpy(), 0, a * 0.3).sum()
    assert math.isclose(bits_per_dim(-after, D), bits_per_dim(-before, D) + math.log2(a), rel_tol=1e-9)


SHORT = NoiseSchedule(torch.linspace(0.05, 0.9, 9, dtype=torch.float64))


def half(x_t, t):
    return 0.5 * x_t


def silent(parts, B=1):
    """The bound of B equal images without noise, so that each term depends on t alone."""
    x_0 = numbers(0.3, -0.7).expand(B, 2)
    K = len(parts) if parts else SHORT.T - 1
    keywords = {"parts": parts} if parts else {}
    generator = torch.Generator().manual_seed(0)
    noise = torch.zeros(K + 1, B, 2, dtype=torch.float64)
    return variational_bound(half, x_0, SHORT, levels=None, generator=generator, noise=noise, **keywords)


@pytest.mark.equation("stratified-sum", "parts-variance")
@pytest.mark.parametrize("parts", [[2], [2, 3, 5], [2, 4, 9], [2, 3, 4, 5, 6, 7, 8, 9]])
def test_one_time_from_each_part(parts):
    """Every draw is n_k times the term at its time, exact; times are uniform in their part, and sum and variance are
    those of the formulas, Monte Carlo within 4.5 standard errors."""
    full, B = silent(None), 20_000
    table = dict(zip(full.t[0].tolist(), full.L_t[0].tolist(), strict=True))
    assert sorted(table) == list(range(2, 10))
    drawn = silent(parts, B)
    edges = [*parts, 10]
    variance = 0.0
    for k, (a, b) in enumerate(pairwise(edges)):
        t, n = drawn.t[:, k], b - a
        assert torch.allclose(drawn.L_t[:, k], n * numbers(*[table[i] for i in t.tolist()]), rtol=1e-9)
        share = t.bincount(minlength=10)[a:b] / B
        assert (share - 1 / n).abs().max() < 4.5 * math.sqrt(1 / n / B) and share.sum() == 1
        terms = np.array([table[i] for i in range(a, b)])
        variance += n**2 * terms.var()
    total = drawn.L_t.sum(1)
    assert abs(total.mean().item() - sum(table.values())) <= 4.5 * math.sqrt(variance / B) + 1e-9
    moment = ((total - total.mean()) ** 2).std().item() / math.sqrt(B)
    assert abs(total.var().item() - variance) <= 4.5 * moment + 1e-9


# ---- Fréchet distance --------------------------------------------------------------------------------------------


@pytest.mark.equation("frechet-1d")
def test_frechet_distance_in_one_dimension():
    """Exact for all Gaussian pairings, and by an optimal assignment of quantiles (scipy), which knows no formula."""
    m_a, s_a, m_b, s_b = 0.7, 1.5, -0.4, 0.6
    formula = (m_a - m_b) ** 2 + (s_a - s_b) ** 2
    found = frechet_distance(cloud(numbers(m_a), numbers(s_a**2)[None]), cloud(numbers(m_b), numbers(s_b**2)[None]))
    assert math.isclose(found, formula, rel_tol=1e-12)
    for rho in (-1.0, 0.0, 0.9, 1.0):
        way = (m_a - m_b) ** 2 + s_a**2 + s_b**2 - 2 * rho * s_a * s_b
        assert way >= formula - 1e-12 and (rho < 1 or math.isclose(way, formula))
    z = scipy.stats.norm.ppf((np.arange(300) + 0.5) / 300)
    x, y = m_a + s_a * z, np.random.default_rng(0).permutation(m_b + s_b * z)
    cost = (x[:, None] - y) ** 2
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    assert math.isclose(cost[rows, columns].mean(), formula, rel_tol=0.02)


@pytest.mark.equation("frechet-gaussian")
@pytest.mark.parametrize("d, seed", [(1, 0), (2, 1), (6, 2)])
def test_frechet_distance_of_gaussians(d, seed):
    """Exact: no pairing has a shorter way, one has this; and all three forms of the trace agree with scipy's root."""
    m_a, m_b, C_a, C_b = random(d, seed=seed), random(d, seed=9), covariance(d, seed), covariance(d, seed + 20)
    found = frechet_distance(cloud(m_a, C_a), cloud(m_b, C_b))
    A, B = root(C_a), root(C_b)
    apart = ((m_a - m_b) ** 2).sum() + C_a.trace() + C_b.trace()
    U, S, Vh = torch.linalg.svd(B @ A)
    best = Vh.T @ U.T
    for i in range(200):
        R = random(d, d, seed=100 + i)
        R = R / torch.linalg.matrix_norm(R, 2)  # the correlation matrices of whitened vectors: norm at most 1
        assert apart - 2 * (A @ R @ B).trace() >= found - 1e-9
    assert math.isclose((apart - 2 * (A @ best @ B).trace()).item(), found, rel_tol=1e-9)
    roots = [scipy.linalg.sqrtm((C_a @ C_b).numpy()).real.trace(), root(A @ C_b @ A).trace().item(), S.sum().item()]
    assert np.allclose([apart.item() - 2 * r for r in roots], found, rtol=1e-7)


@pytest.mark.equation("frechet-gaussian")
def test_frechet_distance_equals_torchmetrics():
    """Exact, against an independent implementation."""
    from torchmetrics.image.fid import _compute_fid

    a, b = random(300, 16), 1.3 * random(200, 16, seed=1) @ random(16, 16, seed=2) + 0.7
    expected = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
    assert math.isclose(frechet_distance(a, b), expected, rel_tol=1e-9)


@pytest.mark.equation("frechet-map")
@pytest.mark.parametrize("d", [1, 2, 5])
def test_frechet_map(d):
    """Exact: the map is symmetric, has the right mean and covariance, and its mean squared way is the distance."""
    m_a, m_b, C_a, C_b = random(d), random(d, seed=1), covariance(d, 2), covariance(d, 3)
    A = root(C_a)
    inverse = torch.linalg.inv(A)
    M = inverse @ root(A @ C_b @ A) @ inverse
    assert torch.allclose(M, M.T) and torch.allclose(M @ C_a @ M, C_b)
    x = cloud(m_a, C_a)
    y = m_b + (x - m_a) @ M.T
    assert torch.allclose(y.mean(0), m_b) and torch.allclose(y.T.cov().reshape(d, d), C_b)
    step = y - x
    way = (m_b - m_a).square().sum() + step.T.cov().reshape(d, d).trace()
    assert math.isclose(way.item(), frechet_distance(x, cloud(m_b, C_b)), rel_tol=1e-9)


@pytest.mark.equation("frechet-expansion")
def test_frechet_distance_of_nearly_equal_covariances():
    """Exact, as the perturbation goes to 0: the ratio to the formula goes to 1, and its error falls with the size."""
    lam, zero = numbers(2.0, 1.0, 0.3, 0.05), torch.zeros(4, dtype=torch.float64)
    E = random(4, 4, seed=3)
    E = (E + E.T) * (lam[:, None] * lam).sqrt()
    formula = 0.5 * (E.square() / (lam[:, None] + lam)).sum()
    off = []
    for h in (1e-2, 1e-3):
        found = frechet_distance(cloud(zero, lam.diag()), cloud(zero, lam.diag() + h * E))
        off.append(abs(found / (h**2 * formula.item()) - 1))
    assert off[1] < 0.01 and off[1] < 0.3 * off[0]


def constant(lam):
    return (1.25 * lam.sum() + 0.5 * (lam[:, None] * lam / (lam[:, None] + lam)).sum()).item()


@pytest.mark.equation("frechet-bias")
def test_bias_of_the_frechet_distance():
    """Monte Carlo: mean distance of 800 samples of N = 300 to their own Gaussian, within 4 standard errors (1.8 % each)
    of c/N plus 2 % for the next order; the constants of one and of 128 equal dimensions are exact."""
    lam = numbers(2.0, 1.0, 0.3, 0.05)
    C, zero = lam.diag(), torch.zeros(4, dtype=torch.float64)
    exact, N = cloud(zero, C), 300
    values = np.array([frechet_distance(random(N, 4, seed=i) * lam.sqrt(), exact) for i in range(800)])
    error = values.std() / math.sqrt(len(values))
    predicted = constant(lam) / N
    assert error < 0.03 * predicted and abs(values.mean() - predicted) < 4 * error + 0.02 * predicted
    assert math.isclose(constant(numbers(0.7)), 0.7 * 1.5)  # σ²/N of the mean, σ²/(2N) of the standard deviation
    assert math.isclose(constant(torch.ones(128).double()), 1.25 * 128 + 0.25 * 128**2)


@pytest.mark.equation("jackknife-bias")
def test_jackknife_bias():
    """Symbolic; and Monte Carlo, through the package: 80 corrected distances have the true mean, within 4 errors."""
    f, c, N, G = sp.symbols("f c N G", positive=True)
    with_all, without_one = f + c / N, f + c / (N * (G - 1) / G)
    assert sp.simplify((G - 1) * (without_one - with_all) - c / N) == 0
    values, corrected = [], []
    for i in range(80):
        a, b = random(120, 3, seed=2 * i), 1.5 * random(80, 3, seed=2 * i + 1) + 0.5
        estimate = frechet_jackknife(a, b, groups=8)
        values.append(estimate.value)
        corrected.append(estimate.value - estimate.bias)
    true = 3 * 0.25 + 3 * 0.25
    error = np.std(corrected) / math.sqrt(80)
    assert abs(np.mean(corrected) - true) < 4 * error and np.mean(values) - true > 2 * error


# ---- the perfect fit ---------------------------------------------------------------------------------------------


@pytest.mark.equation("ideal-denoiser")
@pytest.mark.parametrize("t", [1, 20, 300, 1000])
def test_ideal_denoiser(t):
    """Exact: equal to the weighted mean written out, and to a mixture of very narrow bells."""
    schedule, data = linear_schedule(), random(7, 3, seed=4)
    a = schedule.alpha_bar[t].item()
    eps = random(7, 3, seed=5)
    x_t = math.sqrt(a) * data + math.sqrt(1 - a) * eps
    times = torch.full((7,), t)
    found = IdealDenoiser(data, schedule)(x_t, times)
    for j in range(7):
        exponent = [-((x_t[j] - math.sqrt(a) * p) ** 2).sum().item() / (2 * (1 - a)) for p in data]
        w = np.exp(np.array(exponent) - max(exponent))
        x_0 = (torch.from_numpy(w / w.sum())[:, None] * data).sum(0)
        assert torch.allclose(found[j], (x_t[j] - math.sqrt(a) * x_0) / math.sqrt(1 - a), atol=1e-7)
    narrow = GaussianMixture(torch.ones(7).double(), data, torch.full_like(data, 1e-12))
    assert torch.allclose(found, narrow.denoiser(schedule)(x_t, times), atol=1e-5)
