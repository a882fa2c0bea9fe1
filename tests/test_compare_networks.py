"""The comparison of networks: one recipe, curves against time, and the page that its results make."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

import compare_networks
import pytest
import torch
from compare_networks import (
    FIGURE,
    MARKED,
    NETWORKS,
    PAGE,
    SEEDS,
    curve,
    minutes_to,
    points,
    read_results,
    seeds_done,
    shares,
    table,
)

from diffbook.data import fashion_subset
from diffbook.recipes import Diffusion, find_recipe

RESULTS = read_results()


def test_only_the_network_differs() -> None:
    first = NETWORKS["plain"][1].to_json()
    for name, (_, recipe) in NETWORKS.items():
        changed = {key for key, value in recipe.to_json().items() if value != first[key]}
        # the budget, of which a hundredth is trained, says where a run is stopped
        assert changed <= {"network", "options", "images"}, name
    plain, patch = (sum(p.numel() for p in NETWORKS[name][1].build().parameters()) for name in ("plain", "patch"))
    assert patch == pytest.approx(plain, rel=0.01)


def test_the_last_is_the_recipe_that_is_shipped() -> None:
    shipped, lite = find_recipe("fashion-cpu"), NETWORKS["lite"][1]
    assert isinstance(shipped, Diffusion)
    assert (lite.network, lite.options) == (shipped.network, shipped.options)


def test_learning_rate_stays_the_same() -> None:
    for name, (_, recipe) in NETWORKS.items():
        assert [recipe.learning_rate(n) for n in points(recipe)] == pytest.approx(
            [recipe.lr] * len(points(recipe)), rel=1e-3
        ), name
        assert all(n % recipe.batch == 0 for n in points(recipe))


def test_minutes_to_a_distance() -> None:
    line = [(m, 100 / m**0.5) for m in (1.0, 4.0, 16.0)]  # straight in log-log
    assert minutes_to(100 / 3, line) == pytest.approx(9)
    assert minutes_to(50.0, line) == pytest.approx(4)
    assert minutes_to(200.0, line) == 1.0  # there at its first point already
    assert minutes_to(24.9, line) is None
    bump = [(1.0, 10.0), (2.0, 12.0), (4.0, 3.0)]
    reached = minutes_to(6.0, bump)
    assert reached is not None and 2 < reached < 4


def planted(costs: dict[str, float]) -> dict[str, Any]:
    rows = [
        {"network": name, "seed": seed, "images": n, "frechet_distance": 1000 / math.sqrt(n) + seed}
        for name in NETWORKS
        for seed in (0, 1)
        for n in points(NETWORKS[name][1])
    ]
    return {"rows": rows, "costs": {n: {"seconds": s, "megaflops": 1.0, "parameters": 1} for n, s in costs.items()}}


def test_shares_are_of_time_not_of_images() -> None:
    results = planted({"plain": 0.06, "patch": 0.02, "lite": 0.006})
    assert seeds_done(results, "lite") == [0, 1]
    results["rows"] = [row for row in results["rows"] if (row["network"], row["seed"]) != ("patch", 1)]
    assert seeds_done(results, "patch") == [0] and seeds_done(results, "lite") == [0, 1]
    assert shares(results, "plain") == pytest.approx([1, 1])
    # equal curves against images: the shares are those of the seconds an image
    assert shares(results, "patch") == pytest.approx([1 / 3])
    assert shares(results, "lite") == pytest.approx([0.1, 0.1])
    assert curve(results, "lite", 0)[0][0] == pytest.approx(points(NETWORKS["lite"][1])[0] * 0.006 / 60)


def test_costs_and_measuring_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """With few images: a point that is measured is kept and not measured again."""
    monkeypatch.setattr(compare_networks, "SAMPLES", 60)
    monkeypatch.setattr(compare_networks, "CALLS", 2)
    monkeypatch.setattr(compare_networks, "ROUNDS", 1)
    monkeypatch.setattr(compare_networks, "fashion_mnist", fashion_subset)
    recipe = NETWORKS["lite"][1]
    weights = tmp_path / "point-0000032.safetensors"
    compare_networks.write_tensors(weights, recipe.build().state_dict(), {"recipe": recipe.to_json()})
    torch.set_num_threads(1)
    row = compare_networks.measure("lite", 0, weights, 32)
    assert row["frechet_distance"] > 50  # it draws noise
    weights.unlink()
    assert compare_networks.measure("lite", 0, weights, 32) == row
    costs = compare_networks.costs()
    assert costs["plain"]["megaflops"] > 5 * costs["lite"]["megaflops"] > 0
    assert costs["plain"]["seconds"] > 2 * costs["lite"]["seconds"] > 0


def test_results_are_whole() -> None:
    rows = {(r["network"], r["seed"], r["images"]): r for r in RESULTS["rows"]}
    assert len(rows) == len(RESULTS["rows"])
    for name, (_, recipe) in NETWORKS.items():
        cost = RESULTS["costs"][name]
        assert cost["parameters"] == sum(p.numel() for p in recipe.build().parameters())
        for seed in SEEDS:
            measured = [n for n in points(recipe) if (name, seed, n) in rows]
            assert measured in ([], points(recipe))
    assert all(seeds_done(RESULTS, name) for name in NETWORKS)


def test_the_page_shows_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert MARKED.findall(page) == [table(RESULTS)]
    assert "_static/networks.svg" in page and FIGURE.exists()


def test_the_page_says_what_the_results_show() -> None:
    lite, patch = shares(RESULTS, "lite"), shares(RESULTS, "patch")
    for name, found in (("lite", lite), ("patch", patch)):  # with every seed they reach the plain U-Net's distance
        assert len(found) == len(seeds_done(RESULTS, name)) == 3, "the page says three seeds"
    assert 0.2 < mean(lite) < 0.25, "the page says between a fifth and a quarter"
    ends = [curve(RESULTS, "plain", seed)[-1][1] for seed in seeds_done(RESULTS, "plain")]
    assert all(12.5 < distance < 13.5 for distance in ends), "the page says about 13"
    assert max(lite) < min(patch) and max(patch) < 0.8
    costs = RESULTS["costs"]
    rate = {name: cost["megaflops"] / cost["seconds"] for name, cost in costs.items()}
    assert rate["plain"] < min(rate["patch"], rate["lite"])
    assert 3.5 < costs["plain"]["parameters"] / costs["lite"]["parameters"] < 4
