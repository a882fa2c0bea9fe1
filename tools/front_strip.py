"""Make the two pictures on the front page: the shipped models turn noise into images, step by step.

    python tools/front_strip.py [FOLDER]

One image a row, at some of the times that DDIM visits with 50 network calls: clothes in pixel space, and combinations
of object, tone and style that the training has never seen in latent space, decoded at each of these times.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from diffbook.data import to_uint8
from diffbook.latent import from_latents
from diffbook.recipes import CaptionedDiffusion, Diffusion, stream
from diffbook.sampling import as_eps, ddim_sample_steps, guided, timesteps
from diffbook.weights import latent_diffusion, load_model

FOLDER = Path(__file__).resolve().parents[1] / "book" / "_static"
CLASSES = (9, 3, 8, 5)  # ankle boot, dress, bag, sandal
STEPS, COLUMNS = 50, (0, 12, 20, 26, 31, 36, 41, 46, 50)  # after how many steps
CAPTIONS = (  # of the test: each of these combinations was kept from the training
    "twemoji woman firefighter dark skin",
    "noto man astronaut light skin",
    "fluent pouting cat face",
    "noto waving hand sign dark skin",
)
W = 3.0  # guidance for captions
SCALE, GAP, SEED = 4, 3, 0


def front_strip() -> Image.Image:
    """The picture: a row for each class, a column for each time."""
    network, recipe = load_model("fashion-cpu")
    assert isinstance(recipe, Diffusion)
    schedule = recipe.noise_schedule()
    shape = (recipe.options["channels"], recipe.size, recipe.size)
    x_T = torch.stack([torch.randn(shape, generator=stream(SEED, "front", k)) for k in CLASSES])
    denoiser = as_eps(guided(network, torch.tensor(CLASSES)), schedule, predicts=recipe.predicts)
    steps = ddim_sample_steps(denoiser, x_T, schedule, timesteps(recipe.T, STEPS), clip=1.0)
    states = [x_T, *(step.x for step in steps)]
    tiles = [
        [Image.fromarray(to_uint8(states[column][i, 0]).numpy()) for column in COLUMNS] for i in range(len(CLASSES))
    ]
    return grid(tiles, recipe.size * SCALE)


def captions_strip() -> Image.Image:
    """A row for each caption, a column for each time; what is noisy is the latent, and that is decoded."""
    network, recipe = load_model("emoji-ldm")
    assert isinstance(recipe, CaptionedDiffusion)
    model, schedule = latent_diffusion(network, recipe), recipe.noise_schedule()
    z_T = torch.stack(
        [torch.randn(model.network.latent, generator=stream(SEED, "front", k)) for k in range(len(CAPTIONS))]
    )
    denoiser = as_eps(guided(network, model.vocabulary.encode(CAPTIONS), W), schedule, predicts=recipe.predicts)
    steps = ddim_sample_steps(denoiser, z_T, schedule, timesteps(recipe.T, STEPS))
    states = [from_latents(model.autoencoder, z) for z in (z_T, *(step.x for step in steps))]
    tiles = [
        [Image.fromarray(to_uint8(states[column][i]).permute(1, 2, 0).numpy()) for column in COLUMNS]
        for i in range(len(CAPTIONS))
    ]
    return grid(tiles, 64)


def grid(tiles: list[list[Image.Image]], side: int) -> Image.Image:
    """Tiles in rows, enlarged to the same side, with transparent gaps."""
    cell, mode = side + GAP, "LA" if tiles[0][0].mode == "L" else "RGBA"
    picture = Image.new(mode, (len(tiles[0]) * cell - GAP, len(tiles) * cell - GAP))
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            picture.paste(tile.resize((side, side), Image.Resampling.NEAREST).convert(mode), (j * cell, i * cell))
    return picture


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    front_strip().save(folder / "front-strip.png", optimize=True)
    captions_strip().save(folder / "front-captions.png", optimize=True)
