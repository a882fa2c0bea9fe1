"""Exercises of the chapter "Gaussian toolkit"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffbook.exercises.core import Exercise, Mistake
from diffbook.gaussian import LOG_2PI, gaussian_log_prob, kl_diagonal


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _normal(x: Tensor, m: Tensor, std: Tensor) -> Tensor:
    return torch.distributions.Normal(m, std).log_prob(x)


def _product(
    m1: Tensor, v1: Tensor, m2: Tensor, v2: Tensor, weights: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log constant of N(x; m1, v1) N(x; m2, v2); other weights of the means if given."""
    w1, w2 = weights or (1 / v1, 1 / v2)
    return (w1 * m1 + w2 * m2) / (w1 + w2), 1 / (1 / v1 + 1 / v2), gaussian_log_prob(m1, m2, v1 + v2)


def _with_variance(m1: Tensor, v1: Tensor, m2: Tensor, v2: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, _, constant = _product(m1, v1, m2, v2)
    return mean, variance, constant


def _with_constant(m1: Tensor, v1: Tensor, m2: Tensor, v2: Tensor, constant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance, _ = _product(m1, v1, m2, v2)
    return mean, variance, constant


def _mean_and_error(f: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    return f.mean(), f.std(correction=correction) / math.sqrt(len(f))


_DENSITY = Exercise(
    key="0.1",
    oracle=gaussian_log_prob,
    cases=[
        (_vector(-1.0, 0.0, 2.5), _vector(0.5, 0.5, 0.5), _vector(4.0, 0.25, 9.0)),
        (_vector(3.0, 1.0), _vector(2.0, -1.0), _vector(0.01, 2.0)),
    ],
    mistakes=[
        Mistake(
            "variance for standard deviation",
            lambda x, m, v: _normal(x, m, v),
            "Look up what the second argument of `torch.distributions.Normal` means, "
            "and compare with what this book puts there.",
        ),
        Mistake(
            "squared instead of rooted",
            lambda x, m, v: _normal(x, m, v.square()),
            "You went from variance to standard deviation in the wrong direction.",
        ),
        Mistake(
            "a root too many",
            lambda x, m, v: _normal(x, m, v**0.25),
            "One conversion from variance to standard deviation is enough.",
        ),
        Mistake(
            "missing square root in the normalising constant",
            lambda x, m, v: -torch.log(2 * math.pi * v) - 0.5 * (x - m).square() / v,
            "Under what does 2πv stand in the density, and what does that do to its logarithm?",
        ),
        Mistake(
            "2π forgotten",
            lambda x, m, v: -0.5 * (torch.log(v) + (x - m).square() / v),
            "The values are off by the same number everywhere. Which part of the factor does not depend on v?",
        ),
        Mistake(
            "normalising constant left out",
            lambda x, m, v: -0.5 * (x - m).square() / v,
            "The exponent is only part of the logarithm: the factor in front of the exponential counts too.",
        ),
        Mistake(
            "density instead of its logarithm",
            lambda x, m, v: _normal(x, m, v.sqrt()).exp(),
            "The values are right as a density; the exercise asks for nats.",
        ),
    ],
)

_SQUARE = Exercise(
    key="0.2",
    oracle=(2.0, 1 / 6),
    mistakes=[
        Mistake(
            "factor ½ forgotten",
            (2.0, 1 / 3),
            "The exponent has to be written with −½ in front before the coefficient of x² is a precision.",
        ),
        Mistake(
            "factor ½ forgotten in both coefficients",
            (4.0, 1 / 3),
            "The recipe starts with −½ in front of the bracket. Both coefficients stand behind it.",
        ),
        Mistake(
            "coefficient of x² for variance",
            (2.0, 3.0),
            "The mean is right. First bring −½ to the front, then ask what the coefficient of x² is one over.",
        ),
        Mistake(
            "precision for variance",
            (2.0, 6.0),
            "The coefficient of x² says how *narrow* the bell is.",
        ),
        Mistake(
            "standard deviation for variance",
            (2.0, 1 / math.sqrt(6)),
            "The second argument of N(mean, variance) is asked for.",
        ),
        Mistake(
            "linear coefficient not halved",
            (4.0, 1 / 6),
            "The linear term of the square is −2bx: compare again what that makes b.",
        ),
        Mistake(
            "b not divided by a",
            (12.0, 1 / 6),
            "Where does the square a (x − b/a)² have its lowest point?",
        ),
        Mistake(
            "wrong sign",
            (-2.0, 1 / 6),
            "Put your mean into log p and check that the values on both sides of it are lower.",
        ),
    ],
    tolerance=0.025,  # 0.17 will do for 1/6
)

_SUM = Exercise(
    key="0.3",
    oracle=(-1 / 3, 6.25),
    mistakes=[
        Mistake(
            "standard deviations added",
            (-1 / 3, 12.25),
            "Independent errors of 3 cm and 4 cm give an error of 5 cm, not 7. What is it that adds up?",
        ),
        Mistake(
            "factors not squared",
            (-1 / 3, 6.75),
            "A variance is a mean of squares: what does a factor in front of x become there?",
        ),
        Mistake(
            "factor of x not squared",
            (-1 / 3, 8.25),
            "You treated the noise as it should be. Do the same with x.",
        ),
        Mistake(
            "factor of the noise not squared",
            (-1 / 3, 4.75),
            "You treated x as it should be. Do the same with the noise.",
        ),
        Mistake(
            "wrong sign in the variance",
            (-1 / 3, -1.75),
            "A minus in front of x turns its mean around. Can it make a spread smaller?",
        ),
        Mistake(
            "wrong sign in the mean",
            (7 / 3, 6.25),
            "The variance is right. If x grows, does y grow or fall?",
        ),
        Mistake(
            "standard deviation for variance",
            (-1 / 3, 2.5),
            "You took one root at the end. N(mean, variance) does not want it.",
        ),
        Mistake(
            "variance for standard deviation",
            (-1 / 3, 36.5625),
            "The given 9 and ¼ are variances already; there is nothing left to square in them.",
        ),
        Mistake(
            "constant forgotten",
            (-4 / 3, 6.25),
            "The variance is right. The shift changes no spread, but it does change the mean.",
        ),
    ],
    tolerance=0.025,  # -0.33 will do for -1/3
)

_PRODUCT = Exercise(
    key="0.4",
    oracle=_product,
    cases=[
        (_vector(0.0), _vector(1.0), _vector(3.0), _vector(0.5)),
        (_vector(-1.0, 2.0), _vector(0.2, 5.0), _vector(1.5, -2.5), _vector(2.0, 0.3)),
    ],
    mistakes=[
        Mistake(
            "weights upside down",
            lambda m1, v1, m2, v2: _product(m1, v1, m2, v2, weights=(v1, v2)),
            "Your mean trusts the *wider* of the two more.",
        ),
        Mistake(
            "standard deviation for variance in the weights",
            lambda m1, v1, m2, v2: _product(m1, v1, m2, v2, weights=(1 / v1.sqrt(), 1 / v2.sqrt())),
            "Which power of the width stands in front of x² in the exponent?",
        ),
        Mistake(
            "mean not divided by the precision",
            lambda m1, v1, m2, v2: (m1 / v1 + m2 / v2, *_product(m1, v1, m2, v2)[1:]),
            "Your weights do not add up to 1: try two thermometers that show the same.",
        ),
        Mistake(
            "plain average",
            lambda m1, v1, m2, v2: _product(m1, v1, m2, v2, weights=(torch.ones_like(v1), torch.ones_like(v2))),
            "The two means do not count equally unless the variances are equal.",
        ),
        Mistake(
            "variances added",
            lambda m1, v1, m2, v2: _with_variance(m1, v1, m2, v2, v1 + v2),
            "That is the variance of a *sum*. A product of densities is narrower than either factor.",
        ),
        Mistake(
            "precision for variance",
            lambda m1, v1, m2, v2: _with_variance(m1, v1, m2, v2, 1 / v1 + 1 / v2),
            "The coefficient of x² is right; it is not yet a variance.",
        ),
        Mistake(
            "standard deviation for variance",
            lambda m1, v1, m2, v2: _with_variance(m1, v1, m2, v2, (1 / (1 / v1 + 1 / v2)).sqrt()),
            "The variance is asked for.",
        ),
        Mistake(
            "constant without logarithm",
            lambda m1, v1, m2, v2: _with_constant(m1, v1, m2, v2, gaussian_log_prob(m1, m2, v1 + v2).exp()),
            "Mean and variance are right, and the constant is too; give its logarithm.",
        ),
        Mistake(
            "wrong variance in the constant",
            lambda m1, v1, m2, v2: _with_constant(m1, v1, m2, v2, gaussian_log_prob(m1, m2, 1 / (1 / v1 + 1 / v2))),
            "Mean and variance are right. The constant asks how far apart the two means are, "
            "measured by the spread of their difference.",
        ),
        Mistake(
            "variance for standard deviation in the constant",
            lambda m1, v1, m2, v2: _with_constant(m1, v1, m2, v2, _normal(m1, m2, v1 + v2)),
            "Mean and variance are right. `torch.distributions.Normal` wants something else as its second argument.",
        ),
        Mistake(
            "standard deviation for variance in the constant",
            lambda m1, v1, m2, v2: _with_constant(m1, v1, m2, v2, gaussian_log_prob(m1, m2, (v1 + v2).sqrt())),
            "Mean and variance are right. `gaussian_log_prob` wants a variance.",
        ),
        Mistake(
            "missing square root in the constant",
            lambda m1, v1, m2, v2: _with_constant(
                m1, v1, m2, v2, gaussian_log_prob(m1, m2, v1 + v2) - 0.5 * (LOG_2PI + torch.log(v1 + v2))
            ),
            "Mean and variance are right. Under what does 2π(v1 + v2) stand in the constant?",
        ),
    ],
)

_KL = Exercise(
    key="0.5",
    oracle=kl_diagonal,
    cases=[
        (_vector(0.0, 1.0), _vector(1.0, 0.3), _vector(1.0, -1.0), _vector(4.0, 2.0)),
        (_vector(2.0), _vector(3.0), _vector(2.5), _vector(0.5)),
    ],
    mistakes=[
        Mistake(
            "means compared on the wrong scale",
            lambda m_q, v_q, m_p, v_p: 0.5 * (v_q / v_p - 1 - torch.log(v_q / v_p) + (m_q - m_p).square() / v_q),
            "The error hides whenever both variances are equal. "
            "Which of the two densities is it whose exponent is averaged to give the mean term?",
        ),
        Mistake(
            "q and p exchanged",
            lambda m_q, v_q, m_p, v_p: kl_diagonal(m_p, v_p, m_q, v_q),
            "You have found a divergence, in the other direction. Under which law is the average taken?",
        ),
        Mistake(
            "one half missing",
            lambda m_q, v_q, m_p, v_p: 2 * kl_diagonal(m_q, v_q, m_p, v_p),
            "Every term of a Gaussian's log-density carries the same factor.",
        ),
        Mistake(
            "logarithm not halved",
            lambda m_q, v_q, m_p, v_p: kl_diagonal(m_q, v_q, m_p, v_p) - 0.5 * torch.log(v_q / v_p),
            "The logarithm of a root is half a logarithm: does the ½ reach every term?",
        ),
        Mistake(
            "ratio of the variances upside down",
            lambda m_q, v_q, m_p, v_p: 0.5 * (v_p / v_q - 1 - torch.log(v_p / v_q) + (m_q - m_p).square() / v_p),
            "The mean term is right. A sample of q that falls far outside a narrow p is costly: "
            "which of the two variances has to make the result large?",
        ),
        Mistake(
            "wrong sign of the logarithm",
            lambda m_q, v_q, m_p, v_p: 0.5 * (v_q / v_p - 1 + torch.log(v_q / v_p) + (m_q - m_p).square() / v_p),
            "For equal means the result must not be negative: try v_q much smaller than v_p.",
        ),
        Mistake(
            "the −1 left out",
            lambda m_q, v_q, m_p, v_p: kl_diagonal(m_q, v_q, m_p, v_p) + 0.5,
            "Two equal Gaussians must give 0: what does yours give?",
        ),
        Mistake(
            "standard deviation for variance",
            lambda m_q, v_q, m_p, v_p: kl_diagonal(m_q, v_q.square(), m_p, v_p.square()),
            "The arguments are variances already; there is nothing left to square in them.",
        ),
        Mistake(
            "means compared without a scale",
            lambda m_q, v_q, m_p, v_p: 0.5 * (v_q / v_p - 1 - torch.log(v_q / v_p) + (m_q - m_p).square()),
            "A divergence has no units, a squared distance has: by what is it divided?",
        ),
        Mistake(
            "missing square",
            lambda m_q, v_q, m_p, v_p: 0.5 * (v_q / v_p - 1 - torch.log(v_q / v_p) + (m_q - m_p).abs() / v_p),
            "The distance of the means enters with another power.",
        ),
    ],
)

_MONTE_CARLO = Exercise(
    key="0.6",
    oracle=_mean_and_error,
    cases=[(_vector(1.0, 2.0, 4.0, 7.0),), (_vector(-0.3, 0.1, 0.4, 0.2, -0.9),)],
    mistakes=[
        Mistake(
            "not divided by √n",
            lambda f: (f.mean(), f.std()),
            "That is the spread of one value. How far does the *mean* of n values spread?",
        ),
        Mistake(
            "missing square root of n",
            lambda f: (f.mean(), f.std() / len(f)),
            "The variance of the mean falls like 1/n. What does its root do?",
        ),
        Mistake(
            "variance for standard deviation",
            lambda f: (f.mean(), f.var() / math.sqrt(len(f))),
            "Check the units: an error of a length is a length, not an area.",
        ),
        Mistake(
            "square root not taken",
            lambda f: (f.mean(), f.var() / len(f)),
            "You have the variance of the mean; the standard error is its root.",
        ),
        Mistake(
            "divided by n inside the variance",
            lambda f: _mean_and_error(f, correction=0),
            "The deviations are from the estimated mean, which lies closer to the data than the true mean.",
        ),
        Mistake(
            "n − 1 used twice",
            lambda f: (f.mean(), f.std() / math.sqrt(len(f) - 1)),
            "The n − 1 belongs to the estimate of σ, and `f.std()` has it already. What is the mean divided by?",
        ),
        Mistake(
            "sum for mean",
            lambda f: (f.sum(), f.std() * math.sqrt(len(f))),
            "That is the sum of the values and its error.",
        ),
    ],
)

EXERCISES = [_DENSITY, _SQUARE, _SUM, _PRODUCT, _KL, _MONTE_CARLO]
