"""The comparison of recipes: equal compute, one change a variant, and the page that its results make."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import compare_recipes
import pytest
from compare_recipes import BASE, MARKED, PAGE, VARIANTS, at_equal_compute, flops, read_results, table

from diffbook.recipes import Diffusion, find_recipe

RESULTS = read_results()


def distance(variant: str) -> float:
    return mean(r["frechet_distance"] for r in RESULTS if r["variant"] == variant)


def test_every_variant_changes_one_thing() -> None:
    base = BASE.to_json()
    for name, (_, recipe) in VARIANTS.items():
        changed = {key for key, value in recipe.to_json().items() if value != base[key]}
        allowed = {"base": 0, "eps-linear": 2, "plain": 2}.get(name, 1)  # a network and its options are one thing
        assert len(changed) == allowed, (name, changed)


def test_equal_compute() -> None:
    for name, (_, recipe) in VARIANTS.items():
        equal = at_equal_compute(recipe)
        assert equal.images % equal.batch == 0
        ratio = equal.images * flops(equal) / (BASE.images * flops(BASE))
        assert ratio == pytest.approx(1, abs=equal.batch / equal.images), name


def test_base_ema_is_held_by_its_warm_up() -> None:
    """What the page says of a longer average: it would be the base."""
    last = BASE.images - BASE.batch
    assert BASE.ema_decay(last) < 0.9975
    assert replace(BASE, ema=0.9999).ema_decay(last) == BASE.ema_decay(last)


def test_results_fit_the_variants() -> None:
    assert len({(r["variant"], r["seed"]) for r in RESULTS}) == len(RESULTS) > 0
    for r in RESULTS:
        recipe = at_equal_compute(VARIANTS[r["variant"]][1])
        assert r["images"] == recipe.images
        assert r["parameters"] == sum(p.numel() for p in recipe.build().parameters())
        assert r["standard_error"] < r["frechet_distance"]


def test_the_page_shows_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert MARKED.findall(page) == [table(RESULTS)]


def test_the_page_says_what_the_results_show() -> None:
    assert distance("eps") > distance("eps-linear") > distance("base")
    assert distance("linear") > distance("base")
    assert distance("plain") > 2 * distance("base")
    assert flops(VARIANTS["plain"][1]) > 10 * flops(BASE)
    shipped = find_recipe("fashion-cpu")
    assert isinstance(shipped, Diffusion)
    assert 20 * BASE.images * flops(BASE) < shipped.images * flops(shipped)
    for ema in ("ema-short", "ema-none"):
        assert abs(distance(ema) - distance("base")) < 0.15 * distance("base")


def test_table_sorts_and_shows_spread() -> None:
    def row(variant: str, seed: int, value: float) -> dict[str, object]:
        return {"variant": variant, "seed": seed, "frechet_distance": value, "parameters": 500_000, "images": 1000}

    text = table([row("base", 0, 5.0), row("base", 1, 7.0), row("x_0", 0, 2.0)])
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[0].lstrip("| ") for line in lines] == [VARIANTS["x_0"][0], VARIANTS["base"][0]]
    assert lines[0].endswith("| 2.0 | 1 | 1,000 |")
    assert lines[1].endswith("| 6.0 ± 1.4 | 2 | 1,000 |")
    assert compare_recipes.MARKED.fullmatch(text)
