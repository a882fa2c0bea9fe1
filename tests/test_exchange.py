"""Our models in diffusers: the same outputs, tables and images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffbook import exchange
from diffbook.cli import main
from diffbook.exchange import ExchangeError, scheduler, to_diffusers, to_unet2d
from diffbook.recipes import RECIPES, Diffusion, find_recipe
from diffbook.sampling import as_eps, ddim_sample, ddpm_sample, dpmpp_2m_sample, guided, trailing_timesteps
from diffbook.unet import LiteUNet, UNet
from diffbook.weights import load_model

diffusers = pytest.importorskip("diffusers")

PAGE = Path(__file__).parents[1] / "book" / "other-programs.md"


def randomized(network: UNet) -> UNet:
    """No parameter is 0 or 1 any more: a part that is lost or exchanged is noticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.1)
    return network.eval()


EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "the paper's": {"channels": 3, "widths": (128, 256, 256), "blocks": 2, "attention": (1,), "dropout": 0.1},
    "classes": {"channels": 1, "widths": (128, 128), "blocks": 1, "attention": (0,), "classes": 10},
    "heads": {"channels": 2, "widths": (128, 256), "blocks": 1, "attention": (1,), "heads": 4},
    "one level": {"channels": 1, "widths": (128,), "blocks": 3, "attention": ()},
}


@pytest.mark.parametrize("options", EXPRESSIBLE.values(), ids=EXPRESSIBLE)
def test_unet2d_has_the_same_outputs(options: dict[str, Any]) -> None:
    """At our t and their t - 1, for times from 1 to T; and not at the same number."""
    network = randomized(UNet(**options))
    theirs = to_unet2d(network, 16)
    assert isinstance(theirs, diffusers.UNet2DModel) and not theirs.training
    x, t = torch.randn(4, options["channels"], 16, 16), torch.tensor([1, 2, 437, 1000])
    y = None if network.classes is None else torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        ours, same = network(x, t, y), theirs(x, t - 1, y).sample
        shifted = theirs(x, t, y).sample
    assert (ours - same).abs().max() <= 2e-4 * ours.abs().max()
    assert (ours - shifted).abs().max() > 1e-3 * ours.abs().max()
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in network.parameters())
    assert theirs.config.dropout == options.get("dropout", 0.0)


@pytest.mark.parametrize(
    "network, reason",
    [
        (LiteUNet(1, (8, 16), patch=2), "a LiteUNet is built differently"),
        (UNet(1, (128, 128), patch=2), "patch=2"),
        (UNet(1, (32, 64)), r"this network has \[8, 16"),
        (UNet(1, (128, 256), attention=(0, 1), heads=2), r"heads of one width, this network has \[64, 128\]"),
    ],
    ids=["lite", "patch", "groups", "heads"],
)
def test_what_unet2d_has_not_is_named(network: UNet, reason: str) -> None:
    with pytest.raises(ExchangeError, match=reason):
        to_unet2d(network, 28)


def test_which_recipe_becomes_what() -> None:
    """What the page says: the paper's network becomes a UNet2DModel, the other pixel models are wrapped."""
    kinds = {}
    for name, recipe in RECIPES.items():
        if isinstance(recipe, Diffusion) and not recipe.autoencoder and name != "cifar10-gpu":
            kinds[name] = type(to_diffusers(recipe.build(), recipe)).__name__
    assert kinds == dict.fromkeys(("fashion-cpu", "fashion-gpu", "fashion-smoke"), "WrappedUNet")
    with torch.device("meta"):
        assert exchange._shape(find_recipe("cifar10-gpu").build())["groups"] == 32  # type: ignore[arg-type]
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in [*kinds, "cifar10-gpu"])


@pytest.mark.parametrize("name", ["emoji-ldm", "fashion-vae", "fashion-classifier"])
def test_other_models_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", name, "--diffusers", "--to", str(tmp_path)]) == 1
    assert f"only diffusion models of pixels go into diffusers; {name} is none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_tables_are_equal(schedule: str, kind: str) -> None:
    recipe = Diffusion(name="", about="", network="UNet", options={}, images=1, batch=1, lr=1.0, schedule=schedule)
    table = recipe.noise_schedule()
    peer = scheduler(recipe, kind)
    torch.testing.assert_close(peer.betas.double(), table.beta[1:], rtol=1e-6, atol=1e-9)
    # their product is in float32
    torch.testing.assert_close(peer.alphas_cumprod.double(), table.alpha_bar[1:], rtol=1e-3, atol=1e-9)
    assert peer.config.prediction_type == "v_prediction" and peer.config.timestep_spacing == "trailing"
    with pytest.raises(ExchangeError, match="'PNDMScheduler'; there are DDPM"):
        scheduler(recipe, "PNDMScheduler")


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Diffusion]:
    network, recipe = load_model("fashion-cpu")
    assert isinstance(recipe, Diffusion) and recipe.predicts == "v" and recipe.schedule == "cosine"
    return network, recipe


STEPS, LABELS = 10, torch.tensor([0, 1, 7, 9])


@torch.no_grad()
def drawn_by_theirs(model: Any, peer: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    peer.set_timesteps(STEPS)
    for t in peer.timesteps:
        x = peer.step(model(x, t, class_labels=LABELS).sample, t, x, **options).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_their_loop_draws_our_images(kind: str, trained: tuple[nn.Module, Diffusion]) -> None:
    network, recipe = trained
    x_T = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    denoiser = as_eps(guided(network, LABELS), recipe.noise_schedule())
    sample = ddim_sample if kind == "DDIMScheduler" else dpmpp_2m_sample
    # in float64: ours goes from v to ε and from there to x_0, which costs digits where ᾱ_t is 1e-9
    ours = sample(denoiser, x_T.double(), recipe.noise_schedule(), trailing_timesteps(recipe.T, STEPS))
    theirs = drawn_by_theirs(to_diffusers(network, recipe), scheduler(recipe, kind), x_T)
    assert (ours - theirs).abs().max() <= 1e-4
    assert ours.std() > 0.3, "pictures, not a grey plane"


def test_their_ancestral_loop_draws_our_images(
    trained: tuple[nn.Module, Diffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, recipe = trained
    g = torch.Generator().manual_seed(0)
    x_T, noise = torch.randn(4, 1, 28, 28, generator=g), torch.randn(STEPS, 4, 1, 28, 28, generator=g)
    denoiser = as_eps(guided(network, LABELS), recipe.noise_schedule())
    times = trailing_timesteps(recipe.T, STEPS)
    ours = ddpm_sample(denoiser, x_T, recipe.noise_schedule(), times, clip=1.0, noise=noise)
    replayed = iter([*noise[:-1], torch.zeros_like(x_T)])  # their last step adds noise unless it starts at index 0
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(replayed))
    peer = scheduler(recipe, "DDPMScheduler", clip_sample=True)
    theirs = drawn_by_theirs(to_diffusers(network, recipe), peer, x_T)
    assert (ours - theirs).abs().max() <= 1e-3


def test_an_exported_wrapper_is_read_again(tmp_path: Path, trained: tuple[nn.Module, Diffusion]) -> None:
    network, _ = trained
    assert main(["export", "fashion-cpu", "--diffusers", "--to", str(tmp_path)]) == 0
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    model = exchange.wrapper().from_pretrained(tmp_path, subfolder="unet")
    peer = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert peer.config.prediction_type == "v_prediction" and peer.config.beta_schedule == "squaredcos_cap_v2"
    x, y = torch.randn(2, 1, 28, 28), torch.tensor([3, 4])
    with torch.no_grad():
        for timestep in (499, torch.tensor(499), torch.tensor([499, 499])):
            ours = network(x, torch.tensor([500, 500]), y)
            torch.testing.assert_close(model(x, timestep, y).sample, ours, rtol=1e-4, atol=1e-4)
        (null,) = model(x, 499, return_dict=False)
        torch.testing.assert_close(null, network(x, torch.tensor([500, 500])), rtol=1e-4, atol=1e-4)


def test_an_exported_unet2d_is_read_again(tmp_path: Path) -> None:
    options = {"channels": 1, "widths": [128, 128], "blocks": 1}
    recipe = Diffusion(
        name="small", about="of a test", network="UNet", options=options, images=1, batch=1, lr=1.0, size=16
    )
    network = randomized(UNet(**options))  # type: ignore[arg-type]
    assert exchange.export_to_diffusers(network, recipe, tmp_path)["network"] == "UNet2DModel"
    model = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x, 499).sample, network(x, torch.tensor([500, 500])), rtol=1e-3, atol=1e-3)


def test_a_pipeline_of_diffusers_draws_with_our_model(trained: tuple[nn.Module, Diffusion]) -> None:
    network, recipe = trained
    pipeline = diffusers.DDIMPipeline(to_diffusers(network, recipe), scheduler(recipe, clip_sample=True))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images
    assert images.shape == (2, 28, 28, 1) and images.std() > 0.1


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["export", "fashion-cpu", "--diffusers", "--to", str(tmp_path)]) == 1
    assert "pip install diffusers" in capsys.readouterr().err


def test_the_code_on_the_page_runs(tmp_path: Path) -> None:
    """All blocks of Python, in one program, in an empty folder, after the commands that the page names."""
    page = PAGE.read_text(encoding="utf-8")
    (command,) = re.findall(r"^diffbook (export .+ --diffusers .+)$", page, re.MULTILINE)
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 2
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    for arguments in (["-m", "diffbook.cli", *command.split()], ["-c", "\n".join(blocks)]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.png"))
