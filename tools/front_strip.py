"""Make the picture on the front page: the shipped model turns noise into images, step by step.

    python tools/front_strip.py [FILE]

One image a row, at some of the times that DDIM visits with 50 network calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from diffbook.data import to_uint8
from diffbook.recipes import Diffusion, stream
from diffbook.sampling import as_eps, ddim_sample_steps, guided, timesteps
from diffbook.weights import load_model

FILE = Path(__file__).resolve().parents[1] / "book" / "_static" / "front-strip.png"
CLASSES = (9, 3, 8, 5)  # ankle boot, dress, bag, sandal
STEPS, COLUMNS = 50, (0, 12, 20, 26, 31, 36, 41, 46, 50)  # after how many steps
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
    cell = recipe.size * SCALE + GAP
    picture = Image.new("LA", (len(COLUMNS) * cell - GAP, len(CLASSES) * cell - GAP))  # transparent gaps
    for j, column in enumerate(COLUMNS):
        for i in range(len(CLASSES)):
            tile = Image.fromarray(to_uint8(states[column][i, 0]).numpy())
            picture.paste(tile.resize((cell - GAP,) * 2, Image.Resampling.NEAREST).convert("LA"), (j * cell, i * cell))
    return picture


if __name__ == "__main__":
    front_strip().save(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE, optimize=True)
