"""Our pixel models in 🤗 diffusers: the same network, the same schedule, the same images.

Time is the one thing that differs: our t = 1, …, T is their timestep t - 1. A :class:`~diffbook.unet.UNet` whose parts
diffusers also has becomes a ``UNet2DModel`` with the same outputs; every other network of pixels is wrapped so that it
is called as diffusers calls its own. Needs the extra ``hub``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbook.recipes import Diffusion, Recipe
from diffbook.unet import Attention, Layers, LiteUNet, ResBlock, UNet
from diffbook.weights import write_atomically

PREDICTION = {"v": "v_prediction", "x_0": "sample", "eps": "epsilon"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
CARD = """\
---
library_name: diffusers
---

# {name}

{about}

`unet/` is a `{kind}`, `scheduler/` a `DDIMScheduler`. {how}
"""
HOW = {
    "UNet2DModel": "Load them with `UNet2DModel.from_pretrained(FOLDER, subfolder='unet')` and "
    "`DDIMScheduler.from_pretrained(FOLDER, subfolder='scheduler')`.",
    "WrappedUNet": "Load the network with `diffbook.exchange.wrapper().from_pretrained(FOLDER, subfolder='unet')` "
    "and the scheduler with `DDIMScheduler.from_pretrained(FOLDER, subfolder='scheduler')`.",
}


class ExchangeError(ValueError):
    """A model that diffusers cannot hold; the message says why."""


def to_unet2d(network: UNet, size: int) -> nn.Module:
    """The network as a ``diffusers.UNet2DModel`` in evaluation mode, called with the timestep t - 1.

    Our sines and cosines of t are those of t - 1, turned by a fixed angle, so the first layer of the time embedding
    is turned back and nothing else changes. Label K, "no class", must be given there: it has no default.

    Args:
        size: height and width of the images, for the configuration.

    Raises:
        ExchangeError: the network has what a ``UNet2DModel`` has not; :func:`to_diffusers` wraps it.
    """
    from diffusers import UNet2DModel

    shape = _shape(network)
    kinds = ["AttnDownBlock2D" if attends else "DownBlock2D" for _, attends in shape["levels"]]
    theirs = UNet2DModel(
        sample_size=size,
        in_channels=network.channels,
        out_channels=network.channels,
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        block_out_channels=tuple(width for width, _ in shape["levels"]),
        layers_per_block=shape["blocks"],
        dropout=shape["dropout"],
        attention_head_dim=shape["head"],
        norm_num_groups=shape["groups"],
        norm_eps=1e-5,
        num_class_embeds=None if network.classes is None else network.classes + 1,
    )
    theirs.load_state_dict(_translated(network, theirs))
    exported: nn.Module = theirs.eval()
    return exported


def _shape(network: UNet) -> dict[str, Any]:
    """The numbers that a ``UNet2DModel`` is built from, or the reason why there are none."""
    if type(network) is not UNet:
        raise ExchangeError(f"a {type(network).__name__} is built differently from every network of diffusers")
    if network.patch != 1:
        raise ExchangeError(f"a UNet2DModel does not fold pixels into channels, this network has patch={network.patch}")
    groups = {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)}
    if len(groups) > 1:
        raise ExchangeError(f"a UNet2DModel normalises with one number of groups, this network has {sorted(groups)}")
    attentions = [m for m in network.modules() if isinstance(m, Attention)]
    heads = attentions[0].heads
    head = {m.project.in_channels // heads for m in attentions}
    if heads > 1 and len(head) > 1:
        raise ExchangeError(f"a UNet2DModel has heads of one width, this network has {sorted(head)}")
    levels: list[tuple[int, bool]] = []
    blocks = 0
    for layers in _rows(network.down):
        if isinstance(layers[0], ResBlock):
            if blocks == 0:
                levels.append((layers[0].conv1.out_channels, len(layers) > 1))
            blocks += 1
        else:
            blocks = 0  # every level has as many
    first = next(m for m in network.modules() if isinstance(m, ResBlock))
    return {
        "levels": levels,
        "blocks": blocks,
        "groups": groups.pop(),
        "head": head.pop() if heads > 1 else None,
        "dropout": first.dropout.p,
    }


def _rows(part: nn.ModuleList) -> list[list[nn.Module]]:
    """The layers of the way down or up, row by row."""
    return [[*layers] for layers in part if isinstance(layers, Layers)]


def _translated(network: UNet, theirs: nn.Module) -> dict[str, Tensor]:
    """Our parameters under the names of a ``UNet2DModel``."""
    names = {id(module): name for name, module in theirs.named_modules()}
    found: dict[str, Tensor] = {}
    for ours, other in _matched(network, theirs):
        name = names[id(other)]
        if isinstance(ours, Attention):
            C = ours.project.in_channels
            for i, part in enumerate(("to_q", "to_k", "to_v")):
                found[f"{name}.{part}.weight"] = ours.qkv.weight[i * C : (i + 1) * C, :, 0, 0]
                found[f"{name}.{part}.bias"] = _bias(ours.qkv)[i * C : (i + 1) * C]
            found[f"{name}.to_out.0.weight"] = ours.project.weight[:, :, 0, 0]
            found[f"{name}.to_out.0.bias"] = _bias(ours.project)
        else:
            found |= {f"{name}.{key}": value for key, value in ours.state_dict().items()}
    found["time_embedding.linear_1.weight"] = _turned(found["time_embedding.linear_1.weight"])
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _turned(weight: Tensor) -> Tensor:
    """The first layer of the time embedding, for sines and cosines of t - 1 instead of t."""
    sin, cos = weight.double().chunk(2, dim=1)
    half = sin.shape[1]
    angle = 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=weight.device) / (half - 1))
    turned = [sin * angle.cos() - cos * angle.sin(), sin * angle.sin() + cos * angle.cos()]
    return torch.cat(turned, dim=1).to(weight.dtype)


def _matched(network: UNet, theirs: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The layers of ours beside those of a ``UNet2DModel``; an attention as a whole, besides its normalisation."""
    yield network.stem, theirs.conv_in
    yield network.time[0], theirs.time_embedding.linear_1
    yield network.time[2], theirs.time_embedding.linear_2
    if network.label is not None:
        yield network.label, theirs.class_embedding
    yield network.head[0], theirs.conv_norm_out
    yield network.head[2], theirs.conv_out
    ours = [layer for row in [*_rows(network.down), [*network.middle], *_rows(network.up)] for layer in row]
    parts: list[nn.Module] = []
    for block in theirs.down_blocks:
        parts += [*_in_turn(block), *[sampler.conv for sampler in block.downsamplers or []]]
    middle = theirs.mid_block
    parts += [middle.resnets[0], middle.attentions[0], middle.resnets[1]]
    for block in theirs.up_blocks:
        parts += [*_in_turn(block), *[sampler.conv for sampler in block.upsamplers or []]]
    ours = [layer for layer in ours if not isinstance(layer, nn.Upsample)]
    for layer, part in zip(ours, parts, strict=True):
        yield from _inside(layer, part)


def _in_turn(block: Any) -> Iterator[nn.Module]:
    """Residual blocks of one block of diffusers, each followed by its attention if there is one."""
    for i, resnet in enumerate(block.resnets):
        yield resnet
        if hasattr(block, "attentions"):
            yield block.attentions[i]


def _inside(ours: nn.Module, theirs: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    if isinstance(ours, ResBlock):
        yield ours.norm1, theirs.norm1
        yield ours.conv1, theirs.conv1
        yield ours.embed, theirs.time_emb_proj
        yield ours.norm2, theirs.norm2
        yield ours.conv2, theirs.conv2
        if not isinstance(ours.shortcut, nn.Identity):
            yield ours.shortcut, theirs.conv_shortcut
    elif isinstance(ours, Attention):
        yield ours.norm, theirs.group_norm
        yield ours, theirs
    else:
        yield ours, theirs


@cache
def wrapper() -> Any:
    """The class ``WrappedUNet``: a network of ours with the call, ``config`` and files of a model of diffusers.

    ``model(sample, timestep, class_labels=None, return_dict=True)``; left out, the class is "no class". Built from the
    name of the network (``"UNet"`` or ``"LiteUNet"``), its options, and the size of the images.
    """
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.unets.unet_2d import UNet2DOutput

    class WrappedUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is not looked into
        @register_to_config  # type: ignore[untyped-decorator]
        def __init__(
            self, network: str, options: dict[str, Any], sample_size: int, in_channels: int, out_channels: int
        ) -> None:
            super().__init__()
            self.inner = {"UNet": UNet, "LiteUNet": LiteUNet}[network](**options)

        def forward(
            self,
            sample: Tensor,
            timestep: Tensor | float,
            class_labels: Tensor | None = None,
            return_dict: bool = True,
        ) -> Any:
            t = torch.as_tensor(timestep, device=sample.device).long().expand(len(sample)) + 1
            output = self.inner(sample, t, class_labels)
            return UNet2DOutput(sample=output) if return_dict else (output,)

    return WrappedUNet


def to_diffusers(network: nn.Module, recipe: Recipe) -> nn.Module:
    """A trained network of pixels for diffusers: a ``UNet2DModel`` where that is possible, else :func:`wrapper`'s.

    Args:
        network, recipe: as :func:`diffbook.weights.load_model` gives them.

    Raises:
        ExchangeError: not a diffusion model of pixels, or diffusers is missing.
    """
    if not isinstance(recipe, Diffusion) or not isinstance(network, UNet) or recipe.autoencoder:
        raise ExchangeError(f"only diffusion models of pixels go into diffusers; {recipe.name} is none")
    try:
        return to_unet2d(network, recipe.size)
    except ExchangeError:
        options = {"network": recipe.network, "options": recipe.options, "sample_size": recipe.size}
        model: nn.Module = wrapper()(**options, in_channels=network.channels, out_channels=network.channels)
        model.get_submodule("inner").load_state_dict(network.state_dict())
        return model.eval()
    except ImportError as error:
        raise ExchangeError(f"diffusers is missing ({error}): pip install diffusers") from error


def scheduler(recipe: Diffusion, kind: str = "DDIMScheduler", **options: Any) -> Any:
    """A scheduler of diffusers with the recipe's schedule, prediction and spacing of times; no clipping.

    Args:
        kind: ``"DDPMScheduler"``, ``"DDIMScheduler"`` or ``"DPMSolverMultistepScheduler"``.
        options: of the scheduler, in the place of ours; ``clip_sample=True`` is our ``clip=1.0``.

    Raises:
        ExchangeError: another kind.
    """
    import diffusers

    kinds: dict[str, dict[str, Any]] = {
        "DDPMScheduler": {"clip_sample": False, "variance_type": "fixed_large"},
        "DDIMScheduler": {"clip_sample": False},
        "DPMSolverMultistepScheduler": {"final_sigmas_type": "zero"},
    }
    if kind not in kinds:
        raise ExchangeError(f"unknown scheduler {kind!r}; there are {', '.join(kinds)}")
    common = {"num_train_timesteps": recipe.T, "timestep_spacing": "trailing"}
    common |= {"prediction_type": PREDICTION[recipe.predicts]}
    return getattr(diffusers, kind)(**(common | SCHEDULES[recipe.schedule] | kinds[kind] | options))


def export_to_diffusers(network: nn.Module, recipe: Recipe, folder: Path) -> dict[str, object]:
    """Write ``unet/``, ``scheduler/`` and a README into a folder, as diffusers reads them: safetensors and JSON.

    Raises:
        ExchangeError: see :func:`to_diffusers`.
    """
    model: Any = to_diffusers(network, recipe)
    assert isinstance(recipe, Diffusion)
    kind = type(model).__name__
    model.save_pretrained(folder / "unet")
    scheduler(recipe).save_pretrained(folder / "scheduler")
    card = CARD.format(name=recipe.name, about=recipe.about, kind=kind, how=HOW[kind])
    write_atomically(folder / "README.md", card.encode())
    return {"name": recipe.name, "folder": str(folder), "network": kind, "scheduler": "DDIMScheduler"}
