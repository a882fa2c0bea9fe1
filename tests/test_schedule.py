"""Noise schedules: values, conventions, and what is refused."""

import math
import warnings

import pytest
import torch

from diffbook.schedule import NoiseSchedule, check_time, cosine_schedule, linear_schedule


@pytest.fixture(scope="module")
def schedule():
    return linear_schedule()


def test_tables_start_at_clean_data(schedule):
    assert schedule.T == 1000
    for table in (
        schedule.beta,
        schedule.alpha,
        schedule.alpha_bar,
        schedule.snr(),
        schedule.posterior_variance,
    ):
        assert table.shape == (1001,) and table.dtype == torch.float64 and table.device.type == "cpu"
    assert schedule.beta[0] == 0 and schedule.alpha[0] == 1 and schedule.alpha_bar[0] == 1
    assert schedule.snr()[0] == math.inf and schedule.log_snr()[0] == math.inf


def test_linear_schedule_by_hand(schedule):
    for t in (1, 2, 500, 1000):
        assert schedule.beta[t].item() == pytest.approx(1e-4 + (t - 1) / 999 * (0.02 - 1e-4), rel=1e-12)


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
def test_alpha_bar_is_the_product_up_to_and_including_t(make):
    schedule = make()
    for t in (1, 2, 17, 1000):
        product = math.prod(1 - schedule.beta[s].item() for s in range(1, t + 1))
        assert schedule.alpha_bar[t].item() == pytest.approx(product, rel=1e-11)


def test_cosine_schedule_follows_its_formula_until_beta_is_cut():
    schedule = cosine_schedule(T=1000, s=0.008, max_beta=0.999)

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 10, 500, 990, 999):
        assert schedule.alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-9)
    assert schedule.beta[1000] == 0.999 and (schedule.beta[1:1000] < 0.999).all()


def test_cosine_schedule_cuts_at_max_beta():
    assert cosine_schedule(max_beta=0.5).beta.max() == 0.5


@pytest.mark.parametrize("T, left", [(1000, 4.04e-5), (200, 0.132), (50, 0.60)])
def test_signal_left_when_T_changes_and_beta_does_not(T, left):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert linear_schedule(T).alpha_bar[-1].item() == pytest.approx(left, rel=0.01)


def test_warns_when_signal_is_left():
    with pytest.warns(UserWarning, match=r"alpha_bar_T = 0\.132 at T = 200"):
        linear_schedule(200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_schedule(1000)
        linear_schedule(200, beta_start=5e-4, beta_end=0.1)
        cosine_schedule(50)


def test_posterior_variance_by_hand(schedule):
    for t in (2, 10, 1000):
        expected = (1 - schedule.alpha_bar[t - 1]) / (1 - schedule.alpha_bar[t]) * schedule.beta[t]
        assert schedule.posterior_variance[t].item() == pytest.approx(expected.item(), rel=1e-12)
    assert schedule.posterior_variance[1] == 0 and schedule.posterior_variance[0] == 0


def test_snr_and_its_logarithm(schedule):
    a = schedule.alpha_bar[1:]
    torch.testing.assert_close(schedule.snr()[1:], a / (1 - a), rtol=1e-13, atol=0)
    torch.testing.assert_close(schedule.log_snr()[1:], torch.log(a / (1 - a)), rtol=1e-11, atol=1e-11)


def test_coefficients_are_rooted_in_float64_before_the_cast(schedule):
    x = torch.zeros(2, 3, dtype=torch.float32)
    t = torch.tensor([1, 1000])
    got = schedule.at("sqrt_one_minus_alpha_bar", t, x)
    assert got.shape == (2, 1) and got.dtype == torch.float32
    assert got[0].item() == pytest.approx(0.01, rel=1e-7)  # 1 - ᾱ_1 = β_1 = 1e-4


@pytest.mark.parametrize("beta", [[0.0], [1.0], [0.1, -0.1], [0.1, 1.5], [float("nan")], [], [[0.1]], 0.1], ids=str)
def test_refuses_beta_outside_0_1(beta):
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule(torch.tensor(beta))


@pytest.mark.parametrize(
    "make, arguments",
    [
        (linear_schedule, {"T": 0}),
        (linear_schedule, {"T": 10.5}),
        (linear_schedule, {"T": True}),
        (linear_schedule, {"beta_start": 0.0}),
        (linear_schedule, {"beta_end": 1.0}),
        (linear_schedule, {"beta_start": 0.02, "beta_end": 1e-4}),
        (cosine_schedule, {"T": -1}),
        (cosine_schedule, {"s": -0.1}),
        (cosine_schedule, {"max_beta": 1.0}),
        (cosine_schedule, {"s": float("nan")}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_refuses_bad_arguments_and_names_them(make, arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values()))).replace("+", r"\+")):
        make(**arguments)


@pytest.mark.parametrize(
    "t, words",
    [
        (0, "got 0"),
        (1001, "got 1001"),
        (-1, "got -1"),
        (True, "bool"),
        (1.0, "float"),
        (torch.tensor([1, 0]), "got 0"),
        (torch.tensor([1001, 1]), "got 1001"),
        (torch.tensor([1, 1], dtype=torch.int32), "int32"),
        (torch.tensor([1.0, 1.0]), "float32"),
        (torch.tensor([1, 1, 1]), r"\(3,\)"),
        (torch.tensor(1), r"\(\)"),
        (torch.tensor([[1], [1]]), r"\(2, 1\)"),
    ],
    ids=str,
)
def test_refuses_bad_times(schedule, t, words):
    with pytest.raises(ValueError, match=words):
        check_time(t, torch.zeros(2, 3), schedule)


def test_a_plain_int_stands_for_the_whole_batch(schedule):
    assert check_time(7, torch.zeros(3, 2), schedule).tolist() == [7, 7, 7]


def test_repr_says_how_much_signal_is_left(schedule):
    assert repr(schedule) == "NoiseSchedule(T=1000, alpha_bar_T=4.04e-05)"


# found by `make mutants`


def test_the_edges_of_what_is_allowed(schedule):
    """Just inside is taken; just outside is refused, in the words of the argument that is wrong."""
    assert linear_schedule(1, 0.995, 0.995).beta.tolist() == [0, 0.995]
    assert cosine_schedule(1).beta.tolist() == [0, 0.999]
    assert cosine_schedule(s=0).alpha_bar[500].item() == pytest.approx(0.5, rel=1e-9)
    for max_beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="max_beta must lie inside"):
            cosine_schedule(max_beta=max_beta)
    for arguments in ({"beta_start": 0.0}, {"beta_end": 1.0}):
        with pytest.raises(ValueError, match="need 0 < beta_start <= beta_end < 1"):
            linear_schedule(**arguments)
    with pytest.raises(ValueError, match=r"beta_2 = -0\.1"):
        NoiseSchedule(torch.tensor([0.1, -0.1]))
    assert check_time(torch.tensor([1, 1000]), torch.zeros(2), schedule).tolist() == [1, 1000]


def test_defaults_and_the_bound_of_the_warning(monkeypatch):
    assert torch.equal(cosine_schedule().beta, cosine_schedule(1000, 0.008, 0.999).beta)
    assert torch.equal(linear_schedule().beta, linear_schedule(1000, 1e-4, 0.02).beta)
    monkeypatch.setattr("diffbook.schedule.MAX_ALPHA_BAR_T", 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoiseSchedule(torch.tensor([0.75]))  # ᾱ_T is 0.25, not more


def test_numbers_of_python_keep_their_precision():
    assert NoiseSchedule([0.1, 0.995]).beta.tolist() == [0, 0.1, 0.995]


def test_everything_is_on_the_device_of_the_data(schedule):
    """On "meta", a device without numbers, what lies on another one is noticed without a GPU."""
    x = torch.empty(2, 3, device="meta")
    for t in (7, torch.tensor([1, 1000]), torch.empty(2, dtype=torch.int64, device="meta")):
        t = check_time(t, x, schedule)
        assert t.device.type == "meta" and t.dtype == torch.int64
        assert schedule.at("sqrt_alpha_bar", t, x).device.type == "meta"
