"""Compare choices in the recipe of a pixel model at equal compute, and write the page "What we tried".

    python tools/compare_recipes.py [--only NAME ...] [--table]

Each variant changes one thing of a small base recipe. All are trained with the same number of floating-point
operations (counted, forward pass), three seeds each, and measured by the Fréchet distance of 2,000 samples to the
test set. A run that is interrupted goes on; what is measured is not measured again. Results go to book/tried.json, and
from there as a table into book/what-we-tried.md. With --table only the table is written.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from diffbook import planning
from diffbook.classifier import Classifier
from diffbook.data import cache_folder, fashion_mnist
from diffbook.evaluation import draw_images, frechet_jackknife, image_features
from diffbook.recipes import RECIPES, Diffusion
from diffbook.training import train
from diffbook.weights import load_model, write_atomically

BOOK = Path(__file__).resolve().parents[1] / "book"
RESULTS, PAGE = BOOK / "tried.json", BOOK / "what-we-tried.md"
MARKED = re.compile(r"<!-- tried -->.*?<!-- /tried -->", re.DOTALL)
SEEDS, SAMPLES, STEPS = (0, 1, 2), 2000, 20


def _base() -> Diffusion:
    recipe = RECIPES["fashion-cpu"]
    assert isinstance(recipe, Diffusion)
    options = recipe.options | {"blocks": 1}
    return replace(recipe, name="base", options=options, images=96_000, ema=0.999)


BASE = _base()
PLAIN = {"channels": 1, "widths": [32, 64, 128], "blocks": 2, "attention": [1, 2], "classes": 10}
VARIANTS: dict[str, tuple[str, Diffusion]] = {
    "base": ("the base", BASE),
    "eps": ("predicts ε", replace(BASE, predicts="eps")),
    "x_0": ("predicts x_0", replace(BASE, predicts="x_0")),
    "linear": ("linear schedule", replace(BASE, schedule="linear")),
    "eps-linear": ("predicts ε, linear schedule", replace(BASE, predicts="eps", schedule="linear")),
    # In so short a run the warm-up of the EMA holds its decay below 0.997: a longer EMA would be the base again.
    "ema-short": ("shorter EMA", replace(BASE, ema=0.99)),
    "ema-none": ("no EMA", replace(BASE, ema=0.0)),
    "deeper": ("two blocks a level", replace(BASE, options=BASE.options | {"blocks": 2})),
    "plain": ("plain U-Net", replace(BASE, network="UNet", options=PLAIN)),
}


def flops(recipe: Diffusion) -> int:
    """Floating-point operations of the network for one image, forward."""
    network = recipe.build().eval()
    x, t = torch.zeros(1, recipe.options["channels"], recipe.size, recipe.size), torch.ones(1, dtype=torch.int64)
    return planning.flops(lambda: network(x, t))


def at_equal_compute(recipe: Diffusion) -> Diffusion:
    """The recipe with as many images, in whole batches, as the base recipe's compute pays for."""
    images = BASE.images * flops(BASE) / flops(recipe)
    return replace(recipe, images=max(round(images / recipe.batch), 1) * recipe.batch)


def measure(name: str, seed: int) -> dict[str, Any]:
    """Train one variant with one seed, or go on with it, and measure what it draws."""
    recipe = replace(at_equal_compute(VARIANTS[name][1]), seed=seed)
    folder = cache_folder() / "compare" / f"{name}-{seed}"
    for step in train(recipe, folder):
        if step.images % 16_000 < recipe.batch:
            print(f"{name}, seed {seed}: {step.images} of {recipe.images} images, loss {step.loss:.3f}", flush=True)
    network, _ = load_model(folder)
    classifier, _ = load_model("fashion-classifier")
    assert isinstance(classifier, Classifier)
    x = torch.cat(list(draw_images(network, recipe, torch.arange(SAMPLES) % 10, STEPS, seed=seed)))
    reference = image_features(classifier, fashion_mnist("test").x())
    distance = frechet_jackknife(image_features(classifier, x), reference)
    return {
        "variant": name,
        "seed": seed,
        "images": recipe.images,
        "megaflops": round(flops(recipe) / 1e6, 1),
        "parameters": sum(p.numel() for p in network.parameters()),
        "frechet_distance": round(distance.value, 3),
        "standard_error": round(distance.standard_error, 3),
        "bias": round(distance.bias, 3),
    }


def read_results() -> list[dict[str, Any]]:
    """What is stored; nothing if the file is not there yet."""
    results: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    return results


def table(results: list[dict[str, Any]]) -> str:
    """A row for each variant, the best first, markers included."""
    rows = []
    for name, (about, _) in VARIANTS.items():
        found = [r for r in results if r["variant"] == name]
        if found:
            distances = [r["frechet_distance"] for r in found]
            spread = f" ± {stdev(distances):.1f}" if len(found) > 1 else ""
            row = f"| {about} | {mean(distances):.1f}{spread} | {len(found)} | {found[0]['images']:,} |"
            rows.append((mean(distances), row))
    head = "| what | Fréchet distance | seeds | images |\n|---|---|---|---|\n"
    return "<!-- tried -->\n\n" + head + "\n".join(row for _, row in sorted(rows)) + "\n\n<!-- /tried -->"


def write_page() -> None:
    """Put the table of what is stored into the page."""
    page = MARKED.sub(lambda _: table(read_results()), PAGE.read_text(encoding="utf-8"))
    write_atomically(PAGE, page.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare choices in the recipe of a pixel model at equal compute.")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    options = parser.parse_args()
    for seed in () if options.table else SEEDS:
        for name in options.only:
            results = read_results()
            if not any((r["variant"], r["seed"]) == (name, seed) for r in results):
                results = [*results, measure(name, seed)]
                text = "[\n" + ",\n".join(json.dumps(r, sort_keys=True) for r in results) + "\n]\n"
                write_atomically(RESULTS, text.encode())
                write_page()
    write_page()


if __name__ == "__main__":
    main()
