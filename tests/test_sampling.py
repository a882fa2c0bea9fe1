"""Samplers in worlds where the answer is known exactly, and against diffusers."""

import math
from itertools import pairwise

import pytest
import torch

from diffbook.diffusion import eps_from_v
from diffbook.gaussian import GaussianMixture
from diffbook.sampling import (
    as_eps,
    ddim_sample,
    ddim_sample_steps,
    ddpm_sample,
    ddpm_sample_steps,
    dpmpp_2m_sample,
    dpmpp_2m_sample_steps,
    guided,
    timesteps,
    trailing_timesteps,
)
from diffbook.schedule import cosine_schedule, linear_schedule


@pytest.fixture(scope="module")
def schedule():
    return linear_schedule()


def linear_gaussian(schedule, s2):
    """The optimal denoiser for x_0 ~ N(0, s2): linear in x_t."""

    def eps_star(x, t):
        a = schedule.alpha_bar[t][:, None]
        return (1 - a).sqrt() / (a * s2 + 1 - a) * x

    return eps_star


def output_variance(sample, schedule, s2, S, **options):
    """Exact variance of a sampler's output: one basis vector for x_T and one for each noise."""
    basis = torch.eye(S + 1, dtype=torch.float64)
    noise = [basis[:, i + 1 : i + 2] for i in range(S)]
    out = sample(
        linear_gaussian(schedule, s2),
        basis[:, :1],
        schedule,
        times=timesteps(schedule.T, S),
        noise=noise,
        **options,
    )
    return out.square().sum().item()


@pytest.mark.parametrize(
    "s2, variance, S, expected",
    [
        (0.25, "beta_tilde", 1000, 0.2461252),
        (0.25, "beta_tilde", 50, 0.1964202),
        (0.25, "beta_tilde", 10, 0.1042225),
    ],
)
def test_exact_output_variance_of_ancestral_sampling(schedule, s2, variance, S, expected):
    assert output_variance(ddpm_sample, schedule, s2, S, variance=variance) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("S", [10, 50, 1000])
def test_unit_variance_data_keep_their_variance_with_beta(schedule, S):
    """For s² = 1 and σ_t² = β_t every step keeps the variance 1; the last, noiseless one loses β_1 = 1e-4."""
    assert output_variance(ddpm_sample, schedule, 1.0, S, variance="beta") == pytest.approx(0.9999, abs=1e-6)


@pytest.mark.parametrize("S", [10, 50, 1000])
def test_ddim_with_eta_1_is_ancestral_sampling_with_beta_tilde(schedule, S):
    times = timesteps(1000, S)
    g = torch.Generator().manual_seed(0)
    x_T = torch.randn(5, 3, generator=g, dtype=torch.float64)
    noise = torch.randn(S, 5, 3, generator=g, dtype=torch.float64)

    def model(x, t):
        return torch.sin(3 * x + t[:, None] / 200)

    for clip in (None, 1.0):
        a = ddim_sample(model, x_T, schedule, times, eta=1.0, clip=clip, noise=noise)
        b = ddpm_sample(model, x_T, schedule, times, variance="beta_tilde", clip=clip, noise=noise)
        assert float((a - b).abs().max() / b.abs().max()) < 1e-10


def test_ddim_keeps_the_noise_of_a_point(schedule):
    """If all data are one point, DDIM moves along x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε with the same ε to the end."""
    x_0, eps = (
        torch.tensor([[0.5, -1.0]], dtype=torch.float64),
        torch.tensor([[0.3, 2.0]], dtype=torch.float64),
    )

    def point(x, t):
        a = schedule.alpha_bar[t][:, None]
        return (x - a.sqrt() * x_0) / (1 - a).sqrt()

    a_T = schedule.alpha_bar[1000]
    for step in ddim_sample_steps(point, a_T.sqrt() * x_0 + (1 - a_T).sqrt() * eps, schedule, timesteps(1000, 20)):
        a = schedule.alpha_bar[step.s]
        torch.testing.assert_close(step.x, a.sqrt() * x_0 + (1 - a).sqrt() * eps, rtol=0, atol=1e-9)


class TestAgainstDiffusers:
    """Whole trajectories with a model that depends on x and on t; the largest difference counts.

    The model is near the optimum for N(0, I), so that the trajectory stays of size 1: with a model that lets x
    grow to 300 the schedulers' float32 tables alone differ by more.
    """

    @staticmethod
    def model(x, t):
        time = t.to(x.dtype)[:, None, None, None]
        noise = linear_schedule().at("sqrt_one_minus_alpha_bar", t, x)
        return noise * (x + 0.3 * torch.sin(2 * x + time / 150))

    @staticmethod
    def start():
        g = torch.Generator().manual_seed(0)
        return torch.randn(3, 1, 4, 4, generator=g), g

    @pytest.mark.parametrize("variance, theirs", [("beta", "fixed_large"), ("beta_tilde", "fixed_small")])
    @pytest.mark.parametrize("clip", [None, 1.0])
    @pytest.mark.parametrize("S", [1000, 50])
    def test_ddpm(self, schedule, variance, theirs, clip, S, monkeypatch):
        from diffusers import DDPMScheduler

        peer = DDPMScheduler(
            variance_type=theirs,
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
            timestep_spacing="trailing",
        )
        peer.set_timesteps(S)
        times = [int(t) + 1 for t in peer.timesteps]
        x_T, g = self.start()
        noise = torch.randn(S, *x_T.shape, generator=g)
        x, worst = x_T, 0.0
        steps = ddpm_sample_steps(self.model, x_T, schedule, times, variance=variance, clip=clip, noise=noise)
        for i, (t, ours) in enumerate(zip(peer.timesteps, steps, strict=True)):
            # their last step adds noise unless it starts at their index 0; ours never does
            replay = noise[i] if i < S - 1 else torch.zeros_like(x)
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, replay=replay, **k: replay
            )
            x = peer.step(self.model(x, t.repeat(3) + 1), t, x).prev_sample
            worst = max(worst, float((x - ours.x).abs().max()))
        assert worst <= 5e-4

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("S", [1000, 50])
    def test_ddim(self, schedule, eta, S):
        from diffusers import DDIMScheduler

        peer = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
        peer.set_timesteps(S)
        times = [int(t) + 1 for t in peer.timesteps]
        x_T, g = self.start()
        noise = torch.randn(S, *x_T.shape, generator=g)
        x, worst = x_T, 0.0
        steps = ddim_sample_steps(self.model, x_T, schedule, times, eta=eta, noise=noise)
        for i, (t, ours) in enumerate(zip(peer.timesteps, steps, strict=True)):
            fresh = {"variance_noise": noise[i]} if eta > 0 else {}
            x = peer.step(self.model(x, t.repeat(3) + 1), t, x, eta=eta, **fresh).prev_sample
            worst = max(worst, float((x - ours.x).abs().max()))
        assert worst <= 5e-4

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
    @pytest.mark.parametrize("S", [1000, 100, 50, 20, 10])
    def test_dpmpp_2m(self, schedule, S):
        from diffusers import DPMSolverMultistepScheduler

        peer = DPMSolverMultistepScheduler(timestep_spacing="trailing", final_sigmas_type="zero")
        assert peer.config.algorithm_type == "dpmsolver++" and peer.config.solver_order == 2
        peer.set_timesteps(S)
        times = [int(t) + 1 for t in peer.timesteps]
        x, _ = self.start()
        worst = 0.0
        for t, ours in zip(peer.timesteps, dpmpp_2m_sample_steps(self.model, x, schedule, times), strict=True):
            x = peer.step(self.model(x, t.repeat(3) + 1), t, x).prev_sample
            worst = max(worst, float((x - ours.x).abs().max()))
        assert worst <= 1e-3


class TestDpmpp2m:
    """What distinguishes the second-order solver; what all samplers share is in TestEverySampler."""

    @staticmethod
    def model(x, t):
        return torch.sin(2 * x + t[:, None] / 200)

    def test_first_step_and_step_to_0_are_ddim(self, schedule):
        x_T = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for times in ([700], [1000, 300]):
            first = next(dpmpp_2m_sample_steps(self.model, x_T, schedule, times))
            ddim = next(ddim_sample_steps(self.model, x_T, schedule, times))
            torch.testing.assert_close(first.x, ddim.x, rtol=0, atol=1e-10)
        *_, last = dpmpp_2m_sample_steps(self.model, x_T, schedule, [1000, 300, 20])
        assert last.s == 0 and torch.equal(last.x, last.x_0)

    def test_second_step_by_hand(self, schedule):
        """Plain numbers, written from algorithm 2 of the paper, for one step that uses the estimate before."""
        x_T, times = torch.tensor([[0.7]], dtype=torch.float64), [900, 500, 100, 7]
        steps = list(dpmpp_2m_sample_steps(self.model, x_T, schedule, times))

        def signal_noise_lambda(t):
            a = math.prod(1 - b for b in schedule.beta[1 : t + 1].tolist())
            return math.sqrt(a), math.sqrt(1 - a), math.log(math.sqrt(a) / math.sqrt(1 - a))

        for i in (1, 2):
            (_, sigma_t, now), (alpha_s, sigma_s, after) = map(signal_noise_lambda, times[i : i + 2])
            before = signal_noise_lambda(times[i - 1])[2]
            r = (now - before) / (after - now)
            D = (1 + 1 / (2 * r)) * steps[i].x_0 - 1 / (2 * r) * steps[i - 1].x_0
            x_s = sigma_s / sigma_t * steps[i - 1].x - alpha_s * (math.exp(-(after - now)) - 1) * D
            torch.testing.assert_close(steps[i].x, x_s, rtol=0, atol=1e-12)

    def test_constant_estimate_is_followed_exactly(self, schedule):
        """If all data are one point, every order is exact: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε with the same ε."""
        x_0, eps = torch.tensor([[0.5, -1.0]]).double(), torch.tensor([[0.3, 2.0]]).double()

        def state(t):
            a = schedule.alpha_bar[t]
            return a.sqrt() * x_0 + (1 - a).sqrt() * eps

        def point(x, t):
            a = schedule.alpha_bar[t][:, None]
            return (x - a.sqrt() * x_0) / (1 - a).sqrt()

        for step in dpmpp_2m_sample_steps(point, state(1000), schedule, timesteps(1000, 20)):
            torch.testing.assert_close(step.x, state(step.s), rtol=0, atol=1e-9)

    def test_order_of_convergence(self, schedule):
        """Two Gaussians of variance 0.25, against a fine solution of the ODE in λ: DDIM 1, this solver 2."""
        world = GaussianMixture(
            torch.tensor([0.5, 0.5]).double(), torch.tensor([[-1.0], [1.0]]).double(), torch.full((2, 1), 0.25).double()
        )
        lambdas = 0.5 * torch.log(schedule.alpha_bar[1:] / (1 - schedule.alpha_bar[1:]))
        x_T = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]

        def x_0(y, lam):  # E[x_0 | x] at half the log-SNR lam, y = x / √(1-ᾱ)
            a = 1 / (1 + math.exp(-2 * lam))
            return (
                y * math.sqrt(1 - a) + (1 - a) * world.after(math.sqrt(a), 1 - a).score(y * math.sqrt(1 - a))
            ) / math.sqrt(a)

        def velocity(y, lam):  # dy/dλ = e^λ x̂_0
            return math.exp(lam) * x_0(y, lam)

        n, lam, end = 1000, lambdas[-1].item(), lambdas[0].item()
        h, y = (end - lam) / n, x_T / (1 - schedule.alpha_bar[1000]).sqrt()
        for i in range(n):  # Runge & Kutta's fourth order
            at = lam + i * h
            k1 = velocity(y, at)
            k2 = velocity(y + h / 2 * k1, at + h / 2)
            k3 = velocity(y + h / 2 * k2, at + h / 2)
            k4 = velocity(y + h * k3, at + h)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        truth, counts = x_0(y, end), [20, 40, 80, 160, 320]
        for sample, order, within in ((ddim_sample, 1.0, 0.1), (dpmpp_2m_sample, 1.9, 0.2)):
            errors = [
                (sample(world.denoiser(schedule), x_T, schedule, timesteps(1000, S)) - truth).abs().mean().item()
                for S in counts
            ]
            x, y_ = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
            slope = ((x - x.mean()) * (y_ - y_.mean())).sum() / (x - x.mean()).square().sum()
            assert slope.item() == pytest.approx(-order, abs=within)

    def test_takes_what_every_sampler_takes_and_no_noise(self, schedule):
        seen = []

        def spy(x, t):
            seen.append(t.tolist())
            return self.model(x, t)

        for dtype in (torch.float32, torch.float64):
            x_T = torch.ones(2, 2, dtype=dtype)
            out = dpmpp_2m_sample(spy, x_T, schedule, times=[900, 17, 3])
            assert out.dtype == dtype and torch.equal(x_T, torch.ones(2, 2, dtype=dtype))
        assert seen == 2 * [[900, 900], [17, 17], [3, 3]]
        weight = torch.ones((), requires_grad=True)
        assert not dpmpp_2m_sample(lambda x, t: weight * x, torch.ones(1, 1), schedule, [9, 4]).requires_grad
        with pytest.raises(TypeError):
            dpmpp_2m_sample(self.model, torch.ones(2, 2), schedule, noise=torch.ones(1))

    def test_clip_bounds_the_estimate(self, schedule):
        x_T, times = 5 * torch.ones(1, 2), timesteps(1000, 9)
        free = [s.x_0.abs().max() for s in dpmpp_2m_sample_steps(self.model, x_T, schedule, times)]
        steps = list(dpmpp_2m_sample_steps(self.model, x_T, schedule, times, clip=0.5))
        assert max(free) > 1 and max(s.x_0.abs().max() for s in steps) <= 0.5 and steps[-1].x.abs().max() <= 0.5

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"times": []}, "empty"),
            ({"times": [10, 10]}, "decreasing"),
            ({"times": [1001, 1]}, "1…1000"),
            ({"times": [10, 0]}, "1…1000"),
            ({"clip": 0.0}, "0.0"),
            ({"x_T": torch.zeros(2, 2, dtype=torch.int64)}, "int64"),
            ({"model": lambda x, t: x[:1]}, r"\(1, 2\)"),
        ],
        ids=lambda v: str(v)[:30],
    )
    def test_bad_input_is_refused(self, schedule, change, words):
        with pytest.raises(ValueError, match=words):
            dpmpp_2m_sample(schedule=schedule, **{"model": self.model, "x_T": torch.zeros(2, 2)} | change)


@pytest.mark.parametrize("sample, options", [(ddpm_sample, {}), (ddim_sample, {"eta": 1.0}), (ddim_sample, {})])
class TestEverySampler:
    @staticmethod
    def model(x, t):
        return 0.1 * x + (t / 1000)[:, None].to(x.dtype)

    def test_last_step_adds_no_noise(self, schedule, sample, options):
        """The sample does not depend on the noise of its last step, but on that of the step before."""
        x_T = torch.zeros(1, 2)
        noise = torch.zeros(4, 1, 2)
        times = timesteps(1000, 4)
        still = sample(self.model, x_T, schedule, times, noise=noise, **options)
        noise[3] = 1.0
        assert torch.equal(still, sample(self.model, x_T, schedule, times, noise=noise, **options))
        noise[2] = 1.0
        moved = not torch.equal(still, sample(self.model, x_T, schedule, times, noise=noise, **options))
        assert moved == (sample is ddpm_sample or options != {})

    def test_result_is_the_last_estimate_of_x_0(self, schedule, sample, options):
        steps = {ddpm_sample: ddpm_sample_steps, ddim_sample: ddim_sample_steps}[sample]
        *_, last = steps(self.model, torch.ones(2, 2), schedule, timesteps(1000, 5), **options)
        assert last.s == 0 and last.t == 1
        torch.testing.assert_close(last.x, last.x_0)

    def test_model_sees_the_times_of_the_grid(self, schedule, sample, options):
        seen = []

        def spy(x, t):
            seen.append(t.tolist())
            return self.model(x, t)

        sample(spy, torch.zeros(2, 2), schedule, times=[900, 17, 3], **options)
        assert seen == [[900, 900], [17, 17], [3, 3]]

    def test_one_generator_a_sample_makes_it_independent_of_the_batch(self, schedule, sample, options):
        def generators(seeds):
            return [torch.Generator().manual_seed(s) for s in seeds]

        x_T = torch.stack([torch.randn(2, generator=g) for g in generators([1, 2, 3])])
        times = timesteps(1000, 6)
        together = sample(self.model, x_T, schedule, times, generator=generators([1, 2, 3]), **options)
        alone = sample(self.model, x_T[1:2], schedule, times, generator=generators([2]), **options)
        torch.testing.assert_close(together[1:2], alone)

    def test_same_seed_same_sample(self, schedule, sample, options):
        def run(seed):
            g = torch.Generator().manual_seed(seed)
            return sample(self.model, torch.ones(2, 2), schedule, timesteps(1000, 5), generator=g, **options)

        assert torch.equal(run(0), run(0))

    def test_keeps_the_dtype_and_leaves_x_T_alone(self, schedule, sample, options):
        for dtype in (torch.float32, torch.float64):
            x_T = torch.ones(2, 2, dtype=dtype)
            out = sample(self.model, x_T, schedule, timesteps(1000, 3), **options)
            assert out.dtype == dtype and torch.equal(x_T, torch.ones(2, 2, dtype=dtype))

    def test_makes_no_graph(self, schedule, sample, options):
        weight = torch.ones((), requires_grad=True)
        out = sample(lambda x, t: weight * x, torch.ones(1, 1), schedule, timesteps(1000, 3), **options)
        assert not out.requires_grad

    def test_clip_bounds_the_estimate(self, schedule, sample, options):
        steps = {ddpm_sample: ddpm_sample_steps, ddim_sample: ddim_sample_steps}[sample]
        x_T = 5 * torch.ones(1, 2)
        free = [s.x_0.abs().max() for s in steps(self.model, x_T, schedule, timesteps(1000, 9), **options)]
        bound = [s.x_0.abs().max() for s in steps(self.model, x_T, schedule, timesteps(1000, 9), clip=0.5, **options)]
        assert max(free) > 1 and max(bound) <= 0.5

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"times": []}, "empty"),
            ({"times": [10, 10]}, "decreasing"),
            ({"times": [1, 10]}, "decreasing"),
            ({"times": [1001, 1]}, "1…1000"),
            ({"times": [10, 0]}, "1…1000"),
            ({"clip": -1.0}, "-1.0"),
            ({"times": [10, 5, 1], "noise": torch.zeros(1, 2, 2)}, "got 1"),
            ({"x_T": torch.zeros(2, 2, dtype=torch.int64)}, "int64"),
            ({"x_T": torch.zeros(2, 2, dtype=torch.bfloat16)}, "bfloat16"),
            ({"x_T": [0.0]}, "list"),
            ({"model": lambda x, t: x[:1]}, r"\(1, 2\)"),
        ],
        ids=lambda v: str(v)[:30],
    )
    def test_bad_input_is_refused(self, schedule, sample, options, change, words):
        arguments = {"model": self.model, "x_T": torch.zeros(2, 2)} | change
        with pytest.raises(ValueError, match=words):
            sample(schedule=schedule, **arguments, **options)


def test_bad_noise_and_generators_are_refused(schedule):
    x_T, times = torch.zeros(2, 2), [10, 5]
    with pytest.raises(ValueError, match=r"noise\[0\] has shape \(1, 2\)"):
        ddpm_sample(lambda x, t: x, x_T, schedule, times, noise=torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="1 generators for 2"):
        ddpm_sample(lambda x, t: x, x_T, schedule, times, generator=[torch.Generator()])
    with pytest.raises(ValueError, match="'other'"):
        ddpm_sample(lambda x, t: x, x_T, schedule, variance="other")
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            ddim_sample(lambda x, t: x, x_T, schedule, eta=eta)


@pytest.mark.parametrize("T, S", [(1000, 1000), (1000, 50), (1000, 3), (1000, 999), (7, 4), (2, 2)])
def test_timesteps_are_the_rounded_linspace(T, S):
    times = timesteps(T, S)
    assert times == torch.linspace(T, 1, S, dtype=torch.float64).round().int().tolist()
    assert len(times) == S and times[0] == T and times[-1] == 1
    assert all(a > b for a, b in pairwise(times))


def test_one_timestep_is_T():
    assert timesteps(1000, 1) == [1000]


@pytest.mark.parametrize("T, S", [(10, 0), (10, 11), (0, 1)])
def test_timesteps_refuses_bad_numbers(T, S):
    with pytest.raises(ValueError, match=f"S = {S}"):
        timesteps(T, S)


@pytest.mark.parametrize("T, S", [(1000, 1000), (1000, 50), (1000, 20), (1000, 7), (1000, 1), (7, 4), (10, 9)])
def test_trailing_timesteps_make_steps_of_one_length(T, S):
    from diffusers import DDIMScheduler

    times = trailing_timesteps(T, S)
    lengths = [t - s for t, s in pairwise([*times, 0])]
    assert times[0] == T and len(times) == S and min(lengths) >= 1
    assert all(abs(length - T / S) < 1 for length in lengths)
    peer = DDIMScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    peer.set_timesteps(S)
    assert times == [int(t) + 1 for t in peer.timesteps]


@pytest.mark.parametrize("T, S", [(10, 0), (10, 11)])
def test_trailing_timesteps_refuses_bad_numbers(T, S):
    with pytest.raises(ValueError, match=f"S = {S}"):
        trailing_timesteps(T, S)


def test_samplers_work_on_the_cosine_schedule_to_its_end():
    """ᾱ_T = 2.4e-9: the largest division by √ᾱ_T that occurs; the exact denoiser brings the samples home."""
    schedule = cosine_schedule()
    x_T = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = ddim_sample(linear_gaussian(schedule, 0.25), x_T, schedule)
    torch.testing.assert_close(out, 0.5 * x_T, rtol=0.02, atol=0.0)  # the flow map of N(0,1) to N(0,0.25)


# found by `make mutants`


def test_fresh_noise_is_the_generators(schedule):
    """The same numbers, drawn and replayed, in the dtype of the data; one generator, and one a sample."""
    x_T, times = torch.ones(3, 2, dtype=torch.float64), [900, 400, 20]

    def model(x, t):
        return torch.sin(x)

    g = torch.Generator().manual_seed(5)
    noise = [torch.randn(3, 2, generator=g, dtype=torch.float64) for _ in range(2)]  # the last step needs none
    drawn = ddpm_sample(model, x_T, schedule, times, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, ddpm_sample(model, x_T, schedule, times, noise=noise))
    each = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    noise = [torch.stack([torch.randn(2, generator=g, dtype=torch.float64) for g in each]) for _ in range(2)]
    drawn = ddpm_sample(model, x_T, schedule, times, generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)])
    assert torch.equal(drawn, ddpm_sample(model, x_T, schedule, times, noise=noise))
    for count in (1, 4):
        with pytest.raises(ValueError, match=f"first 2 steps, got {count}"):
            ddpm_sample(model, x_T, schedule, times, noise=torch.zeros(count, 3, 2))


def test_deterministic_samplers_draw_nothing(schedule):
    x_T, state = torch.ones(2, 2), torch.get_rng_state()
    ddim_sample(lambda x, t: x, x_T, schedule, [500, 3])
    dpmpp_2m_sample(lambda x, t: x, x_T, schedule, [500, 3])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("sample", [ddpm_sample, ddim_sample, dpmpp_2m_sample])
def test_samplers_at_the_edges(schedule, sample):
    """One time, a clip of more than 1 and the first and last time are allowed; a scalar is not data."""
    x_T = torch.tensor([0.3], dtype=torch.float64)
    assert sample(lambda x, t: x, x_T, schedule, [1000, 1], clip=2.0).shape == (1,)
    alone = sample(lambda x, t: 0 * x, x_T, schedule, [1])
    torch.testing.assert_close(alone, x_T / schedule.alpha_bar[1].sqrt())
    with pytest.raises(ValueError, match=r"shape \(\)"):
        sample(lambda x, t: x, torch.tensor(0.3), schedule)


def test_dpmpp_2m_is_of_second_order_in_the_step_to_1(schedule):
    x_T = torch.tensor([[0.7]], dtype=torch.float64)

    def model(x, t):
        return torch.sin(x)

    first, second, _ = dpmpp_2m_sample_steps(model, x_T, schedule, [900, 500, 1])
    ddim = next(ddim_sample_steps(model, first.x, schedule, [500, 1]))
    assert second.s == 1 and (second.x - ddim.x).abs() > 1e-3


@pytest.mark.parametrize("sample", [ddpm_sample, ddim_sample, dpmpp_2m_sample])
def test_samplers_stay_on_the_device_of_the_data(schedule, sample):
    """On "meta", a device without numbers, what lies on another one is noticed without a GPU."""
    x_T, y = torch.empty(2, 3, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    model = as_eps(guided(lambda x, t, y: x + t[:, None] + y[:, None], y, w=2, null=3), schedule)
    generators = [{}]
    if sample is ddpm_sample:
        generators += [{"generator": torch.Generator()}, {"generator": [torch.Generator() for _ in range(2)]}]
        generators += [{"noise": torch.zeros(1, 2, 3)}]
    for options in generators:
        assert sample(model, x_T, schedule, [500, 3], **options).device.type == "meta"


def test_defaults_of_as_eps_and_guided(schedule):
    x, t, y = torch.ones(2, 3), torch.tensor([5, 900]), torch.tensor([1, 2])

    def model(x, t, y):
        return x * y[:, None] + t[:, None]

    assert torch.equal(guided(model, y)(x, t), model(x, t, y))
    v = model(x, t, y)
    assert torch.equal(as_eps(guided(model, y), schedule)(x, t), eps_from_v(x, v, t, schedule))
