"""Composition: distractors, the trivial answer, ranks and shares."""

import pytest
import torch

from diffbook.composition import compare, distractors, nearest_caption, rank, share
from diffbook.data import Emoji, emoji_rows


def emoji(object_: str, style: str, tone: str = "", split: str = "train", factor: str = "") -> Emoji:
    code = object_ + tone
    return Emoji(code, style, object_, f"thing {object_}", tone, "Objects", "tool", split, factor)


def test_hard_distractors_come_first() -> None:
    rows = [emoji(o, s, t) for o in "abcdef" for s in ("noto", "fluent") for t in ("", "dark")]
    target = rows[0]
    found = [rows[i] for i in distractors(target, rows, number=6)]
    assert {r.object for r in found[:3]} == {"a"} and target not in found
    assert all(r.object != "a" and r.style == "noto" for r in found[3:])
    assert len({(r.code, r.style) for r in found}) == 6
    assert distractors(target, rows, 6) == distractors(target, rows, 6)
    assert distractors(target, rows, 6) != distractors(target, rows, 6, seed=1)
    assert len(distractors(target, rows, 2)) == 2
    with pytest.raises(ValueError, match="only 13 distractors, not 99"):
        distractors(target, rows)


def test_each_held_out_picture_has_hard_distractors() -> None:
    train, test = emoji_rows("train"), emoji_rows("test")
    rows = train + test
    for target in test[::25]:
        found = [rows[i] for i in distractors(target, rows)]
        assert len(found) == len(set(found)) == 99 and target not in found
        hard = [r for r in found if r.object == target.object]
        assert len(hard) == sum(r.object == target.object for r in rows) - 1 >= 1
        answer = train[nearest_caption(target, train)]
        assert answer in hard
        assert (answer.style == target.style) != (answer.tone == target.tone)  # one of the two has to differ


def test_the_trivial_answer_shares_most_words() -> None:
    rows = [emoji("a", "noto"), emoji("a", "fluent", "light"), emoji("a", "noto", "dark"), emoji("b", "fluent", "dark")]
    assert nearest_caption(emoji("a", "fluent", "dark"), rows) == 1  # style, name, "skin"
    assert nearest_caption(emoji("a", "twemoji"), rows) == 0
    with pytest.raises(ValueError, match="none of the 4 rows has the object of 'noto thing c'"):
        nearest_caption(emoji("c", "noto"), rows)


def test_rank_and_share() -> None:
    made, truth = torch.tensor([0.0, 0.0]), torch.tensor([0.0, 2.0])
    assert rank(made, truth, torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, -1.9]])) == 3
    assert rank(made, truth, torch.tensor([[2.0, 0.0]])) == 1  # a tie is no defeat
    found = share([1, 1, 2, 7], 1)
    assert found["share"] == 0.5
    assert found["low"] == pytest.approx(0.15, abs=0.005) and found["high"] == pytest.approx(0.85, abs=0.005)
    assert share([1, 1, 2, 7], 5)["share"] == 0.75


def test_compare_knows_a_perfect_and_a_trivial_model() -> None:
    """Features are one-hot, so every picture is near itself alone."""
    rows = [emoji(o, s) for o in "abcdefgh" for s in ("noto", "fluent", "twemoji")]
    rows = [r._replace(split="test", factor="style") if i in (0, 4) else r for i, r in enumerate(rows)]
    rows[8] = rows[8]._replace(split="test", factor="tone")
    features = torch.eye(len(rows))
    perfect = {(r["factor"], r["answer"]): r for r in compare(features[[0, 4, 8]], features, rows, number=8)}
    assert perfect["all", "model"]["top_1"]["share"] == 1 and perfect["all", "model"]["captions"] == 3
    assert perfect["style", "model"]["captions"] == 2 and perfect["tone", "model"]["captions"] == 1
    assert perfect["all", "trivial"]["top_1"]["share"] == 0  # its own picture is nearer
    assert perfect["all", "trivial_without_itself"]["top_1"]["share"] == 1  # all others are equally far
    trivial = compare(features[[1, 3, 6]], features, rows, number=8)
    assert next(r for r in trivial if (r["factor"], r["answer"]) == ("all", "model"))["top_1"]["share"] == 0
    with pytest.raises(ValueError, match="zip"):
        compare(features[:2], features, rows, number=8)
