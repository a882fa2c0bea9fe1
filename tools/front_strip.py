"""Make the picture on the front page: real images that turn into noise, step by step.

    python tools/front_strip.py [FILE]

Four images of the bundled test set at times 0 … T of the linear schedule, with the same noise at all times.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

from diffbook.data import fashion_subset, to_uint8
from diffbook.diffusion import q_sample
from diffbook.schedule import linear_schedule

FILE = Path(__file__).resolve().parents[1] / "book" / "_static" / "front-strip.png"
TIMES = (0, 20, 60, 110, 170, 240, 330, 500, 1000)
CLASSES = (9, 3, 8, 5)  # ankle boot, dress, bag, sandal
SCALE, GAP = 4, 3


def front_strip() -> Image.Image:
    """The picture: a row for each image, a column for each time."""
    images, schedule = fashion_subset("test").one_per_class(), linear_schedule()
    x_0 = images.x(list(CLASSES))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    columns = [x_0 if t == 0 else q_sample(x_0, eps, t, schedule) for t in TIMES]
    cell = 28 * SCALE + GAP
    picture = Image.new("LA", (len(TIMES) * cell - GAP, len(CLASSES) * cell - GAP))  # transparent gaps
    for j, x in enumerate(columns):
        for i in range(len(CLASSES)):
            tile = Image.fromarray(to_uint8(x[i, 0]).numpy()).resize((28 * SCALE,) * 2, Image.Resampling.NEAREST)
            picture.paste(tile.convert("LA"), (j * cell, i * cell))
    return picture


if __name__ == "__main__":
    front_strip().save(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE, optimize=True)
