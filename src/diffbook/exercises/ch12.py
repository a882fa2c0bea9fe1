"""Exercises of the chapter "From text to image"."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffbook.composition import rank
from diffbook.exercises.core import Exercise, Mistake


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attend(
    scale: Callable[[Tensor, Tensor], float] = lambda q, k: math.sqrt(q.shape[1]),
    masked: Callable[[Tensor, Tensor], Tensor] = lambda s, mask: s.masked_fill(~mask, -math.inf),
    weights: Callable[[Tensor, Tensor], Tensor] = lambda s, mask: s.softmax(1),
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Attention with another scale, mask or softmax."""
    return lambda q, k, v, mask: weights(masked(q @ k.T / scale(q, k), mask), mask) @ v


_ATTENTION = Exercise(
    key="12.1",
    oracle=_attend(),
    cases=[
        (_random(5, 4, seed=1), _random(6, 4, seed=2), _random(6, 4, seed=3), torch.arange(6) < 4),
        (_random(3, 8, seed=4), _random(3, 8, seed=5), _random(3, 8, seed=6), torch.tensor([True, True, False])),
        (_random(2, 4, seed=7), _random(5, 4, seed=8), _random(5, 4, seed=9), torch.arange(5) == 0),
    ],
    mistakes=[
        Mistake(
            "mask ignored",
            _attend(masked=lambda s, mask: s),
            "The words that are not there are looked at like all others. Where does the mask come in?",
        ),
        Mistake(
            "score 0 for masked words",
            _attend(masked=lambda s, mask: s * mask),
            "A score of 0 has the weight e⁰ = 1 before the division. Which score has the weight 0?",
        ),
        Mistake(
            "mask added to the scores",
            _attend(masked=lambda s, mask: s + mask),
            "Added or taken off as 0 and 1, the mask changes scores by a little. Which score has the weight 0?",
        ),
        Mistake(
            "weights cut after the softmax",
            _attend(masked=lambda s, mask: s, weights=lambda s, mask: s.softmax(1) * mask),
            "The masked words are gone from the sum above, but not from the one below: weights have to add up to 1.",
        ),
        Mistake(
            "mask the wrong way round",
            _attend(masked=lambda s, mask: torch.where(mask, -1e30, s)),
            "You look at the words that are not there. Which value of the mask means that a word exists?",
        ),
        Mistake(
            "no root of d",
            _attend(scale=lambda q, k: 1.0),
            "The scores are not divided: their spread grows with the number of entries of a query.",
        ),
        Mistake(
            "divided by d",
            _attend(scale=lambda q, k: float(q.shape[1])),
            "The variance of a score grows like d. What grows like its standard deviation?",
        ),
        Mistake(
            "multiplied by the root of d",
            _attend(scale=lambda q, k: 1 / math.sqrt(q.shape[1])),
            "The scores grow with d already. Does this make them smaller?",
        ),
        Mistake(
            "answers divided in place of scores",
            lambda q, k, v, mask: _attend(scale=lambda q, k: 1.0)(q, k, v, mask) / math.sqrt(q.shape[1]),
            "You divide the answers. It is the scores that have to be made smaller, before the softmax.",
        ),
        Mistake(
            "root of the number of words",
            _attend(scale=lambda q, k: math.sqrt(k.shape[0])),
            "d is how many numbers a query has, not how many words there are.",
        ),
        Mistake(
            "root of the number of places",
            _attend(scale=lambda q, k: math.sqrt(q.shape[0])),
            "d is how many numbers a query has, not how many places ask.",
        ),
        Mistake(
            "softmax over the places",
            lambda q, k, v, mask: torch.where(mask, (q @ k.T / math.sqrt(q.shape[1])).softmax(0), 0) @ v,
            "Each place shares out its attention among the words: the weights of one place add up to 1.",
        ),
        Mistake(
            "softmax over the places, no mask",
            _attend(masked=lambda s, mask: s, weights=lambda s, mask: s.softmax(0)),
            "Each place shares out its attention among the words. And the mask is missing.",
        ),
        Mistake(
            "no exponential",
            lambda q, k, v, mask: (
                (q @ k.T / math.sqrt(q.shape[1]) * mask)
                @ v
                / (q @ k.T / math.sqrt(q.shape[1]) * mask).sum(1, keepdim=True)
            ),
            "Scores may be negative, weights may not. What makes a positive number of a score?",
        ),
        Mistake(
            "not divided by the sum",
            lambda q, k, v, mask: ((q @ k.T / math.sqrt(q.shape[1])).exp() * mask) @ v,
            "The weights have to add up to 1 for each place.",
        ),
        Mistake(
            "mean of the words",
            lambda q, k, v, mask: (mask.double() @ v / mask.sum()).expand(len(q), -1),
            "All words get the same weight here, whatever is asked. Where are the scores?",
        ),
        Mistake(
            "the best word alone",
            lambda q, k, v, mask: v[(q @ k.T).masked_fill(~mask, -math.inf).argmax(1)],
            "This is the hard look-up. Attention takes a mean over the words, with weights.",
        ),
        Mistake(
            "keys in the place of values",
            lambda q, k, v, mask: _attend()(q, k, k, mask),
            "The keys decide on the weights. What is averaged with them?",
        ),
        Mistake(
            "values in the place of keys",
            lambda q, k, v, mask: _attend()(q, v, v, mask),
            "The values are what is averaged. With what is a query compared?",
        ),
        Mistake(
            "keys and values swapped",
            lambda q, k, v, mask: _attend()(q, v, k, mask),
            "A query is compared with the keys, and what comes out is made of the values.",
        ),
    ],
)

_V, _W = 0.25, 2


def _tilted(w: float) -> float:
    return _V / (_V + w * (1 - _V))


_WEIGHT = Exercise(
    key="12.2",
    oracle=(_W, _V**_W, _tilted(_W)),
    tolerance=1e-2,
    mistakes=[
        Mistake(
            "weight not converted",
            (1, _V, _V),
            "In our convention w = 1 is no guidance at all. Compare the factors of the conditional answer.",
        ),
        Mistake(
            "variances of the unconverted weight",
            (2, _V, _V),
            "The weight is right. Put it into the two formulas: both are in our convention.",
        ),
        Mistake(
            "weight lowered",
            (0, 1, 1),
            "The other way round: their weight is the smaller one of the two.",
        ),
        Mistake(
            "weight not converted, though used",
            (1, _V**_W, _tilted(_W)),
            "Both variances are right. Which w did you use for them?",
        ),
        Mistake(
            "standard deviations",
            (2, math.sqrt(_V**_W), math.sqrt(_tilted(_W))),
            "These are standard deviations. Asked are variances.",
        ),
        Mistake(
            "standard deviation of the samples",
            (2, math.sqrt(_V**_W), _tilted(_W)),
            "The second number is v to the power w/2, a standard deviation, and here v itself. Asked is the variance.",
        ),
        Mistake(
            "the two variances swapped",
            (2, _tilted(_W), _V**_W),
            "One of the laws is much narrower: that which the sampler draws.",
        ),
        Mistake(
            "precision",
            (2, _V**_W, 1 / _tilted(_W)),
            "The third number is a precision. What is one over it?",
        ),
        Mistake(
            "variance divided by w",
            (2, _V**_W, _V / _W),
            "That is the law of the caption alone, to the power w. The other factor, to the power 1 - w, counts too.",
        ),
        Mistake(
            "guided samples taken for the tilted law",
            (2, _tilted(_W), _tilted(_W)),
            "That is the misreading: the sampler does not draw from the tilted law.",
        ),
        Mistake(
            "tilted law taken for guided samples",
            (2, _V**_W, _V**_W),
            "The third number is asked for another law, the one with the density of two factors.",
        ),
        Mistake(
            "weight not converted for the tilted law",
            (2, _V**_W, _V),
            "The third number is the variance without guidance. Put w = 2 into the formula.",
        ),
        Mistake(
            "κ for the variance",
            (2, _V**_W, _V + _W * (1 - _V)),
            "The third number is κ. The variance is a fraction with κ below.",
        ),
        Mistake(
            "one over κ",
            (2, _V**_W, 1 / (_V + _W * (1 - _V))),
            "Below stands κ. What stands above?",
        ),
        Mistake(
            "standard deviation of the tilted law",
            (2, _V**_W, math.sqrt(_tilted(_W))),
            "The third number is a standard deviation. Asked is the variance.",
        ),
        Mistake(
            "power of three",
            (3, _V**3, _tilted(3)),
            "Collect what stands before the conditional answer: 1 + w'.",
        ),
        Mistake(
            "variance multiplied by w",
            (2, _V * _W, _tilted(_W)),
            "Guidance narrows. Where does w stand in the variance of guided samples?",
        ),
    ],
)

_GOES = [0.1**n for n in (2, 3, 5)]

_EMPTY = Exercise(
    key="12.3",
    oracle=(sum(_GOES) / 3, _GOES[0] / sum(_GOES)),
    tolerance=1e-2,  # 0.0037 and 0.91 pass
    mistakes=[
        Mistake(
            "whole captions dropped",
            (0.1, 1 / 3),
            "That would be right if a caption were dropped as a whole. Here each word is by itself.",
        ),
        Mistake(
            "sum for mean",
            (sum(_GOES), _GOES[0] / sum(_GOES)),
            "Each of the captions comes in a third of the steps.",
        ),
        Mistake(
            "any word dropped",
            (
                sum(1 - 0.9**n for n in (2, 3, 5)) / 3,
                (1 - 0.9**2) / sum(1 - 0.9**n for n in (2, 3, 5)),
            ),
            "That is the probability that at least one word goes. For the null caption all of them must.",
        ),
        Mistake(
            "no word dropped",
            (sum(0.9**n for n in (2, 3, 5)) / 3, 0.9**2 / sum(0.9**n for n in (2, 3, 5))),
            "That is the probability that no word goes. For the null caption all of them must.",
        ),
        Mistake(
            "number of words in place of the power",
            (0.1 * (2 + 3 + 5) / 3, 0.2),
            "Words go independently of each other: their probabilities are multiplied.",
        ),
        Mistake(
            "rate divided by the number of words",
            (sum(0.1 / n for n in (2, 3, 5)) / 3, (1 / 2) / sum(1 / n for n in (2, 3, 5))),
            "Words go independently of each other: their probabilities are multiplied.",
        ),
        Mistake(
            "mean length",
            (0.1 ** (10 / 3), _GOES[0] / sum(_GOES)),
            "The mean of powers is not the power of the mean: short captions count for most.",
        ),
        Mistake(
            "first caption of all steps",
            (sum(_GOES) / 3, _GOES[0] / 3),
            "The second number is a share of the steps with the null caption, not of all steps.",
        ),
        Mistake(
            "share of the data",
            (sum(_GOES) / 3, 1 / 3),
            "A third of the data is the first caption. But it becomes empty more often than the others.",
        ),
        Mistake(
            "share of the longest caption",
            (sum(_GOES) / 3, _GOES[2] / sum(_GOES)),
            "That is the share of the caption with five words. Asked is the one with two.",
        ),
        Mistake(
            "percent",
            (100 * sum(_GOES) / 3, 100 * _GOES[0] / sum(_GOES)),
            "Both are right in percent. A share lies between 0 and 1.",
        ),
        Mistake(
            "first caption alone",
            (_GOES[0], _GOES[0] / sum(_GOES)),
            "That is how often the first caption becomes empty. There are two more captions.",
        ),
        Mistake(
            "share of the other captions",
            (sum(_GOES) / 3, 1 - _GOES[0] / sum(_GOES)),
            "That is the share of the two other captions. Asked is the first one.",
        ),
        Mistake(
            "all three captions at once",
            (math.prod(_GOES), _GOES[0] / sum(_GOES)),
            "A step has one caption only: which of the three, is a matter of a third each.",
        ),
        Mistake(
            "order",
            (_GOES[0] / sum(_GOES), sum(_GOES) / 3),
            "Both numbers are right. Which one was asked for first?",
        ),
    ],
)


def _drop(
    dropped: Callable[[Tensor, float], Tensor] = lambda u, p: u[:, :1] < p,
    null: Callable[[int], int] = lambda V: V,
) -> Callable[[Tensor, Tensor, float, int], Tensor]:
    return lambda y, u, p, V: torch.where(dropped(u, p), null(V), y)


def _captions(seed: int) -> tuple[Tensor, Tensor, float, int]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 20, (12, 4), generator=generator)
    y[:, 3:] = 20
    y[0, 1:] = 20
    u = torch.rand(12, 4, generator=generator, dtype=torch.float64)
    u[1] = 0.1  # all below p
    return y, u, 0.4, 20


_WORDS_DROPPED = "A caption loses some of its words and keeps others. One number has to decide for the whole row."

_DROP = Exercise(
    key="12.4",
    oracle=_drop(),
    cases=[_captions(1), _captions(2)],
    mistakes=[
        Mistake(
            "both bugs are there",
            _drop(lambda u, p: u < p, lambda V: V - 1),
            "Which of the words go if u is small for one of them only? And which word has the number V - 1?",
        ),
        Mistake(
            "words dropped one by one",
            _drop(lambda u, p: u < p),
            "One bug is found: the null number is right. " + _WORDS_DROPPED,
        ),
        Mistake(
            "the last word of the alphabet",
            _drop(null=lambda V: V - 1),
            "One bug is found: captions go as a whole. But the words have the numbers 0 … V - 1.",
        ),
        Mistake(
            "one beyond",
            _drop(null=lambda V: V + 1),
            "Captions go as a whole. The number of no word is one above the last word, and the last word is V - 1.",
        ),
        Mistake(
            "the first word of the alphabet",
            _drop(null=lambda V: 0),
            "Captions go as a whole. But 0 is a word like any other, the first of the alphabet.",
        ),
        Mistake(
            "a number that no table has",
            _drop(null=lambda V: -1),
            "Captions go as a whole. But -1 is no row of the table of words.",
        ),
        Mistake(
            "dropped if any word is",
            _drop(lambda u, p: (u < p).any(1, keepdim=True)),
            "With four words this is far more than the share p of the captions. The first number decides.",
        ),
        Mistake(
            "dropped if all words are",
            _drop(lambda u, p: (u < p).all(1, keepdim=True)),
            "This is far less than the share p of the captions. The first number decides.",
        ),
        Mistake(
            "mean of the random numbers",
            _drop(lambda u, p: u.mean(1, keepdim=True) < p),
            "A mean of uniform numbers is not uniform: the share would not be p. The first number decides.",
        ),
        Mistake(
            "the last number decides",
            _drop(lambda u, p: u[:, -1:] < p),
            "A caption goes as a whole, good. But the first number of a row shall decide.",
        ),
        Mistake(
            "the captions of the wrong rows",
            _drop(lambda u, p: u[:1] < p),
            "This is one decision for each place, the same for all captions. Which dimension is the captions'?",
        ),
        Mistake(
            "kept where it should be dropped",
            _drop(lambda u, p: u[:, :1] >= p),
            "This drops the share 1 - p. A uniform number is below p with the probability p.",
        ),
        Mistake(
            "the first word only",
            lambda y, u, p, V: torch.cat([torch.where(u[:, :1] < p, V, y[:, :1]), y[:, 1:]], 1),
            "Only the first word goes. The others still say what the picture is.",
        ),
        Mistake(
            "nothing is dropped",
            lambda y, u, p, V: y,
            "The captions come out as they went in.",
        ),
    ],
)

Score = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _oracle(made: Tensor, truth: Tensor, others: Tensor, k: int) -> float:
    ranks = [rank(m, t, o) for m, t, o in zip(made, truth, others, strict=True)]
    return sum(r <= k for r in ranks) / len(ranks)


def _score(
    to_others: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda m, t, o: (o - m[:, None]).square().sum(2),
    to_truth: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda m, t, o: (t - m).square().sum(1, keepdim=True),
    nearer: Callable[[Tensor, Tensor], Tensor] = lambda o, t: o < t,
    first: int = 1,
) -> Score:
    def answer(made: Tensor, truth: Tensor, others: Tensor, k: int) -> Tensor:
        found = nearer(to_others(made, truth, others), to_truth(made, truth, others))
        return (first + found.sum(1) <= k).double().mean()

    return answer


def _sets(seed: int, M: int, k: int) -> tuple[Tensor, Tensor, Tensor, int]:
    made = _random(M, 6, seed=seed)
    truth = made + 0.7 * _random(M, 6, seed=seed + 1)
    others = truth[:, None] + 0.8 * _random(M, 9, 6, seed=seed + 2)
    others[::2, 0] = truth[::2]  # a copy of the true picture is no nearer than the truth
    return made, truth, others, k


_TOP_K = Exercise(
    key="12.5",
    oracle=_oracle,
    cases=[_sets(10, 200, 1), _sets(20, 300, 2), _sets(30, 250, 5)],
    mistakes=[
        Mistake(
            "rank starts at 0",
            _score(first=0),
            "If one distractor is nearer, the rank is 2. Is 2 at most k = 1?",
        ),
        Mistake(
            "rank starts at 2",
            _score(first=2),
            "If no distractor is nearer, the rank is 1; and at most k includes k itself.",
        ),
        Mistake(
            "equal distances counted",
            _score(nearer=lambda o, t: o <= t),
            "A distractor that is exactly as far away as the truth is not nearer.",
        ),
        Mistake(
            "the farther ones counted",
            _score(nearer=lambda o, t: o > t),
            "You count the distractors that are farther away than the truth.",
        ),
        Mistake(
            "distances from the truth",
            _score(to_others=lambda m, t, o: (o - t[:, None]).square().sum(2)),
            "All distances start at what was drawn. You measured how far the distractors are from the truth.",
        ),
        Mistake(
            "distances between pictures one by one",
            lambda made, truth, others, k: (((others - made[:, None]).square().sum(2).amin(1)) > 0).double().mean(),
            "Where does the true picture come in? Its distance has to be compared with the others'.",
        ),
        Mistake(
            "sum of the differences, not of their squares",
            _score(lambda m, t, o: (o - m[:, None]).sum(2), lambda m, t, o: (t - m).sum(1, keepdim=True)),
            "Differences of both signs cancel. Square them first.",
        ),
        Mistake(
            "squares on one side only",
            _score(lambda m, t, o: (o - m[:, None]).square().sum(2).sqrt()),
            "One of the two distances is squared, the other one is not.",
        ),
        Mistake(
            "root on one side only",
            _score(to_truth=lambda m, t, o: (t - m).square().sum(1, keepdim=True).sqrt()),
            "One of the two distances is squared, the other one is not.",
        ),
        Mistake(
            "mean on one side only",
            _score(lambda m, t, o: (o - m[:, None]).square().mean(2)),
            "One of the two distances is a mean, the other one a sum.",
        ),
        Mistake(
            "largest product in place of the smallest distance",
            _score(
                lambda m, t, o: -(o * m[:, None]).sum(2),
                lambda m, t, o: -(t * m).sum(1, keepdim=True),
            ),
            "An inner product is large for long vectors too. Asked are distances.",
        ),
        Mistake(
            "cosine in place of the distance",
            _score(
                lambda m, t, o: -torch.cosine_similarity(o, m[:, None], dim=2),
                lambda m, t, o: -torch.cosine_similarity(t, m, dim=1)[:, None],
            ),
            "The cosine sees directions only. Asked are distances.",
        ),
        Mistake(
            "sum over the distractors",
            _score(lambda m, t, o: (o - m[:, None]).square().sum(1)),
            "You added up over the distractors. A distance is a sum over the D features, the last dimension.",
        ),
        Mistake(
            "length of the truth for its distance",
            _score(to_truth=lambda m, t, o: t.square().sum(1, keepdim=True)),
            "The distance of the truth starts at what was drawn too. You took the length of its features.",
        ),
        Mistake(
            "absolute values",
            _score(
                lambda m, t, o: (o - m[:, None]).abs().sum(2),
                lambda m, t, o: (t - m).abs().sum(1, keepdim=True),
            ),
            "That is another distance, the sum of absolute values. Asked is the usual one, with squares.",
        ),
        Mistake(
            "rank exactly k",
            lambda made, truth, others, k: (
                (
                    (
                        1
                        + ((others - made[:, None]).square().sum(2) < (truth - made).square().sum(1, keepdim=True)).sum(
                            1
                        )
                    )
                    == k
                )
                .double()
                .mean()
            ),
            "At most k: a rank of 1 is among the first five, too.",
        ),
        Mistake(
            "number in place of share",
            lambda made, truth, others, k: len(made) * _score()(made, truth, others, k),
            "That is how many cases. Which share of the M cases is it?",
        ),
        Mistake(
            "percent",
            lambda made, truth, others, k: 100 * _score()(made, truth, others, k),
            "A share lies between 0 and 1.",
        ),
        Mistake(
            "share that misses",
            lambda made, truth, others, k: 1 - _score()(made, truth, others, k),
            "That is the share of the cases that are not among the first k.",
        ),
        Mistake(
            "mean rank",
            lambda made, truth, others, k: (
                (1 + ((others - made[:, None]).square().sum(2) < (truth - made).square().sum(1, keepdim=True)).sum(1))
                .double()
                .mean()
            ),
            "That is the mean of the ranks. Which share of them is at most k?",
        ),
    ],
)

EXERCISES = [_ATTENTION, _WEIGHT, _EMPTY, _DROP, _TOP_K]
