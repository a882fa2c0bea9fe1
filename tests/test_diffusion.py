"""Forward process, posterior, conversions and loss, against formulas written out by hand."""

import math

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
    x0_from_eps,
)
from diffbook.schedule import linear_schedule

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
