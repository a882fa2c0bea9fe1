"""Exercises of the chapter "Evaluation"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffbook.exercises.core import Exercise, Mistake

_SCALE = math.log(127.5)

_UNITS = Exercise(
    key="7.1",
    oracle=((_SCALE - 3.2) / math.log(2), 3.2 - _SCALE),
    tolerance=1.5e-3,
    mistakes=[
        Mistake(
            "order",
            (3.2 - _SCALE, (_SCALE - 3.2) / math.log(2)),
            "Both numbers are right. Which one was asked for first?",
        ),
        Mistake(
            "sign of the bits",
            ((3.2 - _SCALE) / math.log(2), 3.2 - _SCALE),
            "A file has no negative size. Bits belong to minus the logarithm.",
        ),
        Mistake(
            "multiplied by log 2",
            ((_SCALE - 3.2) * math.log(2), 3.2 - _SCALE),
            "One bit is log 2 = 0.69 nats. Are there more bits or more nats?",
        ),
        Mistake(
            "other width of a level",
            (7 - 3.2 / math.log(2), 3.2 - _SCALE),
            "You added exactly 7 bits, which belongs to levels that are 1/128 apart. Here they are 2/255 apart.",
        ),
        Mistake(
            "density not stretched",
            ((_SCALE - 3.2) / math.log(2), 3.2),
            "A density changes when its axis is stretched; a probability does not.",
        ),
        Mistake(
            "width of a level forgotten",
            (-3.2 / math.log(2), 3.2 - _SCALE),
            "A density is not a probability yet: over how wide an interval does a grey level extend?",
        ),
        Mistake(
            "nats taken for bits",
            (_SCALE - 3.2, 3.2 - _SCALE),
            "The first number is asked for in bits.",
        ),
        Mistake(
            "only one part converted to bits",
            (_SCALE / math.log(2) - 3.2, 3.2 - _SCALE),
            "You subtracted nats from bits. Convert all of it, or nothing until the end.",
        ),
        Mistake(
            "pixels in [0, 1]",
            (8 - 3.2 / math.log(2), 3.2 - _SCALE),
            "You added 8 bits. How many levels fit into an interval of length 1, when all of them fit into [-1, 1]?",
        ),
        Mistake(
            "sign of the width",
            ((-3.2 - _SCALE) / math.log(2), 3.2 - _SCALE),
            "Is the probability of a narrow interval larger or smaller than the density in it, here?",
        ),
        Mistake(
            "density stretched the wrong way",
            ((_SCALE - 3.2) / math.log(2), 3.2 + _SCALE),
            "When the axis becomes longer, the area under the density stays 1. Does the density rise or fall?",
        ),
        Mistake(
            "stretched by 255",
            ((_SCALE - 3.2) / math.log(2), 3.2 - math.log(255)),
            "The interval that becomes 255 long had the length 2, not 1.",
        ),
        Mistake(
            "log-density divided by the stretch",
            ((_SCALE - 3.2) / math.log(2), 3.2 / 127.5),
            "The density is divided by the stretch. What happens to its logarithm?",
        ),
    ],
)


def _bound(L_T: Tensor, middle: Tensor, L_0: Tensor, dims: int) -> Tensor:
    return (L_T + middle + L_0) / (dims * math.log(2))


def _terms(seed: int, lengths: list[float], dims: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(3, len(lengths) + 2, generator=generator, dtype=torch.float64) + 0.1
    return draws[:, 0], draws[:, 2:], torch.tensor(lengths, dtype=torch.float64), 5 * draws[:, 1], dims


_PARTS = Exercise(
    key="7.2",
    oracle=lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, (lengths * L_t).sum(1), L_0, dims),
    cases=[_terms(0, [1.0, 99.0], 4), _terms(1, [2.0, 5.0, 20.0], 6)],
    mistakes=[
        Mistake(
            "parts treated as equal",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, lengths.sum() * L_t.mean(1), L_0, dims),
            "A part of one time and a part of 99 get the same weight here. For what does each term stand?",
        ),
        Mistake(
            "lengths forgotten",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, L_t.sum(1), L_0, dims),
            "One term of each part was drawn. The bound contains all of them.",
        ),
        Mistake(
            "mean for sum",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, (lengths * L_t).mean(1), L_0, dims),
            "Each product is an estimate of its part's sum. What is to be done with the parts?",
        ),
        Mistake(
            "weighted mean",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, (lengths * L_t).sum(1) / lengths.sum(), L_0, dims),
            "That is the mean term over all times. The bound contains their sum.",
        ),
        Mistake(
            "all images in one",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, (lengths * L_t).sum() * torch.ones(3).double(), L_0, dims),
            "The sum runs over the parts of one image; each image has its own.",
        ),
        Mistake(
            "L_0 forgotten",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, (lengths * L_t).sum(1), 0 * L_0, dims),
            "The last step, to the grey levels themselves, costs bits as well.",
        ),
        Mistake(
            "L_T forgotten",
            lambda L_T, L_t, lengths, L_0, dims: _bound(0 * L_T, (lengths * L_t).sum(1), L_0, dims),
            "The start of the walk back costs something too, unless the schedule ends in noise.",
        ),
        Mistake(
            "lengths divided by",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, (L_t / lengths).sum(1), L_0, dims),
            "The mean term of a part is its sum over n_k. You have the mean term, and need the sum.",
        ),
        Mistake(
            "dims forgotten",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, (lengths * L_t).sum(1), L_0, 1),
            "These are the bits of a whole image.",
        ),
        Mistake(
            "nats for bits",
            lambda L_T, L_t, lengths, L_0, dims: _bound(L_T, (lengths * L_t).sum(1), L_0, dims) * math.log(2),
            "The middle is right; the result is asked for in bits.",
        ),
    ],
)


def _frechet(m_a: Tensor, v_a: Tensor, m_b: Tensor, v_b: Tensor) -> Tensor:
    return (m_a - m_b).square().sum() + (v_a.sqrt() - v_b.sqrt()).square().sum()


def _numbers(*rows: list[float]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(row, dtype=torch.float64) for row in rows)


_DIAGONAL = Exercise(
    key="7.3",
    oracle=_frechet,
    cases=[
        _numbers([0.5, -1.0], [4.0, 0.25], [1.0, 2.0], [1.0, 2.25]),
        _numbers([0.0, 1.0, 2.0], [0.3, 0.2, 5.0], [0.4, 1.0, 0.5], [0.7, 2.0, 0.1]),
    ],
    mistakes=[
        Mistake(
            "variances for standard deviations",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).square().sum() + (v_a - v_b).square().sum(),
            "What is squared in the second term of the equation: a difference of variances?",
        ),
        Mistake(
            "difference of variances, not squared",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).square().sum() + (v_a - v_b).abs().sum(),
            "Expand the square of the difference of two standard deviations: there is a mixed term.",
        ),
        Mistake(
            "mixed term forgotten",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).square().sum() + (v_a + v_b).sum(),
            "That is the distance of independent pairs. The best pairing has a covariance, too.",
        ),
        Mistake(
            "mixed term once",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).square().sum() + (v_a + v_b - (v_a * v_b).sqrt()).sum(),
            "How often does the mixed term stand in the square of a difference?",
        ),
        Mistake(
            "root of the mixed term forgotten",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).square().sum() + (v_a + v_b - 2 * v_a * v_b).sum(),
            "The mixed term is a product of standard deviations, not of variances.",
        ),
        Mistake(
            "sign of the mixed term",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).square().sum() + (v_a.sqrt() + v_b.sqrt()).square().sum(),
            "That is the most expensive pairing. Which correlation makes the way short?",
        ),
        Mistake(
            "difference of standard deviations, not squared",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).square().sum() + (v_a.sqrt() - v_b.sqrt()).abs().sum(),
            "Both terms of the equation are squares.",
        ),
        Mistake(
            "sum before the square",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).sum().square() + (v_a.sqrt() - v_b.sqrt()).sum().square(),
            "Differences of opposite sign cancel here. First the square, then the sum.",
        ),
        Mistake(
            "means not squared",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).abs().sum() + (v_a.sqrt() - v_b.sqrt()).square().sum(),
            "The distance of the means enters with which power?",
        ),
        Mistake(
            "means forgotten",
            lambda m_a, v_a, m_b, v_b: (v_a.sqrt() - v_b.sqrt()).square().sum(),
            "Two clouds of the same shape in different places are not the same.",
        ),
        Mistake(
            "covariances forgotten",
            lambda m_a, v_a, m_b, v_b: (m_a - m_b).square().sum(),
            "Two clouds with the same mean may have different widths.",
        ),
        Mistake(
            "mean over the dimensions",
            lambda m_a, v_a, m_b, v_b: _frechet(m_a, v_a, m_b, v_b) / len(m_a),
            "A squared distance in several dimensions is a sum over them.",
        ),
        Mistake(
            "root of the distance",
            lambda m_a, v_a, m_b, v_b: _frechet(m_a, v_a, m_b, v_b).sqrt(),
            "The number that is reported is the squared distance.",
        ),
    ],
)

_EXTRAPOLATED = Exercise(
    key="7.4",
    oracle=lambda d_1, n_1, d_2, n_2: (n_2 * d_2 - n_1 * d_1) / (n_2 - n_1),
    cases=[(12.0, 500, 9.0, 2000), (7.5, 1000, 6.0, 3000), (5.0, 10_000, 8.0, 2500)],
    mistakes=[
        Mistake(
            "weighted mean",
            lambda d_1, n_1, d_2, n_2: (n_2 * d_2 + n_1 * d_1) / (n_2 + n_1),
            "That lies between the two distances. The distance without bias lies below both.",
        ),
        Mistake(
            "weights exchanged",
            lambda d_1, n_1, d_2, n_2: (n_1 * d_2 - n_2 * d_1) / (n_1 - n_2),
            "Multiply each equation by its own N, so that c stands alone.",
        ),
        Mistake(
            "root of N",
            lambda d_1, n_1, d_2, n_2: (
                (math.sqrt(n_2) * d_2 - math.sqrt(n_1) * d_1) / (math.sqrt(n_2) - math.sqrt(n_1))
            ),
            "The standard error falls with the root of N. And the bias?",
        ),
        Mistake(
            "square of N",
            lambda d_1, n_1, d_2, n_2: (n_2**2 * d_2 - n_1**2 * d_1) / (n_2**2 - n_1**2),
            "The bias falls with the first power of N.",
        ),
        Mistake(
            "not divided",
            lambda d_1, n_1, d_2, n_2: n_2 * d_2 - n_1 * d_1,
            "The difference of the two equations still has a factor in front of the unknown.",
        ),
        Mistake(
            "the constant, not the limit",
            lambda d_1, n_1, d_2, n_2: (d_1 - d_2) / (1 / n_1 - 1 / n_2),
            "That is c, the slope against 1/N. Where does the line end at 1/N = 0?",
        ),
        Mistake(
            "c not divided by N",
            lambda d_1, n_1, d_2, n_2: d_2 - (d_1 - d_2) / (1 / n_1 - 1 / n_2),
            "You subtracted c. The bias is c/N.",
        ),
        Mistake(
            "plain mean",
            lambda d_1, n_1, d_2, n_2: (d_1 + d_2) / 2,
            "The mean of two numbers that are both too large is too large.",
        ),
        Mistake(
            "the larger sample taken as exact",
            lambda d_1, n_1, d_2, n_2: d_1 if n_1 > n_2 else d_2,
            "The larger sample has the smaller bias, but it has one.",
        ),
    ],
)


def _constant(D: int) -> float:
    return 1.25 * D + 0.25 * D**2


_BIAS = Exercise(
    key="7.5",
    oracle=(0.03 * _constant(2), _constant(128)),
    tolerance=1e-3,
    mistakes=[
        Mistake(
            "order",
            (_constant(128), 0.03 * _constant(2)),
            "Both numbers are right. Which one was asked for first?",
        ),
        Mistake(
            "c for the distance",
            (_constant(2), _constant(128)),
            "The first number is c itself. What does c have to be divided by?",
        ),
        Mistake(
            "mean of the two numbers of samples",
            (_constant(2) / 75, _constant(128)),
            "1/N and 1/M are added, not N and M averaged.",
        ),
        Mistake(
            "one set taken as exact",
            (0.01 * _constant(2), _constant(128)),
            "Both sets are samples, and both estimates are off.",
        ),
        Mistake(
            "the other set taken as exact",
            (0.02 * _constant(2), _constant(128)),
            "Both sets are samples, and both estimates are off.",
        ),
        Mistake(
            "samples counted together",
            (_constant(2) / 150, _constant(128)),
            "The two errors are independent: each set brings a bias of its own, and the biases add up.",
        ),
        Mistake(
            "error of the means only",
            (0.03 * 2, 128.0),
            "The means are not the only thing that is estimated.",
        ),
        Mistake(
            "double sum over the diagonal only",
            (0.03 * (1.25 + 0.25) * 2, (1.25 + 0.25) * 128),
            "The double sum has a term for each pair i, j, not only for i = j.",
        ),
        Mistake(
            "quarter forgotten",
            (0.03 * (2 + 1), 128 + 0.25 * 128**2),
            "The variances on the diagonal are twice as large as those beside it. Where does that enter?",
        ),
        Mistake(
            "half in front of the sum forgotten",
            (0.03 * (2.5 + 2), 160 + 0.5 * 128**2),
            "Each term of the double sum is 1/2, and there is another factor in front of the sum.",
        ),
        Mistake(
            "harmonic term taken as 1",
            (0.03 * (2.5 + 2 * 2), 160 + 128**2),
            "With both eigenvalues 1, what is their product over their sum?",
        ),
    ],
)

EXERCISES = [_UNITS, _PARTS, _DIAGONAL, _EXTRAPOLATED, _BIAS]
