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
import json
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffbook.autoencoder import SpatialVAE
from diffbook.data import CaptionedImages, ImageSet, cache_folder, image_set
from diffbook.latent import LatentSet, emoji_vocabulary, to_latents
from diffbook.recipes import CaptionedDiffusion, Diffusion, Matching, Recipe, recipe_from_json, stream
from diffbook.weights import (
    WeightsError,
    checkpoints,
    fill,
    load_model,
    read_tensors,
    source_of,
    write_atomically,
    write_tensors,
)

LOG_EVERY = 50  # steps


class TrainingError(ValueError):
    """A run cannot start or go on; the message says what to do. What was saved is intact."""


class Step(NamedTuple):
    """What :func:`train` yields after each step."""

    images: int  # seen so far
    loss: float
    lr: float
    gradient_norm: float  # before clipping
    averaged: nn.Module  # the network with averaged weights (EMA), live: to look at, not to change


class State:
    """All that a checkpoint holds: network, averaged network, optimizer, images seen, seconds spent."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.network = recipe.build().to(device).to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.images = 0
        self.seconds = self.cpu_seconds = 0.0

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint and delete all but the last ``keep``."""
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

    def resume(self, path: Path) -> None:
        """Go back to a checkpoint.

        Raises:
            WeightsError: it is damaged or foreign.
            TrainingError: it belongs to another recipe.
        """
        tensors, about = read_tensors(path)
        try:
            _check_same(self.recipe, recipe_from_json(about["recipe"]), path.parent)
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
    recipe: Recipe, folder: Path | str, device: torch.device | str = "cpu", save_every: float = 60.0, keep: int = 3
) -> Generator[Step, None, None]:
    """Train by a recipe, and go on where a checkpoint in the folder ends.

    Closing the generator, or leaving a ``for`` loop over it, saves first. A folder holds the last checkpoints and
    ``log.jsonl``.

    Args:
        folder: of this run, made if need be.
        save_every: seconds between checkpoints; there is one more at the end.
        keep: how many checkpoints to keep, at least 1.

    Raises:
        TrainingError: another run uses the folder; the folder holds a run of another recipe; the loss or a gradient
            is not finite (the weights are then those before that step, and are not saved).
        WeightsError: the last checkpoint is damaged or foreign.
        OSError: a checkpoint or the log cannot be written.
    """
    folder, device = Path(folder), torch.device(device)
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder.mkdir(parents=True, exist_ok=True)
    with _only_run(folder):
        state = State(recipe, device)
        found = checkpoints(folder)
        if found:
            state.resume(found[-1])
        log = _Log(folder / "log.jsonl", state)
        if recipe.compile and device.type == "cuda":
            state.network.compile()
        data = training_set(recipe, device)
        saved_at, saved_images = time.monotonic(), state.images
        while state.images < recipe.images:
            wall, cpu = time.monotonic(), time.process_time()
            order = image_order(recipe.seed, state.images, recipe.batch, len(data), device)
            step = _step(state, data.x(order), data.labels[order])
            state.seconds += time.monotonic() - wall
            state.cpu_seconds += time.process_time() - cpu
            log.add(step)
            if state.images >= recipe.images:
                recipe.finish(state.averaged, data)
            if time.monotonic() - saved_at >= save_every or state.images >= recipe.images:
                state.save(folder, keep)
                saved_at, saved_images = time.monotonic(), state.images
            try:
                yield step
            except GeneratorExit:
                if saved_images < state.images:
                    state.save(folder, keep)
                raise


def training_set(recipe: Recipe, device: torch.device | str = "cpu") -> ImageSet | LatentSet:
    """What a recipe learns from, on the device: images, or the latents that its autoencoder makes of them.

    Latents are computed once, in float32, and kept in the cache under a checksum of the autoencoder and the images.

    Raises:
        ValueError: the recipe's autoencoder is missing, or no autoencoder.
        DataError: see the function of the data set.
    """
    images = image_set(recipe.data)
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


def _step(state: State, x_0: Tensor, y: Tensor) -> Step:
    """One step of the optimizer and of the moving average, :eq:`def-ema`."""
    recipe, device = state.recipe, state.device
    number = state.images // recipe.batch
    lr = recipe.learning_rate(state.images)
    network: list[Tensor] = list(state.network.parameters())
    averaged: list[Tensor] = list(state.averaged.parameters())
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.autocast(device.type, torch.bfloat16, recipe.autocast and bool(cuda)):
        torch.manual_seed(stream(recipe.seed, "dropout", number).initial_seed())
        x_0 = recipe.augment(x_0, stream(recipe.seed, "augment", number, device))
        loss = recipe.loss(state.network, x_0, y, stream(recipe.seed, "noise", number, device))
        loss.backward()
    norm = nn.utils.clip_grad_norm_(network, recipe.clip)
    values = torch.stack([loss.detach().float(), norm.float()]).tolist()  # the only time a GPU is waited for
    if not all(value - value == 0 for value in values):  # false for NaN and for infinity
        raise TrainingError(
            f"step {number}, after {state.images} images: the loss is {values[0]:g} and the norm of its gradient "
            f"{values[1]:g}; the checkpoints are from before. Lower the learning rate ({lr:g})"
        )
    state.optimizer.param_groups[0]["lr"] = lr
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(averaged, network, 1 - recipe.ema_decay(state.images))
    state.images += recipe.batch
    return Step(state.images, values[0], lr, values[1], state.averaged)


class _Log:
    """A line of JSON for every ``LOG_EVERY`` steps, with the mean of the losses since the last."""

    def __init__(self, path: Path, state: State) -> None:
        self.path, self.state, self.losses = path, state, list[float]()
        if path.exists():  # what was logged after the checkpoint will be logged again
            lines = [line for line in read_log(path) if line["images"] <= state.images]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, step: Step) -> None:
        self.losses.append(step.loss)
        if step.images // self.state.recipe.batch % LOG_EVERY == 0 or step.images >= self.state.recipe.images:
            line = {
                "images": step.images,
                "loss": round(sum(self.losses) / len(self.losses), 6),
                "lr": step.lr,
                "gradient_norm": round(step.gradient_norm, 4),
                "seconds": round(self.state.seconds, 1),
                "cpu_seconds": round(self.state.cpu_seconds, 1),
            }
            self.losses.clear()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that was cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


@contextlib.contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it even when the process is killed. Without effect on Windows."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(f"another run is using {folder}; wait for it, or choose another folder") from error
        yield


def _check_same(new: Recipe, old: Recipe, folder: Path) -> None:
    a, b = new.to_json(), old.to_json()
    names = [name for name in sorted({*a, *b} - {"about"}) if a.get(name) != b.get(name)]
    changed = [f"{name} was {b.get(name)!r} and is {a.get(name)!r}" for name in names]
    if changed:
        raise TrainingError(f"{folder} holds a run of another recipe ({'; '.join(changed)}); choose another folder")


def describe(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
