"""Proofs of the equations of the chapter "Variational autoencoders and the ELBO"."""

import math

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal, kl_divergence

from diffbook.autoencoder import LinearVAE, elbo, importance_weighted_bound
from diffbook.exercises import exercises
from diffbook.gaussian import discretised_log_likelihood, gaussian_log_prob, kl_diagonal

f64 = torch.float64


def number(value):
    return torch.tensor(value, dtype=f64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


# ---- a nonlinear world with one latent, in which every integral is a sum over a grid ---------------------------

H = 1 / 64
Z = torch.arange(-10, 10 + H / 2, H, dtype=f64)
STANDARD = (-0.5 * Z.square()).exp() / math.sqrt(2 * math.pi) * H  # weights of N(0, 1) on the grid
VARIANCE_X = 0.3


def curve(z):
    """The decoder's mean, two pixels of one latent."""
    return torch.stack([torch.sin(1.3 * z) + 0.2 * z, 0.5 * z.square() - 0.4], -1)


class CurvedVAE:
    """A decoder that is not linear, and an encoder that is not fitted to it."""

    def __init__(self, shift=0.0, scale=1.0):
        self.shift, self.scale = shift, scale

    def encode(self, x):
        return 0.6 * x[:, :1] - 0.1 + self.shift, (0.2 + 0.1 * x[:, 1:].square()) * self.scale

    def log_likelihood(self, x, z):
        return gaussian_log_prob(x, curve(z[:, 0]), number(VARIANCE_X)).sum(1)


X = number([[0.3, -0.2], [-1.0, 0.5], [1.4, 1.1]])


def densities(x, mean, variance):
    """log p(z), log p(x | z) and log q(z | x) on the grid, by hand."""
    log_prior = -0.5 * Z.square() - 0.5 * math.log(2 * math.pi)
    square = (x - curve(Z)).square().sum(1)
    log_likelihood = -math.log(2 * math.pi * VARIANCE_X) - square / (2 * VARIANCE_X)
    log_q = -0.5 * (Z - mean).square() / variance - 0.5 * torch.log(2 * math.pi * variance)
    return log_prior, log_likelihood, log_q


def over_noise(function, x):
    """The mean over ε of a function of x and ε, by quadrature, for one x."""
    values = function(x.expand(len(Z), -1), Z[:, None])
    return (values * STANDARD).sum()


@pytest.mark.equation("vae-elbo", "vae-gap")
def test_the_bound_and_its_gap_in_a_nonlinear_world():
    """Quadrature: `elbo` averaged over ε is E_q log p(x|z)p(z)/q, below log p(x) by KL(q ‖ p(z|x)), three images."""
    vae = CurvedVAE()
    for x in X:
        mean, variance = (v[0, 0] for v in vae.encode(x[None]))
        log_prior, log_likelihood, log_q = densities(x, mean, variance)
        log_p = torch.logsumexp(log_prior + log_likelihood, 0) + math.log(H)
        q = log_q.exp() * H
        bound = (q * (log_likelihood + log_prior - log_q)).sum()
        gap = (q * (log_q - (log_prior + log_likelihood - log_p))).sum()
        kl = (q * (log_q - log_prior)).sum()
        found = [over_noise(lambda x, e, i=i: elbo(vae, x, noise=e)[i], x) for i in range(3)]
        torch.testing.assert_close(found[0], bound, rtol=0, atol=1e-9)
        torch.testing.assert_close(found[1], (q * log_likelihood).sum(), rtol=0, atol=1e-9)
        torch.testing.assert_close(found[2], kl, rtol=0, atol=1e-9)
        torch.testing.assert_close(log_p - found[0], gap, rtol=0, atol=1e-9)
        assert gap > 0.05


@pytest.mark.equation("vae-gap")
def test_the_gap_closes_at_the_true_posterior_only():
    """Exact: with a linear decoder of one latent, the posterior as encoder has gap 0, its neighbours have not."""
    vae = linear_vae(D=3, d=1, seed=5)
    x = random(4, 3, seed=6)
    mean, covariance = vae.posterior(x)
    A = covariance @ vae.W.T / vae.variance_x
    exact = LinearVAE(vae.W, vae.b, vae.variance_x, A, covariance.diagonal())
    torch.testing.assert_close(exact.encode(x)[0], mean)
    torch.testing.assert_close(exact_elbo(exact, x), exact.log_prob(x), rtol=1e-12, atol=1e-12)
    for A_off, v_off in ((1.1 * A, exact.v), (A, 1.1 * exact.v), (A, 0.9 * exact.v)):
        near = LinearVAE(vae.W, vae.b, vae.variance_x, A_off, v_off)
        assert (exact_elbo(near, x) - near.log_prob(x)).mean() < -1e-3


@pytest.mark.equation("kl-to-prior")
def test_kl_to_the_prior():
    """Quadrature: ½ Σ (μ² + σ² - 1 - log σ²) is the sum over latents of ∫ q log q/p, and what `elbo` subtracts."""
    mean, variance = number([[0.5, -1.2, 0.0]]), number([[0.3, 1.4, 1.0]])
    total = 0.0
    for m, v in zip(mean[0], variance[0], strict=True):
        q = (-0.5 * (Z - m).square() / v).exp() / torch.sqrt(2 * math.pi * v)
        ratio = -0.5 * (Z - m).square() / v - 0.5 * torch.log(v) + 0.5 * Z.square()
        total = total + (q * ratio).sum() * H
    formula = 0.5 * (mean**2 + variance - 1 - variance.log()).sum(1)
    torch.testing.assert_close(formula[0], total, rtol=0, atol=1e-9)

    class Fixed:
        def encode(self, x):
            return mean, variance

        def log_likelihood(self, x, z):
            return torch.zeros(1, dtype=f64)

    bound = elbo(Fixed(), X[:1], torch.Generator().manual_seed(0))
    torch.testing.assert_close(bound.kl, formula, rtol=1e-12, atol=0)
    torch.testing.assert_close(bound.total, -formula, rtol=1e-12, atol=0)
    torch.testing.assert_close(exercises()["8.1"].oracle(mean, variance.log()), formula)


@pytest.mark.equation("vae-reparameterization", "vae-score-gradient")
def test_the_two_gradients_of_the_reconstruction():
    """Quadrature: autograd through `elbo`, the pathwise formulas and the score function equal the true derivative."""

    def reconstruction(shift, scale):
        """∫ q(z | x) log p(x | z) dz directly, without ε, and differentiable in a different way."""
        mean, variance = (v[0, 0] for v in CurvedVAE(shift, scale).encode(x[None]))
        _, log_likelihood, log_q = densities(x, mean, variance)
        return (log_q.exp() * log_likelihood).sum() * H

    for x in X:
        shift, scale = number(0.0).requires_grad_(), number(1.0).requires_grad_()
        through = over_noise(lambda x, e, s=(shift, scale): elbo(CurvedVAE(*s), x, noise=e).reconstruction, x)
        by_mean, by_scale = torch.autograd.grad(through, (shift, scale))
        mean, variance = (v[0, 0] for v in CurvedVAE().encode(x[None]))
        sigma, h = variance.sqrt(), 1e-5
        true_mean = (reconstruction(h, 1.0) - reconstruction(-h, 1.0)) / (2 * h)
        true_sigma = (reconstruction(0.0, (1 + h) ** 2) - reconstruction(0.0, (1 - h) ** 2)) / (2 * h * sigma)
        torch.testing.assert_close(by_mean, true_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_scale * 2 / sigma, true_sigma, rtol=1e-6, atol=1e-6)

        z = (mean + sigma * Z).requires_grad_()
        log_p = CurvedVAE().log_likelihood(x.expand(len(Z), -1), z[:, None])
        (slope,) = torch.autograd.grad(log_p.sum(), z)
        torch.testing.assert_close((STANDARD * slope).sum(), true_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close((STANDARD * Z * slope).sum(), true_sigma, rtol=1e-6, atol=1e-6)
        for b in (0.0, -7.0):
            score = (STANDARD * (log_p.detach() - b) * Z / sigma).sum()
            torch.testing.assert_close(score, true_mean, rtol=1e-6, atol=1e-6)


# ---- the linear world ---------------------------------------------------------------------------------------


def linear_vae(D=5, d=3, seed=1):
    """A linear VAE with random parameters; its encoder fits nothing."""
    W, b, A = (random(*s, seed=seed + i) for i, s in enumerate(((D, d), (D,), (d, D))))
    return LinearVAE(W, b, number(0.4), 0.3 * A, 0.2 + random(d, seed=seed + 9).square())


def exact_elbo(vae, x):
    """`elbo` averaged over ε exactly: the reconstruction is quadratic, and ±√d e_j have the first moments of ε."""
    d = vae.W.shape[1]
    points = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).to(f64)
    total = elbo(vae, x.repeat_interleave(2 * d, 0), noise=points.repeat(len(x), 1)).total
    return total.reshape(len(x), 2 * d).mean(1)


def precision(vae):
    return torch.eye(vae.W.shape[1], dtype=f64) + vae.W.T @ vae.W / vae.variance_x


def with_encoder(vae, v, stretch=1.0):
    """The same decoder; the encoder has the true posterior's mean, times a factor, and variances v."""
    A = torch.linalg.inv(precision(vae)) @ vae.W.T / vae.variance_x
    return LinearVAE(vae.W, vae.b, vae.variance_x, stretch * A, v)


@pytest.mark.equation("linear-vae-posterior", "linear-vae-marginal")
def test_bayes_in_the_linear_world():
    """Exact: `posterior` and `log_prob` satisfy p(z) p(x | z) = p(x) p(z | x) at random points; both are normalised."""
    vae = linear_vae()
    x, z = random(6, 5, seed=20), random(6, 3, seed=21)
    log_joint = gaussian_log_prob(z, number(0.0), number(1.0)).sum(1) + vae.log_likelihood(x, z)
    mean, covariance = vae.posterior(x)
    torch.testing.assert_close(covariance, torch.linalg.inv(precision(vae)), rtol=1e-10, atol=1e-12)
    conditional = MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(vae.log_prob(x) + conditional, log_joint, rtol=1e-10, atol=1e-10)


@pytest.mark.equation("linear-vae-marginal")
def test_the_marginal_of_the_linear_world_by_integration():
    """Quadrature over one latent: ∫ p(z) p(x | z) dz is N(b, W Wᵀ + σ_x² I)."""
    vae = linear_vae(D=4, d=1, seed=3)
    x = random(3, 4, seed=22)
    covariance = vae.W @ vae.W.T + vae.variance_x * torch.eye(4, dtype=f64)
    expected = MultivariateNormal(vae.b, covariance).log_prob(x)
    for row, right in zip(x, expected, strict=True):
        values = vae.log_likelihood(row.expand(len(Z), -1), Z[:, None]) - 0.5 * Z.square()
        integral = torch.logsumexp(values, 0) + math.log(H / math.sqrt(2 * math.pi))
        torch.testing.assert_close(integral, right, rtol=0, atol=1e-9)
    torch.testing.assert_close(vae.log_prob(x), expected, rtol=1e-12, atol=0)


@pytest.mark.equation("linear-vae-gap", "vae-gap")
def test_the_gap_of_the_linear_world():
    """Exact: the formula is torch's KL of two Gaussian vectors, and log p - ELBO, for encoders that fit nothing."""
    for seed in (1, 40):
        vae = linear_vae(seed=seed)
        x, G = random(6, 5, seed=23), precision(vae)
        mean, v = vae.encode(x)
        m, covariance = vae.posterior(x)
        off = mean - m
        formula = 0.5 * (
            (G.diagonal() * v - 1 - v.log()).sum(1) - torch.logdet(G) + torch.einsum("bi,ij,bj->b", off, G, off)
        )
        laws = MultivariateNormal(mean, torch.diag_embed(v)), MultivariateNormal(m, covariance)
        torch.testing.assert_close(formula, kl_divergence(*laws), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(vae.log_prob(x) - exact_elbo(vae, x), formula, rtol=1e-10, atol=1e-10)
        assert (formula > 0.5).all()


@pytest.mark.equation("best-diagonal-encoder")
def test_the_best_diagonal_encoder():
    """Exact: v = 1/G_jj has the stated gap, every other encoder of a list a larger one, and it is too narrow."""
    vae = linear_vae(seed=7)
    x, G = random(5, 5, seed=24), precision(vae)
    best = 1 / G.diagonal()
    gap = 0.5 * (G.diagonal().log().sum() - torch.logdet(G))

    def found(v, stretch=1.0):
        return (vae.log_prob(x) - exact_elbo(with_encoder(vae, v, stretch), x)).mean()

    torch.testing.assert_close(found(best), gap, rtol=1e-9, atol=1e-9)
    others = [torch.linalg.inv(G).diagonal(), *(best * torch.exp(0.1 * random(3, seed=s)) for s in range(30, 50))]
    assert all(found(v) > gap + 1e-5 for v in others)
    assert found(best, 1.01) > gap and found(best, 0.99) > gap
    assert (best < torch.linalg.inv(G).diagonal()).all() and gap > 0.1


@pytest.mark.equation("best-diagonal-encoder")
def test_orthogonal_columns_close_the_gap():
    """Exact: with orthogonal columns the best diagonal encoder has no gap; turn them a little and it has."""
    Q, _ = torch.linalg.qr(random(5, 5, seed=8))
    W = Q[:, :3] * number([2.0, 1.0, 0.5])
    x, b, variance_x = random(5, 5, seed=25), random(5, seed=26), number(0.3)
    angle = 0.2
    turn = number([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    for columns, closed in ((W, True), (W @ turn, False)):
        vae = LinearVAE(columns, b, variance_x, torch.zeros(3, 5, dtype=f64), torch.ones(3, dtype=f64))
        best = with_encoder(vae, 1 / precision(vae).diagonal())
        gap = vae.log_prob(x) - exact_elbo(best, x)
        assert (gap.abs() < 1e-10).all() if closed else (gap > 1e-3).all()


@pytest.mark.equation("isotropic-encoder")
def test_the_best_isotropic_encoder():
    """Exact: 1/v = mean of G_jj minimises the gap along a fine grid, and loses d/2 (log mean - mean log) nats."""
    vae = linear_vae(seed=11)
    x, G = random(4, 5, seed=27), precision(vae)
    diagonal, d = G.diagonal(), 3

    def found(v):
        return exact_elbo(with_encoder(vae, v.expand(d)), x)

    v = 1 / diagonal.mean()
    best = exact_elbo(with_encoder(vae, 1 / diagonal), x)
    loss = d / 2 * (diagonal.mean().log() - diagonal.log().mean())
    torch.testing.assert_close(best - found(v), loss.expand(4), rtol=1e-9, atol=1e-9)
    assert loss > 0.05
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert (found(factor * v) < found(v)).all()


def spectrum(D=6, seed=12):
    """Data with a known covariance: 2D points whose mean is 0 and whose covariance has these eigenvalues."""
    lam = number([4.0, 2.5, 1.2, 0.5, 0.3, 0.1])
    U, _ = torch.linalg.qr(random(D, D, seed=seed))
    points = math.sqrt(D) * U * lam.sqrt()
    return lam, U, torch.cat([points.T, -points.T])


def decoder(W, variance_x):
    D, d = W.shape
    return LinearVAE(W, torch.zeros(D, dtype=f64), variance_x, torch.zeros(d, D, dtype=f64), torch.ones(d, dtype=f64))


@pytest.mark.equation("ppca")
@pytest.mark.parametrize("variance_x", [0.2, 0.8, 1.7])
def test_the_best_decoder_for_a_given_variance(variance_x):
    """Exact: U (ℓ)^½ R is stationary, has the derived likelihood for every R, and beats random and other columns."""
    lam, U, x = spectrum()
    d, s2 = 3, number(variance_x)
    torch.testing.assert_close(x.T @ x / len(x), U @ torch.diag(lam) @ U.T)
    lengths = (lam[:d] - s2).clamp(min=0)
    W = U[:, :d] * lengths.sqrt()
    gamma = torch.cat([torch.maximum(lam[:d], s2), s2.expand(3)])
    value = -0.5 * (6 * math.log(2 * math.pi) + (gamma.log() + lam / gamma).sum())
    R, _ = torch.linalg.qr(random(d, d, seed=13))
    for columns in (W, W @ R):
        columns = columns.clone().requires_grad_()
        likelihood = decoder(columns, s2).log_prob(x).mean()
        torch.testing.assert_close(likelihood, value, rtol=1e-10, atol=1e-10)
        (slope,) = torch.autograd.grad(likelihood, columns)
        assert slope.abs().max() < 1e-9
    for seed in range(50, 90):  # near by and far away
        for size in (0.05, 1.0):
            assert decoder(W @ R + size * random(6, d, seed=seed), s2).log_prob(x).mean() < value
    for seed in range(90, 95):  # another b than the mean loses its quadratic form, and nothing else
        b = 0.1 * random(6, seed=seed)
        other = LinearVAE(W, b, s2, torch.zeros(d, 6, dtype=f64), torch.ones(d, dtype=f64)).log_prob(x).mean()
        C = W @ W.T + s2 * torch.eye(6, dtype=f64)
        torch.testing.assert_close(value - other, 0.5 * b @ torch.linalg.solve(C, b), rtol=1e-9, atol=1e-10)
    for chosen in ([0, 1, 3], [0, 2, 4], [3, 4, 5]):  # other eigenvectors: stationary as well, but lower
        other = U[:, chosen] * (lam[chosen] - s2).clamp(min=0).sqrt()
        worse = decoder(other, s2).log_prob(x).mean()
        assert worse < value - 1e-3 or torch.allclose((lam[chosen] - s2).clamp(min=0), lengths)


@pytest.mark.equation("ppca-noise", "ppca")
def test_the_best_noise_variance():
    """Exact: the mean of the eigenvalues left out beats other variances, each with its best W, and has no slope."""
    lam, U, x = spectrum()
    d = 3

    def best(s2):
        return decoder(U[:, :d] * (lam[:d] - s2).clamp(min=0).sqrt(), s2).log_prob(x).mean()

    s2 = lam[d:].mean().requires_grad_()
    (slope,) = torch.autograd.grad(best(s2), s2)
    assert slope.abs() < 1e-9
    assert all(best(number(v)) < best(s2) - 1e-5 for v in (0.05, 0.2, 0.28, 0.32, 0.5, 1.0, 2.0, 4.5))


@pytest.mark.equation("linear-collapse")
@pytest.mark.parametrize("variance_x", [0.2, 0.8, 1.7, 4.1])
def test_directions_below_the_variance_collapse(variance_x):
    """Exact: over data, `elbo`'s KL of latent i is ½ log λ_i/σ_x² or 0, at the optimum that gradients cannot leave."""
    lam, U, x = spectrum()
    d, s2 = 3, number(variance_x)
    vae = decoder(U[:, :d] * (lam[:d] - s2).clamp(min=0).sqrt(), s2)
    vae = with_encoder(vae, 1 / precision(vae).diagonal())
    mean, v = vae.encode(x)
    by_latent = kl_diagonal(mean, v, number(0.0), number(1.0)).mean(0)
    expected = torch.where(lam[:d] > s2, 0.5 * torch.log(lam[:d] / s2), 0.0)
    torch.testing.assert_close(by_latent, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(elbo(vae, x, torch.Generator().manual_seed(0)).kl.mean(), expected.sum())
    W, A, log_v = (p.clone().requires_grad_() for p in (vae.W, vae.A, vae.v.log()))
    bound = exact_elbo(LinearVAE(W, vae.b, s2, A, log_v.exp()), x).mean()
    for slope in torch.autograd.grad(bound, (W, A, log_v)):
        assert slope.abs().max() < 1e-9
    for seed in range(60, 80):
        near = LinearVAE(
            vae.W + 0.1 * random(6, d, seed=seed), vae.b, s2, vae.A + 0.1 * random(d, 6, seed=seed + 50), vae.v
        )
        assert exact_elbo(near, x).mean() < bound


# ---- the decoder's variance, and the weights of a loss --------------------------------------------------------


@pytest.mark.equation("best-decoder-variance")
def test_the_best_decoder_variance():
    """Symbolic: the mean log-density has its only maximum at σ_x² = the mean squared error, with the stated value."""
    s, e, D = sp.symbols("s e D", positive=True)
    value = -D / 2 * (sp.log(2 * sp.pi) + sp.log(s) + e / s)
    assert sp.solve(sp.diff(value, s), s) == [e]
    assert sp.simplify(sp.diff(value, s, 2).subs(s, e) + D / (2 * e**2)) == 0  # negative
    best = value.subs(s, e)
    assert sp.simplify(best + D / 2 * (sp.log(2 * sp.pi) + sp.log(e) + 1)) == 0
    # and it is the package's reconstruction
    vae, x = linear_vae(), random(7, 5, seed=28)
    noise = random(7, 3, seed=29)
    square = (x - vae.decode(vae.encode(x)[0] + vae.v.sqrt() * noise)).square().mean()
    for variance_x in (square.item(), 0.9 * square.item(), 1.1 * square.item()):
        model = LinearVAE(vae.W, vae.b, number(variance_x), vae.A, vae.v)
        found = elbo(model, x, noise=noise).reconstruction.mean().item()
        assert math.isclose(found, value.subs({s: variance_x, e: square.item(), D: 5}).evalf(), rel_tol=1e-12)
        assert found <= best.subs({e: square.item(), D: 5}).evalf() + 1e-12


@pytest.mark.equation("hidden-beta")
def test_the_hidden_beta():
    """Exact: a loss with torch's reductions is c times minus the ELBO of σ_x² = c/2a, up to a constant."""
    base, D, d = linear_vae(D=5, d=3), 5, 3
    x, noise = random(8, 5, seed=30), random(8, 3, seed=31)
    mean, v = base.encode(x)
    f = base.decode(mean + v.sqrt() * noise)
    kl = 0.5 * (mean**2 + v - 1 - v.log())
    losses = {  # as people write them, with the a and c that the reductions make
        "sum and sum": (((x - f) ** 2).sum(1).mean() + kl.sum(1).mean(), 1, 1),
        "mean and sum": (F.mse_loss(f, x) + kl.sum(1).mean(), 1 / D, 1),
        "mean and mean": (F.mse_loss(f, x) + kl.mean(), 1 / D, 1 / d),
    }
    for loss, a, c in losses.values():
        variance_x = number(c / (2 * a))
        honest = elbo(LinearVAE(base.W, base.b, variance_x, base.A, base.v), x, noise=noise).total.mean()
        constant = D / 2 * torch.log(2 * math.pi * variance_x)
        torch.testing.assert_close(loss, c * (-honest - constant), rtol=1e-12, atol=1e-12)
        for s2 in (0.05, 0.7):  # with another variance in mind: a β-ELBO of it
            beta = c / (2 * a) / s2
            weighted = ((x - f) ** 2).sum(1).mean() / (2 * s2) + beta * kl.sum(1).mean()
            torch.testing.assert_close(loss, 2 * a * s2 * weighted, rtol=1e-12, atol=1e-12)
    assert exercises()["8.3"].oracle == (1 / 2, 784 / 2, 784 / 64)


def test_the_planted_loss_of_the_exercise_is_minus_the_elbo():
    """Exact: the repaired loss of exercise 8.4 is `elbo` with the same draw."""
    vae, x, noise = linear_vae(), random(8, 5, seed=32), random(8, 3, seed=33)
    mean, v = vae.encode(x)
    f = vae.decode(mean + v.sqrt() * noise)
    loss = exercises()["8.4"].oracle(x, f, mean, v, vae.variance_x)
    torch.testing.assert_close(loss, -elbo(vae, x, noise=noise).total.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.equation("constant-pixel")
def test_a_pixel_that_never_changes():
    """Exact: its log-density is -log s - ½ log 2π, without bound; its log-probability is log Φ(Δ/2s), up to 0."""
    black, delta = number(-1.0), 2 / 255
    for s in (1.0, 0.1, 1e-2, 1e-3, 1e-9):
        density = gaussian_log_prob(black, black, number(s**2)).item()
        probability = discretised_log_likelihood(black, black, number(s**2)).item()
        assert math.isclose(density, -math.log(s) - 0.5 * math.log(2 * math.pi), rel_tol=1e-12)
        tail = 0.5 * math.erfc(delta / (2 * s) / math.sqrt(2))  # 1 - Φ
        assert math.isclose(probability, math.log1p(-tail), rel_tol=1e-9, abs_tol=1e-15)
        assert probability <= 0
    assert density > 19 and probability == 0


# ---- more samples in the logarithm ----------------------------------------------------------------------------


def nodes(n=48):
    """Gauss–Hermite nodes and weights for N(0, 1)."""
    import numpy as np

    points, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())


def bounds_by_quadrature(x):
    """L_1, L_2, L_3 of the curved VAE for one x by quadrature over one, two and three ε, and log p(x)."""
    vae, (e, w) = CurvedVAE(), nodes()
    mean, variance = (v[0, 0] for v in vae.encode(x[None]))
    z = mean + variance.sqrt() * e
    log_q = -0.5 * e.square() - 0.5 * torch.log(2 * math.pi * variance)
    log_w = (
        vae.log_likelihood(x.expand(len(z), -1), z[:, None]) - 0.5 * z.square() - 0.5 * math.log(2 * math.pi) - log_q
    )
    two = torch.logaddexp(log_w[:, None], log_w)
    three = torch.logaddexp(two[:, :, None], log_w)
    L1 = (w * log_w).sum()
    L2 = torch.einsum("i,j,ij->", w, w, two) - math.log(2)
    L3 = torch.einsum("i,j,k,ijk->", w, w, w, three) - math.log(3)
    log_prior, log_likelihood, _ = densities(x, mean, variance)
    return [L1, L2, L3], torch.logsumexp(log_prior + log_likelihood, 0) + math.log(H)


@pytest.mark.equation("importance-weighted-bound")
def test_the_importance_weighted_bounds_in_order():
    """Quadrature over K noises: ELBO = L_1 < L_2 < L_3 < log p(x). Monte Carlo (4 SE): the package's mean is L_K."""
    n = 20_000
    for i, x in enumerate(X):
        exact, log_p = bounds_by_quadrature(x)
        mean_elbo = over_noise(lambda x, e: elbo(CurvedVAE(), x, noise=e).total, x)
        torch.testing.assert_close(exact[0], mean_elbo, rtol=0, atol=1e-6)
        assert exact[0] + 1e-3 < exact[1] and exact[1] + 1e-3 < exact[2] and exact[2] + 1e-3 < log_p
        for K in (1, 2, 3):
            found = importance_weighted_bound(
                CurvedVAE(), x.expand(n, -1), K, torch.Generator().manual_seed(10 * i + K)
            )
            assert abs(found.mean() - exact[K - 1]) < 4 * found.std() / math.sqrt(n)


@pytest.mark.equation("importance-weighted-bound")
def test_leaving_out_one_weight_at_a_time():
    """Exact: the mean of K + 1 weights is the mean of the means without one, so its log is above the mean of theirs."""
    log_w = 3 * random(6, 500, seed=34)
    w = log_w.exp()
    without = torch.stack([torch.cat([w[:j], w[j + 1 :]]).mean(0) for j in range(6)])
    torch.testing.assert_close(without.mean(0), w.mean(0), rtol=1e-12, atol=0)
    assert (w.mean(0).log() >= without.log().mean(0) - 1e-12).all()
    bound = exercises()["8.5"].oracle(log_w)
    torch.testing.assert_close(bound, w.mean(0).log(), rtol=1e-9, atol=1e-9)
