"""Our models in 🤗 diffusers: its schedulers and samplers then drive them.

:class:`DiffusersNetwork` is one of our diffusion networks in diffusers' clothes: called with its times 0, …, T-1, and
saved as ``config.json`` and ``diffusion_pytorch_model.safetensors``. :func:`scheduler` is our table of β and our
parameterization as one of diffusers' schedulers. Needs diffusers; not imported by the rest of the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from diffbook.recipes import Diffusion, Recipe, recipe_from_json

SCHEDULERS: dict[str, Any] = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmpp": DPMSolverMultistepScheduler}
PREDICTS = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}


class DiffusersNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A diffusion network as a model of diffusers.

    Args:
        recipe: of the network, as :meth:`diffbook.recipes.Recipe.to_json` wrote it; it becomes the configuration.
        sample_size, in_channels, out_channels: for those who ask the configuration; they follow from the recipe.

    Raises:
        ValueError: the recipe makes no diffusion model.
    """

    @register_to_config
    def __init__(
        self,
        recipe: dict[str, Any],
        sample_size: int | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.network = _diffusion(recipe_from_json(recipe)).build()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """What the network predicts.

        Args:
            sample: x_t, shape ``(B, C, H, W)``.
            timestep: t - 1, a number or ``(B,)``.
            class_labels: classes ``(B,)`` or captions ``(B, L)``; left out, it is the null class.
        """
        t = torch.as_tensor(timestep, device=sample.device).long().expand(len(sample)) + 1
        predicted = self.network(sample, t) if class_labels is None else self.network(sample, t, class_labels)
        return UNet2DOutput(sample=predicted) if return_dict else (predicted,)


def _diffusion(recipe: Recipe) -> Diffusion:
    if not isinstance(recipe, Diffusion):
        raise ValueError(f"{recipe.name} is no diffusion model: diffusers has no use for it")
    return recipe


def to_diffusers(network: nn.Module, recipe: Recipe) -> DiffusersNetwork:
    """A network of ours, as :func:`diffbook.weights.load_model` gives it, with its weights, for diffusers.

    Raises:
        ValueError: it is no diffusion model.
    """
    diffusion = _diffusion(recipe)
    options = diffusion.options
    channels = options["channels"] if "channels" in options else options["latent"][0]
    model = DiffusersNetwork(diffusion.to_json(), diffusion.size, channels, channels)
    model.network.load_state_dict(network.state_dict())
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def scheduler(recipe: Recipe, kind: str = "ddim") -> Any:
    """The recipe's noise schedule and parameterization as a scheduler of diffusers.

    Its grid of times ends with T ("trailing"): for S steps that divide T our samplers walk the same grid, with the
    times T, T - T/S, …, T/S.

    Args:
        kind: ``"ddpm"``, ``"ddim"`` or ``"dpmpp"``.

    Raises:
        ValueError: no diffusion model, or no such kind.
    """
    diffusion = _diffusion(recipe)
    if kind not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {kind!r}; there are {', '.join(SCHEDULERS)}")
    options: dict[str, Any] = {
        "num_train_timesteps": diffusion.T,
        "trained_betas": diffusion.noise_schedule().beta[1:].tolist(),
        "prediction_type": PREDICTS[diffusion.predicts],
        "timestep_spacing": "trailing",
    }
    if kind != "dpmpp":  # latents have no bounds to be clipped to
        options["clip_sample"] = not diffusion.autoencoder
    return SCHEDULERS[kind](**options)


def save(network: nn.Module, recipe: Recipe, folder: Path) -> list[Path]:
    """Write a model for diffusers: the network into ``unet``, a DDIM scheduler into ``scheduler``.

    Returns:
        the files.

    Raises:
        ValueError: it is no diffusion model.
        OSError: a file cannot be written.
    """
    to_diffusers(network, recipe).save_pretrained(folder / "unet")
    scheduler(recipe).save_pretrained(folder / "scheduler")
    return sorted(path for name in ("unet", "scheduler") for path in (folder / name).iterdir())
