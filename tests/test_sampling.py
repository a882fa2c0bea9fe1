"""Samplers in worlds where the answer is known exactly, and against diffusers."""

import math
from itertools import pairwise

import pytest
import torch

from diffbook.sampling import (
    ddim_sample,
    ddim_sample_steps,
    ddpm_sample,
    ddpm_sample_steps,
    timesteps,
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


def test_samplers_work_on_the_cosine_schedule_to_its_end():
    """ᾱ_T = 2.4e-9: the largest division by √ᾱ_T that occurs; the exact denoiser brings the samples home."""
    schedule = cosine_schedule()
    x_T = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = ddim_sample(linear_gaussian(schedule, 0.25), x_T, schedule)
    torch.testing.assert_close(out, 0.5 * x_T, rtol=0.02, atol=0.0)  # the flow map of N(0,1) to N(0,0.25)
