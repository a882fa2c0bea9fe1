"""The equations of the chapter "Gaussian toolkit", each proved by computation."""

import math

import pytest
import sympy as sp
import torch
from torch.distributions import MultivariateNormal

from diffbook.gaussian import GaussianMixture, gaussian_log_prob, kl_diagonal

F = torch.float64


def number(value):
    return torch.tensor(value, dtype=F)


def integrate(f, low=-60.0, high=60.0, n=24_001):
    """Trapezoidal rule, exact to rounding for smooth functions that vanish at both ends."""
    x = torch.linspace(low, high, n, dtype=F)
    return torch.trapezoid(f(x), x)


def density(x, m, v):
    return gaussian_log_prob(x, number(m), number(v)).exp()


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F), torch.as_tensor(b, dtype=F), rtol=tolerance, atol=1e-12)


def single(m, v):
    """One Gaussian in one dimension as a mixture of one component."""
    return GaussianMixture(number([1.0]), number([[m]]), number([[v]]))


PARAMETERS = [(0.0, 1.0), (1.5, 2.25), (-0.7, 0.04), (3.0, 9.0)]
X = torch.linspace(-3, 4, 29, dtype=F)
MIXTURE = GaussianMixture(number([0.3, 0.7]), number([[-1.0], [2.0]]), number([[0.4], [0.1]]))


# ---- the density -----------------------------------------------------------------------------------------


@pytest.mark.equation("gaussian-moments")
@pytest.mark.parametrize("m, v", PARAMETERS)
def test_area_mean_and_variance(m, v):
    """Area 1, mean m, variance v: quadrature of the package's density."""
    close(integrate(lambda x: density(x, m, v)), 1.0)
    close(integrate(lambda x: x * density(x, m, v)), m)
    close(integrate(lambda x: (x - m) ** 2 * density(x, m, v)), v)


@pytest.mark.equation("gaussian-moments")
def test_moments_symbolically():
    """Area 1, mean m, variance v for all m and all v > 0: sympy's exact integrals of the definition."""
    x, m = sp.symbols("x m", real=True)
    v = sp.symbols("v", positive=True)
    p = sp.exp(-((x - m) ** 2) / (2 * v)) / sp.sqrt(2 * sp.pi * v)
    moments = [sp.integrate(g * p, (x, -sp.oo, sp.oo)) for g in (1, x, (x - m) ** 2)]
    assert [sp.simplify(a - b) for a, b in zip(moments, (1, m, v), strict=True)] == [0, 0, 0]


@pytest.mark.equation("gaussian-log-density")
@pytest.mark.parametrize("m, v", PARAMETERS)
def test_log_density(m, v):
    """gaussian_log_prob is the logarithm of the defined density, written out here: exact in float64."""
    defined = torch.exp(-((X - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
    kept = defined > 1e-290  # below that the density, not its logarithm, leaves the range of float64
    assert kept.sum() >= 10
    close(gaussian_log_prob(X, number(m), number(v))[kept], defined.log()[kept])


# ---- affine maps -----------------------------------------------------------------------------------------


@pytest.mark.equation("change-of-variables")
@pytest.mark.parametrize("a, b, low, high", [(2.0, -1.0, -0.9, 0.6), (-0.5, 0.7, -4.0, -1.2), (-3.0, 0.0, -2.0, 0.0)])
def test_change_of_variables(a, b, low, high):
    """∫ p_x((s-b)/a)/|a| ds is the probability of low < a x + b <= high, for an exponential x: quadrature."""
    ends = sorted(((low - b) / a, (high - b) / a))
    probability = math.exp(-ends[0]) - math.exp(-ends[1])  # P(u < x <= w) for x with the density exp(-x)
    assert ends[0] >= 0 and probability > 0.01
    close(integrate(lambda s: torch.exp(-(s - b) / a) / abs(a), low, high), probability, 1e-8)


@pytest.mark.equation("gaussian-affine")
@pytest.mark.parametrize("m, v", PARAMETERS)
@pytest.mark.parametrize("a", [0.3, -2.0])
def test_affine_map_of_a_gaussian(m, v, a):
    """The law of a x by GaussianMixture.after equals the change of variables, at many points: float64."""
    y = single(m, v).after(a, 0.0)
    close(y.log_prob((a * X)[:, None]), gaussian_log_prob(X, number(m), number(v)) - math.log(abs(a)))


@pytest.mark.equation("gaussian-affine")
def test_affine_map_with_shift_symbolically():
    """p_x((s-b)/a)/a is N(s; am+b, a²v) for all symbols, a > 0 and a < 0: sympy."""
    s, m, b = sp.symbols("s m b", real=True)
    v, a = sp.symbols("v a", positive=True)

    def normal(x, mean, variance):
        return sp.exp(-((x - mean) ** 2) / (2 * variance)) / sp.sqrt(2 * sp.pi * variance)

    for sign in (1, -1):
        left = normal((s - b) / (sign * a), m, v) / a
        ratio = left / normal(s, sign * a * m + b, a**2 * v)
        assert sp.simplify(sp.expand(sp.powsimp(sp.simplify(ratio)))) == 1


@pytest.mark.equation("affine-covariance")
def test_covariance_of_a_linear_map():
    """Cov(Ax + b) = A Cov(x) A^T and E = Am + b for a law on six points (not Gaussian): exact sums."""
    g = torch.Generator().manual_seed(0)
    points, w = torch.randn(6, 3, generator=g, dtype=F), torch.rand(6, generator=g, dtype=F)
    w = w / w.sum()
    A, b = torch.randn(2, 3, generator=g, dtype=F), torch.randn(2, generator=g, dtype=F)

    def moments(x):
        mean = w @ x
        return mean, ((x - mean) * w[:, None]).T @ (x - mean)

    mean, covariance = moments(points)
    mean_y, covariance_y = moments(points @ A.T + b)
    close(mean_y, A @ mean + b)
    close(covariance_y, A @ covariance @ A.T)


@pytest.mark.equation("gaussian-affine-vector")
@pytest.mark.parametrize("seed", range(5))
def test_linear_map_of_a_gaussian_vector(seed):
    """N(Am+b, AΣA^T) at Ax+b is N(m, Σ) at x over |det A|: torch's MultivariateNormal, float64."""
    g = torch.Generator().manual_seed(seed)
    A, root = torch.randn(2, 3, 3, generator=g, dtype=F)
    m, b = torch.randn(2, 3, generator=g, dtype=F)
    sigma = root @ root.T + 0.1 * torch.eye(3, dtype=F)
    x = torch.randn(20, 3, generator=g, dtype=F)
    after = MultivariateNormal(A @ m + b, A @ sigma @ A.T).log_prob(x @ A.T + b)
    close(after, MultivariateNormal(m, sigma).log_prob(x) - torch.linalg.det(A).abs().log(), 1e-7)


# ---- completing the square -------------------------------------------------------------------------------


@pytest.mark.equation("complete-square")
def test_completing_the_square():
    """a x² - 2 b x + c = a (x - b/a)² + c - b²/a for all a ≠ 0 and all b, c, x: sympy."""
    a, (b, c, x) = sp.Symbol("a", nonzero=True), sp.symbols("b c x")
    assert sp.simplify(a * x**2 - 2 * b * x + c - (a * (x - b / a) ** 2 + c - b**2 / a)) == 0


@pytest.mark.equation("read-off")
@pytest.mark.parametrize("a, b, c", [(0.8, -1.2, 3.0), (4.0, 2.0, -1.0), (0.3, 0.0, 0.5)])
def test_reading_off_a_gaussian(a, b, c):
    """exp(-(ax² - 2bx + c)/2) is √(2π/a) exp(-(c - b²/a)/2) N(x; b/a, 1/a): pointwise, and its integral."""
    left = torch.exp(-(a * X**2 - 2 * b * X + c) / 2)
    constant = math.sqrt(2 * math.pi / a) * math.exp(-(c - b**2 / a) / 2)
    close(left, constant * density(X, b / a, 1 / a))
    close(integrate(lambda x: torch.exp(-(a * x**2 - 2 * b * x + c) / 2)), constant)


# ---- sums ------------------------------------------------------------------------------------------------


@pytest.mark.equation("variance-of-sum")
def test_variance_of_a_sum():
    """Var(x+y) = Var x + Var y + 2 Cov(x, y) for a joint law on nine points, not independent: exact sums."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 9, generator=g, dtype=F)
    w = torch.rand(9, generator=g, dtype=F)
    w = w / w.sum()

    def cov(a, b):
        return (w * (a - w @ a) * (b - w @ b)).sum()

    assert abs(cov(x, y)) > 0.05  # otherwise the term with the factor 2 would not be tested
    close(cov(x + y, x + y), cov(x, x) + cov(y, y) + 2 * cov(x, y))


@pytest.mark.equation("convolution")
@pytest.mark.parametrize("s", [-1.0, 0.3, 2.0])
def test_density_of_a_sum_is_the_convolution(s):
    """The convolution is the derivative of P(x+y <= s) = ∫ p1(x) F2(s-x) dx: quadrature, difference."""

    def probability_below(s):
        def integrand(x):
            below = torch.special.ndtr((s - x - 0.5) / math.sqrt(0.8))
            return MIXTURE.log_prob(x[:, None]).exp() * below

        return integrate(integrand, -20, 20, 20_001)

    def product(x):
        return MIXTURE.log_prob(x[:, None]).exp() * density(s - x, 0.5, 0.8)

    h = 1e-4
    derivative = (probability_below(s + h) - probability_below(s - h)) / (2 * h)
    close(integrate(product, -20, 20, 20_001), derivative, 1e-6)


@pytest.mark.equation("gaussian-sum", "convolution")
@pytest.mark.parametrize("m1, v1", PARAMETERS)
@pytest.mark.parametrize("m2, v2", [(-2.0, 1.5), (0.4, 0.09)])
def test_sum_of_independent_gaussians(m1, v1, m2, v2):
    """The convolution of N(m1, v1) and N(m2, v2) is N(m1+m2, v1+v2), so GaussianMixture.after: quadrature."""
    total = m1 + m2 + math.sqrt(v1 + v2) * number([-2.0, -0.5, 0.0, 1.3])
    by_integral = torch.stack([integrate(lambda x, s=s: density(x, m1, v1) * density(s - x, m2, v2)) for s in total])
    close(density(total, m1 + m2, v1 + v2), by_integral)
    close(single(m1, v1).after(1.0, v2).log_prob((total - m2)[:, None]).exp(), by_integral)


@pytest.mark.equation("gaussian-affine", "gaussian-sum")
@pytest.mark.parametrize("scale, variance", [(0.6, 0.64), (-1.5, 0.2), (0.1, 3.0)])
def test_scale_then_add_noise(scale, variance):
    """The law of s x + N(0, r) by GaussianMixture.after equals the integral over x: quadrature."""
    y = torch.linspace(-4, 4, 9, dtype=F)

    def at(point):
        return integrate(lambda x: MIXTURE.log_prob(x[:, None]).exp() * density(point - scale * x, 0.0, variance))

    close(MIXTURE.after(scale, variance).log_prob(y[:, None]).exp(), torch.stack([at(p) for p in y]))


# ---- products and posteriors -----------------------------------------------------------------------------


@pytest.mark.equation("gaussian-product")
@pytest.mark.parametrize("m1, v1", PARAMETERS)
@pytest.mark.parametrize("m2, v2", [(-2.0, 1.5), (0.4, 0.09)])
def test_product_of_two_gaussian_densities(m1, v1, m2, v2):
    """N(x;m1,v1) N(x;m2,v2) is its constant times GaussianMixture.posterior, pointwise: exact in float64."""
    left = gaussian_log_prob(X, number(m1), number(v1)) + gaussian_log_prob(X, number(m2), number(v2))
    _, mean, variance = single(m1, v1).posterior(number([[m2]]), 1.0, v2)
    constant = gaussian_log_prob(number(m1), number(m2), number(v1 + v2))
    close(left, constant + gaussian_log_prob(X, mean.squeeze(), variance.squeeze()))
    close(variance.squeeze(), 1 / (1 / v1 + 1 / v2))
    close(mean.squeeze(), variance.squeeze() * (m1 / v1 + m2 / v2))


@pytest.mark.equation("gaussian-posterior")
@pytest.mark.parametrize("m, v", PARAMETERS)
@pytest.mark.parametrize("s, r, y", [(0.6, 0.64, 0.9), (-2.0, 0.3, 1.0), (0.0, 1.0, 5.0)])
def test_posterior_of_a_gaussian(m, v, s, r, y):
    """Prior times likelihood is evidence times GaussianMixture.posterior, pointwise (s = 0 too): float64."""
    _, mean, variance = single(m, v).posterior(number([[y]]), s, r)
    left = gaussian_log_prob(X, number(m), number(v)) + gaussian_log_prob(number(y), s * X, number(r))
    evidence = gaussian_log_prob(number(y), number(s * m), number(s**2 * v + r))
    close(left, evidence + gaussian_log_prob(X, mean.squeeze(), variance.squeeze()))
    close(variance.squeeze(), 1 / (1 / v + s**2 / r))


@pytest.mark.equation("gain")
@pytest.mark.parametrize("m, v", PARAMETERS)
@pytest.mark.parametrize("s, r, y", [(0.6, 0.64, 0.9), (-2.0, 0.3, 1.0)])
def test_posterior_mean_by_the_gain(m, v, s, r, y):
    """The mean of GaussianMixture.posterior is m + k (y - s m) with k = s v/(s² v + r): exact in float64."""
    _, mean, _ = single(m, v).posterior(number([[y]]), s, r)
    close(mean.squeeze(), m + s * v / (s**2 * v + r) * (y - s * m))


@pytest.mark.equation("mixture-posterior")
@pytest.mark.parametrize("s, r, y", [(0.6, 0.64, 0.9), (1.0, 0.2, -0.3), (-1.2, 2.0, 1.5)])
def test_posterior_of_a_mixture(s, r, y):
    """GaussianMixture.posterior equals prior times likelihood divided by its integral: quadrature."""
    weights, means, variances = MIXTURE.posterior(number([[y]]), s, r)

    def joint(x):
        return MIXTURE.log_prob(x[:, None]).exp() * density(number(y) - s * x, 0.0, r)

    posterior = GaussianMixture(weights[0], means[0], variances)
    close(posterior.log_prob(X[:, None]).exp(), joint(X) / integrate(joint))


@pytest.mark.equation("posterior-mean-error")
@pytest.mark.parametrize("s, r", [(0.8, 0.36), (-0.5, 2.0)])
def test_error_of_the_posterior_mean(s, r):
    """E(m' - x)² = v' for x on two points with the prior's mean and variance: quadrature over the noise."""
    points, w = number([-1.0, 2.0]), number([0.7, 0.3])
    m = float(w @ points)
    v = float(w @ (points - m) ** 2)

    def error(x):
        def integrand(noise):
            _, mean, _ = single(m, v).posterior((s * x + noise)[:, None], s, r)
            return density(noise, 0.0, r) * (mean[:, 0, 0] - x) ** 2

        return integrate(integrand, -20, 20, 20_001)

    _, _, announced = single(m, v).posterior(number([[0.0]]), s, r)
    close(sum(wk * error(x) for wk, x in zip(w, points, strict=True)), announced.squeeze())
    close(announced.squeeze(), v * r / (s**2 * v + r))


# ---- KL and likelihood -----------------------------------------------------------------------------------


@pytest.mark.equation("gaussian-kl")
@pytest.mark.parametrize("m_q, v_q", PARAMETERS)
@pytest.mark.parametrize("m_p, v_p", [(-2.0, 1.5), (0.4, 0.09)])
def test_kl_between_gaussians(m_q, v_q, m_p, v_p):
    """kl_diagonal is E_q[log q - log p]: quadrature of the definition."""

    def integrand(x):
        log_q = gaussian_log_prob(x, number(m_q), number(v_q))
        return log_q.exp() * (log_q - gaussian_log_prob(x, number(m_p), number(v_p)))

    close(kl_diagonal(*map(number, (m_q, v_q, m_p, v_p))), integrate(integrand))


@pytest.mark.equation("gaussian-kl")
def test_kl_sums_over_dimensions():
    """The sum of kl_diagonal over dimensions is torch's divergence of diagonal vectors: exact in float64."""
    g = torch.Generator().manual_seed(2)
    m_q, m_p = torch.randn(2, 5, generator=g, dtype=F)
    v_q, v_p = torch.rand(2, 5, generator=g, dtype=F) + 0.1
    q, p = (MultivariateNormal(m, torch.diag(v)) for m, v in ((m_q, v_q), (m_p, v_p)))
    close(kl_diagonal(m_q, v_q, m_p, v_p).sum(), torch.distributions.kl_divergence(q, p))


@pytest.mark.equation("tangent")
@pytest.mark.parametrize("f", [torch.log, torch.sqrt, lambda x: -(x**3), lambda x: -torch.exp(x)])
def test_concave_functions_lie_below_their_tangents(f):
    """f(x) <= f(c) + f'(c)(x-c) on a grid of pairs, equality only at x = c: float64, slopes by autograd."""
    x = torch.linspace(0.05, 4, 80, dtype=F)
    c = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(c).sum(), c)
    gap = f(c).detach()[:, None] + slope[:, None] * (x - x[:, None]) - f(x)
    assert gap.min() >= -1e-12
    off_diagonal = ~torch.eye(80, dtype=torch.bool)
    assert gap[off_diagonal].min() > 0 and gap.diagonal().abs().max() < 1e-12


@pytest.mark.equation("jensen")
@pytest.mark.parametrize("f, sign", [(torch.log, 1), (torch.sqrt, 1), (torch.square, -1), (torch.exp, -1)])
def test_jensen(f, sign):
    """E f(X) <= f(E X) for concave f, >= for convex, on 500 finite laws; equality for a constant: float64."""
    g = torch.Generator().manual_seed(3)
    x = 0.01 + 5 * torch.rand(500, 7, generator=g, dtype=F)
    w = torch.rand(500, 7, generator=g, dtype=F)
    w = w / w.sum(1, keepdim=True)
    gap = sign * (f((w * x).sum(1)) - (w * f(x)).sum(1))
    assert gap.min() > 0
    constant = x[:, :1].expand_as(x)
    close((w * f(constant)).sum(1), f((w * constant).sum(1)))


@pytest.mark.equation("gibbs")
def test_no_divergence_is_negative():
    """kl_diagonal >= 0 on 20,000 pairs, 0 for equal Gaussians; also for two mixtures, by quadrature."""
    g = torch.Generator().manual_seed(4)
    m_q, m_p = torch.randn(2, 20_000, generator=g, dtype=F)
    v_q, v_p = torch.randn(2, 20_000, generator=g, dtype=F).exp()
    assert kl_diagonal(m_q, v_q, m_p, v_p).min() >= 0
    close(kl_diagonal(m_q, v_q, m_q, v_q), torch.zeros(20_000))
    other = GaussianMixture(number([0.6, 0.4]), number([[0.0], [1.0]]), number([[1.0], [2.0]]))

    def divergence(q, p):
        def integrand(x):
            x = x[:, None]
            return q.log_prob(x).exp() * (q.log_prob(x) - p.log_prob(x))

        return integrate(integrand, -25, 25)

    assert divergence(MIXTURE, other) > 0.1 and divergence(other, MIXTURE) > 0.1
    close(divergence(MIXTURE, MIXTURE), 0.0)


@pytest.mark.equation("gibbs")
def test_gibbs_where_the_second_law_reaches_further():
    """The chain up to log ∫_{q>0} p <= 0, with q uniform on a part of p's range: quadrature."""
    low, high = -0.5, 1.0

    def p(x):
        return density(x, 0.0, 1.0)

    q = 1 / (high - low)
    minus_kl = integrate(lambda x: q * (p(x) / q).log(), low, high)
    covered = integrate(p, low, high)
    close(covered, torch.special.ndtr(number(high)) - torch.special.ndtr(number(low)), 1e-8)
    assert minus_kl < covered.log() < 0


@pytest.mark.equation("log-normal-mean")
@pytest.mark.parametrize("m, v", PARAMETERS)
def test_mean_of_a_log_normal(m, v):
    """E[e^z] = exp(m + v/2): quadrature of the package's density."""
    mean = integrate(lambda z: torch.exp(z + gaussian_log_prob(z, number(m), number(v))))
    close(mean, math.exp(m + v / 2))


@pytest.mark.equation("likelihood-kl")
@pytest.mark.parametrize("m_q, v_q", PARAMETERS)
def test_log_likelihood_is_minus_entropy_minus_kl(m_q, v_q):
    """E_q[log p] = E_q[log q] - KL(q ‖ p), with kl_diagonal; the expectations by quadrature."""
    m_p, v_p = number(0.3), number(1.7)
    log_p = integrate(lambda x: density(x, m_q, v_q) * gaussian_log_prob(x, m_p, v_p))
    log_q = integrate(lambda x: density(x, m_q, v_q) * gaussian_log_prob(x, number(m_q), number(v_q)))
    close(log_p, log_q - kl_diagonal(number(m_q), number(v_q), m_p, v_p))


@pytest.mark.equation("gaussian-max-likelihood")
def test_maximum_likelihood_of_a_gaussian():
    """The data's mean and variance (over N) beat all neighbours, with the stated maximum: float64."""
    x = 2 + 3 * torch.rand(40, generator=torch.Generator().manual_seed(5), dtype=F)
    mean, variance = x.mean(), x.var(correction=0)

    def likelihood(m, v):
        return gaussian_log_prob(x, m, v).mean()

    best = likelihood(mean, variance)
    close(best, -0.5 * (math.log(2 * math.pi) + variance.log() + 1))
    for shift in (-0.5, -0.01, 0.01, 0.5):
        assert likelihood(mean + shift, variance) < best
        assert likelihood(mean, variance * (1 + shift)) < best
    assert likelihood(mean, x.var()) < best  # dividing by N - 1 is not the maximum


# ---- Monte Carlo -----------------------------------------------------------------------------------------


@pytest.mark.equation("monte-carlo-error", "variance-of-sum", "sample-variance")
def test_standard_error_of_a_mean_exactly():
    """All 3^4 samples of size 4 of a law on three points: error σ/√n, unbiased variance: exact sums."""
    values, w = number([-1.0, 0.5, 4.0]), number([0.5, 0.3, 0.2])
    mean = w @ values
    sigma = (w @ (values - mean) ** 2).sqrt()
    index = torch.cartesian_prod(*[torch.arange(3)] * 4)
    samples, probability = values[index], w[index].prod(1)
    close(probability.sum(), 1.0)
    close(probability @ samples.mean(1), mean)
    close((probability @ (samples.mean(1) - mean) ** 2).sqrt(), sigma / math.sqrt(4))
    close(probability @ samples.var(1), sigma**2)


@pytest.mark.equation("monte-carlo-error")
@pytest.mark.parametrize("n", [10, 100, 1000])
def test_standard_error_measured(n):
    """2,000 means of n samples of log q - log p scatter by σ/√n around kl_diagonal: Monte Carlo, ±10 %.

    The relative standard error of a root mean square of 2,000 values with kurtosis κ is √((κ-1)/8000): 1.6 %
    for Gaussian values (κ = 3), 2.5 % at κ = 6. So ±10 % are at least four standard errors. Fixed seed.
    """
    m_q, v_q, m_p, v_p = map(number, (1.0, 0.5, 0.0, 1.0))
    eps = torch.randn(2000, n, generator=torch.Generator().manual_seed(n), dtype=F)
    x = m_q + v_q.sqrt() * eps
    f = gaussian_log_prob(x, m_q, v_q) - gaussian_log_prob(x, m_p, v_p)
    truth = kl_diagonal(m_q, v_q, m_p, v_p)

    def squared_deviation(x):
        ratio = gaussian_log_prob(x, m_q, v_q) - gaussian_log_prob(x, m_p, v_p)
        return gaussian_log_prob(x, m_q, v_q).exp() * (ratio - truth) ** 2

    sigma = integrate(squared_deviation).sqrt()
    measured = (f.mean(1) - truth).square().mean().sqrt()
    assert abs(measured / (sigma / math.sqrt(n)) - 1) < 0.1
