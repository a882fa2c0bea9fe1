"""Measure how good the shipped models are, and write it into their model cards.

    python tools/measure_quality.py [--model NAME …] [--jobs N]

Runs `diffbook evaluate` for each line of EVALUATIONS, N at a time on one core each (about an hour for N = 2), and
keeps each result in the cache under the checksum of the weights and of the arguments: an interrupted run goes on, and
other weights are measured anew. How long an image takes is measured at the end, the models in turn. The results become
the list "quality" of the card, which the chapters read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import Any

import torch

from diffbook.autoencoder import VAE
from diffbook.data import cache_folder
from diffbook.evaluation import decode_images, draw_images
from diffbook.recipes import Diffusion
from diffbook.weights import load_model, model_card, source_of, write_atomically


def _draws(sampler: str, steps: int, number: int, guidance: float = 1.0) -> list[str]:
    return ["--sampler", sampler, "--steps", str(steps), "--number", str(number), "--guidance", str(guidance)]


def _bits(variance: str, number: int, *more: str) -> list[str]:
    return ["--metric", "bits", "--variance", variance, "--number", str(number), *more]


PIXEL = [
    # the number that is quoted, and its neighbours
    *[_draws(sampler, steps, 10_000) for sampler, steps in (("dpmpp", 20), ("ddim", 50), ("ddim", 20))],
    # quality against the number of network calls
    *[_draws("dpmpp", steps, 2000) for steps in (5, 10, 20, 50)],
    *[_draws("ddim", steps, 2000) for steps in (5, 10, 20, 50, 100)],
    *[_draws("ddpm", steps, 2000) for steps in (10, 20, 50)],
    # guidance
    *[_draws("dpmpp", 20, 2000, w) for w in (2.0, 4.0)],
    # likelihood
    _bits("beta", 5000),
    _bits("beta", 5000, "--null"),
    _bits("beta_tilde", 1000),
    # without classes, as the VAE is
    [*_draws("dpmpp", 20, 10_000), "--null"],
    # copies of training images
    ["--metric", "neighbours", *_draws("dpmpp", 20, 2000)],
]
CAPTIONS = [
    # guidance against diversity
    *[["--number", "1000", "--guidance", str(w)] for w in (1.0, 2.0, 3.0, 5.0, 8.0)],
    # combinations that no training caption has
    *[["--metric", "composition", "--guidance", str(w)] for w in (1.0, 3.0, 5.0)],
    # copies of training images, by captions of the training and new ones
    *[["--metric", "neighbours", "--number", "500", "--guidance", "3", "--captions", c] for c in ("train", "test")],
]
EVALUATIONS: dict[str, list[list[str]]] = {
    "fashion-cpu": PIXEL,
    "fashion-vae": [
        ["--number", "10000"],
        ["--metric", "neighbours", "--number", "2000"],
        *[["--metric", "bits", "--number", "5000", "--importance", str(K)] for K in (1, 10, 100)],
    ],
    "emoji-vae": [[]],
    "emoji-matcher": [[]],
    "emoji-ldm": CAPTIONS,
}
TIMED, ROUNDS = 64, 9  # images drawn at once, and how often


def result(model: str, arguments: list[str]) -> dict[str, Any]:
    """What `diffbook evaluate` says: from the cache, or measured now."""
    weights = hashlib.sha256(source_of(model).read_bytes()).hexdigest()
    key = hashlib.sha256(" ".join([weights, *arguments]).encode()).hexdigest()[:16]
    path = cache_folder() / "quality" / f"{model}-{key}.json"
    if not path.exists():
        command = [sys.executable, "-m", "diffbook.cli", "evaluate", model, *arguments, "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, done.stdout)
        print("measured:", " ".join(arguments), flush=True)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def seconds_per_image(models: list[str]) -> dict[str, dict[str, Any]]:
    """Median seconds an image, of models that draw, on one thread.

    The models take turns, so that other programs disturb all alike.
    """
    torch.set_num_threads(1)
    draw: dict[str, Callable[[], Any]] = {}
    for name in models:
        network, recipe = load_model(name)
        if isinstance(recipe, Diffusion):
            null = torch.full((TIMED,), recipe.options["classes"])
            draw[name] = partial(lambda *a: list(draw_images(*a, sampler="dpmpp")), network, recipe, null)
        elif isinstance(network, VAE):
            draw[name] = partial(lambda *a: list(decode_images(*a)), network, TIMED)
    seconds: dict[str, list[float]] = {name: [] for name in draw}
    for _ in range(ROUNDS):
        for name in draw:
            start = time.perf_counter()
            draw[name]()
            seconds[name].append((time.perf_counter() - start) / TIMED)
    about = {"images": TIMED, "rounds": ROUNDS, "threads": 1, "measured_with": sorted(draw)}
    return {name: {"seconds_per_image": float(f"{median(s):.3g}")} | about for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the shipped models, and write their cards.")
    parser.add_argument("--model", nargs="*", choices=EVALUATIONS, default=list(EVALUATIONS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="evaluations at a time (default: 2)")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        work = {name: [pool.submit(result, name, a) for a in EVALUATIONS[name]] for name in options.model}
        quality = {name: [future.result() for future in futures] for name, futures in work.items()}
    # The models of Fashion-MNIST all take part, but only if one of them is asked for.
    draws = ["fashion-cpu", "fashion-vae"]
    speed = seconds_per_image(draws) if {*draws} & {*options.model} else {}
    for name, results in quality.items():
        card = model_card(name) | {"quality": [*results, *([speed[name]] if name in speed else [])]}
        path = source_of(name).with_suffix(".json")
        write_atomically(path, (json.dumps(card, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
