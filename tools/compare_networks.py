"""Compare networks by the time they need on a CPU to reach the same quality, for the page "What we tried".

    python tools/compare_networks.py [--only NAME ...] [--seeds N ...] [--costs | --page]

Three networks are trained by the recipe fashion-cpu, three seeds each, with a learning rate that stays the same, so
that one run gives a whole curve. At each point the averaged weights draw 2,000 images, whose Fréchet distance to the
test set is measured. Time is counted fairly: images seen times the seconds that a training step costs an image, taken
with the networks in turn on one thread of a machine that does nothing else (--costs measures these again).

A run that is interrupted goes on; what is measured is not measured again; several of these commands may share the
work with --only and --seeds. Results go to book/networks.json, and from there into book/what-we-tried.md and the
figure book/_static/networks.svg (--page writes only these). About four hours on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffbook.bench import in_turn
from diffbook.classifier import Classifier
from diffbook.data import cache_folder, fashion_mnist
from diffbook.evaluation import draw_images, frechet_jackknife, image_features
from diffbook.planning import flops
from diffbook.recipes import Diffusion, find_recipe, stream
from diffbook.training import train
from diffbook.weights import load_model, write_atomically, write_tensors

BOOK = Path(__file__).resolve().parents[1] / "book"
RESULTS, PAGE, FIGURE = BOOK / "networks.json", BOOK / "what-we-tried.md", BOOK / "_static" / "networks.svg"
MARKED = re.compile(r"<!-- networks -->.*?<!-- /networks -->", re.DOTALL)
SEEDS, SAMPLES, CALLS, ROUNDS = (0, 1, 2), 2000, 10, 45
FIRST = 11_200  # images at the first point; each further point has twice as many


def _recipe(network: str, widths: list[int], attention: list[int], patch: int, points: int) -> Diffusion:
    """fashion-cpu with another network, to be stopped after ``points`` points.

    Its budget is a hundred times what is trained, so the learning rate stays where the warm-up has brought it.
    """
    recipe = find_recipe("fashion-cpu")
    assert isinstance(recipe, Diffusion)
    options = {"channels": 1, "widths": widths, "blocks": 2, "attention": attention, "patch": patch, "classes": 10}
    images = 100 * FIRST * 2 ** (points - 1)
    return replace(recipe, network=network, options=options, images=images, warmup=3_200, ema=0.999)


NETWORKS: dict[str, tuple[str, Diffusion]] = {
    "plain": ("the plain U-Net", _recipe("UNet", [32, 64, 128], [1, 2], 1, 3)),
    "patch": ("the same, patches of 2×2", _recipe("UNet", [64, 128], [1], 2, 4)),
    "lite": ("`LiteUNet`, patches of 2×2", _recipe("LiteUNet", [48, 96], [1], 2, 5)),
}


def points(recipe: Diffusion) -> list[int]:
    """After how many images a run is measured; it is stopped after the last."""
    last = recipe.images // 100
    return [FIRST * 2**i for i in range(int(math.log2(last / FIRST)) + 1)]


def train_and_measure(name: str, seed: int) -> list[dict[str, Any]]:
    """A run, or what is left of it: a row for each point."""
    recipe = replace(NETWORKS[name][1], seed=seed)
    folder = cache_folder() / "compare" / f"network-{name}-{seed}"
    for step in train(recipe, folder, save_every=30):
        if step.images in points(recipe):
            tensors = dict(step.averaged.state_dict())
            write_tensors(folder / f"point-{step.images:07d}.safetensors", tensors, {"recipe": recipe.to_json()})
            print(f"{name}, seed {seed}: {step.images} images, loss {step.loss:.3f}", flush=True)
        if step.images >= points(recipe)[-1]:
            break
    return [measure(name, seed, folder / f"point-{images:07d}.safetensors", images) for images in points(recipe)]


def measure(name: str, seed: int, weights: Path, images: int) -> dict[str, Any]:
    """Draw with the weights of a point, and compare with the test set; kept beside the weights."""
    kept = weights.with_suffix(".json")
    if not kept.exists():
        network, recipe = load_model(weights)
        classifier, _ = load_model("fashion-classifier")
        assert isinstance(classifier, Classifier)
        assert isinstance(recipe, Diffusion)
        y = torch.arange(SAMPLES) % 10
        x = torch.cat(list(draw_images(network, recipe, y, CALLS, seed=seed, sampler="dpmpp")))
        reference = image_features(classifier, fashion_mnist("test").x())
        distance = frechet_jackknife(image_features(classifier, x), reference)
        row = {"network": name, "seed": seed, "images": images, "frechet_distance": round(distance.value, 3)}
        row |= {"standard_error": round(distance.standard_error, 3), "bias": round(distance.bias, 3)}
        print(row, flush=True)
        write_atomically(kept, json.dumps(row).encode())
    row = json.loads(kept.read_text(encoding="utf-8"))
    return row


def one_step(recipe: Diffusion) -> Callable[[], None]:
    """A training step on real images, the optimizer's included."""
    network = recipe.build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    images = fashion_mnist("test")
    x, y = images.x(slice(recipe.batch)), images.labels[: recipe.batch]

    def work() -> None:
        recipe.loss(network, x, y, stream(0, "cost", 0)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def costs() -> dict[str, dict[str, float]]:
    """What an image costs each network in training: seconds on one thread, and operations; and its parameters."""
    steps = {name: one_step(recipe) for name, (_, recipe) in NETWORKS.items()}
    seconds = in_turn(steps, ROUNDS, torch.device("cpu"))
    rows = {}
    for name, (_, recipe) in NETWORKS.items():
        rows[name] = {
            "seconds": float(f"{statistics.median(seconds[name]) / recipe.batch:.4g}"),
            "megaflops": round(flops(steps[name]) / recipe.batch / 1e6, 1),
            "parameters": sum(p.numel() for p in recipe.build().parameters()),
        }
    return rows


def read_results() -> dict[str, Any]:
    """What is stored; empty if the file is not there yet."""
    if not RESULTS.exists():
        return {"rows": [], "costs": {}}
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


def write_results(results: dict[str, Any]) -> None:
    results["rows"].sort(key=lambda row: (list(NETWORKS).index(row["network"]), row["seed"], row["images"]))
    rows = ",\n".join("  " + json.dumps(row, sort_keys=True) for row in results["rows"])
    cost = json.dumps(results["costs"], indent=1, sort_keys=True)
    write_atomically(RESULTS, f'{{"costs": {cost},\n "rows": [\n{rows}\n]}}\n'.encode())


def curve(results: dict[str, Any], name: str, seed: int) -> list[tuple[float, float]]:
    """Core-minutes of training and Fréchet distance at the points of a run."""
    rows = [row for row in results["rows"] if (row["network"], row["seed"]) == (name, seed)]
    return [(row["images"] * results["costs"][name]["seconds"] / 60, row["frechet_distance"]) for row in rows]


def minutes_to(distance: float, points: list[tuple[float, float]]) -> float | None:
    """After how many minutes a curve first comes down to a distance, between its points on a line in log-log.

    None if it never does; its first point's minutes if that lies below already (an upper bound).
    """
    if points[0][1] <= distance:
        return points[0][0]
    for (m_0, d_0), (m_1, d_1) in itertools.pairwise(points):
        if d_1 <= distance:
            share = math.log(d_0 / distance) / math.log(d_0 / d_1)
            return m_0 * (m_1 / m_0) ** share
    return None


def shares(results: dict[str, Any], name: str) -> list[float]:
    """Per seed: a network's time to the distance that the plain U-Net ends with, as a share of the plain U-Net's."""
    found = []
    for seed in seeds_done(results, name):
        minutes, distance = curve(results, "plain", seed)[-1]
        reached = minutes_to(distance, curve(results, name, seed))
        if reached is not None:
            found.append(reached / minutes)
    return found


def seeds_done(results: dict[str, Any], name: str) -> list[int]:
    """The seeds with which a network and the plain U-Net have been measured."""
    return [seed for seed in SEEDS if all(curve(results, which, seed) for which in ("plain", name))]


def table(results: dict[str, Any]) -> str:
    """Costs and shares of the networks as a table, and the figure, markers included."""
    rows = []
    for name, (about, _) in NETWORKS.items():
        cost, found = results["costs"][name], shares(results, name)
        several = name != "plain" and len(found) > 1
        share = f"{statistics.mean(found):.2f}" + (f" ({min(found):.2f} to {max(found):.2f})" if several else "")
        rate = cost["megaflops"] / cost["seconds"] / 1e3
        rows.append(f"| {about} | {share} | {len(found)} | {cost['megaflops']:,.0f} | {rate:.0f} |")
    head = "| network | time, share of the plain U-Net's | seeds | MFLOP an image | GFLOP/s |\n|---|---|---|---|---|\n"
    return "<!-- networks -->\n\n" + head + "\n".join(rows) + "\n\n<!-- /networks -->"


def draw(results: dict[str, Any]) -> None:
    """The curves of all seeds, as a figure in letters that are outlines, so that it looks the same everywhere."""
    import matplotlib.pyplot as plt

    from diffbook.notebook import COLOURS

    with plt.rc_context({"svg.hashsalt": "networks", "font.size": 11, "axes.spines.top": False}):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for (name, (about, _)), colour, mark in zip(NETWORKS.items(), COLOURS, "so^", strict=False):
            for seed in SEEDS:
                if found := curve(results, name, seed):
                    minutes, distances = zip(*found, strict=True)
                    label = about.replace("`", "") if seed == SEEDS[0] else None
                    axes.loglog(minutes, distances, color=colour, marker=mark, alpha=0.8, label=label)
        axes.set(xlabel="core-minutes of training", ylabel="Fréchet distance")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        axes.grid(alpha=0.25, which="both")
        axes.legend()
        axes.spines.right.set_visible(False)
        figure.savefig(FIGURE, metadata={"Date": None, "Creator": None}, facecolor="white")
        plt.close(figure)


def write_page() -> None:
    """Put table and figure of what is stored into the page."""
    results = read_results()
    page = MARKED.sub(lambda _: table(results), PAGE.read_text(encoding="utf-8"))
    write_atomically(PAGE, page.encode())
    draw(results)


def runs(only: list[str], seeds: list[int]) -> Iterator[tuple[str, int]]:
    """What is not measured yet, all networks with a seed before the next seed."""
    for seed in seeds:
        for name in only:
            if not any((row["network"], row["seed"]) == (name, seed) for row in read_results()["rows"]):
                yield name, seed


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare networks by the CPU time they need for the same quality.")
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, choices=SEEDS, default=list(SEEDS), metavar="N")
    parser.add_argument("--costs", action="store_true", help="only measure the costs again")
    parser.add_argument("--page", action="store_true", help="only write the page and the figure again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed in runs(options.only, options.seeds) if not (options.costs or options.page) else ():
        rows = train_and_measure(name, seed)
        results = read_results()  # another command may have written meanwhile
        write_results(results | {"rows": [*results["rows"], *rows]})
    if options.costs or not (options.page or read_results()["costs"]):
        write_results(read_results() | {"costs": costs()})
    if all(shares(read_results(), name) for name in NETWORKS):
        write_page()


if __name__ == "__main__":
    main()
