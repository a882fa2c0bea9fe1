"""The equations of chapter 12, From text to image."""

import math
import warnings

import pytest
import sympy as sp
import torch
from torch.testing import assert_close

from diffbook.composition import share
from diffbook.gaussian import GaussianMixture, IdealDenoiser, gaussian_log_prob
from diffbook.latent import Attention, CaptionEncoder, CaptionUNet, UnknownWordWarning, Vocabulary
from diffbook.recipes import RECIPES
from diffbook.sampling import as_eps, ddim_sample, guided
from diffbook.schedule import NoiseSchedule, cosine_schedule, linear_schedule

SCHEDULE = linear_schedule()
F64 = torch.float64


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def numbers(*values):
    return torch.tensor(values, dtype=F64)


def attention(width=8, context=6, heads=2, seed=0):
    """A layer of the package with random weights, its last matrix included."""
    layer = Attention(width, context, heads).double().requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(0.7 * random(*parameter.shape, seed=seed + i))
    return layer


def lookup(d, M):
    """A layer with one head that returns its weights: queries and keys of d numbers, unit vectors as values."""
    width = max(d, M)
    layer = Attention(width, d + M, 1).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.zero_()
    layer.query.weight[:d, :d] = torch.eye(d) * math.sqrt(width / d)  # so that the scale is 1/√d
    layer.key_value.weight[:d, :d] = torch.eye(d)
    layer.key_value.weight[width : width + M, d:] = torch.eye(M)
    layer.project.weight[:, :] = torch.eye(width)

    def weights(q, k, mask=None):
        h = torch.cat([q, q.new_zeros(len(q), width - d)], 1)[None]
        context = torch.cat([k, torch.eye(M, dtype=F64)], 1)[None]
        return layer(h, context, None if mask is None else mask[None])[0, :, :M]

    return weights


# ---- attention -----------------------------------------------------------------------------------------------


@pytest.mark.equation("softmax-lookup")
def test_softmax_lookup():
    """Exact: for the layer's weights and any other ones p, mean score plus entropy differ by KL(p ‖ w)."""
    d, M = 5, 4
    q, k = random(3, d, seed=1), random(M, d, seed=2)
    w = lookup(d, M)(q, k)
    s = torch.tensor([[sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(d) for y in k] for x in q])
    assert_close(w.sum(1), torch.ones(3, dtype=F64))

    def aim(p):
        return (p * s).sum(1) + torch.special.entr(p).sum(1)

    assert_close(aim(w), s.exp().sum(1).log(), rtol=1e-10, atol=1e-10)
    for seed in range(3, 20):
        p = random(3, M, seed=seed).square()
        p = p / p.sum(1, keepdim=True)
        divergence = (p * (p / w).log()).sum(1)
        assert (divergence > 1e-4).all()
        assert_close(aim(p), s.exp().sum(1).log() - divergence, rtol=1e-10, atol=1e-10)


@pytest.mark.equation("masked-attention")
def test_masked_words_do_not_exist():
    """Exact: a layer with masked words equals the layer on the list without them; what they hold counts nothing."""
    layer, h, context = attention(), random(2, 5, 8, seed=3), random(2, 7, 6, seed=4)
    mask = torch.tensor([[True, True, False, True, False, False, False], [True] + 6 * [False]])
    answer = layer(h, context, mask)
    for i in range(2):
        assert_close(answer[i : i + 1], layer(h[i : i + 1], context[i : i + 1, mask[i]]), rtol=1e-12, atol=1e-12)
    garbage = torch.where(mask[:, :, None], context, 1e3 * random(2, 7, 6, seed=5))
    assert torch.equal(layer(h, garbage, mask), answer)
    assert (layer(h, context) - answer).abs().max() > 0.1
    weights = lookup(4, 6)(random(3, 4, seed=6), random(6, 4, seed=7), torch.arange(6) < 4)
    assert (weights[:, 4:] == 0).all() and (weights[:, :4] > 0).all()


@pytest.mark.equation("masked-attention")
def test_masked_attention_is_a_quotient_of_sums():
    """Exact: both sums of one head, written as loops over the unmasked words."""
    layer, h, context = attention(heads=1), random(1, 3, 8, seed=8), random(1, 5, 6, seed=9)
    mask = torch.tensor([[True, False, True, True, False]])
    q = h[0] @ layer.query.weight.T + layer.query.bias
    k, v = (context[0] @ layer.key_value.weight.T + layer.key_value.bias).split(8, dim=1)
    for i in range(3):
        below, above = 0.0, torch.zeros(8, dtype=F64)
        for j in (0, 2, 3):
            e = math.exp((q[i] * k[j]).sum().item() / math.sqrt(8))
            below, above = below + e, above + e * v[j]
        expected = (above / below) @ layer.project.weight.T + layer.project.bias
        assert_close(layer(h, context, mask)[0, i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.equation("context-order")
def test_order_of_the_context():
    """Exact: permuted words, with their mask, give the same answers; permuted places give permuted answers."""
    layer, h, context = attention(), random(1, 5, 8, seed=10), random(1, 6, 6, seed=11)
    mask = torch.tensor([[True, True, False, True, True, False]])
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert_close(layer(h, context[:, order], mask[:, order]), layer(h, context, mask), rtol=1e-12, atol=1e-12)
    assert (layer(h, context[:, order], mask) - layer(h, context, mask)).abs().max() > 0.1
    places = torch.tensor([3, 0, 4, 1, 2])
    assert_close(layer(h[:, places], context, mask), layer(h, context, mask)[:, places], rtol=1e-12, atol=1e-12)


@pytest.mark.equation("context-order")
def test_places_tell_the_order():
    """Exact: the encoder's features of swapped words are not the swapped features, unless its places are all equal."""
    encoder = CaptionEncoder(20, 3, 16).double().requires_grad_(False)
    for i, parameter in enumerate(encoder.parameters()):
        parameter.copy_(0.5 * random(*parameter.shape, seed=20 + i))
    y, swapped = torch.tensor([[3, 7, 20]]), torch.tensor([[7, 3, 20]])
    order = torch.tensor([0, 2, 1, 3])
    assert (encoder(y)[0][:, order] - encoder(swapped)[0]).abs().max() > 0.01
    encoder.place.copy_(encoder.place[:1].expand(4, -1))
    assert_close(encoder(y)[0][:, order], encoder(swapped)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.equation("one-word")
def test_one_word_is_the_same_everywhere():
    """Exact: with one unmasked word every place gets its value, whatever the place holds."""
    layer, h, context = attention(), random(1, 5, 8, seed=12), random(1, 4, 6, seed=13)
    mask = torch.tensor([[False, False, True, False]])
    value = (context[0, 2] @ layer.key_value.weight.T + layer.key_value.bias)[8:]
    expected = value @ layer.project.weight.T + layer.project.bias
    assert_close(layer(h, context, mask), expected.expand(1, 5, 8), rtol=1e-12, atol=1e-12)


@pytest.mark.equation("one-word")
def test_null_caption_hears_its_start():
    """Exact: the null caption has one unmasked row, the start, so no place of it is without an answer."""
    encoder = CaptionEncoder(20, 3, 16)
    features, mask = encoder(torch.full((2, 3), 20))
    assert mask.tolist() == 2 * [[True, False, False, False]] and features.isfinite().all()


@pytest.mark.equation("softmax-shift")
def test_bias_of_the_keys():
    """Exact: a bias of the keys changes no answer, and its gradient is zero; that of the values is not."""
    layer, h, context = attention(), random(1, 5, 8, seed=14), random(1, 4, 6, seed=15)
    mask = torch.tensor([[True, True, False, True]])
    answer = layer(h, context, mask)
    bias = layer.key_value.bias.requires_grad_()
    layer(h, context, mask).square().sum().backward()
    assert bias.grad[:8].abs().max() < 1e-12 < 1e-2 < bias.grad[8:].abs().min()
    with torch.no_grad():
        bias[:8] += random(8, seed=16)
        assert_close(layer(h, context, mask), answer, rtol=1e-12, atol=1e-12)
        bias[8:] += 1
        assert (layer(h, context, mask) - answer).abs().max() > 0.1


# ---- words ---------------------------------------------------------------------------------------------------


def test_the_null_caption_of_the_network():
    """No caption, and a caption of nothing but "no word", are the same for the network."""
    network = CaptionUNet((4, 8, 8), 20, 3, (16, 16), 1).requires_grad_(False)
    for i, parameter in enumerate(network.parameters()):
        parameter.copy_(0.1 * random(*parameter.shape, seed=30 + i))
    z, t = random(2, 4, 8, 8, seed=29).float(), torch.tensor([5, 900])
    null = torch.full((2, 3), 20)
    assert torch.equal(network(z, t), network(z, t, null))
    assert (network(z, t, torch.tensor([[1, 20, 20], [2, 3, 20]])) - network(z, t, null)).abs().max() > 1e-3


def test_nobody_looks_at_no_word():
    """Exact: what the rows of "no word" hold changes no output, and the mean is that over the start and the words."""
    network = CaptionUNet((4, 8, 8), 20, 3, (16, 16), 1).requires_grad_(False)
    for i, parameter in enumerate(network.parameters()):
        parameter.copy_(0.1 * random(*parameter.shape, seed=30 + i))
    z, t, y = random(1, 4, 8, 8, seed=28).float(), torch.tensor([300]), torch.tensor([[3, 7, 20]])
    told = []
    network.pooled.register_forward_pre_hook(lambda layer, args: told.append(args[0]))
    answer, features = network(z, t, y), network.caption(y)[0]
    assert_close(told[0], features[:, :3].mean(1))
    network.caption.place[3] += random(128, seed=27)  # the row of the third word, which is not there
    assert_close(network(z, t, y), answer, rtol=1e-6, atol=1e-6)
    network.caption.place[2] += random(128, seed=27)
    assert (network(z, t, y) - answer).abs().max() > 1e-3


def test_unknown_words_are_named():
    vocabulary = Vocabulary(["cat", "fluent"], 3)
    with pytest.warns(UnknownWordWarning, match="zeppelin"):
        assert vocabulary.encode(["fluent zeppelin cat"]).tolist() == [[1, 0, 2]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vocabulary.encode(["Fluent cat", ""]).tolist() == [[1, 0, 2], [2, 2, 2]]


# ---- scores and guidance -------------------------------------------------------------------------------------

CLASS = GaussianMixture(numbers(0.6, 0.4), numbers(0.4, 1.8)[:, None], numbers(0.1, 0.2)[:, None])
WORLD = GaussianMixture(numbers(0.5, 0.3, 0.2), numbers(-0.8, 0.4, 1.8)[:, None], numbers(0.25, 0.1, 0.2)[:, None])
POINTS = torch.linspace(-2.5, 2.5, 9, dtype=F64)[:, None]


def slope(log_density, z):
    """The gradient of a log-density by automatic differentiation."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(log_density(z).sum(), z)[0]


def network_of(predicts, schedule=SCHEDULE):
    """A conditional network that knows the world exactly; label 0 is the class, 1 is null."""

    def network(z, t, y):
        eps = torch.where((y == 0)[:, None], CLASS.denoiser(schedule)(z, t), WORLD.denoiser(schedule)(z, t))
        a = schedule.alpha_bar[t][:, None]
        x_0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        return {"eps": eps, "x_0": x_0, "v": a.sqrt() * eps - (1 - a).sqrt() * x_0}[predicts]

    return network


@pytest.mark.equation("score-is-noise")
@pytest.mark.parametrize("t", [1, 200, 700])
def test_score_is_noise(t):
    """Quadrature over z_0: the mean of ε given z_t is -√(1-ᾱ) times the slope of log q(z_t), and is the denoiser."""
    a = SCHEDULE.alpha_bar[t].item()
    noise = torch.linspace(-9, 9, 20_001, dtype=F64)
    for z in POINTS[2:7, 0]:
        z_0 = (z - math.sqrt(1 - a) * noise) / math.sqrt(a)
        weight = (WORLD.log_prob(z_0[:, None]) - noise.square() / 2).exp()
        mean = ((weight * noise).sum() / weight.sum()).item()
        h = 1e-5 * math.sqrt(1 - a)
        ends = [WORLD.at(t, SCHEDULE).log_prob((z + e).reshape(1, 1)).item() for e in (h, -h)]
        assert mean == pytest.approx(-math.sqrt(1 - a) * (ends[0] - ends[1]) / (2 * h), abs=1e-5)
        denoised = WORLD.denoiser(SCHEDULE)(z.reshape(1, 1), torch.tensor([t])).item()
        assert mean == pytest.approx(denoised, abs=1e-6)


@pytest.mark.equation("score-bayes", "guidance-score")
@pytest.mark.parametrize("t", [1, 200, 700])
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0, -2.0])
def test_guidance_score(t, w):
    """Exact: by automatic differentiation of log q(z_t), of log q(y | z_t), and of the product of powers."""
    world, of_class = WORLD.at(t, SCHEDULE), CLASS.at(t, SCHEDULE)
    s_u, s_c = world.score(POINTS), of_class.score(POINTS)
    # the classifier: how probable the components 2 and 3 of the world are, given z_t
    components = gaussian_log_prob(POINTS[:, None], world.means, world.variances)[:, :, 0] + world.weights.log()
    assert_close(
        components.softmax(1)[:, 1:].sum(1),
        (of_class.log_prob(POINTS) - world.log_prob(POINTS) + math.log(0.5)).exp(),
    )

    def log_classifier(z):
        joint = gaussian_log_prob(z[:, None], world.means, world.variances)[:, :, 0] + world.weights.log()
        return joint[:, 1:].logsumexp(1) - joint.logsumexp(1)

    assert_close(s_u + slope(log_classifier, POINTS), s_c, rtol=1e-9, atol=1e-9)
    guided_score = s_u + w * (s_c - s_u)
    assert_close(guided_score, s_u + w * slope(log_classifier, POINTS), rtol=1e-9, atol=1e-9)
    product = slope(lambda z: (1 - w) * world.log_prob(z) + w * of_class.log_prob(z), POINTS)
    assert_close(guided_score, product, rtol=1e-9, atol=1e-9)


@pytest.mark.equation("guidance")
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_guided_noise(w):
    """Exact: `guided` on the exact network gives -√(1-ᾱ) times the slope of log q(z_t)^(1-w) q(z_t | y)^w."""
    t = 300
    a = SCHEDULE.alpha_bar[t].item()
    denoiser = guided(network_of("eps"), torch.zeros(len(POINTS), dtype=torch.int64), w, null=1)
    world, of_class = WORLD.at(t, SCHEDULE), CLASS.at(t, SCHEDULE)
    product = slope(lambda z: (1 - w) * world.log_prob(z) + w * of_class.log_prob(z), POINTS)
    assert_close(denoiser(POINTS, torch.full((len(POINTS),), t)), -math.sqrt(1 - a) * product, rtol=1e-9, atol=1e-9)


@pytest.mark.equation("guidance-any-target")
@pytest.mark.parametrize("predicts", ["v", "x_0"])
@pytest.mark.parametrize("schedule", [SCHEDULE, cosine_schedule()])
def test_guidance_of_any_target(predicts, schedule):
    """Exact: guiding a network of v or x_0 and then turning to ε equals guiding the network of ε."""
    y = torch.zeros(len(POINTS), dtype=torch.int64)
    for t in (1, 300, 950):
        times = torch.full((len(POINTS),), t)
        plain = guided(network_of("eps", schedule), y, 3.0, null=1)(POINTS, times)
        other = as_eps(guided(network_of(predicts, schedule), y, 3.0, null=1), schedule, predicts)(POINTS, times)
        assert_close(other, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.equation("guidance-conventions")
def test_guidance_conventions():
    """Symbolic, and exact with `guided`: (1+w') c - w' u is u + w (c - u) with w = 1 + w', and with no other w."""
    c, u, w, w_prime = sp.symbols("c u w w_prime")
    difference = sp.expand((1 + w_prime) * c - w_prime * u - (u + w * (c - u)))
    assert sp.solve(sp.Poly(difference, c, u).coeffs(), w) == {w: 1 + w_prime}
    y, times = torch.zeros(len(POINTS), dtype=torch.int64), torch.full((len(POINTS),), 300)
    network = network_of("eps")
    c, u = network(POINTS, times, y), network(POINTS, times, y + 1)
    for theirs in (0.0, 0.3, 2.0):
        ours = guided(network, y, 1 + theirs, null=1)(POINTS, times)
        assert_close(ours, (1 + theirs) * c - theirs * u, rtol=1e-10, atol=1e-10)


# ---- what guided sampling draws ------------------------------------------------------------------------------


@pytest.mark.equation("tilted-gaussian")
def test_tilted_gaussian():
    """Symbolic: the exponent of N(0,1)^(1-w) N(m,v)^w is that of the Gaussian claimed, up to a constant."""
    z, m, w = sp.symbols("z m w", real=True)
    v = sp.symbols("v", positive=True)
    exponent = -((1 - w) * z**2 + w * (z - m) ** 2 / v) / 2
    mean, variance = w * m / (v + w * (1 - v)), v / (v + w * (1 - v))
    assert sp.simplify(sp.diff(exponent + (z - mean) ** 2 / (2 * variance), z)) == 0


def ends_of(w, m, v, schedule=SCHEDULE):
    """Mean and standard deviation that guided DDIM draws in the Gaussian world: its map is affine."""
    world, of_class = (
        GaussianMixture(numbers(1.0), numbers(mean)[:, None], numbers(variance)[:, None])
        for mean, variance in ((0.0, 1.0), (m, v))
    )

    def network(z, t, y):
        return torch.where((y == 0)[:, None], of_class.denoiser(schedule)(z, t), world.denoiser(schedule)(z, t))

    denoiser = guided(network, torch.zeros(2, dtype=torch.int64), w, null=1)
    end = ddim_sample(denoiser, numbers(0.0, 1.0)[:, None], schedule)[:, 0]
    return end[0].item(), (end[1] - end[0]).item()


@pytest.mark.equation("guided-variance", "guided-mean")
def test_guided_flow_is_solved():
    """Symbolic: r = c g solves the guided flow, g(0) = v^(w/2), and g/ς → 1."""
    s, v = sp.symbols("varsigma v", positive=True)
    w, m = sp.symbols("w m", real=True)
    g = (1 + s**2) ** ((1 - w) / 2) * (v + s**2) ** (w / 2)
    c = sp.Function("c")(s)
    slope_of_c = -w * s * m / ((v + s**2) * g)
    r = c * g
    right = (1 - w) * s * r / (1 + s**2) + w * s * (r - m) / (v + s**2)
    left = sp.diff(r, s).subs(sp.diff(c, s), slope_of_c)
    assert sp.simplify((left - right) / g) == 0
    assert sp.simplify(g.subs(s, 0) - v ** (w / 2)) == 0
    for value in (0, 1, 3, sp.Rational(5, 2)):
        assert sp.limit((g / s).subs({w: value, v: sp.Rational(1, 4)}), s, sp.oo) == 1
    # c(0) - c(∞) in p = ς²
    p = sp.symbols("p", positive=True)
    integrand = (-slope_of_c / (2 * s)).subs(s, sp.sqrt(p))
    claimed = w / 2 * m * (1 + p) ** ((w - 1) / 2) * (v + p) ** (-w / 2 - 1)
    assert sp.simplify(integrand / claimed) == 1


@pytest.mark.equation("guided-variance")
@pytest.mark.parametrize("v", [0.25, 0.6])
@pytest.mark.parametrize("w", [0.0, 1.0, 2.0, 3.0, 4.5])
def test_guided_variance(w, v):
    """Exact map of DDIM with 1000 steps (first order, so within 2 %): its variance is v^w, whatever the mean."""
    std = ends_of(w, 0.7, v)[1]
    assert std == pytest.approx(v ** (w / 2), rel=0.02)
    if w > 1:
        assert std < 0.93 * math.sqrt(v / (v + w * (1 - v)))  # far from the tilted law


@pytest.mark.equation("guided-mean")
@pytest.mark.parametrize("v", [0.25, 0.6])
@pytest.mark.parametrize("w", [1.0, 2.0, 3.0, 4.5])
def test_guided_mean(w, v):
    """Quadrature of the integral against DDIM with 1000 steps (within 1 %), and the closed values at w = 1 and 3."""
    from scipy.integrate import quad

    integral = quad(lambda p: (1 + p) ** ((w - 1) / 2) * (v + p) ** (-w / 2 - 1), 0, math.inf)[0]
    mean = w / 2 * v ** (w / 2) * integral
    assert ends_of(w, 0.7, v)[0] == pytest.approx(0.7 * mean, rel=0.01)
    closed = {1.0: 1.0, 3.0: 1 + 2 * v}
    assert mean == pytest.approx(closed.get(w, mean), rel=1e-8)


# ---- dropped captions ----------------------------------------------------------------------------------------


@pytest.mark.equation("null-caption")
def test_null_caption_is_the_mean():
    """Exact: the mean of the captions' denoisers, weighted with q(y | z_t), is the denoiser without a caption."""
    t, times = 300, torch.full((len(POINTS),), 300)
    captions = [GaussianMixture(numbers(1.0), WORLD.means[k : k + 1], WORLD.variances[k : k + 1]) for k in range(3)]
    log_q = torch.stack([c.at(t, SCHEDULE).log_prob(POINTS) for c in captions], 1) + WORLD.weights.log()
    noise = torch.stack([c.denoiser(SCHEDULE)(POINTS, times)[:, 0] for c in captions], 1)
    mean = (log_q.softmax(1) * noise).sum(1)
    assert_close(mean, WORLD.denoiser(SCHEDULE)(POINTS, times)[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.equation("null-caption")
def test_whole_captions_are_dropped():
    """Monte Carlo, 20,000 captions: the recipe drops each whole or not at all, a tenth, whatever the caption is."""
    recipe = RECIPES["emoji-ldm"]
    V, L = recipe.options["words"], recipe.options["length"]
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, V, (20_000, L), generator=generator)
    y[::2, 2:] = V
    dropped = recipe.drop_labels(y, generator)
    gone = (dropped == V).all(1)
    assert torch.equal(dropped[~gone], y[~gone])
    error = math.sqrt(recipe.label_drop * (1 - recipe.label_drop) / 10_000)
    for half in (gone[::2], gone[1::2]):
        assert abs(half.double().mean() - recipe.label_drop) < 4 * error


@pytest.mark.equation("word-drop")
def test_words_dropped_one_by_one():
    """Exact enumeration of all ways to drop words: what comes with an empty caption is weighted with ρ^n."""
    rho, lengths, q = 0.3, (1, 2, 4), (0.2, 0.5, 0.3)
    empty = [0.0, 0.0, 0.0]
    for i, n in enumerate(lengths):
        for pattern in range(2**n):
            kept = pattern.bit_count()
            if kept == 0:
                empty[i] += q[i] * (1 - rho) ** kept * rho ** (n - kept)
    means = (-1.0, 0.5, 2.0)  # of z_0 for each caption
    left = sum(e * z for e, z in zip(empty, means, strict=True)) / sum(empty)
    weights = [a * rho**n for a, n in zip(q, lengths, strict=True)]
    right = sum(a * z for a, z in zip(weights, means, strict=True)) / sum(weights)
    assert left == pytest.approx(right, abs=1e-12)
    assert abs(left - sum(a * z for a, z in zip(q, means, strict=True))) > 0.3


@pytest.mark.equation("word-drop")
def test_words_dropped_are_drawn():
    """Monte Carlo, 200,000 captions: the share of a caption among the empty ones, within four standard errors."""
    n, lengths, rho = 200_000, torch.tensor([1, 2, 4]), 0.3
    generator = torch.Generator().manual_seed(1)
    caption = torch.multinomial(numbers(0.2, 0.5, 0.3), n, replacement=True, generator=generator)
    there = torch.arange(4) < lengths[caption][:, None]
    gone = ~(there & (torch.rand(n, 4, generator=generator) >= rho)).any(1)
    expected = numbers(0.2, 0.5, 0.3) * rho**lengths
    share_of_first = (caption[gone] == 0).double().mean()
    p = (expected[0] / expected.sum()).item()
    assert abs(share_of_first - p) < 4 * math.sqrt(p * (1 - p) / gone.sum())
    assert abs(gone.double().mean() - expected.sum()) < 4 * math.sqrt(expected.sum() / n)


# ---- one picture a caption, and shares -----------------------------------------------------------------------


@pytest.mark.equation("single-picture")
def test_single_picture():
    """Exact: the denoiser of a data set of one picture knows the noise, so its loss is zero."""
    z_0, eps = random(1, 4, 3, 3, seed=40), random(5, 4, 3, 3, seed=41)
    for t in (1, 300, 1000):
        a = SCHEDULE.alpha_bar[t].item()
        z_t = math.sqrt(a) * z_0 + math.sqrt(1 - a) * eps
        found = IdealDenoiser(z_0, SCHEDULE)(z_t, torch.full((5,), t))
        assert_close(found, (z_t - math.sqrt(a) * z_0) / math.sqrt(1 - a), rtol=1e-9, atol=1e-9)
        assert_close(found, eps, rtol=1e-7, atol=1e-7)


@pytest.mark.equation("wilson")
def test_wilson_symbolic():
    """Symbolic: both ends are roots of (p̂ - p)² = u² p (1 - p)/n, and there are no others."""
    p, p_hat, u, n = sp.symbols("p p_hat u n", positive=True)
    root = sp.sqrt(p_hat * (1 - p_hat) / n + u**2 / (4 * n**2))
    ends = [(p_hat + u**2 / (2 * n) + sign * u * root) / (1 + u**2 / n) for sign in (1, -1)]
    equation = (p_hat - p) ** 2 - u**2 * p * (1 - p) / n
    for end in ends:
        assert sp.simplify(equation.subs(p, end)) == 0
    assert sp.degree(sp.expand(equation), p) == 2


@pytest.mark.equation("wilson")
@pytest.mark.parametrize("hits, n", [(0, 20), (7, 20), (271, 271), (83, 285)])
def test_wilson_in_the_package(hits, n):
    """Exact: `share` gives these ends, rounded to four digits, with u = 1.96."""
    u, p = 1.959964, hits / n
    root = u * math.sqrt(p * (1 - p) / n + u**2 / (4 * n**2))
    low, high = ((p + u**2 / (2 * n) + sign * root) / (1 + u**2 / n) for sign in (-1, 1))
    found = share([1] * hits + [2] * (n - hits), 1)
    assert found["share"] == pytest.approx(p, abs=6e-5)
    assert found["low"] == pytest.approx(low, abs=6e-5) and found["high"] == pytest.approx(high, abs=6e-5)
    assert 0 <= found["low"] <= found["share"] <= found["high"] <= 1


def test_coverage_of_wilson():
    """Exact, by summing the binomial law: about 95 % of the intervals hold p, also for p near 1."""
    from scipy.stats import binom

    for p in (0.05, 0.4, 0.95):
        n, held = 100, 0.0
        for hits in range(n + 1):
            found = share([1] * hits + [2] * (n - hits), 1)
            held += binom.pmf(hits, n, p) * (found["low"] <= p <= found["high"])
        assert 0.92 < held < 0.98


def test_guided_variance_needs_pure_noise():
    """The variance v^w needs a start at pure noise: on a schedule that keeps signal at T it is missed."""
    short = NoiseSchedule(SCHEDULE.beta[1:300])
    std = ends_of(3.0, 0.0, 0.25, short)[1]
    assert abs(std - 0.125) > 0.02
