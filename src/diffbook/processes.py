"""Who takes part in a run: this process alone, or several, each with a device of its own.

Hugging Face accelerate finds the others, wraps the loss so that gradients are averaged, and moves nothing else: which
images are seen when, learning rate, moving average and checkpoints stay ours, because they are functions of the images
seen. Several processes are started by ``accelerate launch`` or ``torchrun``; accelerate comes with the extra ``gpu``.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from diffbook.recipes import Recipe


class Loss(nn.Module):
    """A recipe's loss as the forward pass of a module.

    What averages gradients between processes wraps a module and acts when *its* forward pass is called. Recipes call
    what they like of their network, ``encode`` and ``decode`` of an autoencoder for example; here all is within one.
    """

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__()
        self.recipe, self.network = recipe, network

    def forward(self, x_0: Tensor, y: Tensor, generator: torch.Generator, rows: slice) -> Tensor:
        """See :meth:`diffbook.recipes.Recipe.loss`."""
        return self.recipe.loss(self.network, x_0, y, generator, rows)


class Processes:
    """This process alone.

    Attributes:
        count: how many take part.
        index: which of them this is, from 0. The first writes the files of the run.
        device: the one this process computes on.
        stop_asked: set it to have all processes stop after the same step.
    """

    count = 1
    index = 0
    stop_asked = False

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def wrap(self, loss: Loss) -> nn.Module:
        """The loss, such that a backward pass gives the mean gradient of all processes."""
        return loss

    def without_others(self, loss: nn.Module) -> AbstractContextManager[None]:
        """Within it, gradients are only added up here: what follows will send them."""
        return contextlib.nullcontext()

    def mean(self, values: Tensor, flags: list[bool]) -> list[float]:
        """The means of values on the device, and of flags as 0 and 1, over all processes: the same in each.

        A GPU is waited for.
        """
        return [*values.tolist(), *map(float, flags)]

    def agree(self, network: nn.Module) -> bool:
        """Whether all processes have the same weights, as far as a sum shows it."""
        return True

    def wait(self) -> None:
        """Go on when all have come here."""


class Several(Processes):
    """This process and others that were started together with it.

    Raises:
        ValueError: accelerate is missing.
    """

    def __init__(self, device: torch.device | str) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ValueError("several processes need accelerate: pip install accelerate") from error
        # mixed precision is the recipe's: the loss itself says what is computed in bfloat16
        self.accelerator = Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision="no")
        super().__init__(self.accelerator.device)
        self.count, self.index = self.accelerator.num_processes, self.accelerator.process_index

    def wrap(self, loss: Loss) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare_model(loss)
        return wrapped

    def without_others(self, loss: nn.Module) -> AbstractContextManager[None]:
        within: AbstractContextManager[None] = self.accelerator.no_sync(loss)
        return within

    def mean(self, values: Tensor, flags: list[bool]) -> list[float]:
        told = torch.cat([values, torch.tensor(flags, dtype=values.dtype, device=values.device)])
        mean = self.accelerator.reduce(told, reduction="mean")
        assert isinstance(mean, Tensor)
        means: list[float] = mean.tolist()
        return means

    def agree(self, network: nn.Module) -> bool:
        sums = torch.stack([p.detach().double().sum() for p in network.parameters()])
        values = self.accelerator.gather(sums[None])
        assert isinstance(values, Tensor)
        return bool((values == values[0]).all())

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def find_processes(device: torch.device | str) -> Processes:
    """All who take part: several if this process was started by ``accelerate launch`` or ``torchrun``.

    Args:
        device: for several processes its kind counts only; each gets a device of its own of that kind.
    """
    return Several(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Processes(device)


def own_rows(batch: int, processes: Processes, parts: int) -> list[slice]:
    """Which rows of a batch this process computes, one slice for each part.

    Raises:
        ValueError: the batch cannot be divided into so many equal parts; their mean would not be the batch's mean.
    """
    number = processes.count * parts
    if batch % number:
        raise ValueError(
            f"a batch of {batch} images cannot be divided into {number} equal parts "
            f"({processes.count} processes, {parts} parts each)"
        )
    size = batch // number
    starts = [(processes.index * parts + i) * size for i in range(parts)]
    return [slice(start, start + size) for start in starts]
