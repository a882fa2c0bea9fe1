"""Does a model of captions compose? Drawn for a caption it has never seen, does its picture look like the true one?

A picture is compared with the true one and with 99 others, *distractors*, in features; its rank is 1 if the true one is
nearest. The trivial answer, against which a model must stand, is to return a training picture of the same object.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffbook.data import Emoji


def distractors(target: Emoji, rows: Sequence[Emoji], number: int = 99, seed: int = 0) -> list[int]:
    """Numbers of rows that a picture of the target could be confused with.

    First all other pictures of its object, in other styles and tones: the hard ones. Then others of its style, drawn
    at random, a function of the seed and of the target alone.

    Raises:
        ValueError: there are not so many.
    """
    same = [i for i, row in enumerate(rows) if row.object == target.object and row != target]
    others = [i for i, row in enumerate(rows) if row.object != target.object and row.style == target.style]
    if len(same) + len(others) < number:
        raise ValueError(f"there are only {len(same) + len(others)} distractors, not {number}")
    drawn = random.Random(f"{seed} {target.code} {target.style}").sample(others, max(number - len(same), 0))
    return (same + drawn)[:number]


def nearest_caption(target: Emoji, rows: Sequence[Emoji]) -> int:
    """Which picture of the same object has the caption that shares most words with the target's: the trivial answer.

    Of several the first.

    Raises:
        ValueError: none of the rows has the target's object.
    """
    words = set(target.caption.split())
    same = [i for i, row in enumerate(rows) if row.object == target.object]
    if not same:
        raise ValueError(f"none of the {len(rows)} rows has the object of {target.caption!r}")
    return max(same, key=lambda i: (len(words & set(rows[i].caption.split())), -i))


def rank(made: Tensor, truth: Tensor, others: Tensor) -> int:
    """1 + the number of others that are nearer to what was made than the truth is.

    Args:
        made, truth: features, shape ``(D,)``, others: ``(M, D)``.
    """
    return 1 + int(((others - made).square().sum(1) < (truth - made).square().sum()).sum())


def share(ranks: Sequence[int], k: int) -> dict[str, Any]:
    """Which share of the ranks is at most k, with Wilson's interval at 95 %, :eq:`eq-wilson`."""
    from scipy.stats import binomtest  # type: ignore[import-untyped]  # slow to import

    hits = sum(r <= k for r in ranks)
    low, high = binomtest(hits, len(ranks)).proportion_ci(0.95, method="wilson")
    return {"share": round(hits / len(ranks), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def compare(made: Tensor, features: Tensor, rows: Sequence[Emoji], number: int = 99) -> list[dict[str, Any]]:
    """Top-1 and top-5 of pictures of the test captions, and of the trivial answer, by what is new in a caption.

    Args:
        made: features of what was made, one for each row of the test, in order, shape ``(M, D)``.
        features: those of all pictures, shape ``(N, D)``; rows: what they are.
        number: of distractors.

    Returns:
        Rows with ``factor`` ("style", "tone" or "all"), ``answer``, number of ``captions``, ``top_1`` and ``top_5``.
        The answers are that of the model, the trivial one, and the trivial one when its own picture is no distractor;
        else it is always in its own way.
    """
    test = [i for i, row in enumerate(rows) if row.split == "test"]
    train = [i for i, row in enumerate(rows) if row.split == "train"]
    known = [rows[i] for i in train]
    ranks: dict[str, list[tuple[int, int, int]]] = {"style": [], "tone": []}
    for picture, i in zip(made, test, strict=True):
        others = distractors(rows[i], rows, number)
        answer = train[nearest_caption(rows[i], known)]
        kept = [j for j in others if j != answer]
        model, trivial = (
            rank(picture, features[i], features[others]),
            rank(features[answer], features[i], features[others]),
        )
        ranks[rows[i].factor].append((model, trivial, rank(features[answer], features[i], features[kept])))
    ranks["all"] = [triple for triples in ranks.values() for triple in triples]
    names = ("model", "trivial", "trivial_without_itself")
    found = []
    for factor, triples in ranks.items():
        for name, column in zip(names, zip(*triples, strict=True), strict=True):
            tops = {f"top_{k}": share(column, k) for k in (1, 5)}
            found.append({"factor": factor, "answer": name, "captions": len(column)} | tops)
    return found
