"""What pytest needs everywhere: the notebooks' environment, figures compared, tests for a GPU.

nbval compares what a cell prints, but not its figures. Here figures are compared too: those in PNG, and the frames
of animations. Fresh and stored pictures may differ by what another processor's rounding does to a few pixels.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Generator, Iterator
from typing import Any

import pytest

# Root mean square difference of the pixel values, 0 to 255. The second bound is for each square of 16 by 16
# pixels: a single moved marker or another digit in a title vanishes in the mean over a whole figure.
TOLERANCE = 2.0
TOLERANCE_OF_A_SQUARE = 20.0
SQUARE = 16

# A frame in matplotlib's player is a JavaScript string, broken by a backslash at the end of each line.
_FRAME = re.compile(r"data:image/png;base64,((?:[A-Za-z0-9+/=]|\\?\n)+)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("nbval", False) or config.getoption("nbval_lax", False):
        from run_notebooks import prepare_environment

        prepare_environment()
    else:
        os.environ.setdefault("MPLBACKEND", "agg")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def pictures(outputs: list[dict[str, Any]]) -> Iterator[bytes]:
    """The PNG files in a cell's outputs, in order."""
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            yield base64.b64decode(data["image/png"])
        for frame in _FRAME.findall(data.get("text/html", "")):
            yield base64.b64decode(re.sub(r"[\\\n]", "", frame))


def difference(stored: bytes, fresh: bytes) -> str | None:
    """In what two PNG files differ more than rounding explains, or None."""
    import numpy as np
    from PIL import Image
    from run_notebooks import few_colours

    fresh = few_colours(fresh)  # as the stored one was treated
    if stored == fresh:
        return None
    old, new = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float) for png in (stored, fresh))
    if old.shape != new.shape:
        sizes = [f"{a.shape[1]}x{a.shape[0]}" for a in (new, old)]
        return f"has {sizes[0]} pixels, the stored one {sizes[1]}"
    squared = ((old - new) ** 2).mean(axis=2)
    rms = float(np.sqrt(squared.mean()))
    if rms > TOLERANCE:
        return f"differs from the stored one: rms {rms:.1f} of 255"
    height, width = squared.shape
    padded = np.pad(squared, ((0, -height % SQUARE), (0, -width % SQUARE)))
    blocks = padded.reshape(padded.shape[0] // SQUARE, SQUARE, -1, SQUARE).mean(axis=(1, 3))
    worst = float(np.sqrt(blocks.max()))
    if worst > TOLERANCE_OF_A_SQUARE:
        row, column = np.unravel_index(int(blocks.argmax()), blocks.shape)
        at = f"x {column * SQUARE}, y {row * SQUARE}"
        return f"differs from the stored one near pixel {at}: rms {worst:.1f} of 255 in that square"
    return None


def recorded(outputs: list[dict[str, Any]]) -> list[Any]:
    """The results that ``diffbook.notebook.record`` stored in the outputs' metadata."""
    return [output["metadata"]["measured"] for output in outputs if "measured" in output.get("metadata", {})]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if type(item).__name__ == "IPyNbCell" and item.options["check"]:
        from nbval.plugin import NbCellError

        def fail(message: str) -> None:
            raise NbCellError(item.cell_num, message, item.cell.source)

        if item.cell.execution_count is None and item.cell.source.strip():
            fail("The stored notebook was not executed here: make notebooks")
        stored, fresh = item.cell.outputs, item.test_outputs or []
        old, new = list(pictures(stored)), list(pictures(fresh))
        if len(old) != len(new):
            fail(f"{len(new)} figure(s) or frames, stored {len(old)}")
        for number, pair in enumerate(zip(old, new, strict=True), start=1):
            found = difference(*pair)
            if found:
                fail(f"Figure or frame {number} {found}")
        if recorded(stored) != recorded(fresh):
            fail(f"Recorded results differ: {recorded(fresh)}, stored {recorded(stored)}")
    return result
