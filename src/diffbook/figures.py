"""Pictures of images: grids, and strips that show a process over time."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from diffbook.data import to_uint8


def show_image(axes: Axes, x: Tensor, title: str | None = None) -> None:
    """Draw one image ``x`` of shape ``(C, H, W)`` with values in [-1, 1]; values outside are clipped."""
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"x must have shape (1, H, W) or (3, H, W), got {tuple(x.shape)}")
    picture = to_uint8(x.detach().cpu()).permute(1, 2, 0).squeeze(2).numpy()
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title or "")
    axes.spines[:].set_visible(False)


def image_grid(
    x: Tensor, columns: int | None = None, titles: Sequence[str] | None = None, width: float = 8.0
) -> Figure:
    """A grid of images, row by row.

    Args:
        x: images in [-1, 1], shape ``(N, C, H, W)``.
        columns: images in a row; all of them by default.
        titles: one for each image.
        width: of the figure, in inches.
    """
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"x must have shape (N, C, H, W) with N > 0, got {tuple(x.shape)}")
    columns = columns or len(x)
    rows = -(-len(x) // columns)
    height = width / columns * x.shape[2] / x.shape[3] * rows + (0.25 * rows if titles else 0)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for i, ax in enumerate(axes.flat):
        if i < len(x):
            show_image(ax, x[i], titles[i] if titles else None)
        else:
            ax.set_axis_off()
    return figure


def process_strip(x: Tensor, times: Sequence[int], names: Sequence[str] | None = None, width: float = 8.0) -> Figure:
    """A process over time: one row an image, one column a time, the times above.

    Args:
        x: images in [-1, 1], shape ``(N, len(times), C, H, W)``.
        times: the time of each column.
        names: one for each row, written at its left.
        width: of the figure, in inches.
    """
    if x.ndim != 5 or x.shape[1] != len(times):
        raise ValueError(f"x must have shape (N, {len(times)}, C, H, W), got {tuple(x.shape)}")
    rows, columns = x.shape[:2]
    height = width / columns * x.shape[3] / x.shape[4] * rows + 0.3
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for i in range(rows):
        for j in range(columns):
            show_image(axes[i, j], x[i, j], f"t = {times[j]}" if i == 0 else None)
        if names:
            axes[i, 0].set_ylabel(names[i])
    return figure
