"""Compare autoencoders of emoji64 for chapter 10: compression factors, weights of the KL divergence, the latent scale.

    python tools/compare_autoencoders.py [--only NAME ...]

Each variant changes one thing of the base, the shipped autoencoder in a short training; all see the same images in the
same order. Each is measured on the test images: PSNR, the distance in the features of emoji-matcher, the KL divergence,
and what its latents are like. Then a small diffusion model learns the latents of some, with their scale and without,
and one with a wrong one. Interrupted, the command goes on; what is measured is not measured again. Results and pictures
go to the package's assets/results, where the chapter reads them. Forty-five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbook.autoencoder import SpatialVAE
from diffbook.classifier import CaptionMatcher
from diffbook.data import cache_folder, emoji64, to_uint8
from diffbook.evaluation import draw_images, frechet_jackknife, image_features, psnr, shuffled
from diffbook.gaussian import kl_diagonal
from diffbook.planning import flops
from diffbook.recipes import RECIPES, Compression, Diffusion, stream
from diffbook.runs import read_log
from diffbook.training import train
from diffbook.weights import checkpoints, load_model, write_atomically, write_tensors

ASSETS = Path(__file__).resolve().parents[1] / "src" / "diffbook" / "assets" / "results"
RESULTS, PICTURES = ASSETS / "autoencoders.json", ASSETS / "autoencoders.png"
SHOWN = 8  # test images whose reconstructions are kept
SAMPLES, STEPS = 1000, 20


def _base() -> Compression:
    recipe = RECIPES["emoji-vae"]
    assert isinstance(recipe, Compression)
    return replace(recipe, name="f8", images=16_000, warmup=2_000)


BASE = _base()


def _with(name: str, **options: Any) -> Compression:
    return replace(BASE, name=name, options=BASE.options | options)


VARIANTS: dict[str, Compression] = {
    "f4": _with("f4", widths=[48, 96]),
    "f8": BASE,
    "f16": _with("f16", widths=[48, 96, 128, 128]),
    "kl-0": replace(BASE, name="kl-0", kl_weight=0.0),
    "kl-0.1": replace(BASE, name="kl-0.1", kl_weight=0.1),
    "kl-1": replace(BASE, name="kl-1", kl_weight=1.0),
}
LATENT = Diffusion(
    name="latent",
    about="a small diffusion model of latents, told the category",
    network="LiteUNet",
    options={"channels": 4, "widths": [96, 128], "blocks": 2, "attention": [1], "classes": 9},
    data="emoji64",
    size=8,
    images=32_000,
    batch=64,
    lr=1e-3,
    warmup=2_000,
)
DIFFUSED = {  # whose latents are learned, with which scales: fitted, none, or ten times too small
    "f8": ("fitted", "one", "tenth"),
    "kl-0": ("fitted", "one"),
    "kl-1": ("fitted", "one"),
}


def folder_of(name: str) -> Path:
    return cache_folder() / "compare" / f"autoencoder-{name}"


def trained(name: str) -> SpatialVAE:
    """The variant's averaged network, trained now if need be."""
    recipe = VARIANTS[name]
    for step in train(recipe, folder_of(name)):
        if step.images % 8_000 < recipe.batch:
            print(f"{name}: {step.images} of {recipe.images} images, loss {step.loss:.4f}", flush=True)
    vae, _ = load_model(folder_of(name))
    assert isinstance(vae, SpatialVAE)
    return vae


def features(x: Tensor) -> Tensor:
    matcher, _ = load_model("emoji-matcher")
    assert isinstance(matcher, CaptionMatcher)
    return image_features(matcher, x)


def measure(name: str) -> dict[str, Any]:
    """Train one autoencoder, or go on with it, and measure it on the test images."""
    vae, recipe, x = trained(name), VARIANTS[name], emoji64("test").x()
    # A loaded network asks for no gradients.
    coded = [vae.encode(part) for part in x.split(100)]
    mean, variance = torch.cat([m for m, _ in coded]), torch.cat([v for _, v in coded])
    noise = torch.randn(mean.shape, generator=stream(0, "test", 0))
    rebuilt = torch.cat([vae.decode(z).clamp(-1, 1) for z in mean.split(100)])
    # As a diffusion model errs: by noise of a tenth of the latents' own size.
    spread = mean.std() / 10
    disturbed = torch.cat([vae.decode(z).clamp(-1, 1) for z in (mean + spread * noise).split(100)])
    kl = kl_diagonal(mean, variance, torch.zeros_like(mean), torch.ones_like(mean))
    operations = flops(lambda: vae.decode(vae.encode(x[:1])[0]))
    dims = mean[0].numel()
    return {
        "variant": name,
        "f": x.shape[-1] // mean.shape[-1],
        "kl_weight": recipe.kl_weight,
        "latents": dims,
        "compression": x[0].numel() / dims,
        "images": recipe.images,
        "seconds": read_log(folder_of(name) / "log.jsonl")[-1]["seconds"],
        "megaflops": round(operations / 1e6, 1),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "psnr": _short(psnr(rebuilt, x).mean()),
        "psnr_worst": _short(psnr(rebuilt, x).min()),
        "psnr_disturbed": _short(psnr(disturbed, x).mean()),
        "feature_distance": _short((features(rebuilt) - features(x)).norm(dim=1).mean()),
        "feature_distance_of_two_images": _short((features(x) - features(x).roll(1, 0)).norm(dim=1).mean()),
        "kl_nats_per_image": _short(kl.flatten(1).sum(1).mean()),
        "std": _short(1 / vae.scale),
        "std_by_channel": [_short(s) for s in mean.transpose(0, 1).flatten(1).std(1)],
        "sigma_median": _short(variance.sqrt().median()),
        "largest": _short(mean.abs().max() * vae.scale),
    }


def diffuse(name: str, scale: str) -> dict[str, Any]:
    """Train a small diffusion model on the latents of a variant, with one of the scales, and measure what it draws."""
    vae = trained(name)
    vae.scale.copy_({"fitted": vae.scale, "one": torch.ones(()), "tenth": vae.scale / 10}[scale])
    source = cache_folder() / "compare" / f"scale-{name}-{scale}.safetensors"
    if not source.exists():
        write_tensors(source, dict(vae.state_dict()), {"recipe": VARIANTS[name].to_json()})
    recipe = replace(LATENT, autoencoder=str(source))
    folder = cache_folder() / "compare" / f"diffused-{name}-{scale}"
    for _ in train(recipe, folder):
        pass
    print(f"{name}, scale {scale}: trained", flush=True)
    network, _ = load_model(folder)
    images = emoji64("train")
    y = images.labels[torch.arange(SAMPLES) * len(images) // SAMPLES]
    x = torch.cat(list(draw_images(network, recipe, y, STEPS, sampler="dpmpp", autoencoder=vae)))
    distance = frechet_jackknife(shuffled(features(x)), shuffled(features(images.x())))
    return {
        "autoencoder": name,
        "scale": scale,
        "value": _short(vae.scale),
        "images": recipe.images,
        "loss": read_log(folder / "log.jsonl")[-1]["loss"],
        "frechet_distance": _short(distance.value),
        "standard_error": _short(distance.standard_error),
        "bias": _short(distance.bias),
    }


def save_pictures() -> None:
    """A row of test images, and below it their reconstructions by each variant that is trained."""
    from torchvision.utils import save_image

    images = emoji64("test")
    x = images.x(torch.arange(SHOWN) * len(images) // SHOWN)
    rows = [x]
    for name in VARIANTS:
        if checkpoints(folder_of(name)):
            vae, _ = load_model(folder_of(name))
            assert isinstance(vae, SpatialVAE)
            with torch.no_grad():
                rows.append(vae.decode(vae.encode(x)[0]))
    save_image(to_uint8(torch.cat(rows)).float() / 255, PICTURES, nrow=SHOWN, padding=0)


def _short(value: float | Tensor) -> float:
    return float(f"{float(value):.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare autoencoders of emoji64.")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ASSETS.mkdir(parents=True, exist_ok=True)
    empty: dict[str, list[dict[str, Any]]] = {"autoencoders": [], "diffused": []}
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else empty

    def keep(kind: str, row: dict[str, Any]) -> None:
        results[kind].append(row)
        write_atomically(RESULTS, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())

    for name in options.only:
        if all(row["variant"] != name for row in results["autoencoders"]):
            keep("autoencoders", measure(name))
            save_pictures()
    for name, scales in DIFFUSED.items():
        for scale in scales:
            done = any((row["autoencoder"], row["scale"]) == (name, scale) for row in results["diffused"])
            if name in options.only and not done:
                keep("diffused", diffuse(name, scale))


if __name__ == "__main__":
    main()
