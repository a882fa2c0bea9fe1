"""The command ``diffbook``."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import diffbook
from diffbook import exchange
from diffbook.autoencoder import VAE, SpatialVAE
from diffbook.classifier import CaptionMatcher, Classifier
from diffbook.composition import compare, distractors, rank, share
from diffbook.data import (
    IMAGE_SETS,
    TOY_SETS,
    ImageSet,
    cache_folder,
    emoji64,
    emoji_rows,
    folder_size,
    image_set,
)
from diffbook.evaluation import (
    SAMPLERS,
    accuracy,
    bound_in_bits,
    bound_sums,
    decode_images,
    draw_images,
    frechet_distance,
    frechet_jackknife,
    geometric_parts,
    image_features,
    importance_in_bits,
    importance_sums,
    nearest_neighbours,
    precision_recall,
    psnr,
    shuffled,
)
from diffbook.latent import LatentDiffusion, emoji_vocabulary, from_latents, to_latents
from diffbook.planning import plan
from diffbook.processes import Processes, find_processes
from diffbook.recipes import (
    RECIPES,
    CaptionedDiffusion,
    Diffusion,
    Recipe,
    Unconditional,
    WithoutLabels,
    find_recipe,
    with_data,
)
from diffbook.runs import best_of, read_log
from diffbook.training import Step, train
from diffbook.weights import (
    checkpoints,
    is_shipped,
    latent_diffusion,
    load_autoencoder,
    load_model,
    read_tensors,
    source_of,
    write_atomically,
    write_tensors,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Stopped(Exception):
    """A signal has stopped a training run; what was done is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it succeeded; 1 after an error, which is told in one line; 2 for arguments that argparse refuses; 128 and
        the number of the signal that stopped it.
    """
    options = _parser().parse_args(arguments)
    try:
        result = options.command(options)
    except (ValueError, OSError) as error:
        print(f"diffbook: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"diffbook: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("diffbook: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    if not result:  # of several processes only the first has something to say
        return 0
    if options.json:
        print(json.dumps(result))
    else:
        width = max(map(len, result))
        for key, value in result.items():
            print(f"{key:{width}}  {value}")
    return 0


def data(options: argparse.Namespace) -> dict[str, object]:
    """Fetch a data set if need be, check it, and describe it."""
    device = _device(options.device)
    if options.name in IMAGE_SETS or folder_size(options.name):
        images = image_set(options.name, options.split).to(device)
        x = images.x()
        counts = dict(zip(images.classes, images.labels.bincount().tolist(), strict=True))
        result: dict[str, object] = {"name": options.name, "shape": list(x.shape), "classes": counts}
    elif options.name in TOY_SETS:
        generator = torch.Generator().manual_seed(options.seed)
        x = TOY_SETS[options.name](10_000, generator=generator).to(device)
        result = {"name": options.name, "shape": list(x.shape)}
    else:
        raise ValueError(f"unknown data set {options.name!r}; there are {', '.join([*IMAGE_SETS, *TOY_SETS])}")
    return result | {
        "min": round(x.min().item(), 4),
        "max": round(x.max().item(), 4),
        "mean": round(x.mean().item(), 4),
        "variance": round(x.var(correction=0).item(), 4),
    }


def recipes(options: argparse.Namespace) -> dict[str, object]:
    """List the recipes, or describe one."""
    if options.name is None:
        return {name: recipe.about for name, recipe in RECIPES.items()}
    recipe = find_recipe(options.name)
    parameters = sum(parameter.numel() for parameter in recipe.build().parameters())
    return recipe.to_json() | {"parameters": parameters}


def train_model(options: argparse.Namespace) -> dict[str, object]:
    """Train by a recipe, or go on with a run; show progress, and draw samples as it goes."""
    recipe = _recipe_to_train(options)
    folder = options.folder or cache_folder() / "runs" / recipe.name
    processes = find_processes(_device(options.device))
    if options.dry_run:
        return plan(recipe, processes) if processes.index == 0 else {}
    with _signals(processes) as received:
        steps = train(recipe, folder, save_every=options.save_every, keep=options.keep, processes=processes)
        with contextlib.closing(steps):  # closing saves
            last = _follow(steps, recipe, folder, options) if processes.index == 0 else _leave_with_the_others(steps)
    if last and last.stop:
        message = f"stopped and saved after {last.images} images; the same command goes on from there"
        raise Stopped(message, received[0] if received else signal.SIGTERM)
    if processes.index > 0:
        return {}
    result = {"name": recipe.name, "folder": str(folder)} | read_log(folder / "log.jsonl")[-1]
    if best := best_of(folder):
        result |= {"best": best[0], "held_out_loss": round(best[1], 6)}
    return result


def _recipe_to_train(options: argparse.Namespace) -> Recipe:
    """The recipe of that name, with what the command's options change in it."""
    recipe = replace(find_recipe(options.name), seed=options.seed)
    for name in ("images", "parts", "keep", "samples_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.images is not None:
        recipe = replace(recipe, images=options.images)
    if options.parts is not None:
        recipe = replace(recipe, parts=options.parts)
    if options.data is not None:
        recipe = with_data(recipe, options.data)
    if options.autoencoder is not None:
        if not isinstance(recipe, Diffusion) or not recipe.autoencoder:
            raise ValueError(f"--autoencoder: {recipe.name} works on pixels")
        path = Path(options.autoencoder)  # in full, so that the run can be used from anywhere
        recipe = replace(recipe, autoencoder=str(path.absolute()) if path.exists() else options.autoencoder)
    return recipe


@contextlib.contextmanager
def _signals(processes: Processes) -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM ask the run to stop after its next step, and are put into the list."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        processes.stop_asked = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(steps: Iterable[Step], recipe: Recipe, folder: Path, options: argparse.Namespace) -> Step | None:
    """Show progress and draw samples until the run ends or is stopped; the last step, or None if there was none."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    done = max((int(path.stem.removeprefix("checkpoint-")) for path in checkpoints(folder)), default=0)
    writer = _tensorboard(folder, done) if options.tensorboard else None
    bar = tqdm(
        total=recipe.images,
        initial=done,  # what was done in earlier sittings is no speed of this one
        unit=" images",
        unit_scale=True,
        mininterval=1 if sys.stderr.isatty() else 30,
    )
    step = None
    with bar, writer or contextlib.nullcontext():
        for step in steps:
            bar.update(min(step.images, recipe.images) - bar.n)
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)
            if writer:
                _write_scalars(writer, step)
            crossed = step.images // options.samples_every > (step.images - recipe.batch) // options.samples_every
            path = folder / f"samples-{step.images:012d}.png"
            if (crossed or step.images >= recipe.images) and _save_samples(step.averaged, recipe, path) and writer:
                writer.add_image("samples", _read_png(path), step.images)
            if step.stop:
                break
    return step


def _leave_with_the_others(steps: Iterable[Step]) -> Step | None:
    """As :func:`_follow`, for the processes that write nothing."""
    step = None
    for step in steps:
        if step.stop:
            break
    return step


def _tensorboard(folder: Path, images: int) -> SummaryWriter:
    """A writer of curves for TensorBoard; what was written after the checkpoint is replaced."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=images)


def _write_scalars(writer: SummaryWriter, step: Step) -> None:
    """The numbers of a step, over the images seen."""
    values = {"loss": step.loss, "learning_rate": step.lr, "gradient_norm": step.gradient_norm}
    if step.held_out is not None:
        values["held_out_loss"] = step.held_out
    for name, value in values.items():
        writer.add_scalar(name, value, step.images)


def _read_png(path: Path) -> Tensor:
    """A picture as uint8, shape ``(C, H, W)``."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def sample(options: argparse.Namespace) -> dict[str, object]:
    """Draw images and write them as one PNG."""
    network, recipe = load_model(options.name, _device(options.device))
    _check_counts(options)
    if isinstance(network, VAE):
        return _sample_vae(network, recipe, options)
    if isinstance(recipe, CaptionedDiffusion):
        return _sample_captions(options)
    network, recipe = _diffusion(options)
    K = recipe.options.get("classes", 0)
    if options.label is not None and not 0 <= options.label <= K:
        raise ValueError(f"--label must lie in 0…{K} ({K} for no class), got {options.label}")
    y = _in_turn(recipe, options.number)
    x = _draw(network, recipe, y if options.label is None else torch.full_like(y, options.label), options)
    path = options.to or Path(f"{recipe.name}.png")
    save_grid(x, path, min(K or 10, options.number))
    drawn = {"name": recipe.name, "images": len(x), "file": str(path), "sampler": SAMPLERS[options.sampler][0]}
    return drawn | {"steps": options.steps, "guidance": options.guidance, "seed": options.seed}


def _sample_vae(vae: VAE, recipe: Recipe, options: argparse.Namespace) -> dict[str, object]:
    """As :func:`sample`, for a VAE, which has neither classes nor steps."""
    if options.label is not None:
        raise ValueError(f"--label: {options.name} is a VAE without classes; leave it out")
    path = options.to or Path(f"{recipe.name}.png")
    save_grid(torch.cat(list(decode_images(vae, options.number, options.seed))), path, min(10, options.number))
    return {"name": recipe.name, "images": options.number, "file": str(path), "seed": options.seed}


def _sample_captions(options: argparse.Namespace) -> dict[str, object]:
    """As :func:`sample`, for a model of captions: all captions in turn."""
    if options.label is not None:
        raise ValueError(f"--label: {options.name} has captions in the place of classes; use --caption")
    model = latent_diffusion(*load_model(options.name, _device(options.device)))
    captions = options.caption or [""]
    x = model.sample(
        [captions[i % len(captions)] for i in range(options.number)], options.steps, options.guidance, options.seed
    )
    path = options.to or Path(f"{Path(options.name).name}.png")
    save_grid(x, path, min(max(len(captions), 8), options.number))
    drawn = {"name": options.name, "images": len(x), "file": str(path), "captions": captions}
    return drawn | {"steps": options.steps, "guidance": options.guidance, "seed": options.seed}


def evaluate(options: argparse.Namespace) -> dict[str, object]:
    """Measure a classifier's accuracy, or a generative model's Fréchet distance to the test set or its bits per dim."""
    network, recipe = load_model(options.name, _device(options.device))
    _check_counts(options)
    if isinstance(recipe, CaptionedDiffusion):
        return {"name": options.name} | _evaluate_captions(latent_diffusion(network, recipe), options)
    if isinstance(network, CaptionMatcher):
        return {"name": options.name} | _evaluate_matcher(network)
    test = image_set(recipe.data, "test")
    if isinstance(network, SpatialVAE):
        return {"name": options.name} | _evaluate_autoencoder(network, test)
    if options.metric == "composition":
        raise ValueError(f"--metric {options.metric}: {options.name} knows no captions")
    if isinstance(network, Classifier):
        result: dict[str, object] = {"accuracy": round(accuracy(network, test), 4), "images": len(test)}
    elif options.metric == "bits":
        result = _bits_per_dim(network, recipe, test, options)
    elif options.metric == "neighbours":
        result = _neighbours(network, recipe, test, options)
    else:
        result = _frechet(network, recipe, test, options)
    return {"name": options.name} | result


def _evaluate_matcher(matcher: CaptionMatcher) -> dict[str, object]:
    """How often a picture of the test is nearest to its own caption, of a hundred of which some are hard."""
    train, test = emoji64("train"), emoji64("test")
    rows, captions = train.rows + test.rows, train.captions + test.captions
    features, y = image_features(matcher, test.x()), emoji_vocabulary().encode(captions)
    codes = matcher.cpu().code(y)
    ranks = [rank(features[i], codes[len(train) + i], codes[distractors(row, rows)]) for i, row in enumerate(test.rows)]
    return {"captions": len(test), "distractors": 99} | {f"top_{k}": share(ranks, k) for k in (1, 5)}


@torch.no_grad()
def _evaluate_autoencoder(autoencoder: SpatialVAE, test: ImageSet) -> dict[str, object]:
    """PSNR of the reconstructed test images, and the size of their scaled latents."""
    device, parts = next(autoencoder.parameters()).device, torch.arange(len(test)).split(250)
    z = torch.cat([to_latents(autoencoder, test.x(part).to(device)) for part in parts])
    decibels = torch.cat([psnr(from_latents(autoencoder, z[part]).cpu(), test.x(part)) for part in parts])
    return {
        "metric": "psnr",
        "psnr": round(decibels.mean().item(), 3),
        "psnr_worst": round(decibels.min().item(), 3),
        "std_of_scaled_latents": round(z.std().item(), 4),
        "images": len(test),
    }


def _evaluate_captions(model: LatentDiffusion, options: argparse.Namespace) -> dict[str, object]:
    """Measure what a model of captions draws; the features are those of emoji-matcher.

    Metrics: Fréchet distance to all training images, with captions of the training set; how near its pictures are to
    training images; or composition, for the captions of the test.
    """
    if options.metric == "bits":
        raise ValueError("--metric bits: not for a model of captions; there are frechet, neighbours and composition")
    matcher, _ = load_model("emoji-matcher")
    assert isinstance(matcher, CaptionMatcher)
    train, test, n = emoji64("train"), emoji64("test"), options.number
    split = test if options.metric == "composition" or options.captions == "test" else train
    if options.metric == "composition":
        n = len(test)
    index = torch.arange(n) * len(split) // n
    captions = [split.captions[i] for i in index.tolist()]
    x = model.sample(captions, options.steps, options.guidance, options.seed).cpu()
    features, reference = image_features(matcher, x), image_features(matcher, train.x())
    about: dict[str, object] = {"metric": options.metric, "images": n, "captions": split.rows[0].split}
    about |= {"steps": options.steps, "guidance": options.guidance, "seed": options.seed}
    if options.metric == "composition":
        everything = torch.cat([reference, image_features(matcher, test.x())])
        return about | {"distractors": 99, "results": compare(features, everything, train.rows + test.rows)}
    if options.metric == "neighbours":
        return about | _neighbours_of(x, train, test)
    distance = frechet_jackknife(shuffled(features), shuffled(reference))  # emoji lie sorted by kind
    real = image_features(matcher, split.x(index))
    precision, recall = precision_recall(real, features)
    says = matcher.code(emoji_vocabulary().encode(captions)) / features.shape[1]
    return about | {
        "frechet_distance": round(distance.value, 3),
        "standard_error": round(distance.standard_error, 3),
        "bias": round(distance.bias, 3),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "caption_similarity": round((features * says).sum(1).mean().item(), 4),
        "caption_similarity_of_real": round((real * says).sum(1).mean().item(), 4),
    }


def _frechet(
    network: torch.nn.Module, recipe: Recipe, test: ImageSet, options: argparse.Namespace
) -> dict[str, object]:
    """Fréchet distance, precision and recall of what a diffusion model or a VAE draws."""
    classifier, _ = load_model(options.classifier, _device(options.device))
    if not isinstance(classifier, Classifier):
        raise ValueError(f"{options.classifier} is no classifier")
    x, how = _drawn(network, options)
    features, reference = image_features(classifier, x), image_features(classifier, test.x())
    distance = frechet_jackknife(features, reference)
    precision, recall = precision_recall(reference, features)
    real = image_set(recipe.data).x(slice(options.number))
    return {
        "frechet_distance": round(distance.value, 4),
        "standard_error": round(distance.standard_error, 4),
        "bias": round(distance.bias, 4),
        "by_number": _by_number(features, reference),
        "real": round(frechet_distance(image_features(classifier, real), reference), 4),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "classifier": options.classifier,
        "images": options.number,
        "reference": f"{recipe.data}, test, {len(test)} images",
        "seed": options.seed,
    } | how


def _neighbours(
    network: torch.nn.Module, recipe: Recipe, test: ImageSet, options: argparse.Namespace
) -> dict[str, object]:
    """How near to the training set a model's images are, and how near the test images are, which nobody copied."""
    train = image_set(recipe.data)
    x, how = _drawn(network, options)
    about: dict[str, object] = {"metric": "neighbours", "images": options.number, "seed": options.seed}
    return about | {"reference": f"{recipe.data}, train, {len(train)} images"} | _neighbours_of(x, train, test) | how


def _neighbours_of(x: Tensor, train: ImageSet, test: ImageSet) -> dict[str, object]:
    drawn, usual = (nearest_neighbours(images, train.x())[0][:, 0] for images in (x.cpu(), test.x()))
    threshold = usual.quantile(0.01)
    return {
        "median_distance": round(drawn.median().item(), 4),
        "median_distance_of_test_images": round(usual.median().item(), 4),
        "smallest_distance": round(drawn.min().item(), 4),
        "nearer_than_99_percent_of_test_images": round((drawn < threshold).double().mean().item(), 4),
    }


def _drawn(network: torch.nn.Module, options: argparse.Namespace) -> tuple[Tensor, dict[str, object]]:
    """Images of a diffusion model or a VAE as the options ask for them, and how they were drawn."""
    if isinstance(network, VAE):
        x = torch.cat(list(decode_images(network, options.number, options.seed)))
        return x, {"classes": "none", "sampler": "decoder mean", "steps": 1}
    network, recipe = _diffusion(options)
    y = _in_turn(recipe, options.number)
    y = torch.full_like(y, recipe.options.get("classes", 0)) if options.null else y
    how = {"classes": "null" if options.null else "given", "sampler": SAMPLERS[options.sampler][0]}
    return _draw(network, recipe, y, options), how | {"steps": options.steps, "guidance": options.guidance}


def _bits_per_dim(
    network: torch.nn.Module, recipe: Recipe, test: ImageSet, options: argparse.Namespace
) -> dict[str, object]:
    """Bits per dimension by the variational bound of a diffusion model, or the importance-weighted bound of a VAE."""
    x, y, seed = test.x(slice(options.number)), test.labels[: options.number], options.seed
    about: dict[str, object] = {"images": len(x), "reference": f"{recipe.data}, test, {len(test)} images", "seed": seed}
    if isinstance(network, VAE):
        K, vae = options.importance, network
        about |= {"classes": "none", "importance_samples": K}
        sums = _kept_sums(lambda skip: importance_sums(vae, x, K, seed, skip), about, options)
        bits = importance_in_bits(sums, x[0].numel())
    else:
        denoiser, diffusion = _diffusion(options)
        denoiser = WithoutLabels(denoiser) if isinstance(diffusion, Unconditional) else denoiser
        parts, variance = geometric_parts(diffusion.T, options.times), options.variance
        about |= {"times_per_image": len(parts), "classes": "null" if options.null else "given", "variance": variance}
        if options.null:
            y = torch.full_like(y, diffusion.options.get("classes", 0))
        sums = _kept_sums(
            lambda skip: bound_sums(denoiser, diffusion, x, y, variance, parts, seed, skip), about, options
        )
        bits = bound_in_bits(sums, x[0].numel())
    return {name: float(f"{value:.4g}") for name, value in bits.items()} | about


def _kept_sums(
    rows: Callable[[int], Iterator[list[float]]], about: dict[str, object], options: argparse.Namespace
) -> list[list[float]]:
    """The rows, with a progress bar. What is done is kept in the cache, and not done again."""
    from tqdm import tqdm

    weights = hashlib.sha256(source_of(options.name).read_bytes()).hexdigest()
    key = json.dumps([weights, options.device, torch.__version__, about], sort_keys=True)
    path = cache_folder() / "bounds" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        sums: list[list[float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        done = sum(int(row[0]) for row in sums)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it") from error
    disable = None if not options.json else True
    with tqdm(total=about["images"], initial=done, unit=" images", disable=disable) as bar:
        for row in rows(len(sums)):
            sums.append(row)
            write_atomically(path, json.dumps(sums).encode())
            bar.update(int(row[0]))
    return sums


def _by_number(features: Tensor, reference: Tensor) -> list[list[float]]:
    """Fréchet distances from fewer samples: their number, and the mean over as many disjoint sets as there are."""
    numbers = [n for n in (500, 1000, 2000, 5000) if n <= len(features)]
    parts = {n: [part for part in features.split(n) if len(part) == n] for n in numbers}
    return [[n, round(sum(frechet_distance(p, reference) for p in parts[n]) / len(parts[n]), 4)] for n in numbers]


def export(options: argparse.Namespace) -> dict[str, object]:
    """Write a run's averaged weights in half precision, with a model card beside them; or for diffusers."""
    source = source_of(options.name)
    network, recipe = load_model(source)
    if options.diffusers:
        return exchange.export_to_diffusers(network, recipe, options.to)
    _, about = read_tensors(source)
    options.to.mkdir(parents=True, exist_ok=True)
    if isinstance(recipe, Diffusion) and recipe.autoencoder:
        recipe = replace(recipe, autoencoder=_export_autoencoder(recipe, options.to))
    recipe = _without_place(recipe)
    about["recipe"] = recipe.to_json()
    log = source.parent / "log.jsonl"
    curve = [[line["images"], line["loss"]] for line in read_log(log)] if log.exists() else []
    thin = max(len(curve) // 100, 1)
    known = ("recipe", "images", "seconds", "cpu_seconds", "device", "torch")
    card: dict[str, object] = {key: about[key] for key in known if key in about}
    card |= {"parameters": sum(p.numel() for p in network.parameters()), "precision": "float16", "licence": "MIT"}
    card |= {"curve": {"columns": ["images", "loss"], "rows": curve[::-thin][::-1]}}
    if options.quality:
        card["quality"] = [json.loads(path.read_text(encoding="utf-8")) for path in options.quality]
    path = _write_half(network, recipe, options.to)
    write_atomically(path.with_suffix(".json"), (json.dumps(card, indent=1, sort_keys=True) + "\n").encode())
    return {"name": recipe.name, "file": str(path), "bytes": path.stat().st_size}


def _export_autoencoder(recipe: Diffusion, folder: Path) -> str:
    """Its name; unless everybody has a model of that name, its weights are written into the folder beside the model's.

    Raises:
        ValueError: it is missing, or the folder holds another model of that name.
    """
    if recipe.autoencoder.startswith("hf:"):
        return recipe.autoencoder
    try:
        source = source_of(recipe.autoencoder)
    except ValueError as error:
        raise ValueError(f"the autoencoder of {recipe.name}: {error}") from error
    if is_shipped(source):
        return recipe.autoencoder
    autoencoder, inner = load_model(source)
    inner = _without_place(inner)
    there = folder / f"{inner.name}.safetensors"
    if there.exists():
        stored, new = read_tensors(there)[0], autoencoder.state_dict()
        if stored.keys() != new.keys() or not all(torch.equal(stored[k], new[k].half()) for k in new):
            raise ValueError(f"{there} is not the autoencoder of {recipe.name}; choose another folder, or delete it")
        return inner.name
    _write_half(autoencoder, inner, folder)
    return inner.name


def _without_place(recipe: Recipe) -> Recipe:
    """The recipe without the folder of its images: where somebody's images lie is nobody's business."""
    size = folder_size(recipe.data)
    return replace(recipe, data=f"folder:{size}:{Path(recipe.data.split(':', 2)[2]).name}") if size else recipe


def _write_half(network: torch.nn.Module, recipe: Recipe, folder: Path) -> Path:
    """Write weights in half precision, and return where."""
    path = folder / f"{recipe.name}.safetensors"
    write_tensors(path, {k: v.half() for k, v in network.state_dict().items()}, {"recipe": recipe.to_json()})
    return path


def bench(options: argparse.Namespace) -> dict[str, object]:
    """Measure speed against other libraries, or what each of our tricks brings."""
    from diffbook import bench

    device = _device(options.device)
    for name in ("rounds", "batch"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    try:
        if options.tricks:
            result: dict[str, object] = {"tricks": bench.tricks(device, options.rounds, options.batch)}
        else:
            bfloat16 = options.precision == "bf16"
            result = dict(bench.compare(device, options.rounds, options.batch, bfloat16, options.compile))
            if "diffusers" not in bench.present()[1]:
                result["overhead"] = bench.overhead(device, options.rounds)
    except RuntimeError as error:  # for example torch.compile without a compiler, or too large a batch
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"this machine cannot do that ({reason}); try another --device, --batch or no --compile"
        ) from error
    if options.json:
        return result
    print(bench.table(result))
    return {}


def _save_samples(network: torch.nn.Module, recipe: Recipe, path: Path) -> bool:
    """Eighty images of a model that can draw, as one PNG; nothing for the others. Whether there is one."""
    if isinstance(recipe, CaptionedDiffusion):
        rows, model = emoji_rows("test"), latent_diffusion(network, recipe)
        save_grid(model.sample([rows[i * len(rows) // 80].caption for i in range(80)]), path, 10)
    elif isinstance(recipe, Diffusion):
        y, autoencoder = _in_turn(recipe, 80), _autoencoder(recipe, next(network.parameters()).device)
        save_grid(torch.cat(list(draw_images(network, recipe, y, autoencoder=autoencoder))), path, 10)
    elif isinstance(network, VAE):
        save_grid(torch.cat(list(decode_images(network, 80))), path, 10)
    return path.exists()


def save_grid(x: Tensor, path: Path, columns: int) -> None:
    """Images in [-1, 1], shape ``(N, C, H, W)``, as one PNG."""
    from torchvision.utils import save_image

    save_image((x.float().cpu().clamp(-1, 1) + 1) / 2, path, nrow=columns, padding=1)


def _draw(network: torch.nn.Module, recipe: Diffusion, y: Tensor, options: argparse.Namespace) -> Tensor:
    """Images of the classes ``y``, on the CPU, with a progress bar."""
    from tqdm import tqdm

    parts, how = [], (options.steps, options.guidance, options.seed, options.sampler)
    autoencoder = _autoencoder(recipe, next(network.parameters()).device)
    with tqdm(total=len(y), unit=" images", disable=None if not options.json else True) as bar:
        for x in draw_images(network, recipe, y, *how, autoencoder=autoencoder):
            parts.append(x.cpu())
            bar.update(len(x))
    return torch.cat(parts)


def _in_turn(recipe: Diffusion, number: int) -> Tensor:
    """All classes in turn; zeros for a model without classes."""
    return torch.arange(number) % recipe.options.get("classes", 1)


def _autoencoder(recipe: Diffusion, device: torch.device) -> SpatialVAE | None:
    if not recipe.autoencoder:
        return None
    return load_autoencoder(recipe, device)


def _diffusion(options: argparse.Namespace) -> tuple[torch.nn.Module, Diffusion]:
    network, recipe = load_model(options.name, _device(options.device))
    if not isinstance(recipe, Diffusion) or isinstance(recipe, CaptionedDiffusion):
        raise ValueError(
            f"{options.name} is no diffusion model of images with classes: it was trained by the recipe {recipe.name!r}"
        )
    return network, recipe


def _check_counts(options: argparse.Namespace) -> None:
    for name in ("number", "steps", "times", "importance"):
        if getattr(options, name, 1) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # CUDA raises either, depending on how torch was built
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); try --device cpu") from error
    return device


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    common.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    common.add_argument("--json", action="store_true", help="print one JSON object, for programs")

    parser = argparse.ArgumentParser(prog="diffbook", description="The code behind the book, as commands.")
    parser.add_argument("--version", action="version", version=f"diffbook {diffbook.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = commands.add_parser("data", parents=[common], help="fetch, check and describe a data set")
    p.add_argument("name", metavar="NAME", help=f"one of {', '.join([*IMAGE_SETS, *TOY_SETS])}")
    p.add_argument("--split", default="train", help="train or test (default: train)")
    p.set_defaults(command=data)

    p = commands.add_parser("recipes", parents=[common], help="list what can be trained, or describe one recipe")
    p.add_argument("name", metavar="NAME", nargs="?", help="the recipe to describe, with its number of parameters")
    p.set_defaults(command=recipes)

    p = commands.add_parser("train", parents=[common], help="train by a recipe; repeated, it goes on where it stopped")
    p.add_argument("name", metavar="NAME", help=f"one of {', '.join(RECIPES)}")
    p.add_argument("--folder", type=Path, help="where checkpoints, log and samples go (default: in the cache)")
    p.add_argument("--images", type=int, help="train on so many images instead of the recipe's number")
    p.add_argument("--data", help="other data than the recipe's: a name, or folder:SIZE:PATH for your own images")
    p.add_argument("--autoencoder", help="for diffusion on latents: a model, a file, or the folder of a run")
    p.add_argument("--save-every", type=float, default=60.0, help="seconds between checkpoints (default: 60)")
    p.add_argument("--keep", type=int, default=3, help="how many checkpoints to keep, beside the best (default: 3)")
    p.add_argument("--parts", type=int, help="compute a batch in so many parts, to save memory (default: the recipe's)")
    p.add_argument(
        "--samples-every", type=int, default=50_000, help="images between two grids of samples (default: 50000)"
    )
    p.add_argument("--tensorboard", action="store_true", help="write curves and samples for TensorBoard as well")
    p.add_argument("--dry-run", action="store_true", help="train nothing; say what it would cost")
    p.set_defaults(command=train_model)

    model = "a model that comes with the package, a file, the folder of a run or an export, or hf:OWNER/NAME"
    drawing = argparse.ArgumentParser(add_help=False)
    drawing.add_argument("name", metavar="NAME", help=model)
    drawing.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="default: ddim")
    drawing.add_argument("--steps", type=int, default=20, help="steps of the sampler (default: 20)")
    drawing.add_argument("--guidance", type=float, default=1.0, help="weight w; 1 is plain conditional (default: 1)")

    p = commands.add_parser("sample", parents=[common, drawing], help="draw images")
    p.add_argument("--number", type=int, default=80, help="how many images (default: 80)")
    p.add_argument("--label", type=int, help="a class for all of them (default: all classes in turn)")
    p.add_argument("--caption", action="append", help="words, for a model of captions; may be given several times")
    p.add_argument("--to", type=Path, help="the PNG to write (default: NAME.png)")
    p.set_defaults(command=sample)

    p = commands.add_parser("evaluate", parents=[common, drawing], help="measure how good a model is")
    p.add_argument(
        "--metric",
        choices=("frechet", "bits", "neighbours", "composition"),
        default="frechet",
        help="Fréchet distance, bits per dimension by a bound, distance to training images, or, for a model of "
        "captions, whether it draws combinations it has not seen (default: frechet)",
    )
    p.add_argument("--number", type=int, default=10_000, help="how many images to draw, or to measure (default: 10000)")
    p.add_argument(
        "--times", type=int, default=20, help="bits of a diffusion model: times drawn an image (default: 20)"
    )
    p.add_argument("--variance", choices=("beta", "beta_tilde"), default="beta", help="bits: of the model's steps")
    p.add_argument("--null", action="store_true", help="of the model without classes")
    p.add_argument("--importance", type=int, default=100, help="bits of a VAE: samples of z an image (default: 100)")
    p.add_argument("--classifier", default="fashion-classifier", help="whose features are compared")
    p.add_argument("--captions", choices=("train", "test"), default="train", help="for a model of captions: whose")
    p.set_defaults(command=evaluate)

    p = commands.add_parser("export", parents=[common], help="write a run's weights in float16, with a model card")
    p.add_argument("name", metavar="NAME", help=model)
    p.add_argument("--to", type=Path, required=True, help="the folder to write to")
    p.add_argument("--diffusers", action="store_true", help="write it for 🤗 diffusers instead, in float32")
    p.add_argument("--quality", type=Path, nargs="*", help="results of evaluate --json to put into the card")
    p.set_defaults(command=export)

    p = commands.add_parser("bench", parents=[common], help="measure speed against other libraries, in turn")
    p.add_argument("--rounds", type=int, default=9, help="rounds in which all have their turn (default: 9)")
    p.add_argument("--batch", type=int, default=64, help="images a step (default: 64)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast (default: fp32)")
    p.add_argument("--compile", action="store_true", help="networks by torch.compile")
    p.add_argument("--tricks", action="store_true", help="measure instead what each of our own tricks brings")
    p.set_defaults(command=bench)
    return parser


if __name__ == "__main__":
    sys.exit(main())
