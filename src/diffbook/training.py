"""One training loop for every model.

:func:`train` is a generator that yields a record after each step; the caller decides on bars, pictures and when to
stop. Called again with the same recipe and folder it goes on where the last checkpoint was written.

Everything random is a pure function of the recipe's seed and of the images seen so far:

- the i-th image of a run is number ``i mod N`` of the permutation of the N training images that belongs to the
  seed and the epoch ``i // N``;
- noise, times and dropped labels of a step come from a generator that is seeded from the seed and the step's number.

So a checkpoint needs no state of any random generator, and a run that was interrupted, however often, ends with the
same weights as one that was not: bit for bit on a CPU with the same number of threads.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import time
import warnings
from collections.abc import Generator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffbook.autoencoder import VAE, SpatialVAE
from diffbook.data import CaptionedImages, DataError, ImageSet, cache_folder, image_set
from diffbook.latent import LatentSet, emoji_vocabulary, to_latents
from diffbook.processes import Loss, Processes, find_processes, own_rows
from diffbook.recipes import CaptionedDiffusion, Diffusion, Matching, Recipe, recipe_from_json, stream
from diffbook.runs import HELD_OUT, LOG_EVERY, Best, Log, TrainingError, check_same, only_run
from diffbook.weights import (
    WeightsError,
    checkpoints,
    fill,
    load_model,
    read_tensors,
    source_of,
    write_tensors,
)


class Step(NamedTuple):
    """What :func:`train` yields after each step."""

    images: int  # seen so far
    loss: float
    lr: float
    gradient_norm: float  # before clipping
    averaged: nn.Module  # the network with averaged weights (EMA), live: to look at, not to change
    held_out: float | None = None  # the averaged network's loss on held-out images, when it was measured
    stop: bool = False  # a process was asked to stop: all of them should leave after this step
    save: bool = False  # a checkpoint is due


class State:
    """All that a checkpoint holds: network, averaged network, optimizer, images seen, seconds spent."""

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        self.recipe, self.processes, self.device = recipe, processes, processes.device
        self.rows = own_rows(recipe.batch, processes, recipe.parts)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.network = recipe.build().to(self.device).to(memory_format=layout)
        self.averaged = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.loss = processes.wrap(Loss(recipe, self.network))
        self.autocast = recipe.autocast and self.device.type == "cuda"  # most CPUs are slower in bfloat16
        self.images = 0
        self.seconds = self.cpu_seconds = 0.0

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint and delete all but the last ``keep``; of several processes the first does so.

        Raises:
            TrainingError: the processes have no longer the same weights.
        """
        if not self.processes.agree(self.averaged):
            raise TrainingError(
                f"after {self.images} images the processes have different weights: the last checkpoint is from before; "
                "the same command goes on from there"
            )
        if self.processes.index > 0:
            return
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.averaged.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            tensors |= {f"optimizer.{name}.{k}": v for k, v in self.optimizer.state[parameter].items()}
        about = {
            "recipe": self.recipe.to_json(),
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "device": describe(self.device),
            "torch": torch.__version__,
        }
        write_tensors(folder / f"checkpoint-{self.images:012d}.safetensors", tensors, about)
        for old in checkpoints(folder)[:-keep]:
            old.unlink()

    def resume_last(self, folder: Path) -> None:
        """Go back to the last checkpoint in a folder, if there is one.

        Raises:
            WeightsError, TrainingError: see :meth:`resume`.
        """
        found = checkpoints(folder)
        try:
            if found:
                self.resume(found[-1])
        except WeightsError as error:
            before = f"; the run then goes on from {found[-2].name}" if len(found) > 1 else ""
            raise WeightsError(f"{error}{before}") from error

    def resume(self, path: Path) -> None:
        """Go back to a checkpoint.

        Raises:
            WeightsError: it is damaged or foreign.
            TrainingError: it belongs to another recipe.
        """
        tensors, about = read_tensors(path)
        try:
            check_same(self.recipe, recipe_from_json(about["recipe"]), path.parent)
            parts: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}}
            for key, tensor in tensors.items():
                part, _, name = key.partition(".")
                parts[part][name] = tensor
            fill(self.network, parts["network"], str(path))
            fill(self.averaged, parts["ema"], str(path))
            for name, parameter in self.network.named_parameters():
                # Moments need the strides of their parameter: the fused optimizer walks over memory.
                moments = {k: parts["optimizer"][f"{name}.{k}"] for k in ("exp_avg", "exp_avg_sq")}
                state = {k: torch.empty_like(parameter).copy_(v).detach() for k, v in moments.items()}
                state["step"] = parts["optimizer"][f"{name}.step"].to(self.device)
                self.optimizer.state[parameter] = state
            self.images, self.seconds = about["images"], about["seconds"]
            self.cpu_seconds = about["cpu_seconds"]
        except KeyError as error:
            raise WeightsError(f"{path} is no checkpoint of a training run ({error} is missing)") from error


def train(
    recipe: Recipe,
    folder: Path | str,
    device: torch.device | str = "cpu",
    save_every: float = 60.0,
    keep: int = 3,
    processes: Processes | None = None,
) -> Generator[Step, None, None]:
    """Train by a recipe, and go on where a checkpoint in the folder ends.

    Closing the generator, or leaving a ``for`` loop over it, saves first. What lies in the folder is told in
    :mod:`diffbook.runs`. Several processes share a batch; the first writes, and all must see the same folder.

    Args:
        folder: of this run, made if need be.
        save_every: seconds between checkpoints; there is one more at the end.
        keep: how many checkpoints to keep, at least 1.
        processes: who takes part; by default all that were started together with this one.

    Raises:
        TrainingError: another run uses the folder; the folder holds a run of another recipe; the loss or a gradient
            is not finite (the weights are then those before that step, and are not saved).
        WeightsError: the last checkpoint is damaged or foreign.
        ValueError: the batch cannot be divided among processes and parts.
        OSError: a checkpoint or the log cannot be written.
    """
    folder = Path(folder)
    processes = processes or find_processes(device)
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder.mkdir(parents=True, exist_ok=True)
    with only_run(folder) if processes.index == 0 else contextlib.nullcontext():
        state = State(recipe, processes)
        state.resume_last(folder)
        if recipe.compile and state.device.type == "cuda":
            compile_network(state.network)
        data = training_set(recipe, state.device)
        record = _Record(folder, state, data) if processes.index == 0 else None
        saved_at, saved_images = time.monotonic(), state.images
        while state.images < recipe.images:
            wall, cpu = time.monotonic(), time.process_time()
            order = image_order(recipe.seed, state.images, recipe.batch, len(data), state.device)
            step = take_step(state, data.x(order), data.labels[order], save=wall - saved_at >= save_every)
            state.seconds += time.monotonic() - wall
            state.cpu_seconds += time.process_time() - cpu
            if record:
                step = record.add(step)
            if state.images >= recipe.images:
                recipe.finish(state.averaged, data)
            if step.save or state.images >= recipe.images:
                state.save(folder, keep)
                saved_at, saved_images = time.monotonic(), state.images
            try:
                yield step
            except GeneratorExit:
                if saved_images < state.images:
                    state.save(folder, keep)
                raise


def compile_network(network: nn.Module) -> None:
    """Have torch.compile translate what a recipe calls of its network: its two halves, if it is an autoencoder."""
    halves = [network.encoder, network.decoder] if isinstance(network, (VAE, SpatialVAE)) else [network]
    for module in halves:
        module.compile()


def training_set(
    recipe: Recipe, device: torch.device | str = "cpu", split: str = "train", at_most: int | None = None
) -> ImageSet | LatentSet:
    """What a recipe learns from, on the device: images, or the latents that its autoencoder makes of them.

    Latents are computed once, in float32, and kept in the cache under a checksum of the autoencoder and the images.

    Args:
        split: or ``"test"``, what it does not learn from.
        at_most: only so many of the images, at equal distances.

    Raises:
        ValueError: the recipe's autoencoder is missing, or no autoencoder.
        DataError: see the function of the data set.
    """
    images = image_set(recipe.data, split)
    if at_most is not None:
        images = images.spread(at_most)
    labels = images.labels
    if isinstance(recipe, (CaptionedDiffusion, Matching)):
        assert isinstance(images, CaptionedImages)
        labels = emoji_vocabulary().encode(images.captions)
    if isinstance(recipe, Diffusion) and recipe.autoencoder:
        return LatentSet(_latents(recipe.autoencoder, images, device), labels).to(device)
    return replace(images, labels=labels).to(device)


def _latents(autoencoder: str, images: ImageSet, device: torch.device | str) -> Tensor:
    try:
        source = source_of(autoencoder)
    except ValueError as error:
        raise ValueError(f"{error}; train {autoencoder} first, and name its run with --autoencoder FOLDER") from error
    key = hashlib.sha256(source.read_bytes() + images.images.cpu().numpy().tobytes()).hexdigest()
    path = cache_folder() / "latents" / f"{key[:16]}.safetensors"
    if not path.exists():
        model, _ = load_model(source, device)
        if not isinstance(model, SpatialVAE):
            raise ValueError(f"{autoencoder} is no autoencoder with latents")
        parts = torch.arange(len(images)).split(250)
        z = torch.cat([to_latents(model, images.x(part).to(device)) for part in parts])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"z": z}, {"autoencoder": autoencoder})
    return read_tensors(path)[0]["z"]


def image_order(seed: int, start: int, count: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Which images of a set of that size are the ``start``-th to ``start + count - 1``-th of a run, int64."""
    first, last = start // size, (start + count - 1) // size
    epochs = torch.cat([_permutation(seed, epoch, size, str(device)) for epoch in range(first, last + 1)])
    return epochs[start - first * size :][:count]


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int, device: str) -> Tensor:
    return torch.randperm(size, generator=stream(seed, "epoch", epoch)).to(device)


def take_step(state: State, x_0: Tensor, y: Tensor, save: bool = False) -> Step:
    """One step of the optimizer and of the moving average, :eq:`def-ema`.

    Args:
        x_0, y: the whole batch, in every process: noise belongs to a row of the batch, whoever computes that row.
        save: the first process finds that a checkpoint is due.

    Raises:
        TrainingError: the loss or its gradient is not finite; the weights are those before.
    """
    recipe = state.recipe
    lr = recipe.learning_rate(state.images)
    network: list[Tensor] = list(state.network.parameters())
    averaged: list[Tensor] = list(state.averaged.parameters())
    loss = _gradients(state, x_0, y)
    norm = nn.utils.clip_grad_norm_(network, recipe.clip)
    flags = [state.processes.stop_asked, save and state.processes.index == 0]
    values = state.processes.mean(torch.stack([loss, norm.float()]), flags)  # the only time a GPU is waited for
    if not all(value - value == 0 for value in values):  # false for NaN and for infinity
        raise TrainingError(
            f"step {state.images // recipe.batch}, after {state.images} images: the loss is {values[0]:g} and the norm "
            f"of its gradient {values[1]:g}; the checkpoints are from before. Lower the learning rate ({lr:g})"
        )
    state.optimizer.param_groups[0]["lr"] = lr
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(averaged, network, 1 - recipe.ema_decay(state.images))
    state.images += recipe.batch
    return Step(state.images, values[0], lr, values[1], state.averaged, stop=values[2] > 0, save=values[3] > 0)


def _gradients(state: State, x_0: Tensor, y: Tensor) -> Tensor:
    """Add up the gradients of a batch, part by part, and return the mean loss of this process's rows."""
    recipe, device = state.recipe, state.device
    x_0 = recipe.augment(x_0, stream(recipe.seed, "augment", state.images // recipe.batch, device))
    total = torch.zeros((), device=device)
    for rows in state.rows:
        sent = rows is state.rows[-1]  # with the last part: what was added up goes to the other processes
        with contextlib.nullcontext() if sent else state.processes.without_others(state.loss):
            loss = _loss(state, x_0, y, rows) / recipe.parts
            loss.backward()
        total += loss.detach().float()
    return total


def _loss(state: State, x_0: Tensor, y: Tensor, rows: slice) -> Tensor:
    """The recipe's loss of some rows of a batch, with the noise that belongs to the step."""
    recipe, device, number = state.recipe, state.device, state.images // state.recipe.batch
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.autocast(device.type, torch.bfloat16, state.autocast):
        # no process and no part may drop what another one drops
        place = f" from row {rows.start}" if rows.start else ""
        torch.manual_seed(stream(recipe.seed, f"dropout{place}", number).initial_seed())
        loss: Tensor = state.loss(x_0, y, stream(recipe.seed, "noise", number, device), rows)
    return loss


class _Record:
    """What the first process writes down: the log, and the best weights so far."""

    def __init__(self, folder: Path, state: State, data: ImageSet | LatentSet) -> None:
        self.state, self.data, self.losses = state, data, list[float]()
        self.log = Log(folder / "log.jsonl", state.images)
        self.best = None
        try:
            if state.recipe.data == "digits":
                raise DataError("digits have no test set")
            held_out = training_set(state.recipe, state.device, "test", HELD_OUT)
            self.best = Best(folder, state.recipe, state.images, held_out)
        except DataError as error:
            warnings.warn(f"{error}; the best weights are not kept apart", stacklevel=2)

    def add(self, step: Step) -> Step:
        recipe = self.state.recipe
        self.losses.append(step.loss)
        if step.images // recipe.batch % LOG_EVERY == 0 or step.images >= recipe.images:
            self.log.add(
                images=step.images,
                loss=round(sum(self.losses) / len(self.losses), 6),
                lr=step.lr,
                gradient_norm=round(step.gradient_norm, 4),
                seconds=round(self.state.seconds, 1),
                cpu_seconds=round(self.state.cpu_seconds, 1),
            )
            self.losses.clear()
        if self.best and self.best.is_due(step.images):
            step = step._replace(held_out=self.best.measure(step.averaged, step.images, self.data))
        return step


def describe(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
