"""Make the repository's address known, or write anew what follows from it.

    python tools/set_address.py [https://github.com/owner/name | --remove]

The address has one source: ``Repository`` under ``[project.urls]`` in pyproject.toml. From it come the first code
cell of each notebook (on Google Colab it installs the package) and the book's launch buttons and links.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import nbformat
from run_notebooks import ROOT, notebooks, read, write

PYPROJECT = ROOT / "pyproject.toml"
VALID = re.compile(r"https://[A-Za-z0-9.-]+(?:/[A-Za-z0-9_.-]+){2,}")

_ON_COLAB = """\
# Google Colab starts without the book's package; everywhere else this cell does nothing.
import importlib.util
import sys

if "google.colab" in sys.modules and importlib.util.find_spec("diffbook") is None:
"""
_INSTALL = """\
    import subprocess

    package = "diffbook @ git+{address}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)"""
_EXPLAIN = """\
    raise ModuleNotFoundError(
        "The book's package is missing. Run this in a new cell, with the address of the repository "
        "from which you have this notebook: %pip install git+https://github.com/owner/name"
    )"""


def colab_cell(address: str | None) -> str:
    """The source of the first code cell of every notebook."""
    return _ON_COLAB + (_INSTALL.format(address=address) if address else _EXPLAIN)


def validated(address: str) -> str:
    """The address in its one form.

    Raises:
        ValueError: if it is not the https address of a repository.
    """
    plain = address.strip().rstrip("/").removesuffix(".git")
    if not VALID.fullmatch(plain):
        raise ValueError(f"{address!r} is no address of a repository; it looks like https://github.com/owner/name")
    return plain


def repository_address(pyproject: Path = PYPROJECT) -> str | None:
    """The address in pyproject.toml, or None where none is set."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    address: str | None = project.get("urls", {}).get("Repository")
    return address


def store(address: str | None, pyproject: Path = PYPROJECT) -> None:
    """Write the address into pyproject.toml, or take it out; the rest of the file stays as it is."""
    text = pyproject.read_text(encoding="utf-8")
    text = re.sub(r'^Repository = ".*"\n', "", text, flags=re.MULTILINE)
    if address is None:
        text = re.sub(r"^\[project\.urls\]\n\s*(?=^\[|\Z)", "", text, flags=re.MULTILINE)
    elif "[project.urls]\n" in text:
        text = text.replace("[project.urls]\n", f'[project.urls]\nRepository = "{address}"\n')
    else:
        text = text.replace("[project.scripts]\n", f'[project.urls]\nRepository = "{address}"\n\n[project.scripts]\n')
    if tomllib.loads(text)["project"].get("urls", {}).get("Repository") != address:
        raise ValueError(f"{pyproject} could not be edited: it needs a line [project.scripts] or [project.urls]")
    pyproject.write_text(text, encoding="utf-8", newline="\n")


def update_notebook(path: Path, address: str | None) -> str:
    """Write the Colab cell of one notebook; returns what was done."""
    nb = read(path)
    source = colab_cell(address)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    if code and "colab" in code[0].metadata.get("tags", []):
        if code[0].source == source:
            return "unchanged"
        code[0].source = source
        done = "written"
    else:
        nb.cells.insert(1, nbformat.v4.new_code_cell(source, metadata={"tags": ["colab"]}))
        done = "cell added; execute the notebook"
    write(nb, path)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the repository's address known to the package and the book.")
    parser.add_argument("address", nargs="?", help="if left out, the notebooks are brought up to date")
    parser.add_argument("--remove", action="store_true", help="forget the address")
    options = parser.parse_args(arguments)
    try:
        if options.remove:
            store(None)
        elif options.address:
            store(validated(options.address))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    address = repository_address()
    print(f"address: {address or 'none (make address URL=https://github.com/owner/name sets one)'}")
    for path in notebooks():
        print(f"{path.name}: {update_notebook(path, address)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
