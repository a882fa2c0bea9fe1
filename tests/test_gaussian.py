"""Gaussian formulas and exact worlds, against torch.distributions, scipy and brute force."""

import math

import pytest
import torch
from scipy import integrate, stats

from diffbook.diffusion import q_sample, simple_loss
from diffbook.gaussian import (
    GaussianMixture,
    IdealDenoiser,
    discretised_log_likelihood,
    gaussian_log_prob,
    kl_diagonal,
)
from diffbook.schedule import linear_schedule


@pytest.fixture(scope="module")
def schedule():
    return linear_schedule()


@pytest.fixture(scope="module")
def mixture():
    f = torch.float64
    return GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=f),
        torch.tensor([[-1.0, 0.5], [0.8, -0.2]], dtype=f),
        torch.tensor([[0.2, 0.1], [0.05, 0.3]], dtype=f),
    )


@pytest.fixture(scope="module")
def line():
    """The same in one dimension, for quadrature."""
    f = torch.float64
    return GaussianMixture(
        torch.tensor([1.0, 3.0], dtype=f),
        torch.tensor([[-1.0], [0.8]], dtype=f),
        torch.tensor([[0.2], [0.05]], dtype=f),
    )


def test_log_prob_and_kl_equal_torch_distributions():
    g = torch.Generator().manual_seed(0)
    mq, mp, x = torch.randn(3, 50, generator=g, dtype=torch.float64)
    vq, vp = torch.rand(2, 50, generator=g, dtype=torch.float64) + 0.1
    q, p = torch.distributions.Normal(mq, vq.sqrt()), torch.distributions.Normal(mp, vp.sqrt())
    torch.testing.assert_close(gaussian_log_prob(x, mq, vq), q.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        kl_diagonal(mq, vq, mp, vp), torch.distributions.kl_divergence(q, p), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("function", [lambda v: gaussian_log_prob(v, v, v), lambda v: kl_diagonal(v, v, v, 1 + 0 * v)])
def test_refuses_variances_that_are_not_positive(function):
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            function(torch.tensor([1.0, bad]))


class TestDiscretisedLikelihood:
    levels = (2 * torch.arange(256, dtype=torch.float64) / 255 - 1).reshape(-1, 1)

    @pytest.mark.parametrize("mean, variance", [(0.0, 1e-4), (0.3, 0.01), (-1.2, 0.05), (5.0, 4.0)])
    def test_probabilities_of_all_levels_add_up_to_one(self, mean, variance):
        mean, variance = torch.tensor(mean, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64)
        log_p = discretised_log_likelihood(self.levels, mean, variance)
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)

    def test_equals_the_integral_of_the_density(self):
        mean, std = 0.1, 0.2
        log_p = discretised_log_likelihood(self.levels, torch.tensor(mean), torch.tensor(std**2))
        for k in (0, 1, 100, 140, 254, 255):
            low = -math.inf if k == 0 else self.levels[k].item() - 1 / 255
            high = math.inf if k == 255 else self.levels[k].item() + 1 / 255
            p = stats.norm.cdf(high, mean, std) - stats.norm.cdf(low, mean, std)
            if k == 255:
                p = stats.norm.sf(low, mean, std)
            assert log_p[k].item() == pytest.approx(math.log(p), rel=1e-5)

    def test_stays_finite_far_in_both_tails(self):
        x = torch.tensor([-1.0, 1.0, 129 / 255])
        log_p = discretised_log_likelihood(x, torch.tensor([1.0, -1.0, -1.0]), torch.tensor(1e-4))
        assert log_p.isfinite().all() and (log_p < -1000).all()
        mirrored = discretised_log_likelihood(-x, -torch.tensor([1.0, -1.0, -1.0]), torch.tensor(1e-4))
        torch.testing.assert_close(log_p, mirrored)

    @pytest.mark.parametrize("x", [0.0, 1.01, -1.1, math.nan])
    def test_refuses_values_off_the_grid(self, x):
        with pytest.raises(ValueError, match="256 levels"):
            discretised_log_likelihood(torch.tensor([x]), torch.tensor(0.0), torch.tensor(1.0))


class TestGaussianMixture:
    def test_log_prob_equals_torch_distributions(self, mixture):
        x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        peer = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(mixture.weights),
            torch.distributions.Independent(torch.distributions.Normal(mixture.means, mixture.variances.sqrt()), 1),
        )
        torch.testing.assert_close(mixture.log_prob(x), peer.log_prob(x), rtol=1e-12, atol=1e-12)

    def test_score_is_the_gradient_of_log_prob(self, mixture):
        x = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
        torch.testing.assert_close(mixture.score(x.detach()), gradient, rtol=1e-10, atol=1e-10)

    def test_samples_have_its_moments(self, mixture):
        x = mixture.sample(200_000, torch.Generator().manual_seed(0))
        mean, variance = mixture.moments()
        error = (variance / len(x)).sqrt()
        assert ((x.mean(0) - mean).abs() < 4 * error).all()
        spread = ((x - mean).pow(4).mean(0) - variance**2).sqrt() / math.sqrt(len(x))
        assert ((x.var(0) - variance).abs() < 4 * spread).all()

    @pytest.mark.parametrize("t", [0, 1, 100, 1000])
    def test_marginal_is_the_integral_over_x_0(self, line, schedule, t):
        """q(x_t) = ∫ N(x_t; √ᾱ_t x_0, 1-ᾱ_t) p(x_0) dx_0 by quadrature; for t = 0 the mixture itself."""
        x_t = 0.4
        got = line.at(t, schedule).log_prob(torch.tensor([[x_t]], dtype=torch.float64)).exp().item()
        a = schedule.alpha_bar[t].item()

        def p(x):
            return line.log_prob(torch.tensor([[x]], dtype=torch.float64)).exp().item()

        if t == 0:
            assert got == pytest.approx(p(x_t), rel=1e-12)
            return
        centre, width = x_t / math.sqrt(a), math.sqrt((1 - a) / a)
        value, _ = integrate.quad(
            lambda x: p(x) * stats.norm.pdf(x_t, math.sqrt(a) * x, math.sqrt(1 - a)),
            max(-6, centre - 12 * width),
            min(6, centre + 12 * width),
            points=[-1, 0.8] if t > 1 else None,
            limit=400,
            epsabs=1e-13,
        )
        assert got == pytest.approx(value, rel=1e-8)

    @pytest.mark.parametrize("t", [1, 100, 1000])
    def test_posterior_is_bayes_rule(self, line, schedule, t):
        """p(x_0 | x_t) q(x_t) = q(x_t | x_0) p(x_0), pointwise."""
        a = schedule.alpha_bar[t].item()
        x_t = torch.tensor([[0.3]], dtype=torch.float64)
        weights, means, variances = line.posterior(x_t, math.sqrt(a), 1 - a)
        assert weights.sum().item() == pytest.approx(1)
        posterior = GaussianMixture(weights[0], means[0], variances)
        x_0 = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
        left = posterior.log_prob(x_0) + line.at(t, schedule).log_prob(x_t)
        likelihood = gaussian_log_prob(x_t, math.sqrt(a) * x_0, torch.tensor(1 - a, dtype=torch.float64)).sum(1)
        torch.testing.assert_close(left, likelihood + line.log_prob(x_0), rtol=1e-9, atol=1e-9)

    def test_denoiser_is_the_conditional_mean_of_the_noise(self, line, schedule):
        """E[ε | x_t] by quadrature over x_0, at several times in one batch."""
        t = torch.tensor([1, 30, 400, 1000])
        x_t = torch.tensor([[0.7], [0.3], [-0.2], [1.5]], dtype=torch.float64)
        got = line.denoiser(schedule)(x_t, t)
        x_0 = torch.linspace(-4, 4, 160_001, dtype=torch.float64)[:, None]
        prior = line.log_prob(x_0)
        for i, time in enumerate(t.tolist()):
            a = schedule.alpha_bar[time].item()
            eps = (x_t[i] - math.sqrt(a) * x_0) / math.sqrt(1 - a)
            weight = torch.softmax(prior - 0.5 * eps.square()[:, 0], dim=0)
            assert got[i].item() == pytest.approx((weight[:, None] * eps).sum().item(), rel=1e-7, abs=1e-9)

    def test_denoiser_minimises_the_loss(self, line, schedule):
        x_0 = line.sample(50_000, torch.Generator().manual_seed(0))

        def loss(model):
            return simple_loss(model, x_0, schedule, torch.Generator().manual_seed(1)).item()

        best = line.denoiser(schedule)
        assert loss(best) < min(loss(lambda x, t: 0.98 * best(x, t)), loss(lambda x, t: 1.02 * best(x, t)))

    def test_refuses_bad_input(self, mixture, schedule):
        one = torch.ones(2, 2)
        for weights, means, variances, words in [
            (torch.ones(3), one, one, r"\(3,\)"),
            (torch.ones(2), one, torch.ones(2, 1), r"\(2, 1\)"),
            (torch.tensor([1.0, 0.0]), one, one, "weights"),
            (torch.ones(2), one, -one, "variances"),
        ]:
            with pytest.raises(ValueError, match=words):
                GaussianMixture(weights, means, variances)
        with pytest.raises(ValueError, match=r"\(5, 3\)"):
            mixture.log_prob(torch.zeros(5, 3))
        for t in (-1, 1001):
            with pytest.raises(ValueError, match=str(t)):
                mixture.at(t, schedule)
        with pytest.raises(ValueError, match="got 0"):
            mixture.denoiser(schedule)(torch.zeros(1, 2), torch.tensor([0]))


class TestIdealDenoiser:
    @pytest.mark.parametrize("t", [1, 50, 300, 1000])
    def test_equals_the_limit_of_narrow_components(self, schedule, t):
        g = torch.Generator().manual_seed(0)
        points = torch.randn(7, 3, generator=g, dtype=torch.float64)
        narrow = GaussianMixture(torch.ones(7, dtype=torch.float64), points, torch.full_like(points, 1e-12))
        x_0 = points[torch.tensor([0, 3, 3, 6])]
        x_t = q_sample(x_0, torch.randn(4, 3, generator=g, dtype=torch.float64), t, schedule)
        times = torch.full((4,), t)
        got = IdealDenoiser(points, schedule)(x_t, times)
        torch.testing.assert_close(got, narrow.denoiser(schedule)(x_t, times), rtol=1e-6, atol=1e-6)

    def test_works_on_images(self, schedule):
        images = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        out = IdealDenoiser(images, schedule)(images[:2], torch.tensor([1, 700]))
        assert out.shape == (2, 1, 4, 4) and out.isfinite().all()

    def test_refuses_bad_data(self, schedule):
        for bad in (torch.zeros(3), torch.zeros(3, 2, dtype=torch.uint8)):
            with pytest.raises(ValueError, match="data must be"):
                IdealDenoiser(bad, schedule)


# found by `make mutants`


@pytest.mark.parametrize("name", ["var_q", "var_p"])
def test_the_variance_that_is_not_positive_is_named(name):
    one, zero = torch.ones(2), torch.tensor([1.0, 0.0])
    arguments = {"mean_q": one, "var_q": one, "mean_p": one, "var_p": one} | {name: zero}
    with pytest.raises(ValueError, match=f"^{name} must be positive"):
        kl_diagonal(**arguments)
    for function in (gaussian_log_prob, discretised_log_likelihood):
        with pytest.raises(ValueError, match=r"^variance must be positive"):
            function(one, one, zero)
    for weights, variances, wrong in ((zero, one, "weights"), (one, zero, "variances")):
        with pytest.raises(ValueError, match=f"^{wrong} must be positive"):
            GaussianMixture(weights, one[:, None], variances[:, None])


def test_levels_are_met_to_rounding_and_their_grid_has_ends():
    mean, variance = torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    for end in (-1.0, 1.0):
        x = end + torch.tensor([0.0, 1e-6, -1e-6], dtype=torch.float64)
        log_p = discretised_log_likelihood(x, mean, variance)
        assert log_p.exp().min() > 0.04  # the whole tail
        torch.testing.assert_close(log_p, log_p[:1].expand(3), rtol=1e-5, atol=0)
    for k in (-1, 256):
        with pytest.raises(ValueError, match="256 levels"):
            discretised_log_likelihood(torch.tensor([2 * k / 255 - 1]), mean, variance)
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    assert discretised_log_likelihood(x, mean, variance, levels=3).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_mixture_by_hand(mixture):
    w, m, v = mixture.weights[:, None], mixture.means, mixture.variances
    mean, variance = mixture.moments()
    torch.testing.assert_close(mean, (w * m).sum(0))
    torch.testing.assert_close(variance, (w * (v + m**2)).sum(0) - mean**2)
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    k = torch.multinomial(mixture.weights, 50, replacement=True, generator=a)
    expected = m[k] + v[k].sqrt() * torch.randn(50, 2, generator=a, dtype=torch.float64)
    assert torch.equal(mixture.sample(50, b), expected)
    with pytest.raises(ValueError, match="need weights"):
        GaussianMixture(torch.ones(2), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="x must have shape"):
        mixture.log_prob(torch.zeros(2, 2, 1))
