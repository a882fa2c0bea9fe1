"""Measure how good the shipped diffusion model is, and write it into its model card.

    python tools/measure_quality.py [--model NAME] [--jobs N]

Runs `diffbook evaluate` for each line of EVALUATIONS, N at a time on one core each (about 40 minutes for N = 2), and
keeps each result in the cache under the checksum of the weights and of the arguments: an interrupted run goes on, and
other weights are measured anew. The results become the list "quality" of the card, which the chapters read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diffbook.data import cache_folder
from diffbook.weights import model_card, source_of, write_atomically


def _draws(sampler: str, steps: int, number: int, guidance: float = 1.0) -> list[str]:
    return ["--sampler", sampler, "--steps", str(steps), "--number", str(number), "--guidance", str(guidance)]


def _bits(variance: str, number: int, *more: str) -> list[str]:
    return ["--metric", "bits", "--variance", variance, "--number", str(number), *more]


EVALUATIONS: list[list[str]] = [
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
]


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the shipped diffusion model, and write its card.")
    parser.add_argument("--model", default="fashion-cpu", help="default: fashion-cpu")
    parser.add_argument("--jobs", type=int, default=2, help="evaluations at a time (default: 2)")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        quality = list(pool.map(lambda arguments: result(options.model, arguments), EVALUATIONS))
    card = model_card(options.model) | {"quality": quality}
    path = source_of(options.model).with_suffix(".json")
    write_atomically(path, (json.dumps(card, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
