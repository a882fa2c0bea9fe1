"""The folder of a run: who may write to it, its log, and the best weights so far.

======================  =============================================================================
``checkpoint-….``       the last few checkpoints, named by the images seen
``best.safetensors``    the averaged weights with the smallest loss on held-out images
``held-out.jsonl``      these losses
``log.jsonl``           loss, learning rate, norm of the gradient and time, every ``LOG_EVERY`` steps
``samples-….png``       what the averaged weights draw, by the command ``diffbook train``
======================  =============================================================================
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffbook.data import ImageSet
from diffbook.latent import LatentSet
from diffbook.recipes import Recipe, stream
from diffbook.weights import read_tensors, write_atomically, write_tensors

LOG_EVERY = 50  # steps
HELD_OUT, AT_ONCE = 500, 50  # images
TIMES, AT_LEAST = 20, 50  # held-out losses are measured so often in a run, but not more often than so many steps


class TrainingError(ValueError):
    """A run cannot start or go on; the message says what to do. What was saved is intact."""


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, and clear away what a killed run was just writing.

    The system lets go of the lock even when the process is killed. Without effect on Windows.

    Raises:
        TrainingError: another process holds it.
    """
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
        for unfinished in folder.glob(".*.tmp"):
            unfinished.unlink()
        yield


def check_same(new: Recipe, old: Recipe, folder: Path) -> None:
    """Compare a recipe with that of the run in the folder.

    Into what a batch is divided, and how images lie in memory, is left out: it changes no more than the rounding.

    Raises:
        TrainingError: they differ; the message says in what.
    """
    a, b = new.to_json(), old.to_json()
    names = [name for name in sorted({*a, *b} - {"about", "parts", "channels_last"}) if a.get(name) != b.get(name)]
    changed = [f"{name} was {b.get(name)!r} and is {a.get(name)!r}" for name in names]
    if changed:
        raise TrainingError(
            f"{folder} holds a run of another recipe ({'; '.join(changed)}); "
            "repeat the command as it was, or choose another folder"
        )


class Log:
    """A file with a line of JSON for each entry.

    Args:
        images: the run goes on from there; what was logged after it is deleted, because it will be logged again.
    """

    def __init__(self, path: Path, images: int) -> None:
        self.path = path
        if path.exists():
            lines = [line for line in read_log(path) if line["images"] <= images]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def add(self, **line: float) -> None:
        """Write a line at the end.

        Raises:
            OSError: it cannot be written.
        """
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that was cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


class Best:
    """The averaged weights whose loss on held-out images is the smallest so far.

    It is no measure of how good pictures are, but it shows when a model begins to learn its training images by heart.
    The held-out images are those of the test, so what was chosen by them must not be judged by them.

    Args:
        folder: of the run.
        images: seen so far.
        data: the held-out images, or their latents.
    """

    def __init__(self, folder: Path, recipe: Recipe, images: int, data: ImageSet | LatentSet) -> None:
        self.path, self.recipe, self.data = folder / "best.safetensors", recipe, data
        self.log = Log(folder / "held-out.jsonl", images)
        self.smallest = min((line["loss"] for line in self._lines()), default=float("inf"))

    def _lines(self) -> list[dict[str, Any]]:
        return read_log(self.log.path) if self.log.path.exists() else []

    def is_due(self, images: int) -> bool:
        """Whether to measure now: after fixed numbers of images, so that a run that was interrupted has the same."""
        every = max(self.recipe.images // TIMES, AT_LEAST * self.recipe.batch)
        crossed = images // every > (images - self.recipe.batch) // every
        return crossed or images >= self.recipe.images

    @torch.no_grad()
    def loss(self, averaged: nn.Module) -> float:
        """The recipe's loss on the held-out images, always with the same noise."""
        losses = []
        for i, part in enumerate(torch.arange(len(self.data)).split(AT_ONCE)):
            part = part.to(self.data.labels.device)
            generator = stream(self.recipe.seed, "held-out", i, part.device)
            losses.append(self.recipe.loss(averaged, self.data.x(part), self.data.labels[part], generator) * len(part))
        return (torch.stack(losses).sum() / len(self.data)).item()

    def measure(self, averaged: nn.Module, images: int, training: ImageSet | LatentSet) -> float:
        """Measure, log, and keep the weights if they are the best.

        Args:
            training: what the run learns from; an autoencoder's scale is fitted to a part of it.

        Raises:
            OSError: a file cannot be written.
        """
        loss = self.loss(averaged)
        if loss < self.smallest:
            self.smallest = loss
            best = copy.deepcopy(averaged)
            self.recipe.finish(best, training.spread(2000) if isinstance(training, ImageSet) else training)
            about = {"recipe": self.recipe.to_json(), "images": images, "held_out_loss": loss}
            write_tensors(self.path, dict(best.state_dict()), about)
        self.log.add(images=images, loss=round(loss, 6))
        return loss


def best_of(folder: Path) -> tuple[int, float] | None:
    """After how many images the best weights of a run were kept, and their loss; None if there are none yet."""
    path = folder / "best.safetensors"
    if not path.exists():
        return None
    _, about = read_tensors(path)
    return about["images"], about["held_out_loss"]
