"""Tensors in files: safetensors with a JSON description in their metadata, written so that nothing is ever lost.

A file is either there in full or not at all, and carries a checksum of its content. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffbook.autoencoder import SpatialVAE
from diffbook.latent import CaptionUNet, LatentDiffusion, emoji_vocabulary
from diffbook.recipes import CaptionedDiffusion, Recipe, recipe_from_json


class WeightsError(ValueError):
    """A file of weights is damaged or foreign; the message says what to do."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment, power cuts included, the old or the new content is there in full.

    Raises:
        OSError: it could not be written, for example on a full disk. What was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = f"could not write ({error.strerror}); what was there before is intact"
        raise OSError(error.errno, reason, str(path)) from error
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors with a description, atomically.

    Raises:
        OSError: see :func:`write_atomically`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"diffbook": json.dumps(about), "sha256": _digest(tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that :func:`write_tensors` wrote.

    Raises:
        OSError: there is no such file.
        WeightsError: it is damaged, or was written by another program.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or no safetensors file ({error}); delete it") from error
    if "diffbook" not in metadata:
        raise WeightsError(f"{path} was not written by diffbook; move it elsewhere")
    if _digest(tensors) != metadata.get("sha256"):
        raise WeightsError(f"{path} is damaged (wrong checksum); delete it")
    return tensors, json.loads(metadata["diffbook"])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob(f"checkpoint-{12 * '[0-9]'}.safetensors"))


def load_model(name: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, Recipe]:
    """A trained network in evaluation mode, float32, and its recipe.

    Args:
        name: a model that comes with the package, for example ``"fashion-cpu"``; or a file that ``diffbook export``
            wrote, or its folder; or a checkpoint, or the folder of a run, of which the averaged weights are taken; or a
            model on the Hugging Face Hub, see :func:`from_hub`.

    Raises:
        ValueError: there is nothing of that name; or the file is damaged or foreign (:class:`WeightsError`).
    """
    source = source_of(name)
    tensors, about = read_tensors(source)
    if any(key.startswith("ema.") for key in tensors):
        tensors = {key.removeprefix("ema."): value for key, value in tensors.items() if key.startswith("ema.")}
    recipe = _recipe_of(about, source)
    check_fits(recipe, tensors, str(name))
    network = recipe.build()
    fill(network, tensors, str(name))
    return network.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False), recipe


def latent_diffusion(network: nn.Module, recipe: Recipe) -> LatentDiffusion:
    """A network of latents and its recipe, as :func:`load_model` gives them, with their autoencoder and vocabulary.

    Raises:
        ValueError: it is another kind of model; or its autoencoder is missing, or no autoencoder.
    """
    if not isinstance(recipe, CaptionedDiffusion) or not isinstance(network, CaptionUNet):
        raise ValueError(f"the recipe {recipe.name!r} makes no latent diffusion model")
    autoencoder, _ = load_model(recipe.autoencoder, network.stem.weight.device)
    if not isinstance(autoencoder, SpatialVAE):
        raise ValueError(f"{recipe.autoencoder} is no autoencoder with latents for {recipe.name}")
    return LatentDiffusion(autoencoder, network, recipe.noise_schedule(), emoji_vocabulary(), recipe.predicts)


def model_card(name: str) -> dict[str, Any]:
    """What is known of a model of the package: recipe, images seen, seconds, device, curve, measured quality, licence.

    ``diffbook export`` writes it.

    Raises:
        ValueError: there is no such model.
    """
    card: dict[str, Any] = json.loads(source_of(name).with_suffix(".json").read_text(encoding="utf-8"))
    return card


def measured(name: str) -> dict[str, Any]:
    """Results of a comparison that come with the package; ``tools/compare_NAME.py`` wrote them.

    Raises:
        ValueError: there are none of that name.
    """
    with resources.as_file(resources.files("diffbook") / "assets" / "results") as folder:
        path = folder / f"{name}.json"
        if not path.is_file():
            raise ValueError(
                f"no results {name!r}; there are {', '.join(sorted(p.stem for p in folder.glob('*.json')))}"
            )
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def measured_pictures(name: str) -> Tensor:
    """The pictures that belong to :func:`measured`, one image in [-1, 1], shape ``(3, H, W)``.

    Raises:
        ValueError: there are none of that name.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    with resources.as_file(resources.files("diffbook") / "assets" / "results") as folder:
        path = folder / f"{name}.png"
        if not path.is_file():
            raise ValueError(
                f"no pictures {name!r}; there are {', '.join(sorted(p.stem for p in folder.glob('*.png')))}"
            )
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB")).float() / 127.5 - 1


def _recipe_of(about: dict[str, Any], source: Path) -> Recipe:
    """The recipe in the description of a file.

    Raises:
        WeightsError: there is none, or none of this version.
    """
    try:
        return recipe_from_json(about["recipe"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{source} holds no recipe of this version of diffbook ({error})") from error


def check_fits(recipe: Recipe, tensors: dict[str, Tensor], source: str) -> None:
    """Compare what a recipe would build with the tensors of a file, before anything is built.

    A file is somebody's claim: its recipe could ask for a network that does not fit into memory. On the device ``meta``
    a network has shapes, but no numbers, and its size is compared before its shapes.

    Raises:
        WeightsError: the recipe describes no network, or another one than that of the tensors.
    """
    stored = sum(tensor.numel() for tensor in tensors.values())
    try:
        with torch.device("meta"), _NothingDrawn(), _no_more_numbers_than(2 * stored + 2**20):
            own = recipe.build().state_dict()
    except (TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"the recipe in {source} describes no network that fits its tensors ({reason})") from error
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise WeightsError(f"{source} does not fit the network of its recipe in this version of diffbook")
    for key, tensor in tensors.items():
        if tensor.is_complex() or not (tensor.is_floating_point() or own[key].dtype == tensor.dtype):
            raise WeightsError(f"{key} in {source} is of type {tensor.dtype}, which is no type of weights")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(f"{key} in {source} holds numbers that are not finite; such weights are of no use")


class _NothingDrawn(TorchFunctionMode):
    """Leave out drawing and scaling random numbers: on the device ``meta`` that would first load a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"]
        if func in (torch.Tensor.mul, torch.Tensor.__rmul__):
            return args[0]
        return torch.empty(*args) if func is torch.randn else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _no_more_numbers_than(most: int) -> Iterator[None]:
    """Within it modules cannot register more parameters than that: a loop over a million layers would not end soon."""
    registered = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal registered
        registered += parameter.numel() if parameter is not None else 0
        if registered > most:
            raise ValueError("it would be larger than they are")

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def fill(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a network's parameters, in the network's precision.

    Raises:
        WeightsError: names or shapes do not fit.
    """
    own = network.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise WeightsError(f"{source} does not fit the network of its recipe in this version of diffbook")
    network.load_state_dict(tensors)


def source_of(name: str | Path) -> Path:
    """The file that :func:`load_model` would read; one from the Hugging Face Hub is fetched first.

    Raises:
        ValueError: there is none.
    """
    if str(name).startswith("hf:"):
        return from_hub(str(name))
    path = Path(name)
    if path.is_dir():
        found = checkpoints(path) or exported(path)
        if not found:
            raise ValueError(f"there is no checkpoint in {path}, nor one model that diffbook export wrote")
        return found[-1]
    if path.is_file():
        return path
    with _shipped() as folder:
        shipped = {file.stem: file for file in sorted(folder.glob("*.safetensors"))}
    if str(name) not in shipped:
        raise ValueError(f"{name} is no file or folder, and no model of the package: {', '.join(shipped) or 'none'}")
    return shipped[str(name)]


def exported(folder: Path) -> list[Path]:
    """The model that ``diffbook export`` wrote into a folder, if there is exactly one; else nothing."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.name != "best.safetensors"]
    return found if len(found) == 1 else []


def from_hub(name: str) -> Path:
    """Fetch a model from the Hugging Face Hub into its cache: a repository with what ``diffbook export`` wrote.

    Only ``.safetensors`` and ``.json`` files are fetched, nothing that could be executed, and nothing is told about the
    reader beyond the request itself.

    Args:
        name: ``hf:OWNER/NAME``, or ``hf:OWNER/NAME@REVISION``; only with a revision (a commit's hash) it is sure that
            the same name always means the same weights.

    Raises:
        ValueError: not such a name; huggingface_hub is missing; the repository cannot be reached, or is no such model.
    """
    repository, _, revision = name.removeprefix("hf:").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or name.endswith("@"):
        raise ValueError(f"a model on the Hub is named as hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got {name!r}")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise ValueError('models from the Hub need huggingface_hub: pip install "diffbook[hub]"') from error
    try:
        patterns = ["*.safetensors", "*.json"]
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name} could not be fetched ({reason}); look at the name, or at the network") from error
    found = exported(folder)
    if not found:
        raise ValueError(f"{name} holds not exactly one .safetensors file that diffbook export wrote")
    return found[0]


@contextlib.contextmanager
def _shipped() -> Iterator[Path]:
    with resources.as_file(resources.files("diffbook") / "assets" / "weights") as folder:
        yield folder


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
