"""Run every check of the project, or one of them: what `make test` does.

    python tools/checks.py [lint | types | unit | notebooks | book | pages]

Each notebook is executed once, by nbval, which compares its outputs and figures with the stored ones; the book is
then built from the stored outputs that have just been confirmed. All steps run, also after one has failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import browser

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable


@dataclass(frozen=True)
class Step:
    """One check: its name, what it says of itself, and the commands that have to succeed."""

    name: str
    about: str
    commands: tuple[tuple[str, ...], ...]


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", *arguments)


NBVAL = (
    "--nbval",
    "--nbval-current-env",
    "--nbval-cell-timeout=300",
    "--nbval-sanitize-with=tests/nbval_sanitize.cfg",
)

STEPS = (
    Step(
        "lint",
        "ruff: style and form of the code, notebooks included",
        ((PYTHON, "-m", "ruff", "check", "."), (PYTHON, "-m", "ruff", "format", "--check", ".")),
    ),
    Step("types", "mypy: types of the package", ((PYTHON, "-m", "mypy"),)),
    Step(
        "unit",
        "tests of the package, the equations, the exercises, the form of notebooks and repository",
        (_pytest("-q", "-n2", "tests", "--ignore=tests/pages"),),
    ),
    # nbval runs a notebook's cells in one kernel, so a notebook must not be split between the two workers
    Step(
        "notebooks",
        "nbval: execute every notebook, compare outputs and figures",
        (_pytest("-q", "-n2", "--dist=loadfile", *NBVAL, "notebooks"),),
    ),
    Step("book", "build the book from the stored outputs", ((PYTHON, "tools/build_book.py"),)),
    Step("pages", "the built pages: links, assets, accessibility", (_pytest("-n2", "tests/pages"),)),
)


def install_browser_in_ci() -> None:
    """In continuous integration the accessibility checks are never left out: get the browser they need."""
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if os.environ.get("CI") == "true" and browser.find() is None and as_root and shutil.which("apt-get"):
        print("== installing Chromium (CI=true)", flush=True)
        subprocess.run(["sh", "tools/install_browser.sh"], cwd=ROOT, stdin=subprocess.DEVNULL, check=False)


def run(steps: Sequence[Step]) -> dict[str, tuple[bool, float]]:
    """Run the steps in order; for each whether it passed, and its seconds."""
    results: dict[str, tuple[bool, float]] = {}
    for step in steps:
        print(f"\n== {step.name} · {step.about}", flush=True)
        began = time.perf_counter()
        # all commands of a step run, so that one run tells everything
        codes = [
            subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
            for command in step.commands
        ]
        passed = not any(codes)
        results[step.name] = passed, time.perf_counter() - began
        print(f"== {step.name}: {'passed' if passed else 'FAILED'} in {results[step.name][1]:.0f} s", flush=True)
    return results


def box(lines: Sequence[str]) -> str:
    """The lines in a frame."""
    width = max(map(len, lines))
    edge = "+" + "-" * (width + 2) + "+"
    return "\n".join([edge, *(f"| {line:{width}} |" for line in lines), edge])


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    parser = argparse.ArgumentParser(description="Run every check of the project, or the named ones.")
    names = [step.name for step in steps]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}; all if none is named")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.steps if name not in names]
    if unknown:
        parser.error(f"no step {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [step for step in steps if not options.steps or step.name in options.steps]

    with_pages = any(step.name == "pages" for step in chosen)
    if with_pages:
        install_browser_in_ci()
    results = run(chosen)

    print("\nSummary")
    for name, (passed, seconds) in results.items():
        advice = "" if passed else f"   alone: make test ONLY={name}"
        print(f"  {name:10} {'passed' if passed else 'FAILED'} {seconds:5.0f} s{advice}")
    if with_pages and browser.find() is None:
        print(
            box(
                [
                    "NOT CHECKED: accessibility of the pages. There is no Chromium or Chrome here.",
                    "To get one (Debian, Ubuntu): make browser",
                    "Elsewhere install Chromium or Google Chrome, then: make test ONLY=pages",
                ]
            )
        )
    failed = [name for name, (passed, _) in results.items() if not passed]
    print(f"{len(failed)} of {len(results)} steps failed: {', '.join(failed)}" if failed else "Every check passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
