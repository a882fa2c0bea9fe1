"""Execute the notebooks and write them in one canonical form.

    python tools/run_notebooks.py [--check] [--timeout SECONDS] [NOTEBOOK ...]

The form keeps diffs small and a second run byte-identical: sorted keys, cell identifiers that do not depend on
other cells, no time stamps, nothing of the machine. A notebook with a cell that fails is not written.
"""

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
import traitlets
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
KEPT_METADATA = ("exercise", "mystnb", "tags")
TIMEOUT = 300


class NotebookError(Exception):
    """A cell failed; the message names the notebook and the cell."""


class ThisPython(KernelSpecManager):
    """Knows one kernel, the Python that runs this: a kernel that the user has installed is never taken."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class Kernel(AsyncKernelManager):
    """Starts that kernel."""

    @traitlets.default("kernel_spec_manager")
    def _kernel_spec_manager(self) -> KernelSpecManager:
        return ThisPython(parent=self)


def prepare_environment(cache: Path = ROOT / ".cache") -> None:
    """Set the environment in which notebooks run: the same in every tool and for every user.

    One thread of OpenMP, figures as PNG, and no configuration of IPython, Jupyter or matplotlib from the user's
    home. Also builds matplotlib's font cache, which would otherwise be announced on a first notebook's stderr.
    """
    matplotlib = cache / "matplotlib"
    for folder in (matplotlib, cache / "ipython"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("JUPYTER_PATH", "MATPLOTLIBRC", "PYTHONWARNINGS"):
        os.environ.pop(name, None)
    os.environ.update(
        OMP_NUM_THREADS="1",
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        MPLCONFIGDIR=str(matplotlib),
        IPYTHONDIR=str(cache / "ipython"),
        JUPYTER_PREFER_ENV_PATH="1",
    )
    if not any(matplotlib.glob("fontlist-*.json")):
        command = [sys.executable, "-c", "import matplotlib.font_manager"]
        subprocess.run(command, check=True, capture_output=True)


def notebooks() -> list[Path]:
    """The notebooks of the book in reading order."""
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    """Read a notebook; cells without an identifier get one from :func:`canonical`."""
    notebook: NotebookNode = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write the canonical form, whole or not at all."""
    draft = path.with_suffix(".ipynb.part")
    draft.write_text(canonical(notebook), encoding="utf-8", newline="\n")
    draft.replace(path)


def canonical(notebook: NotebookNode) -> str:
    """The text of the notebook's one canonical form."""
    nb = copy.deepcopy(notebook)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    taken: set[str] = set()
    for cell in nb.cells:
        cell.metadata = nbformat.from_dict({k: cell.metadata[k] for k in KEPT_METADATA if cell.metadata.get(k)})
        cell.source = cell.source.rstrip("\n")
        if cell.cell_type == "code":
            cell.outputs = _joined_streams(cell.outputs)
            for output in cell.outputs:
                output.pop("transient", None)
                if "image/png" in output.get("data", {}):
                    png = base64.b64decode(output["data"]["image/png"])
                    output["data"]["image/png"] = base64.b64encode(few_colours(png)).decode()
                if "execution_count" in output:
                    output["execution_count"] = cell.execution_count
        name = _name(cell)
        number = 1
        cell.id = name
        while cell.id in taken:
            number += 1
            cell.id = f"{name}-{number}"
        taken.add(cell.id)
    nbformat.validate(nb)
    text = nbformat.writes(nb, version=nbformat.NO_CONVERT, indent=1, sort_keys=True)
    return text.rstrip("\n") + "\n"


def few_colours(png: bytes) -> bytes:
    """The picture with a palette of at most 256 colours: less than half the bytes, and the eye sees no difference.

    What has a palette already is returned as it is, and so is what would not get smaller.
    """
    with Image.open(io.BytesIO(png)) as picture:
        if picture.mode == "P":
            return png
        small = io.BytesIO()
        picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
            small, "PNG", optimize=True
        )
    return min(png, small.getvalue(), key=len)


def _name(cell: NotebookNode) -> str:
    """A cell's identifier: by its role, its heading, or else its content; never by its neighbours."""
    tags = cell.metadata.get("tags", [])
    for role in ("colab", "imports"):
        if role in tags:
            return role
    if "exercise" in cell.metadata:
        return "exercise-" + str(cell.metadata["exercise"]).replace(".", "-")
    heading = re.match(r"#+ +(.+)", cell.source) if cell.cell_type == "markdown" else None
    if heading:
        words = re.sub(r"[^a-z0-9]+", "-", heading[1].lower()).strip("-")[:48].rstrip("-")
        if words:
            return words
    return cell.cell_type + "-" + hashlib.sha256(cell.source.encode()).hexdigest()[:8]


def _joined_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of one stream as one output: where the kernel cuts it depends on the clock."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == last.output_type == "stream" and output["name"] == last["name"]:
            last["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def execute(
    path: Path,
    timeout: int = TIMEOUT,
    on_start: Callable[[int], None] | None = None,
    on_end: Callable[[], None] | None = None,
) -> NotebookNode:
    """Run a notebook in a fresh kernel, in its own folder.

    Args:
        path: the notebook; the file is not changed.
        timeout: seconds that one cell may take.
        on_start: called with the process number of the kernel when it is ready.
        on_end: called after the last cell; the kernel may be gone by then.

    Raises:
        NotebookError: a cell failed, took too long, or killed the kernel.
    """
    nb = read(path)
    at = 0

    def begin_cell(cell: NotebookNode, cell_index: int) -> None:
        nonlocal at
        at = cell_index

    def begin_notebook(notebook: NotebookNode) -> None:
        if on_start is not None:
            on_start(client.km.provisioner.pid)

    def end_notebook(notebook: NotebookNode) -> None:
        if on_end is not None:
            on_end()

    client = NotebookClient(
        nb,
        kernel_manager_class=Kernel,
        kernel_name="python3",
        # errors only: by default every start is told to be unencrypted, although it stays on this machine
        extra_arguments=["--IPKernelApp.log_level=40"],
        timeout=timeout,
        record_timing=False,
        resources={"metadata": {"path": str(path.resolve().parent)}},
        on_cell_start=begin_cell,
        on_notebook_start=begin_notebook,
        on_notebook_complete=end_notebook,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        # the error's own text holds the cell's source and the traceback
        raise NotebookError(f"{path.name}, cell {at}: {error.ename}: {error.evalue}\n\n{error}") from error
    except CellTimeoutError as error:
        raise NotebookError(f"{path.name}, cell {at}: no end after {timeout} s\n\n{nb.cells[at].source}") from error
    except DeadKernelError as error:
        raise NotebookError(f"{path.name}, cell {at}: the kernel died\n\n{nb.cells[at].source}") from error
    return nb


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute the notebooks and write them in canonical form.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of the book if none is named")
    parser.add_argument("--check", action="store_true", help="only say which are not in canonical form")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds that a cell may take")
    options = parser.parse_args(arguments)

    paths = options.notebooks or notebooks()
    missing = [str(p) for p in paths if not p.is_file()]
    if missing:
        print(f"no such notebook: {', '.join(missing)}", file=sys.stderr)
        return 2
    prepare_environment()
    failed = 0
    for path in paths:
        before = path.read_text(encoding="utf-8")
        if options.check:
            good = canonical(read(path)) == before
            failed += not good
            print(f"{path.name}: {'in canonical form' if good else 'not in canonical form'}")
            continue
        try:
            write(execute(path, options.timeout), path)
        except NotebookError as error:
            failed += 1
            print(f"{error}\n\n{path.name} is left as it was", file=sys.stderr)
            continue
        print(
            f"{path.name}: {'unchanged' if path.read_text(encoding='utf-8') == before else 'written'}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
