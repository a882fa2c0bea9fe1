"""The form that every notebook of the book has, as rules; nothing is executed.

    python tools/check_notebooks.py [NOTEBOOK ...]

A rule is a function that yields what is wrong; its first line of documentation says what it asks for.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
from measure import MARKED, cost_line, read_costs
from nbformat import NotebookNode
from run_notebooks import canonical, notebooks
from set_address import colab_cell, repository_address

MAX_BYTES = 1_500_000
KNOWN_TAGS = {
    "colab",
    "exercise",
    "hide-input",
    "hide-output",
    "remove-cell",
    "imports",
    "nbval-ignore-output",
    "remove-input",
    "scroll-output",
}
LEVELS = ("a step of the derivation", "a function to write", "a planted bug")
FOLDER = r"/(?:home|root|tmp|Users|usr|opt|var|private|mnt|content)/\w|[A-Za-z]:\\+Users|site-packages"

# How keys and passwords look that give access to something.
SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(?:gh[pousr]_|github_pat_|glpat-|hf_|pypi-|npm_|xox[abprs]-|sk-|AIza)[A-Za-z0-9_-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"  # a signed web token
    r"|https?://[^\s/:@\"'<>]+:[^\s/@\"'<>]+@"
    r"|\b(?i:password|passwd|secret|token|api_?key)\\?[\"']?\s*[:=]\s*\\?[\"'][^\s\"'\\]{8,}\\?[\"']"
)


@dataclass(frozen=True)
class Notebook:
    """A notebook as it is stored, and what it is checked against."""

    name: str
    text: str
    address: str | None
    cost: dict[str, int | str] | None

    @cached_property
    def nb(self) -> NotebookNode:
        node: NotebookNode = nbformat.reads(self.text, as_version=4)
        return node

    @property
    def cells(self) -> list[NotebookNode]:
        cells: list[NotebookNode] = self.nb.cells
        return cells

    @property
    def code(self) -> list[NotebookNode]:
        return [cell for cell in self.cells if cell.cell_type == "code"]

    @property
    def markdown(self) -> list[NotebookNode]:
        return [cell for cell in self.cells if cell.cell_type == "markdown"]

    @property
    def outputs(self) -> list[NotebookNode]:
        return [output for cell in self.code for output in cell.outputs]


def load(path: Path) -> Notebook:
    """A notebook of the book."""
    text = path.read_text(encoding="utf-8")
    return Notebook(path.stem, text, repository_address(), read_costs().get(path.stem))


def tags(cell: NotebookNode) -> list[str]:
    found: list[str] = cell.metadata.get("tags", [])
    return found


def start(cell: NotebookNode) -> str:
    """How a message names a cell: by its first line."""
    return repr(cell.source.split("\n", 1)[0][:70])


def is_canonical(book: Notebook) -> Iterator[str]:
    """The file is in the canonical form that tools/run_notebooks.py writes."""
    if canonical(book.nb) != book.text:
        yield "not in canonical form; run make notebooks"


def was_run_in_order(book: Notebook) -> Iterator[str]:
    """Every code cell was executed, from the first to the last, in one kernel."""
    counts = [cell.execution_count for cell in book.code]
    if counts != list(range(1, len(counts) + 1)):
        yield f"executed as {counts}; run make notebooks"
    for cell in book.code:
        if not cell.source.strip():
            yield "an empty code cell"


def has_no_errors(book: Notebook) -> Iterator[str]:
    """No cell stores an error, and none wrote on stderr."""
    for cell in book.code:
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {start(cell)} stores an error: {output.ename}: {output.evalue}"
            elif output.get("name") == "stderr":
                yield f"cell {start(cell)} wrote on stderr: {output.text[:100]!r}"


def tells_nothing_of_the_machine(book: Notebook) -> Iterator[str]:
    """No path of the machine that ran it."""
    for cell in book.cells:
        shown = [cell.source]
        for output in cell.get("outputs", []):
            data = {kind: v for kind, v in output.get("data", {}).items() if not kind.startswith("image/")}
            text = json.dumps([output.get("text"), output.get("evalue"), data], ensure_ascii=False)
            shown.append(re.sub(r"base64,[^\"]+", "base64", text))
        for text in shown:
            found = re.search(rf"(?:(?<![\w.:/])|(?<=\\n)){FOLDER}.{{0,40}}", text)
            if found:
                yield f"cell {start(cell)} names a folder of a machine: {found[0]!r}"


def without_pictures(text: str) -> str:
    """A file's text without what is base64, in which chance writes everything."""
    return re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)


def holds_no_secrets(book: Notebook) -> Iterator[str]:
    """No key, token or password anywhere in the file."""
    for found in SECRET.finditer(without_pictures(book.text)):
        yield f"holds what looks like a secret: {found[0][:10]}…"


def figures_have_texts(book: Notebook) -> Iterator[str]:
    """At most one figure a cell, each with a text alternative of more than 20 characters."""
    seen: set[str] = set()
    for cell in book.code:
        figures = sum("image/png" in o.get("data", {}) for o in cell.outputs)
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if figures > 1:
            yield f"cell {start(cell)} shows {figures} figures; one alternative text cannot serve them"
        if figures and len(alt) <= 20:
            yield f"cell {start(cell)} has no text alternative of more than 20 characters: {alt!r}"
        if figures and alt in seen:
            yield f"cell {start(cell)} has the text alternative of another figure: {alt!r}"
        if figures:
            seen.add(alt)
        for output in cell.outputs:
            for image in re.findall(r"<img\b[^>]*>", output.get("data", {}).get("text/html", "")):
                found = re.search(r'\balt="([^"]*)"', image)
                if not found or len(found[1]) <= 20:
                    yield f"cell {start(cell)}: an image in its HTML has no text alternative: {image[:80]}"


def ends_without_semicolon(book: Notebook) -> Iterator[str]:
    """No cell ends with a semicolon: nbval keeps no history, so it would not hide the output there."""
    for cell in book.code:
        if cell.source.rstrip().endswith(";"):
            yield f"cell {start(cell)} ends with a semicolon"


def is_small(book: Notebook) -> Iterator[str]:
    """The file is not large."""
    size = len(book.text.encode())
    if size > MAX_BYTES:
        yield f"{size} bytes; at most {MAX_BYTES}"


def begins_with_its_head(book: Notebook) -> Iterator[str]:
    """Title, a paragraph, what the reader will be able to do, what is needed, and the measured cost."""
    first = book.cells[0]
    if first.cell_type != "markdown":
        yield "the first cell is not text"
        return
    blocks = [block.strip() for block in re.split(r"\n\s*\n", first.source)]
    if not re.match(r"# \S", blocks[0]):
        yield "the first cell does not begin with '# Title'"
    if len(blocks) < 2 or blocks[1].startswith(("**", "<!--", "#")):
        yield "no paragraph after the title"
    able = first.source.partition("**You will be able to**")[2].partition("**You need**")[0]
    if len(re.findall(r"^[-*] \S", able, re.MULTILINE)) < 2:
        yield "no list of at least two things after '**You will be able to**' (and before '**You need**')"
    needs = MARKED.sub("", first.source.partition("**You need**")[2])
    if len(needs.strip()) < 10:
        yield "nothing after '**You need**'"


def costs_are_measured(book: Notebook) -> Iterator[str]:
    """The sentence on run time and memory is the one that follows from notebooks/costs.json."""
    if book.cost is None:
        yield "not in notebooks/costs.json; run make measure"
        return
    lines = MARKED.findall(book.cells[0].source)
    if lines != [cost_line(book.cost)]:
        yield f"its head says {lines}, measured was {cost_line(book.cost)!r}; run make measure"


def begins_with_its_setup(book: Notebook) -> Iterator[str]:
    """The first code cell is the Colab cell, the second imports and calls setup()."""
    if not book.code or book.code[0].source != colab_cell(book.address) or "colab" not in tags(book.code[0]):
        yield "the first code cell is not the one that tools/set_address.py writes; run make address"
    elif book.code[0].outputs:
        yield "the Colab cell printed something"
    if len(book.code) < 2 or "imports" not in tags(book.code[1]):
        yield "the second code cell has no tag 'imports'"
    elif not re.search(r"^setup\(", book.code[1].source, re.MULTILINE):
        yield "the cell with the imports does not call setup()"


def has_known_metadata(book: Notebook) -> Iterator[str]:
    """Only tags that mean something, and none of nbval's comments that switch a comparison off."""
    for cell in book.cells:
        unknown = set(tags(cell)) - KNOWN_TAGS
        if unknown:
            yield f"cell {start(cell)} has unknown tags {sorted(unknown)}"
        marked = re.search(r"(NBVAL|PYTEST_VALIDATE)_[A-Z_]+", cell.source)
        if marked:
            yield f"cell {start(cell)} has nbval's comment {marked[0]}; use the tag nbval-ignore-output"


def unchecked_outputs_are_followed_by_a_check(book: Notebook) -> Iterator[str]:
    """After cells with the tag nbval-ignore-output comes a cell whose assertion or output is checked."""
    ignored = None
    for cell in book.code:
        if "nbval-ignore-output" in tags(cell):
            ignored = cell
        elif ignored is not None:
            asserts = any(isinstance(node, ast.Assert) for node in _statements(cell.source))
            if "exercise" in tags(cell) or not (asserts or cell.outputs):
                yield f"cell {start(ignored)} is not compared, and the next cell that is checks nothing"
            ignored = None
    if ignored is not None:
        yield f"cell {start(ignored)} is not compared, and no cell after it is"


def _statements(source: str) -> Iterator[ast.AST]:
    """The syntax tree of a cell, without lines that only IPython understands."""
    plain = "\n".join("pass" if line.startswith(("%", "!")) else line for line in source.split("\n"))
    return ast.walk(ast.parse(plain))


def exercises_are_complete(book: Notebook) -> Iterator[str]:
    """Three to six exercises, at every level, each with text, hint, stub with its check, and solution."""
    headings: list[tuple[int, re.Match[str]]] = []
    for position, cell in enumerate(book.cells):
        if cell.cell_type == "markdown" and re.search(r"^#+ Exercise", cell.source, re.MULTILINE):
            found = re.match(r"### Exercise (\d+)\.(\d+) · (.+)\n", cell.source)
            if not found:
                yield f"cell {start(cell)} does not begin with '### Exercise 1.2 · level'"
                continue
            headings.append((position, found))
    if not 3 <= len(headings) <= 6:
        yield f"{len(headings)} exercises; a chapter has three to six"
    chapter = int(book.name.split("_")[0])
    numbers = [(int(h[1]), int(h[2])) for _, h in headings]
    if numbers != [(chapter, k + 1) for k in range(len(numbers))]:
        yield f"exercises are numbered {numbers} in chapter {chapter}"
    levels = [h[3].strip() for _, h in headings]
    for level in sorted(set(levels) - set(LEVELS)):
        yield f"unknown level {level!r}; there are {', '.join(LEVELS)}"
    for level in LEVELS:
        if level not in levels:
            yield f"no exercise is {level}"
    for position, found in headings:
        yield from _exercise(book, position, f"{found[1]}.{found[2]}")
    named = [cell.metadata.get("exercise") for cell in book.cells if cell.metadata.get("exercise")]
    if len(named) != len(headings):
        yield f"{len(headings)} exercises, but {len(named)} cells with the metadata 'exercise'"


def _exercise(book: Notebook, position: int, number: str) -> Iterator[str]:
    text, *rest = book.cells[position].source.split("<details>", 1)
    if len(text.strip().split("\n")) < 2:
        yield f"exercise {number} has no text"
    hint = re.escape(f"<summary>Hint for {number}</summary>")
    if not rest or not re.fullmatch(rf"{hint}\n\n\S.*\n\n</details>\s*", rest[0], re.DOTALL):
        yield f"exercise {number} has no hint '<details><summary>Hint for {number}</summary>', blank lines inside"
    following = book.cells[position + 1 : position + 3]
    if len(following) < 2:
        yield f"exercise {number} has no stub and solution after it"
        return
    stub, solution = following
    if stub.cell_type != "code" or "exercise" not in tags(stub) or stub.metadata.get("exercise") != number:
        yield f'exercise {number}: the next cell is no code with tag \'exercise\' and metadata "exercise": "{number}"'
    elif not re.search(rf'^check\(\s*"{re.escape(number)}"', stub.source, re.MULTILINE):
        yield f'exercise {number}: its stub does not call check("{number}", ...)'
    opening = f"<details><summary>Solution of {number}</summary>\n\n"
    if solution.cell_type != "markdown" or not solution.source.startswith(opening):
        yield f"exercise {number}: no cell with the solution after the stub"
    elif not re.search(r"```python\n.+?\n```", solution.source, re.DOTALL):
        yield f"exercise {number}: its solution shows no Python"
    elif not solution.source.rstrip().endswith("\n\n</details>"):
        yield f"exercise {number}: its solution does not end with a blank line and </details>"


def reads_everywhere(book: Notebook) -> Iterator[str]:
    """Text without what only the book's pages understand: directives, and macros of theirs in formulas."""
    for cell in book.markdown:
        found = re.search(r"^(```+\{|:::+)", cell.source, re.MULTILINE)
        if found:
            yield f"cell {start(cell)} has the directive {found[0]!r}"
        macro = re.search(r"\\(E|KL|N|norm)(?![A-Za-z])", cell.source)
        if macro:
            yield f"cell {start(cell)} has the macro {macro[0]}, which JupyterLab and Colab do not know"


Rule = Callable[[Notebook], Iterator[str]]
RULES: tuple[Rule, ...] = (
    is_canonical,
    was_run_in_order,
    has_no_errors,
    tells_nothing_of_the_machine,
    holds_no_secrets,
    figures_have_texts,
    ends_without_semicolon,
    is_small,
    begins_with_its_head,
    costs_are_measured,
    begins_with_its_setup,
    has_known_metadata,
    unchecked_outputs_are_followed_by_a_check,
    exercises_are_complete,
    reads_everywhere,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the form of the notebooks.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of the book if none is named")
    options = parser.parse_args(arguments)
    found = 0
    for path in options.notebooks or notebooks():
        for rule in RULES:
            for problem in rule(load(path)):
                found += 1
                print(f"{path.name}: {problem}")
    print(f"{found} problem(s)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
