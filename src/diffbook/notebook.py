"""What a chapter needs besides the mathematics: a reproducible set-up, source listings, recorded results.

IPython and matplotlib are imported inside the functions, so that importing :mod:`diffbook` never needs them.
"""

from __future__ import annotations

import ast
import hashlib
import html
import inspect
import re
import textwrap
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown
    from matplotlib.animation import FuncAnimation

# Okabe & Ito's colours: told apart by readers with any form of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def setup(seed: int = 0) -> None:
    """Make the notebook repeatable: seed, one thread, deterministic kernels; and set the figure style."""
    import matplotlib.pyplot as plt
    import numpy as np

    torch.manual_seed(seed)
    np.random.seed(seed)
    torch.set_num_threads(1)  # sums in another order would change the last digits
    torch.use_deterministic_algorithms(True)
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 11,
            "lines.linewidth": 2,
            "image.cmap": "gray",
            "animation.embed_limit": 5,
        }
    )


def show_source(*objects: Any) -> Markdown:
    """The package's own source code of functions or classes, without their docstrings, as a code listing.

    The docstrings stand on the API pages. What is shown is read from the installed package each time, so the
    page cannot differ from the code that runs.
    """
    from IPython.display import Markdown

    return Markdown("```python\n" + "\n\n\n".join(_source_without_docstrings(o) for o in objects) + "\n```")


def _source_without_docstrings(obj: Any) -> str:
    source = textwrap.dedent(inspect.getsource(obj))
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            assert text.end_lineno is not None
            last = text.end_lineno
            while last < len(lines) and not lines[last].strip() and isinstance(node, ast.FunctionDef):
                last += 1
            for i in range(text.lineno - 1, last):
                lines[i] = "\0"
    return "\n".join(line for line in lines if line != "\0").rstrip()


def record(name: str, value: float | str, text: str) -> None:
    """Show one measured result and keep it under a name for the book's other pages.

    Args:
        name: the name that a page uses, for example ``naive-variance`` in ``{measured}`01_…:naive-variance```.
        value: the result as it shall be read elsewhere; a number is rounded to 3 significant digits.
        text: what the notebook shows, with ``{}`` where the value goes.
    """
    from IPython.display import display

    value = value if isinstance(value, str) else f"{value:.3g}"
    metadata = {"measured": {"name": name, "value": value}}
    display({"text/plain": text.format(value)}, raw=True, metadata=metadata)


def show_animation(animation: FuncAnimation, alt: str, fps: int = 8) -> HTML:
    """matplotlib's JavaScript player, repaired: offline, with a text alternative and a label on its slider.

    Args:
        animation: what to show.
        alt: what is to be seen, for those who do not see it.
        fps: frames per second.
    """
    from IPython.display import HTML

    page = animation.to_jshtml(fps=fps, default_mode="once")
    page = re.sub(r'<link rel="stylesheet"[^>]*>\s*', "", page)  # it would be fetched from another host
    found = re.search(r'id="_anim_img([0-9a-f]{32})"', page)
    if found is None:
        raise RuntimeError("matplotlib's player has changed: no image with an _anim_img identifier in it")
    # the identifier is random; one derived from the content keeps the stored notebook the same in every run
    identifier = hashlib.sha256(page.replace(found[1], "").encode()).hexdigest()[:12]
    page = page.replace(found[1], identifier)
    page = page.replace(f'<img id="_anim_img{identifier}"', f'<img id="_anim_img{identifier}" alt="{html.escape(alt)}"')
    slider = f'<input id="_anim_slider{identifier}"'
    return HTML(page.replace(slider, slider + ' aria-label="Frame"'))
