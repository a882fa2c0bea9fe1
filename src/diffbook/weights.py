"""Tensors in files: safetensors with a JSON description in their metadata, written so that nothing is ever lost.

A file is either there in full or not at all, and carries a checksum of its content. Nothing is unpickled, and a file
may come from anywhere: what its recipe asks for is compared with what it holds before memory is spent on either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from diffbook.autoencoder import SpatialVAE
from diffbook.latent import CaptionUNet, LatentDiffusion, emoji_vocabulary
from diffbook.recipes import CaptionedDiffusion, Diffusion, Recipe, recipe_from_json

_Any = TypeVar("_Any")
_NO_FIT = "does not fit the network of its recipe in this version of diffbook"
_MOST_BESIDE = 2**24  # numbers that a network keeps and does not store, such as the codes of words


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
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        metadata = file.metadata() or {}
    about = _description(metadata, path)
    if _digest(tensors) != metadata.get("sha256"):
        raise WeightsError(f"{path} is damaged (wrong checksum); delete it")
    return tensors, about


def read_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """The tensors' shapes, and the description; as :func:`read_tensors`, but no tensor is read, and nothing checked.

    Raises:
        OSError: there is no such file.
        WeightsError: its head is damaged, or it was written by another program.
    """
    with _opened(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a dict
        return shapes, _description(file.metadata() or {}, path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged or no safetensors file ({error}); delete it") from error
    except RuntimeError as error:  # PyTorch could not map it, or had no memory for a tensor
        raise WeightsError(f"{path} holds more than this machine's memory, or cannot be mapped into it") from error


def _description(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    if "diffbook" not in metadata:
        raise WeightsError(f"{path} was not written by diffbook; move it elsewhere")
    try:
        about = json.loads(metadata["diffbook"])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is damaged (its description is no JSON); delete it") from error
    if not isinstance(about, dict):
        raise WeightsError(f"{path} is damaged (its description is no object of JSON); delete it")
    return about


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
    shapes, about = read_header(source)
    recipe = _with_autoencoder_beside(_recipe(about, source), source)
    _check_fit(recipe, _averaged(shapes), source)
    tensors = _averaged(read_tensors(source)[0])
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
    autoencoder = load_autoencoder(recipe, network.stem.weight.device)
    return LatentDiffusion(autoencoder, network, recipe.noise_schedule(), emoji_vocabulary(), recipe.predicts)


def load_autoencoder(recipe: Diffusion, device: torch.device | str = "cpu") -> SpatialVAE:
    """The autoencoder whose latents a recipe's model draws.

    Raises:
        ValueError: it is missing, damaged, or no autoencoder.
    """
    try:
        autoencoder, _ = load_model(recipe.autoencoder, device)
    except ValueError as error:
        raise ValueError(f"the autoencoder of {recipe.name}: {error}") from error
    if not isinstance(autoencoder, SpatialVAE):
        raise ValueError(f"{recipe.autoencoder} is no autoencoder with latents for {recipe.name}")
    return autoencoder


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


def fill(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a network's parameters, in the network's precision.

    Raises:
        WeightsError: names, shapes or kinds of numbers do not fit; or a value is infinite or no number.
    """
    own = network.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in tensors.items()}:
        raise WeightsError(f"{source} {_NO_FIT}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex():
            raise WeightsError(f"{source} holds {name} as {tensor.dtype}, the network as {own[name].dtype}")
        if not tensor.float().isfinite().all():
            raise WeightsError(f"{source} holds values in {name} that are infinite or no numbers; train or get it anew")
    network.load_state_dict(tensors)


def _averaged(found: dict[str, _Any]) -> dict[str, _Any]:
    """What belongs to the averaged network, of a checkpoint; everything, of another file."""
    averaged = {key.removeprefix("ema."): value for key, value in found.items() if key.startswith("ema.")}
    return averaged or found


def _recipe(about: dict[str, Any], source: Path) -> Recipe:
    if "recipe" not in about:
        raise WeightsError(f"{source} holds no model: its description has no recipe")
    try:
        return recipe_from_json(about["recipe"])
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error


def _check_fit(recipe: Recipe, shapes: dict[str, tuple[int, ...]], source: Path) -> None:
    """Compare a file with the network of its recipe, built without memory for its numbers (on PyTorch's meta device).

    Raises:
        WeightsError: they do not fit; or there is no such network; or it would keep more beside its weights than any.
    """
    try:
        with torch.device("meta"), _ShapesAlone(), _at_most(len(shapes)):
            network = recipe.build()
    except WeightsError as error:
        raise WeightsError(f"{source} {error}") from None
    except Exception as error:  # a stranger's numbers make a network fail in every way there is
        reason = (str(error).splitlines() or [""])[0]
        raise WeightsError(f"{source}: its recipe makes no network ({type(error).__name__}: {reason:.100})") from error
    stored = network.state_dict()
    beside = sum(buffer.numel() for name, buffer in network.named_buffers() if name not in stored)
    if {k: tuple(v.shape) for k, v in stored.items()} != shapes or beside > _MOST_BESIDE:
        raise WeightsError(f"{source} {_NO_FIT}")


class _ShapesAlone(TorchFunctionMode):
    """Leaves out first weights, drawn and scaled: on the meta device they are no numbers.

    It could compute their shapes too, but PyTorch loads its compiler for that, which takes two seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, Tensor.mul, Tensor.__rmul__):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return torch.empty(*args, device="meta") if func is torch.randn else func(*args, **kwargs)


@contextlib.contextmanager
def _at_most(number: int) -> Iterator[None]:
    """Let this thread build a network of so many parameters, and stop it at the next.

    Without it a recipe of a billion layers would take a week and all memory, though its numbers take none.
    """
    seen, thread = 0, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal seen
        seen += threading.get_ident() == thread
        if seen > number:
            raise WeightsError(_NO_FIT)

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


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


def is_shipped(source: Path) -> bool:
    """Whether a file of weights is one that comes with the package."""
    with _shipped() as folder:
        return source.parent == folder


def exported(folder: Path) -> list[Path]:
    """The model that ``diffbook export`` wrote into a folder, if there is exactly one; else nothing.

    A model that another one there names as its autoencoder does not count.
    """
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.name != "best.safetensors"]
    if len(found) > 1:
        inner = {_autoencoder_named(path) for path in found}
        found = [path for path in found if path.stem not in inner]
    return found if len(found) == 1 else []


def _autoencoder_named(path: Path) -> str:
    try:
        recipe = _recipe(read_header(path)[1], path)
    except WeightsError:
        return ""  # whoever loads it will be told
    return recipe.autoencoder if isinstance(recipe, Diffusion) else ""


def _with_autoencoder_beside(recipe: Recipe, source: Path) -> Recipe:
    """The recipe, its autoencoder the file of that name beside the model's, if there is one; ``export`` wrote it.

    What comes with the package stays a name.
    """
    if isinstance(recipe, Diffusion) and re.fullmatch(r"[\w.-]+", recipe.autoencoder) and not is_shipped(source):
        beside = source.with_name(f"{recipe.autoencoder}.safetensors")
        if beside.is_file():
            return replace(recipe, autoencoder=str(beside))
    return recipe


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
        raise ValueError("models from the Hub need huggingface_hub: pip install huggingface_hub") from error
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
