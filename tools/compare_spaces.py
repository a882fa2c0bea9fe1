"""Compare diffusion in pixel space and in latent space on emoji64, for chapter 11.

    python tools/compare_spaces.py [--costs]

Two models of the same kind, with about the same number of parameters, told the same categories: one of 64×64 pixels,
one of the 8×8 latents of emoji-vae. Each is trained for the same number of floating-point operations, counted. Along
the way the averaged weights are measured: Fréchet distance of 1,000 samples to the training images, in the features of
emoji-matcher. With --costs only the cost table is measured again: operations, bytes, seconds (the models in turn) and
peak memory of a training step and of a sample. Interrupted, the command goes on. Results and samples go to the
package's assets/results, where the chapter reads them. About an hour on one core.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from diffbook.autoencoder import SpatialVAE
from diffbook.classifier import CaptionMatcher
from diffbook.data import cache_folder, emoji64, to_uint8
from diffbook.evaluation import draw_images, frechet_jackknife, image_features, shuffled
from diffbook.planning import flops, saved_bytes
from diffbook.recipes import Diffusion, Recipe, find_recipe, stream
from diffbook.runs import read_log
from diffbook.training import train, training_set
from diffbook.weights import load_model, model_card, write_atomically, write_tensors

ASSETS = Path(__file__).resolve().parents[1] / "src" / "diffbook" / "assets" / "results"
RESULTS, PICTURES = ASSETS / "spaces.json", ASSETS / "spaces.png"
SAMPLES, STEPS, ROUNDS, SHOWN = 1000, 20, 5, 9
POINTS = (0.05, 0.15, 0.4, 1.0)  # shares of the training after which a model is measured

PIXEL = Diffusion(
    name="pixel",
    about="emoji64 in pixel space, told the category",
    network="LiteUNet",
    options={"channels": 3, "widths": [48, 96, 128], "blocks": 2, "attention": [2], "patch": 2, "classes": 9},
    data="emoji64",
    size=64,
    images=64_000,
    batch=64,
    lr=1e-3,
    warmup=2_000,
)
LATENT = replace(
    PIXEL,
    name="latent",
    about="emoji64 in the latent space of emoji-vae, told the category",
    options={"channels": 4, "widths": [96, 128], "blocks": 2, "attention": [1], "classes": 9},
    autoencoder="emoji-vae",
    size=8,
)


def batch_of(recipe: Recipe) -> tuple[Tensor, Tensor]:
    data = training_set(recipe)
    return data.x(slice(recipe.batch)), data.labels[: recipe.batch]


def one_step(recipe: Recipe) -> Callable[[], None]:
    """A training step without the optimizer, on a batch of real data."""
    network = recipe.build().to(memory_format=torch.channels_last)
    x, y = batch_of(recipe)

    def work() -> None:
        recipe.loss(network, x, y, stream(0, "cost", 0)).backward()
        network.zero_grad()

    return work


def one_sample(recipe: Diffusion) -> Callable[[], None]:
    """Sixteen images at once, decoded if they are latents."""
    network, autoencoder, y = recipe.build().eval().requires_grad_(False), autoencoder_of(recipe), torch.arange(16) % 9
    return lambda: list(draw_images(network, recipe, y, STEPS, autoencoder=autoencoder)) and None


def autoencoder_of(recipe: Diffusion) -> SpatialVAE | None:
    if not recipe.autoencoder:
        return None
    network, _ = load_model(recipe.autoencoder)
    assert isinstance(network, SpatialVAE)
    return network


def at_equal_compute() -> Diffusion:
    """The latent recipe with as many images, in whole batches, as the compute of the pixel model pays for."""
    ratio = flops(one_step(PIXEL)) / flops(one_step(LATENT))
    return replace(LATENT, images=round(PIXEL.images * ratio / LATENT.batch) * LATENT.batch)


WORK: dict[str, Callable[[], Callable[[], None]]] = {
    "pixel step": lambda: one_step(PIXEL),
    "latent step": lambda: one_step(LATENT),
    "autoencoder step": lambda: one_step(find_recipe("emoji-vae")),
    "pixel sample": lambda: one_sample(PIXEL),
    "latent sample": lambda: one_sample(LATENT),
}
AT_ONCE = {"pixel step": 64, "latent step": 64, "autoencoder step": 32, "pixel sample": 16, "latent sample": 16}


def peak_mebibytes(name: str) -> float:
    """What the work adds to the peak memory of a process of its own."""
    command = [sys.executable, __file__, "--peak", name]
    return float(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def print_peak(name: str) -> None:
    torch.set_num_threads(1)
    work = WORK[name]()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of reading the data, is forgotten
    before = _peak()
    work()
    print(_peak() - before)


def _peak() -> float:
    """Peak memory in MiB, on Linux. (ru_maxrss would start from that of the process that started this one.)"""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def costs() -> list[dict[str, Any]]:
    """A row for each kind of work, an image each."""
    jobs = {name: make() for name, make in WORK.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(ROUNDS):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, job in jobs.items():
        n = AT_ONCE[name]
        row = {"work": name, "at_once": n, "megaflops": _short(flops(job) / n / 1e6)}
        row |= {"seconds": _short(median(seconds[name]) / n), "peak_mebibytes": _short(peak_mebibytes(name))}
        if name.endswith("step"):
            row["saved_mebibytes"] = _short(saved_bytes(job) / 2**20)
        rows.append(row)
    return rows


def curve(recipe: Diffusion) -> list[dict[str, Any]]:
    """Train, or go on, and measure the averaged weights at each point; samples of the last are kept."""
    folder = cache_folder() / "compare" / f"space-{recipe.name}"
    points = [round(p * recipe.images / recipe.batch) * recipe.batch for p in POINTS]
    for step in train(recipe, folder):
        if step.images in points:
            tensors = dict(step.averaged.state_dict())
            write_tensors(folder / f"point-{step.images}.safetensors", tensors, {"recipe": recipe.to_json()})
            print(f"{recipe.name}: {step.images} of {recipe.images} images, loss {step.loss:.3f}", flush=True)
    log, matcher = read_log(folder / "log.jsonl"), load_model("emoji-matcher")[0]
    assert isinstance(matcher, CaptionMatcher)
    images = emoji64("train")
    reference, y = image_features(matcher, images.x()), images.labels[torch.arange(SAMPLES) * len(images) // SAMPLES]
    step_flops, autoencoder = flops(one_step(recipe)), autoencoder_of(recipe)
    rows = []
    for point in points:
        network, _ = load_model(folder / f"point-{point}.safetensors")
        path = folder / f"point-{point}.json"
        if not path.exists():
            x = torch.cat(list(draw_images(network, recipe, y, STEPS, sampler="dpmpp", autoencoder=autoencoder)))
            distance = frechet_jackknife(shuffled(image_features(matcher, x)), shuffled(reference))
            names = ("frechet_distance", "standard_error", "bias")
            row = dict(zip(names, (_short(v) for v in distance), strict=True))
            if point == points[-1]:
                write_tensors(folder / "samples.safetensors", {"x": to_uint8(x)}, {})
            write_atomically(path, json.dumps(row).encode())
        near = min(log, key=lambda line: abs(line["images"] - point))
        # seconds of the processor: other programs may have slowed one of the two down
        spent = {"images": point, "seconds": _short(near["cpu_seconds"] * point / near["images"])}
        spent["petaflops"] = _short(step_flops / recipe.batch * point / 1e15)
        rows.append({"space": recipe.name} | spent | json.loads(path.read_text(encoding="utf-8")))
        print(rows[-1], flush=True)
    return rows


def save_pictures() -> None:
    """Two rows of samples a space, pixel space first."""
    from torchvision.utils import save_image

    from diffbook.weights import read_tensors

    folders = [cache_folder() / "compare" / f"space-{name}" for name in ("pixel", "latent")]
    index = torch.arange(2 * SHOWN) * SAMPLES // (2 * SHOWN)
    x = torch.cat([read_tensors(folder / "samples.safetensors")[0]["x"][index] for folder in folders])
    save_image(x.float() / 255, PICTURES, nrow=SHOWN, padding=0)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare diffusion in pixel space and in latent space.")
    parser.add_argument("--costs", action="store_true", help="measure the cost table only")
    parser.add_argument("--peak", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return print_peak(options.peak)
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not options.costs:
        latent = at_equal_compute()
        results["curves"] = [*curve(PIXEL), *curve(latent)]
        card = model_card("emoji-vae")
        results["autoencoder"] = {name: card[name] for name in ("images", "seconds", "cpu_seconds")}
        results["autoencoder"]["petaflops"] = _short(
            flops(one_step(find_recipe("emoji-vae"))) / 32 * card["images"] / 1e15
        )
        results["parameters"] = {recipe.name: parameters(recipe.build()) for recipe in (PIXEL, LATENT)}
        save_pictures()
    results["costs"] = costs()
    ASSETS.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main()
