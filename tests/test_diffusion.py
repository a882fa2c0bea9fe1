"""Forward process, posterior, conversions and loss, against formulas written out by hand."""

import math
from itertools import pairwise

import pytest
import torch

from diffbook.diffusion import (
    eps_from_v,
    eps_from_x0,
    q_posterior,
    q_sample,
    q_step,
    simple_loss,
    v_target,
    variational_bound,
    x0_from_eps,
)
from diffbook.schedule import NoiseSchedule, linear_schedule

TIMES = [1, 2, 10, 500, 999, 1000]


@pytest.fixture(scope="module")
def schedule():
    return linear_schedule()


def pair(shape=(4, 1, 3, 3), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)


@pytest.mark.parametrize("t", TIMES)
def test_formulas_by_hand(schedule, t):
    a, b = pair()
    alpha_bar, beta = schedule.alpha_bar[t].item(), schedule.beta[t].item()
    previous = schedule.alpha_bar[t - 1].item()
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(q_step(a, b, t, schedule), math.sqrt(1 - beta) * a + math.sqrt(beta) * b, **close)
    torch.testing.assert_close(q_sample(a, b, t, schedule), signal * a + noise * b, **close)
    torch.testing.assert_close(x0_from_eps(a, b, t, schedule), (a - noise * b) / signal, **close)
    torch.testing.assert_close(eps_from_x0(a, b, t, schedule), (a - signal * b) / noise, **close)
    torch.testing.assert_close(v_target(a, b, t, schedule), signal * b - noise * a, **close)
    torch.testing.assert_close(eps_from_v(a, b, t, schedule), signal * b + noise * a, **close)
    mean, variance = q_posterior(a, b, t, schedule)
    x_0_weight = math.sqrt(previous) * beta / (1 - alpha_bar)
    x_t_weight = math.sqrt(1 - beta) * (1 - previous) / (1 - alpha_bar)
    torch.testing.assert_close(mean, x_0_weight * a + x_t_weight * b, **close)
    assert variance.shape == (4, 1, 1, 1)
    assert variance[0].item() == pytest.approx((1 - previous) / (1 - alpha_bar) * beta, rel=1e-10)


def test_posterior_is_bayes_rule(schedule):
    """log q(x_{t-1}|x_t,x_0) - log q(x_t|x_{t-1}) - log q(x_{t-1}|x_0) does not depend on x_{t-1}."""
    x_0, x_t = torch.full((1,), 0.7, dtype=torch.float64), torch.full((1,), -0.4, dtype=torch.float64)
    x_prev = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def log_normal(x, mean, variance):
        return -0.5 * (torch.log(torch.as_tensor(2 * math.pi * variance)) + (x - mean) ** 2 / variance)

    for t in (2, 10, 500, 1000):
        beta, previous = schedule.beta[t].item(), schedule.alpha_bar[t - 1].item()
        mean, variance = q_posterior(x_0, x_t, t, schedule)
        rest = (
            log_normal(x_prev, mean, variance.item())
            - log_normal(x_t, math.sqrt(1 - beta) * x_prev, beta)
            - log_normal(x_prev, math.sqrt(previous) * x_0, 1 - previous)
        )
        assert float(rest.max() - rest.min()) < 1e-8 * float(rest.abs().max())


def test_at_t_1_the_posterior_is_x_0(schedule):
    x_0, x_t = pair()
    mean, variance = q_posterior(x_0, x_t, 1, schedule)
    torch.testing.assert_close(mean, x_0, rtol=1e-12, atol=1e-12)
    assert (variance == 0).all()


def test_conversions_are_inverse_to_each_other(schedule):
    x_0, eps = pair(shape=(6, 5))
    t = torch.tensor(TIMES)
    x_t = q_sample(x_0, eps, t, schedule)
    torch.testing.assert_close(x0_from_eps(x_t, eps, t, schedule), x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(eps_from_x0(x_t, x_0, t, schedule), eps, rtol=0, atol=1e-10)
    torch.testing.assert_close(eps_from_v(x_t, v_target(x_0, eps, t, schedule), t, schedule), eps)


def test_each_sample_has_its_own_time(schedule):
    x_0, eps = pair(shape=(6, 2))
    t = torch.tensor(TIMES)
    together = q_sample(x_0, eps, t, schedule)
    for i, time in enumerate(TIMES):
        torch.testing.assert_close(together[i : i + 1], q_sample(x_0[i : i + 1], eps[i : i + 1], time, schedule))


def test_float32_agrees_with_float64(schedule):
    x_0, eps = pair(shape=(6, 50))
    t = torch.tensor(TIMES)
    single = q_sample(x_0.float(), eps.float(), t, schedule)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), q_sample(x_0, eps, t, schedule), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_at_t_1_has_its_size_under_autocast_and_in_half_precision(schedule, dtype):
    zeros, eps = torch.zeros(1, 100_000), torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_1 = q_sample(zeros.to(dtype), eps.to(dtype), 1, schedule)
        stepped = q_step(zeros.to(dtype), eps.to(dtype), 1, schedule)
    assert x_1.dtype == torch.float32
    for x in (x_1, stepped):  # √β_1 = 0.01; 100,000 samples: standard error 0.2 %
        assert x.std().item() == pytest.approx(0.01, rel=0.01)


def test_simple_loss_is_the_mean_over_batch_and_pixels(schedule):
    x_0, _ = pair(shape=(64, 1, 4, 4))
    loss = simple_loss(lambda x, t: torch.zeros_like(x), x_0, schedule, torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(1)
    torch.randint(1, 1001, (64,), generator=g)
    eps = torch.randn(x_0.shape, generator=g, dtype=x_0.dtype)
    assert loss.shape == () and loss.item() == pytest.approx(eps.square().mean().item(), rel=1e-12)


def test_simple_loss_gives_the_model_x_t_and_its_time(schedule):
    """A model that knows x_0 and inverts the forward process at the time it is told has no loss."""
    x_0 = torch.full((512, 2), 0.3, dtype=torch.float64)
    seen = []

    def oracle(x_t, t):
        seen.append(t)
        return eps_from_x0(x_t, x_0, t, schedule)

    assert simple_loss(oracle, x_0, schedule, torch.Generator().manual_seed(0)).item() < 1e-20
    assert seen[0].min() >= 1 and seen[0].max() <= 1000

    def late(x_t, t):
        return eps_from_x0(x_t, x_0, (t - 1).clamp(min=1), schedule)

    assert simple_loss(late, x_0, schedule, torch.Generator().manual_seed(0)).item() > 1e-6


def test_simple_loss_draws_every_time(schedule):
    short = linear_schedule(4, beta_start=0.5, beta_end=0.9)
    seen = []
    simple_loss(lambda x, t: seen.append(t) or x, torch.zeros(4000, 1), short, torch.Generator().manual_seed(0))
    counts = seen[0].bincount(minlength=5)
    assert counts[0] == 0 and len(counts) == 5
    assert (counts[1:] - 1000).abs().max() < 4 * math.sqrt(4000 * 0.25 * 0.75)  # 4 standard errors


def test_simple_loss_reaches_the_parameters(schedule):
    model = torch.nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = simple_loss(lambda x, t: model(x), torch.randn(8, 2), schedule)
    loss.backward()
    assert loss.dtype == torch.float32 and model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("function", [q_step, q_sample, q_posterior, x0_from_eps, eps_from_x0, v_target, eps_from_v])
@pytest.mark.parametrize(
    "a, b, t, words",
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), 1, r"\(2, 4\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64), 1, "float64"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3), 1, "uint8"),
        (torch.zeros(()), torch.zeros(()), 1, "scalar"),
        ([0.0], torch.zeros(1), 1, "list"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0, "got 0"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 1001, "got 1001"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1]), r"\(1,\)"),
    ],
    ids=["shape", "dtypes", "integers", "scalar", "list", "t=0", "t>T", "one t for two"],
)
def test_bad_input_is_refused(schedule, function, a, b, t, words):
    with pytest.raises(ValueError, match=words):
        function(a, b, t, schedule)


def test_simple_loss_refuses_a_model_of_another_shape(schedule):
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        simple_loss(lambda x, t: x[:, :1], torch.zeros(2, 3), schedule)


# ---- the variational bound -------------------------------------------------------------------------------------

SHORT = NoiseSchedule(torch.tensor([0.3, 0.5, 0.4, 0.97]))


def half(x_t, t):
    """A made-up denoiser that depends on x and on t."""
    return 0.5 * torch.tanh(x_t) + 0.1 * t.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t)


def kl(mean_q, var_q, mean_p, var_p):
    def normal(mean, variance):
        return torch.distributions.Normal(mean, torch.as_tensor(variance, dtype=torch.float64).sqrt().expand_as(mean))

    return torch.distributions.kl_divergence(normal(mean_q, var_q), normal(mean_p, var_p)).flatten(1).sum(1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_bound_by_hand(variance, clip):
    """Every term against torch.distributions, with replayed noise."""
    x_0, noise = random(3, 1, 2, 2, seed=1), random(4, 3, 1, 2, 2, seed=2)
    bound = variational_bound(half, x_0, SHORT, variance, levels=None, clip=clip, noise=noise)
    assert bound.t.tolist() == [[2, 3, 4]] * 3
    a = SHORT.alpha_bar.tolist()
    expected = kl(math.sqrt(a[4]) * x_0, 1 - a[4], torch.zeros_like(x_0), 1.0)
    torch.testing.assert_close(bound.L_T, expected, rtol=1e-10, atol=0)
    for t in (1, 2, 3, 4):
        x_t = math.sqrt(a[t]) * x_0 + math.sqrt(1 - a[t]) * noise[t - 1]
        guess = x0_from_eps(x_t, half(x_t, torch.full((3,), t)), t, SHORT)
        guess = guess if clip is None else guess.clamp(-clip, clip)
        mean_p = q_posterior(guess, x_t, t, SHORT)[0]
        if t == 1:
            log_p = torch.distributions.Normal(mean_p, SHORT.beta[1].sqrt()).log_prob(x_0)
            torch.testing.assert_close(bound.L_0, -log_p.flatten(1).sum(1), rtol=1e-10, atol=0)
        else:
            mean_q, var_q = q_posterior(x_0, x_t, t, SHORT)
            var_p = SHORT.beta[t] if variance == "beta" else SHORT.posterior_variance[t]
            expected = kl(mean_q, var_q[0, 0, 0, 0], mean_p, var_p)
            torch.testing.assert_close(bound.L_t[:, t - 2], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bound.total, bound.L_T + bound.L_t.sum(1) + bound.L_0)


def test_bound_of_images_uses_the_discretised_likelihood():
    x_0 = torch.tensor([0, 7, 128, 255]).double().reshape(2, 1, 1, 2) * 2 / 255 - 1
    noise = random(4, *x_0.shape)
    bound = variational_bound(half, x_0, SHORT, noise=noise)
    x_1 = q_sample(x_0, noise[0], 1, SHORT)
    mean = x0_from_eps(x_1, half(x_1, torch.ones(2, dtype=torch.int64)), 1, SHORT)
    normal, h = torch.distributions.Normal(mean, SHORT.beta[1].sqrt()), 1 / 255
    upper = torch.where(x_0 > 0.999, 1.0, normal.cdf(x_0 + h))
    lower = torch.where(x_0 < -0.999, 0.0, normal.cdf(x_0 - h))
    torch.testing.assert_close(bound.L_0, -torch.log(upper - lower).flatten(1).sum(1), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="grid of 256 levels"):
        variational_bound(half, x_0 + 1e-3, SHORT)
    coarse = torch.tensor([[-1.0, 1.0]])
    assert variational_bound(half, coarse, SHORT, levels=2).L_0.shape == (1,)


def test_bound_with_every_time_calls_the_model_once_a_time(schedule):
    seen = []
    bound = variational_bound(lambda x, t: seen.append(t) or x, torch.zeros(2, 3), schedule, levels=None)
    assert [t.tolist() for t in seen] == [[t, t] for t in range(1, 1001)]
    assert bound.L_t.shape == bound.t.shape == (2, 999) and not bound.total.isnan().any()


@pytest.mark.parametrize("arguments", [{"times_per_image": K} for K in (1, 2, 3)] + [{"parts": [2, 3, 6]}], ids=str)
def test_sampled_times_are_stratified_and_unbiased(arguments):
    """One time from each part, all of its times equally often; the sum over t has the right mean."""
    n = 20_000
    x_0 = torch.full((n, 1), 0.3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    longer = NoiseSchedule(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.97]))
    parts = {1: [2], 2: [2, 4], 3: [2, 3, 5]}.get(arguments.get("times_per_image"), [2, 3, 6])
    bound = variational_bound(half, x_0, longer, levels=None, generator=generator, **arguments)
    assert bound.t.shape == bound.L_t.shape == (n, len(parts))
    for i, (start, end) in enumerate(pairwise([*parts, 7])):
        share = bound.t[:, i].bincount(minlength=7) / n
        p = 1 / (end - start)
        assert (share[start:end] - p).abs().max() <= 4 * math.sqrt(p * (1 - p) / n)  # 4 standard errors
        assert share.sum() - share[start:end].sum() < 1e-6
    full = variational_bound(half, x_0, longer, levels=None, generator=generator)
    for a, b in ((bound.total, full.total), (bound.L_0, full.L_0), (bound.L_t.sum(1), full.L_t.sum(1))):
        assert (a.mean() - b.mean()).abs() < 4 * ((a.var() + b.var()) / n).sqrt()
    torch.testing.assert_close(bound.L_T, full.L_T)


def test_images_of_a_batch_get_their_own_times(schedule):
    bound = variational_bound(half, torch.zeros(100, 1), schedule, levels=None, times_per_image=2)
    assert len(bound.t[:, 0].unique()) > 50


def test_bound_of_a_chain_of_one_step():
    one = NoiseSchedule(torch.tensor([0.995]))
    x_0 = random(2, 3)
    bound = variational_bound(half, x_0, one, levels=None)
    assert bound.L_t.shape == (2, 0)
    torch.testing.assert_close(bound.total, bound.L_T + bound.L_0)


def test_bound_in_float32_and_its_repetition(schedule):
    x_0 = torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    noise = random(1000, 2, 1, 4, 4)
    single, double = (variational_bound(half, x, schedule, noise=noise) for x in (x_0, x_0.double()))
    assert single.total.dtype == torch.float32 and double.total.dtype == torch.float64
    torch.testing.assert_close(single.total.double(), double.total, rtol=1e-4, atol=0)
    again = [
        variational_bound(half, x_0, schedule, times_per_image=3, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    vector = variational_bound(half, x_0[0, 0, 0], SHORT)  # data of shape (B,)
    assert vector.total.shape == (4,)


def test_bound_keeps_no_graph(schedule):
    model = torch.nn.Linear(2, 2)
    bound = variational_bound(lambda x, t: model(x), torch.zeros(2, 2), SHORT, levels=None)
    assert not bound.total.requires_grad


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"variance": "sigma"}, "'sigma'"),
        ({"clip": 0.0}, "got 0"),
        ({"times_per_image": 0}, "got 0"),
        ({"times_per_image": 4}, r"1…3, got 4"),
        ({"parts": [3, 4]}, "rise from 2"),
        ({"parts": [2, 2]}, "rise from 2"),
        ({"parts": [2, 5]}, "rise from 2 to at most 4"),
        ({"parts": [2], "times_per_image": 1}, "without times_per_image"),
        ({"noise": torch.zeros(3, 2, 3)}, "3 other times, got 3"),
        ({"noise": torch.zeros(4, 2, 4)}, r"\(2, 4\)"),
        ({"model": lambda x, t: x[:, :1]}, r"\(2, 1\)"),
        ({"x_0": torch.zeros(2, 3, dtype=torch.int64)}, "int64"),
    ],
)
def test_bound_refuses_bad_arguments(arguments, words):
    given = {"model": half, "x_0": torch.zeros(2, 3), "schedule": SHORT, "levels": None} | arguments
    with pytest.raises(ValueError, match=words):
        variational_bound(**given)


# found by `make mutants`

ARGUMENTS = {
    q_step: ("x_prev", "eps"),
    q_sample: ("x_0", "eps"),
    q_posterior: ("x_0", "x_t"),
    x0_from_eps: ("x_t", "eps"),
    eps_from_x0: ("x_t", "x_0"),
    v_target: ("x_0", "eps"),
    eps_from_v: ("x_t", "v"),
}


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__name__)
def test_messages_name_the_arguments(schedule, function):
    first, second = ARGUMENTS[function]
    with pytest.raises(ValueError, match=f"^{first} and {second} must have the same shape"):
        function(torch.zeros(2, 3), torch.zeros(2, 4), 1, schedule)
    with pytest.raises(ValueError, match=f"^{first} must be a tensor"):
        function([0.0], torch.zeros(1), 1, schedule)
    with pytest.raises(ValueError, match=f"^{second} must be a tensor"):
        function(torch.zeros(1), [0.0], 1, schedule)


@pytest.mark.parametrize("t", [7, torch.tensor([1, 1000])], ids=["int", "tensor"])
def test_everything_is_on_the_device_of_the_data(schedule, t):
    """On "meta", a device without numbers, what lies on another one is noticed without a GPU."""
    x = torch.empty(2, 3, device="meta")
    for function in ARGUMENTS:
        result = function(x, x, t, schedule)
        for tensor in result if isinstance(result, tuple) else (result,):
            assert tensor.device.type == "meta"
    assert simple_loss(lambda x, t: x + t[:, None], x, schedule).device.type == "meta"


def test_loss_names_what_it_refuses(schedule):
    for loss in (simple_loss, variational_bound):
        with pytest.raises(ValueError, match=r"^x_0 must be a tensor"):
            loss(half, [0.0], schedule)


def test_one_part_is_allowed_and_none_is_not():
    assert variational_bound(half, random(2, 3), SHORT, levels=None, parts=[2]).t.shape == (2, 1)
    with pytest.raises(ValueError, match="parts must rise from 2"):
        variational_bound(half, random(2, 3), SHORT, levels=None, parts=[])


def test_few_levels_are_more_probable_each():
    x_0, noise = torch.tensor([[-1.0, 1.0]]).double(), random(4, 1, 2)
    few, many = (variational_bound(half, x_0, SHORT, levels=levels, noise=noise).L_0 for levels in (2, 256))
    assert few < many
