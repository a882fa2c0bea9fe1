"""Our models in diffusers: its schedulers draw the same images as our samplers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from diffbook.cli import main
from diffbook.exchange import DiffusersNetwork, save, scheduler, to_diffusers
from diffbook.recipes import RECIPES, Diffusion, Unconditional
from diffbook.sampling import as_eps, ddim_sample, ddpm_sample, dpmpp_2m_sample, guided
from diffbook.weights import load_model, write_tensors

S = 20
LABELS = torch.tensor([0, 7, 9])


@pytest.fixture(scope="module")
def shipped() -> tuple[torch.nn.Module, Diffusion]:
    network, recipe = load_model("fashion-cpu")
    assert isinstance(recipe, Diffusion)
    return network, recipe


def walk(
    model: DiffusersNetwork, steps: Any, x: torch.Tensor, y: torch.Tensor | None, noise: bool = False
) -> torch.Tensor:
    """How people use diffusers: set the times, then step by step."""
    steps.set_timesteps(S)
    generator = torch.Generator().manual_seed(0)
    for t in steps.timesteps:
        predicted = model(x, t, class_labels=y).sample
        options: dict[str, Any] = {"generator": generator} if noise else {}
        if isinstance(steps, DDIMScheduler):
            options["use_clipped_model_output"] = True  # ours is consistent: after clipping ε follows from x̂_0
        x = steps.step(predicted, t, x, **options).prev_sample
    return x


@torch.no_grad()
def test_ddim_draws_the_same_images(shipped: tuple[torch.nn.Module, Diffusion]) -> None:
    """v-prediction, the cosine schedule, clipping, labels; times from T in equal steps."""
    network, recipe = shipped
    schedule, x_T = recipe.noise_schedule(), torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    theirs = walk(to_diffusers(network, recipe), scheduler(recipe, "ddim"), x_T, LABELS)
    eps = as_eps(guided(network, LABELS, 1.0), schedule, recipe.predicts)
    times = list(range(recipe.T, 0, -recipe.T // S))
    ours = ddim_sample(eps, x_T, schedule, times, clip=1.0)
    assert (theirs - ours).abs().max() < 1e-3
    shifted = ddim_sample(eps, x_T, schedule, [t - 1 for t in times], clip=1.0)
    assert (theirs - shifted).abs().max() > 5e-3  # a time that is wrong by one would be noticed


@torch.no_grad()
@pytest.mark.parametrize("predicts", ["eps", "v", "x_0"])
def test_every_parameterization(predicts: str) -> None:
    """DDPM at all T steps has no grid: the same noise, the same images."""
    recipe = replace(RECIPES["fashion-smoke"], predicts=predicts, T=S, schedule="cosine")
    assert isinstance(recipe, Diffusion)
    network = recipe.build().eval()
    with torch.no_grad():
        network.head[-1].weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    x_T = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    model, steps = to_diffusers(network, recipe), scheduler(recipe, "ddpm")
    theirs = walk(model, steps, x_T, LABELS, noise=True)
    schedule, generator = recipe.noise_schedule(), torch.Generator().manual_seed(0)
    noise = [torch.randn(x_T.shape, generator=generator) for _ in range(S - 1)]
    eps = as_eps(guided(network, LABELS, 1.0), schedule, predicts)
    noise = torch.stack([*noise, torch.zeros_like(x_T)])
    ours = ddpm_sample(eps, x_T, schedule, variance="beta_tilde", clip=1.0, noise=noise)
    assert (theirs - ours).abs().max() < 1e-3


@torch.no_grad()
def test_dpm_solver(shipped: tuple[torch.nn.Module, Diffusion]) -> None:
    network, recipe = shipped
    schedule, x_T = recipe.noise_schedule(), torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    theirs = walk(to_diffusers(network, recipe), scheduler(recipe, "dpmpp"), x_T, LABELS)
    eps = as_eps(guided(network, LABELS, 1.0), schedule, recipe.predicts)
    ours = dpmpp_2m_sample(eps, x_T, schedule, list(range(recipe.T, 0, -recipe.T // S)))
    # diffusers' own last step differs (it stops before t = 0), hence pictures are compared, not bits
    assert (theirs - ours).abs().mean() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if isinstance(recipe, Diffusion)])
def test_every_diffusion_recipe_goes_through(name: str) -> None:
    recipe = RECIPES[name]
    assert isinstance(recipe, Diffusion)
    small = {"widths": [32, 32], "blocks": 1, "text": 32, "attention": [1], "heads": 1}
    recipe = replace(recipe, options=recipe.options | {k: v for k, v in small.items() if k in recipe.options})
    network = recipe.build().eval()
    model = to_diffusers(network, recipe)
    shape = recipe.options.get("latent") or [recipe.options["channels"], recipe.size, recipe.size]
    assert (model.config.in_channels, model.config.sample_size) == (shape[0], recipe.size)
    x = torch.randn(2, *shape)
    y = None if isinstance(recipe, Unconditional) else torch.zeros((2, 12) if "words" in recipe.options else 2).long()
    ours = network(x, torch.tensor([3, 3])) if y is None else network(x, torch.tensor([3, 3]), y)
    assert torch.allclose(model(x, 2, y, return_dict=False)[0], ours, atol=1e-6)
    assert torch.allclose(model(x, torch.tensor([2, 2]), y).sample, ours, atol=1e-6)


def test_saved_and_loaded_by_diffusers(tmp_path: Path, shipped: tuple[torch.nn.Module, Diffusion]) -> None:
    network, recipe = shipped
    files = {path.name for path in save(network, recipe, tmp_path)}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"}
    model = DiffusersNetwork.from_pretrained(tmp_path / "unet")
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in model.network.state_dict().items())
    steps = DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert torch.allclose(steps.alphas_cumprod.double(), recipe.noise_schedule().alpha_bar[1:], atol=1e-6)
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    first = walk(to_diffusers(network, recipe), scheduler(recipe), x, LABELS[:1])
    assert torch.allclose(walk(model, steps, x, LABELS[:1]), first, atol=1e-5)


def test_a_pipeline_of_diffusers_draws_with_it(shipped: tuple[torch.nn.Module, Diffusion]) -> None:
    """DDIMPipeline knows no classes: the null class."""
    pipeline = DDIMPipeline(to_diffusers(*shipped), scheduler(shipped[1]))
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline(num_inference_steps=5, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert image.shape == (28, 28, 1) and 0.05 < image.mean() < 0.8


def test_why_not_as_a_unet_of_diffusers() -> None:
    """What the page says: our groups have at least four channels, those of UNet2DModel are as many in every level."""
    groups = {m.num_groups for m in RECIPES["fashion-gpu"].build().modules() if isinstance(m, torch.nn.GroupNorm)}
    theirs = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )
    assert len(groups) > 1
    assert len({m.num_groups for m in theirs.modules() if isinstance(m, torch.nn.GroupNorm)}) == 1


def test_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES["fashion-smoke"]
    write_tensors(tmp_path / "m.safetensors", recipe.build().state_dict(), {"recipe": recipe.to_json()})
    command = ["export", str(tmp_path / "m.safetensors"), "--diffusers", "--to", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    assert "unet/config.json" in json.loads(capsys.readouterr().out)["files"]
    assert main(["export", "fashion-classifier", "--diffusers", "--to", str(tmp_path / "c")]) == 1
    assert "is no diffusion model: diffusers has no use for it" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "diffbook.exchange", None)
    monkeypatch.delattr("diffbook.exchange")
    assert main(command) == 1
    assert '--diffusers needs diffusers: pip install "diffbook[bench]"' in capsys.readouterr().err


def test_what_is_unknown(shipped: tuple[torch.nn.Module, Diffusion]) -> None:
    with pytest.raises(ValueError, match="unknown scheduler 'euler'; there are ddpm, ddim, dpmpp"):
        scheduler(shipped[1], "euler")
