"""nbval and conftest.py together: a changed number, figure or animation fails, and what is equal passes.

One small notebook is executed and stored, then the stored outputs of some cells are exchanged; nbval has to complain
about exactly these. It runs in a user's home that has a kernel, a matplotlib style and IPython settings of its own.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from run_notebooks import execute, prepare_environment, read, write

ROOT = Path(__file__).resolve().parents[1]
Compare = Callable[[bytes, bytes], str | None]

SETUP = """\
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.animation import FuncAnimation


def curve(factor, size=(4, 3)):
    plt.figure(figsize=size)
    x = np.linspace(0, 6, 100)
    plt.plot(x, factor * np.sin(x))
    plt.show()


def player(factor, name):
    figure, axes = plt.subplots(figsize=(2, 2), dpi=50)
    film = FuncAnimation(figure, lambda i: axes.plot([0, factor * i + 1]), frames=3)
    page = film.to_jshtml()
    plt.close(figure)
    identifier = page.split('id="_anim_img')[1][:32]
    return HTML(page.replace(identifier, name))
"""

# name of a cell: (source, source whose output is stored instead, what nbval then says)
CELLS = {
    "number": ("print(f'{0.1:.3f}')", "print(f'{0.2:.3f}')", "Cell outputs differ"),
    "same number": ("print(f'{0.1:.3f}')", None, None),
    "figure": ("curve(1.00)", "curve(1.03)", "Figure or frame 1 differs"),
    "same figure": ("curve(1.00)", None, None),
    "size": ("curve(1)", "curve(1, (4, 4))", "Cell outputs differ"),
    "no figure": ("curve(1)", "print(end='')", "Unexpected output fields"),
    "two figures": ("curve(1), curve(1);", "curve(1)", "(?:2 figure|Unexpected|dissimilar)"),
    "frame": ("player(1.0, 'a1b2c3d4e5f6')", "player(1.3, 'a1b2c3d4e5f6')", "Figure or frame [123] differs"),
    "same film": ("player(1.0, 'a1b2c3d4e5f6')", "player(1.0, 'f6e5d4c3b2a1')", None),
    "recorded": (
        "display({'text/plain': 'x'}, raw=True, metadata={'measured': {'name': 'a', 'value': '1'}})",
        "display({'text/plain': 'x'}, raw=True, metadata={'measured': {'name': 'a', 'value': '2'}})",
        "Recorded results differ",
    ),
    "kernel": ("print(sys.executable == REAL, mpl.rcParams['lines.linewidth'])", None, None),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """For each cell nbval's verdict and message."""
    folder = tmp_path_factory.mktemp("nbval")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "nbval_sanitize.cfg", folder / "tests")

    setup = SETUP + f"\n\nREAL = {sys.executable!r}"
    before = dict(os.environ)
    prepare_environment()
    stored = []
    for k in (0, 1):  # as it is, and with the other outputs
        sources = [cell[k] or cell[0] for cell in CELLS.values()]
        nb = new_notebook(cells=[new_code_cell(source) for source in [setup, *sources]])
        path = folder / f"{k}.ipynb"
        write(nb, path)
        write(execute(path), path)
        stored.append(read(path))
        path.unlink()
    os.environ.clear()
    os.environ.update(before)
    nb, other = stored
    for cell, exchanged in zip(nb.cells, other.cells, strict=True):
        cell.outputs = exchanged.outputs
    nb.cells.append(new_code_cell("1"))  # and one that was never run
    write(nb, folder / "planted.ipynb")

    result = folder / "result.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", f"--junitxml={result}"]
    command += ["--nbval", "--nbval-current-env", "--nbval-sanitize-with=tests/nbval_sanitize.cfg", "planted.ipynb"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MPL"))}
    done = subprocess.run(
        command, cwd=folder, env=environment | home_of_a_user(folder / "home"), capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return verdicts(result.read_text(encoding="utf-8"))


def home_of_a_user(home: Path) -> dict[str, str]:
    """A home whose settings would change every result, and the variables that point there."""
    kernel = home / ".local" / "share" / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": [shutil.which("false"), "{connection_file}"], "display_name": "Other", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    style = home / ".config" / "matplotlib" / "matplotlibrc"
    style.parent.mkdir(parents=True)
    style.write_text("lines.linewidth: 9\n")
    startup = home / ".ipython" / "profile_default" / "startup" / "00.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("print('hello')\nimport numpy\nnumpy.sin = numpy.cos\n")
    return {"HOME": str(home), "JUPYTER_PATH": str(kernel.parents[1]), "MATPLOTLIBRC": str(style)}


def verdicts(xml: str) -> dict[str, tuple[str, str]]:
    names = ["setup", *CELLS, "never run"]
    found = {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        number = int(re.findall(r"Cell (\d+)", case.get("name", ""))[0])
        failure = case.find("failure")
        text = "" if failure is None else (failure.get("message") or "") + (failure.text or "")
        found[names[number]] = ("passed" if failure is None else "failed", text)
    assert list(found) == names
    return found


@pytest.mark.parametrize("name", CELLS)
def test_exactly_what_differs_fails(report: dict[str, tuple[str, str]], name: str) -> None:
    verdict, message = report[name]
    expected = CELLS[name][2]
    assert verdict == ("failed" if expected else "passed"), message
    if expected:
        assert re.search(expected, message), message


def test_a_cell_that_was_never_run_fails(report: dict[str, tuple[str, str]]) -> None:
    assert report["never run"][0] == "failed"
    assert "not executed" in report["never run"][1]


# The comparison of two pictures itself.


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Compare:
    """``difference`` of the conftest.py in the root."""
    plugin = request.config.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    assert plugin is not None
    difference: Compare = plugin.difference
    return difference


def test_rounding_in_a_few_pixels_passes(compare: Compare) -> None:
    pixels = np.full((300, 400, 3), 255.0)
    rounded = pixels - np.random.default_rng(0).integers(0, 3, pixels.shape)
    assert compare(png(pixels), png(rounded)) is None


def test_a_single_moved_marker_fails(compare: Compare) -> None:
    """Its effect on the mean over the figure is below the tolerance: the squares have to find it."""
    pixels, moved = np.full((300, 400, 3), 255.0), np.full((300, 400, 3), 255.0)
    pixels[100:105, 200:205], moved[100:105, 206:211] = 60, 60
    assert np.sqrt(((pixels - moved) ** 2).mean()) < 4
    small = np.full((1200, 1600, 3), 255.0)
    changed = small.copy()
    changed[100:105, 200:205] = 60
    assert np.sqrt(((small - changed) ** 2).mean()) < 2
    assert "near pixel x 192, y 96" in compare(png(small), png(changed))
    assert compare(png(pixels), png(moved)) is not None


def test_frames_are_found_in_a_player(request: pytest.FixtureRequest) -> None:
    plugin = request.config.pluginmanager.get_plugin(str(ROOT / "conftest.py"))
    data = base64.b64encode(b"a" * 100).decode()
    script = f'frames[0] = "data:image/png;base64,{data[:76]}\\\n{data[76:]}"\n'
    output: NotebookNode = nbformat.from_dict({"data": {"text/html": script * 2}})
    assert list(plugin.pictures([output])) == [b"a" * 100] * 2
