"""Write constraints.txt: the exact version of everything that the project needs, as installed here.

    python tools/freeze.py

Follows the requirements of ``diffbook[book,test]`` through the installed packages, so that what happens to lie in
the environment besides does not get in. What torch brings for CUDA is left out: torch decides on it.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OF_TORCH = ("nvidia-", "cuda-", "triton")
HEADER = """\
# Exact versions of everything that diffbook[book,test] needs. The stored outputs of the notebooks are compared
# strictly, so they are compared under these versions. `make constraints` upgrades within the ranges of
# pyproject.toml and writes this file; then run `make notebooks` and `make test`.
# Not here: what torch brings for CUDA, and packages that only other systems need.
"""


def pins(*extras: str) -> dict[str, str]:
    """Name and version of everything that ``diffbook`` with these extras leads to, ``[book,test]`` if none is named."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [("diffbook", extra) for extra in ("", *(extras or ("book", "test")))]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or name.startswith(OF_TORCH):
            continue
        seen.add((name, extra))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"{name} is needed but not installed; run make env")
        if name != "diffbook":
            found[name] = package.version.split("+")[0]
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(needed.name), e) for e in ("", *needed.extras)]
    return dict(sorted(found.items()))


def main() -> int:
    versions = pins()
    text = HEADER + "".join(f"{name}=={version}\n" for name, version in versions.items())
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8", newline="\n")
    print(f"constraints.txt: {len(versions)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
