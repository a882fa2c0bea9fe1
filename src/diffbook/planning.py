"""What a training run will cost, before it is started: parameters, operations, memory, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffbook.processes import Processes
from diffbook.recipes import CaptionedDiffusion, Diffusion, Recipe
from diffbook.training import State, compile_network, take_step

COPIES = 5  # of each parameter: the weight, its gradient, two moments of AdamW, the moving average


def example(recipe: Recipe, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Noise and labels of the shapes that a recipe learns from; no data is read.

    Returns:
        x_0, float32 in [-1, 1], shape ``(count, C, H, W)``, on the grid of 256 levels; y, int64, ``(count,)``, or the
        captions' words, ``(count, L)``.
    """
    options = recipe.options
    shape = options.get("latent") if isinstance(recipe, CaptionedDiffusion) else None
    if shape is None:
        size = recipe.size if isinstance(recipe, Diffusion) else options["size"]
        shape = [options["channels"], size, size]
    generator = torch.Generator().manual_seed(0)  # zeros would be computed faster on some hardware
    x_0 = torch.randint(0, 256, (count, *shape), generator=generator) / 127.5 - 1
    if "words" in options:
        y = torch.randint(0, options["words"], (count, options.get("length", 12)), generator=generator)
    else:
        y = torch.randint(0, options.get("classes") or 1, (count,), generator=generator)
    return x_0.to(device), y.to(device)


def megaflops(recipe: Recipe) -> float:
    """Millions of floating-point operations that an image costs in training, forward and backward.

    Counted, a multiplication with an addition as two; what is no product of matrices or convolution is left out.
    """
    state = State(replace(recipe, batch=2, parts=1), Processes("cpu"))
    x_0, y = example(recipe, 2)
    return flops(lambda: state.recipe.loss(state.network, x_0, y, torch.Generator().manual_seed(0)).backward()) / 2e6


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of what is done, backward passes included.

    A fused kernel of attention would not be counted, so attention is computed as two products of matrices.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def saved_bytes(work: Callable[[], Any]) -> int:
    """Bytes of all that a forward pass keeps for its backward pass, parameters included."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        work()
    return sum(kept.values())


def memory(recipe: Recipe, processes: int = 1) -> float:
    """An estimate of what training needs on the device, in MiB, without the data set.

    Five copies of each parameter, and what a part of a batch keeps for its backward pass, measured with batches of two
    and four images. Half of the latter in bfloat16. What a library takes for itself is left out.
    """
    network = recipe.build()
    parameters = sum(p.numel() for p in network.parameters())

    def kept(count: int) -> int:
        generator = torch.Generator().manual_seed(0)
        return saved_bytes(lambda: recipe.loss(network, *example(recipe, count), generator))

    an_image = (kept(4) - kept(2)) / 2 * (0.5 if recipe.autocast else 1)
    at_once = recipe.batch / (processes * recipe.parts)
    return (COPIES * 4 * parameters + an_image * at_once) / 2**20


def seconds_an_image(recipe: Recipe, device: torch.device | str = "cpu", steps: int = 5, at_most: int = 64) -> float:
    """How long training takes for an image: the median of a few steps on noise, after one that is not timed.

    Args:
        at_most: images a step, so that a batch meant for a GPU does not take minutes elsewhere.
    """
    device = torch.device(device)
    batch = math.ceil(recipe.batch / recipe.parts)
    batch = batch if device.type == "cuda" else min(batch, at_most)
    state = State(replace(recipe, batch=batch, parts=1), Processes(device))
    if recipe.compile and device.type == "cuda":
        compile_network(state.network)
    x_0, y = example(recipe, batch, device)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        take_step(state, x_0, y)  # waits for the device, to look at the loss
        times.append(time.perf_counter() - start)
    return median(times[1:]) / batch


def plan(recipe: Recipe, processes: Processes) -> dict[str, Any]:
    """What ``diffbook train --dry-run`` says of a run.

    Returns:
        with ``steps``, ``parameters``, ``megaflops_per_image``, ``memory_mebibytes`` a process, ``images_per_second``
        and ``hours`` of all processes together if they do not hinder each other. Neither data nor autoencoder is read.
    """
    rate = processes.count / seconds_an_image(recipe, processes.device)
    work = megaflops(recipe)
    return {
        "name": recipe.name,
        "images": recipe.images,
        "steps": math.ceil(recipe.images / recipe.batch),
        "parameters": sum(p.numel() for p in recipe.build().parameters()),
        "megaflops_per_image": float(f"{work:.4g}"),
        "gigaflops_per_second": float(f"{work * rate / 1e3:.3g}"),
        "memory_mebibytes": round(memory(recipe, processes.count)),
        "images_per_second": float(f"{rate:.3g}"),
        "hours": float(f"{recipe.images / rate / 3600:.3g}"),
    }
