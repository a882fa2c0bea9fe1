"""Proofs of the equations of the chapter "Training"."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from torch import nn

from diffbook import training
from diffbook.diffusion import eps_from_v, q_sample, v_target, x0_from_eps
from diffbook.processes import Processes
from diffbook.recipes import find_recipe
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule
from diffbook.unet import Attention, LiteUNet, ResBlock, UNet, group_norm, time_embedding

SCHEDULES = [
    linear_schedule(),
    cosine_schedule(),
    cosine_schedule(7),
    NoiseSchedule(torch.tensor([0.3, 0.5, 0.4, 0.97])),
]
SMOKE = find_recipe("fashion-smoke")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(schedule):
    return sorted({1, 2, schedule.T // 3 or 1, schedule.T - 1, schedule.T})


# ---- time embedding


@pytest.mark.equation("embedding-inner-product", "embedding-shift")
def test_embedding_symbolically():
    """Symbolic: the addition theorems, for one frequency."""
    a, b = sp.symbols("a b", real=True)  # ω t and ω t', or ω t and ω s
    assert sp.expand_trig(sp.cos(a - b)) == sp.sin(a) * sp.sin(b) + sp.cos(a) * sp.cos(b)
    turn = sp.Matrix([[sp.cos(b), sp.sin(b)], [-sp.sin(b), sp.cos(b)]])
    both = turn * sp.Matrix([sp.sin(a), sp.cos(a)]) - sp.Matrix([sp.sin(a + b), sp.cos(a + b)])
    assert sp.simplify(both) == sp.zeros(2, 1)


def frequencies(width):
    half = width // 2
    return torch.tensor([10_000 ** (-i / (half - 1)) for i in range(half)], dtype=torch.float64)


@pytest.mark.equation("embedding-inner-product")
@pytest.mark.parametrize("width", [4, 32, 48, 128])
def test_embedding_inner_product_in_code(width):
    """Exact: inner products of `time_embedding` are Σ cos(ω_i (t - t')), with the ω_i written out by hand."""
    t = torch.tensor([1, 2, 3, 50, 400, 999, 1000])
    e = time_embedding(t, width).double()
    difference = (t[:, None] - t[None, :]).double()
    expected = (difference[:, :, None] * frequencies(width)).cos().sum(2)
    torch.testing.assert_close(e @ e.T, expected, rtol=0, atol=2e-4 * width)


@pytest.mark.equation("embedding-shift")
@pytest.mark.parametrize("width", [4, 48])
@pytest.mark.parametrize("shift", [1, 37, 600])
def test_embedding_shift_in_code(width, shift):
    """Exact: `time_embedding` at t + s is the rotation by ω_i s of the one at t, pair by pair."""
    t = torch.tensor([1, 2, 100, 400])
    half = width // 2
    e, later = time_embedding(t, width).double(), time_embedding(t + shift, width).double()
    angle = shift * frequencies(width)
    sine, cosine = e[:, :half], e[:, half:]
    turned = torch.cat([angle.cos() * sine + angle.sin() * cosine, angle.cos() * cosine - angle.sin() * sine], dim=1)
    torch.testing.assert_close(later, turned, rtol=0, atol=3e-4)


# ---- blocks


@pytest.mark.equation("norm-blind")
def test_norm_blind():
    """Exact: with one channel a group the norm removes what was added to a channel; the package's groups do not."""
    h, c = random(3, 8, 5, 5), random(3, 8, 1, 1, seed=1)
    alone = nn.GroupNorm(8, 8).double()
    torch.testing.assert_close(alone(h + c), alone(h), rtol=0, atol=1e-12)
    ours = group_norm(8).double()
    assert ours.num_groups == 2
    assert (ours(h + c) - ours(h)).abs().max() > 0.1
    # of a constant in all channels of a group nothing is left either
    same = c[:, [0, 0, 0, 0, 4, 4, 4, 4]]
    torch.testing.assert_close(ours(h + same), ours(h), rtol=0, atol=1e-12)


@pytest.mark.equation("norm-blind")
@pytest.mark.parametrize("groups, blind", [(8, True), (2, False)])
def test_blind_block(groups, blind):
    """Exact: a `ResBlock` whose second norm has one channel a group gives the same output for every embedding."""
    block = ResBlock(8, 8, 16).double()
    nn.init.normal_(block.conv2.weight, generator=torch.Generator().manual_seed(2))
    block.norm2 = nn.GroupNorm(groups, 8).double()
    x, e = random(1, 8, 6, 6).expand(2, -1, -1, -1), random(2, 16, seed=3)
    out = block(x, e)
    assert torch.allclose(out[0], out[1], rtol=0, atol=1e-10) == blind


@pytest.mark.equation("zero-start")
@pytest.mark.parametrize("kind", [UNet, LiteUNet])
def test_new_networks_return_zero(kind):
    """Exact: the first output of either network is 0, whatever its input."""
    network = kind(1, (8, 16), attention=(1,), classes=10)
    x = random(2, 1, 28, 28, dtype=torch.float32)
    assert network(x, torch.tensor([1, 1000]), torch.tensor([0, 10])).abs().max() == 0


@pytest.mark.equation("zero-start")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_start(schedule):
    """Exact: the mean of v² over ε and -ε with ε² = 1 is ᾱ_t + (1 - ᾱ_t) x_0²."""
    x_0, sign = random(6, 5), random(6, 5, seed=1).sign()
    for t in times(schedule):
        mean = (v_target(x_0, sign, t, schedule) ** 2 + v_target(x_0, -sign, t, schedule) ** 2) / 2
        a = math.prod(1 - b for b in schedule.beta[1 : t + 1].tolist())
        torch.testing.assert_close(mean, a + (1 - a) * x_0**2, rtol=1e-9, atol=1e-12)


@pytest.mark.equation("zero-start")
@pytest.mark.parametrize("predicts", ["v", "eps"])
def test_first_loss_of_a_recipe(predicts):
    """Monte Carlo (standard error under 0.5 %): the first loss of a recipe is the mean of the formula over t."""
    recipe = replace(SMOKE, predicts=predicts)
    x_0 = 0.6 * random(500, 1, 28, 28, dtype=torch.float32)
    loss = recipe.loss(recipe.build(), x_0, torch.zeros(500, dtype=torch.int64), torch.Generator().manual_seed(4))
    a = recipe.noise_schedule().alpha_bar[1:].mean().item()
    expected = 1 if predicts == "eps" else a + (1 - a) * 0.36
    assert loss.item() == pytest.approx(expected, rel=0.02)


# ---- attention


@pytest.mark.equation("dot-product-variance")
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_dot_product_variance(d):
    """Exact: the mean and variance of q·k over all vectors of ±1 and ±2 are 0 and d Var[q] Var[k]."""
    # q_i in {-1, 1}: variance 1; k_i in {-2, 2}: variance 4. All pairs of vectors, equally likely.
    q = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=d)), dtype=torch.float64)
    k = torch.tensor(list(itertools.product([-2.0, 2.0], repeat=d)), dtype=torch.float64)
    dots = q @ k.T
    assert dots.mean().item() == 0
    assert dots.var(correction=0).item() == pytest.approx(4 * d)
    assert (dots / math.sqrt(d)).var(correction=0).item() == pytest.approx(4)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_is_its_definition(heads):
    """Exact: the package's `Attention` is the weighted mean of the definition, head by head."""
    C, H, W = 8, 2, 3
    layer = Attention(C, heads).double()
    for i, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    x = random(1, C, H, W, seed=9)
    rows = F.linear(layer.norm(x)[0].reshape(C, H * W).T, layer.qkv.weight[:, :, 0, 0], layer.qkv.bias)
    q, k, v = rows.split(C, dim=1)
    out, d = [], C // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(H * W):
            score = torch.stack([(q[i, part] * k[j, part]).sum() / math.sqrt(d) for j in range(H * W)]).exp()
            out.append((score[:, None] * v[:, part]).sum(0) / score.sum())
    o = torch.stack(out).reshape(heads, H * W, d).transpose(0, 1).reshape(H * W, C)
    expected = F.linear(o, layer.project.weight[:, :, 0, 0], layer.project.bias).T.reshape(1, C, H, W)
    torch.testing.assert_close(layer(x) - x, expected, rtol=1e-9, atol=1e-9)


def test_paper_network_size():
    """Exact: the configuration of Ho et al. for CIFAR-10 has 35.7 million parameters."""
    with torch.device("meta"):
        network = UNet(3, (128, 256, 256, 256), attention=(1,), dropout=0.1)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(35.7, abs=0.05)


# ---- the loss that the package trains


@pytest.mark.equation("v-loss-weights")
def test_v_loss_weights_symbolically():
    """Symbolic: at a known x_t an error e of v is the error √ᾱ e of ε and -√(1-ᾱ) e of x_0."""
    x_0, eps, v_hat = sp.symbols("x_0 eps v_hat", real=True)
    a = sp.symbols("alpha_bar", positive=True)
    b = 1 - a
    x_t, v = sp.sqrt(a) * x_0 + sp.sqrt(b) * eps, sp.sqrt(a) * eps - sp.sqrt(b) * x_0
    eps_hat, x_0_hat = sp.sqrt(a) * v_hat + sp.sqrt(b) * x_t, sp.sqrt(a) * x_t - sp.sqrt(b) * v_hat
    loss = (v - v_hat) ** 2
    assert sp.simplify((eps - eps_hat) ** 2 - a * loss) == 0
    assert sp.simplify((x_0 - x_0_hat) ** 2 - b * loss) == 0


@pytest.mark.equation("v-loss-weights")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_v_loss_weights_in_code(schedule):
    """Exact: the three losses, computed by the package's conversions, have the ratios of the page."""
    x_0, eps, v_hat = random(4, 3), random(4, 3, seed=1), random(4, 3, seed=2)
    snr = schedule.snr()
    for t in times(schedule):
        x_t = q_sample(x_0, eps, t, schedule)
        loss = (v_target(x_0, eps, t, schedule) - v_hat).square().sum()
        eps_hat = eps_from_v(x_t, v_hat, t, schedule)
        eps_loss = (eps - eps_hat).square().sum()
        x_0_loss = (x_0 - x0_from_eps(x_t, eps_hat, t, schedule)).square().sum()
        a = math.prod(1 - b for b in schedule.beta[1 : t + 1].tolist())
        torch.testing.assert_close(loss, eps_loss / a, rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, (1 + 1 / snr[t]) * eps_loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, x_0_loss / (1 - a), rtol=1e-5, atol=0)
        torch.testing.assert_close(loss, (1 + snr[t]) * x_0_loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(loss, eps_loss + x_0_loss, rtol=1e-5, atol=0)


def overlaps(B, T):
    """P(t | stratum i), exact fractions, shape (B, T): the part of [i/B, (i+1)/B) that lies in [(t-1)/T, t/T)."""

    def overlap(i, t):
        low, high = max(Fraction(i, B), Fraction(t - 1, T)), min(Fraction(i + 1, B), Fraction(t, T))
        return max(high - low, Fraction(0)) * B

    return [[overlap(i, t) for t in range(1, T + 1)] for i in range(B)]


def drawn_times(recipe, batch, seed):
    """The times that `recipe.loss` draws for a batch."""
    seen = []

    def network(x, t, y):
        seen.append(t)
        return x

    x_0 = torch.zeros(batch, 1, 1, 1)
    recipe.loss(network, x_0, torch.zeros(batch, dtype=torch.int64), torch.Generator().manual_seed(seed))
    return seen[0]


@pytest.mark.equation("stratified-unbiased")
@pytest.mark.parametrize("B, T", [(32, 1000), (7, 10), (10, 7), (1, 5)])
def test_stratified_unbiased(B, T):
    """Exact: averaged over the strata, every time has the probability 1/T."""
    table = overlaps(B, T)
    assert all(sum(row) == 1 for row in table)
    for t in range(T):
        assert sum(row[t] for row in table) / B == Fraction(1, T)


@pytest.mark.equation("stratified-unbiased")
def test_stratified_times_in_code():
    """Monte Carlo (5 standard errors): `Diffusion.loss` draws the i-th time with the probabilities of the i-th part."""
    B, T, n = 7, 10, 4000
    recipe = replace(SMOKE, T=T)
    drawn = torch.stack([drawn_times(recipe, B, seed) for seed in range(n)])
    counted = torch.stack([(drawn == t).double().mean(0) for t in range(1, T + 1)], dim=1)
    p = torch.tensor([[float(q) for q in row] for row in overlaps(B, T)], dtype=torch.float64)
    assert ((counted - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()
    assert set(drawn_times(replace(SMOKE, T=1000), 1000, 0).tolist()) == set(range(1, 1001))


@pytest.mark.equation("stratified-variance")
@pytest.mark.parametrize("B, T", [(16, 100), (7, 10), (10, 7)])
def test_stratified_variance(B, T):
    """Exact: plain minus stratified variance is the spread of the strata's means, in fractions."""
    f = [Fraction(t * t % 17 + t) for t in range(1, T + 1)]
    mean = sum(f) / T
    plain = (sum(x * x for x in f) / T - mean**2) / B
    table = overlaps(B, T)
    means = [sum(p * x for p, x in zip(row, f, strict=True)) for row in table]
    within = [sum(p * x * x for p, x in zip(row, f, strict=True)) - m * m for row, m in zip(table, means, strict=True)]
    stratified = sum(within) / B**2
    assert plain - stratified == sum((m - mean) ** 2 for m in means) / B**2
    assert stratified <= plain


@pytest.mark.equation("stratified-variance")
def test_stratified_variance_in_code():
    """Monte Carlo (standard error 3 %): the variance of a mean of t² over the times that `Diffusion.loss` draws."""
    B, T, n = 7, 10, 3000
    recipe = replace(SMOKE, T=T)
    found = torch.stack([drawn_times(recipe, B, seed).double().square().mean() for seed in range(n)])
    p = torch.tensor([[float(q) for q in row] for row in overlaps(B, T)], dtype=torch.float64)
    t = torch.arange(1, T + 1, dtype=torch.float64)
    within = p @ t**4 - (p @ t**2) ** 2
    assert found.var().item() == pytest.approx((within.sum() / B**2).item(), rel=0.15)
    assert found.mean().item() == pytest.approx((t**2).mean().item(), rel=0.01)


# ---- the moving average of the weights


def flat(network):
    return torch.cat([p.detach().double().reshape(-1) for p in network.parameters()])


@pytest.mark.equation("ema-weights")
def test_ema_weights_in_training():
    """Exact: after some steps the package's averaged weights are the weighted sum of all weights it has had."""
    recipe = replace(SMOKE, lr=0.02, ema=0.3)  # reached after four steps, so that both branches of the warm-up are used
    state = training.State(recipe, Processes("cpu"))
    history, decays = [flat(state.network)], []
    for n in range(8):
        decays.append(min(0.3, (1 + n) / (10 + n)))
        x_0 = random(recipe.batch, 1, 28, 28, seed=n, dtype=torch.float32)
        training.take_step(state, x_0, torch.zeros(recipe.batch, dtype=torch.int64))
        history.append(flat(state.network))
    weights = [math.prod(decays)]
    weights += [(1 - d) * math.prod(decays[k + 1 :]) for k, d in enumerate(decays)]
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * theta for w, theta in zip(weights, history, strict=True))
    torch.testing.assert_close(flat(state.averaged), expected, rtol=0, atol=1e-6)
    assert (expected - history[-1]).abs().max() > 1e-3


@pytest.mark.equation("ema-weights")
def test_ema_weights_symbolically():
    """Symbolic: three updates with different decays, and the sum of the weights."""
    d = sp.symbols("d1:4")
    theta = sp.symbols("theta0:4")
    mean = theta[0]
    for k in range(3):
        mean = d[k] * mean + (1 - d[k]) * theta[k + 1]
    weights = [d[0] * d[1] * d[2], (1 - d[0]) * d[1] * d[2], (1 - d[1]) * d[2], 1 - d[2]]
    assert sp.expand(mean - sum(w * x for w, x in zip(weights, theta, strict=True))) == 0
    assert sp.expand(sum(weights)) == 1


@pytest.mark.equation("ema-warmup")
def test_ema_warmup():
    """Exact: the product of the first n decays of a recipe is one over the binomial (n+9 over 9)."""
    recipe = replace(find_recipe("fashion-cpu"), ema=0.999)
    product = 1.0
    for n in range(400):
        assert product == pytest.approx(1 / math.comb(n + 9, 9), rel=1e-9)
        product *= recipe.ema_decay(n * recipe.batch)
    assert recipe.ema_decay(10**9) == 0.999


@pytest.mark.equation("ema-variance", "ema-variance-correlated")
@pytest.mark.parametrize("d", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_ema_variance(d, rho):
    """Exact: w' C w with the weights of a long average and the correlations ρ^|i-j|."""
    n = 3000
    # the weights of the page, found by pushing unit vectors through the update
    weights, units = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    for k in range(n):
        weights = torch.lerp(weights, units[k], 1 - d)
    lag = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs()
    C = torch.tensor(rho, dtype=torch.float64) ** lag
    expected = (1 - d) / (1 + d) * (1 + d * rho) / (1 - d * rho)
    assert (weights @ C @ weights).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.equation("ema-variance-correlated")
def test_ema_variance_correlated_symbolically():
    """Symbolic: the formula is the fixed point of the two recursions of the page."""
    d, rho, s2 = sp.symbols("d rho s2", positive=True)
    g, V = sp.symbols("g V")
    solution = sp.solve(
        [sp.Eq(g, d * rho * g + (1 - d) * s2), sp.Eq(V, d * d * V + (1 - d) ** 2 * s2 + 2 * d * (1 - d) * rho * g)],
        [g, V],
    )
    assert sp.simplify(solution[V] - s2 * (1 - d) / (1 + d) * (1 + d * rho) / (1 - d * rho)) == 0


@pytest.mark.equation("sgd-noise-floor")
def test_sgd_noise_floor():
    """Exact: the covariance of a step of gradient descent on a noisy parabola, iterated until it stands still."""
    eta, lam, sigma = 0.3, 0.7, 1.4
    variance = 0.0
    for _ in range(400):
        variance = (1 - eta * lam) ** 2 * variance + (eta * sigma) ** 2
    assert variance == pytest.approx(eta * sigma**2 / (lam * (2 - eta * lam)), rel=1e-12)


def test_lite_unet_needs_less():
    """Exact: with the same arguments the light network has fewer parameters than the full one."""
    sizes = []
    for kind in (UNet, LiteUNet):
        with torch.device("meta"):
            network = kind(1, (48, 96), attention=(1,), patch=2, classes=10)
        sizes.append(sum(p.numel() for p in network.parameters()))
    assert sizes[1] < sizes[0] / 2
