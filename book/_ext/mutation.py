"""The directive ``mutation-testing``: what ``make mutants`` found, on the page "Verified equations".

``tools/mutants.py`` plants faults in the package and writes tests/mutants/results.json; survivors.toml beside it says
of each fault that no test noticed why none can. Both are read here, and compared with the present code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SHOWN = 16  # characters on both sides of a change


def state_of(path: Path) -> str:
    """A hash of a module's code; its docstrings, comments and form do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def reasons(path: Path) -> dict[tuple[str, str, str], str]:
    """Why no test can kill a survivor: (function, lines before, lines after) → a sentence."""
    groups = tomllib.loads(path.read_text(encoding="utf-8")).get("group", [])
    return {(m["function"], m["before"], m["after"]): group["why"] for group in groups for m in group["mutants"]}


def table(results: dict[str, Any], package: Path) -> str:
    """The kill rates in Markdown, with a warning if the code is not the one that was measured."""
    rows = [(f"`{name}.py`", c["mutants"], c["killed"]) for name, c in results["modules"].items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = ["| module | faults | noticed | share |", "|---|--:|--:|--:|"]
    lines += [f"| {name} | {planted} | {killed} | {killed / planted:.1%} |" for name, planted, killed in rows]
    lines += [
        "",
        f"Measured on {results['date']} by `make mutants`: {results['tests']} tests, mutmut {results['mutmut']}, "
        f"PyTorch {results['torch']}, {results['processes']} processes.",
    ]
    old = [name for name, c in results["modules"].items() if c["state"] != state_of(package / f"{name}.py")]
    if old:
        names = ", ".join(f"`{name}.py`" for name in old)
        lines += ["", f"**Since then {names} changed:** for that the numbers are those of an earlier state."]
    return "\n".join(lines)


def survivors(results: dict[str, Any], known: dict[tuple[str, str, str], str]) -> str:
    """The faults that no test noticed, by reason, in Markdown."""
    grouped: dict[str, list[str]] = {}
    for m in results["survivors"]:
        why = known.get((m["function"], m["before"], m["after"]), "Not yet explained.")
        before, after = shortened(m["before"], m["after"])
        grouped.setdefault(why, []).append(f"- `{m['function']}`, line {m['line']}: `{before}` → `{after}`")
    return "\n\n".join("\n".join([why, "", *items]) for why, items in grouped.items()) or "There are none."


def shortened(before: str, after: str) -> tuple[str, str]:
    """Both texts without what they have in common at the beginning and the end, but for a few characters."""
    shorter = min(len(before), len(after))
    head = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    tail = next((i for i in range(shorter - head) if before[-1 - i] != after[-1 - i]), shorter - head)
    begin = head - SHOWN if head > SHOWN + 1 else 0
    cut = tail - SHOWN if tail > SHOWN + 1 else 0
    texts = (text[begin : len(text) - cut] for text in (before, after))
    first, second = ("…" * (begin > 0) + text + "…" * (cut > 0) for text in texts)
    return first, second or "(nothing)"


class MutationTesting(SphinxDirective):
    """``table`` for the numbers, ``survivors`` for the faults that were not noticed."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        folder = root / "tests" / "mutants"
        for name in ("results.json", "survivors.toml"):
            self.env.note_dependency(str(folder / name))
        if not (folder / "results.json").is_file():
            return self.parse_text_to_nodes("Not measured yet: that is done by `make mutants`.")
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        if self.arguments == ["table"]:
            text = table(results, root / self.config.proofs_package)
        elif self.arguments == ["survivors"]:
            text = survivors(results, reasons(folder / "survivors.toml"))
        else:
            raise self.error(f"mutation-testing shows table or survivors, not {self.arguments[0]!r}")
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, object]:
    app.add_directive("mutation-testing", MutationTesting)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
