"""The form of the notebooks, and that each rule on it notices what it is there for; nothing is executed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_notebooks
import nbformat
import pytest
import yaml
from check_notebooks import LEVELS, RULES, Notebook
from measure import cost_line, read_costs
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from run_notebooks import canonical, notebooks
from set_address import colab_cell

ROOT = Path(__file__).resolve().parents[1]
SECONDS_A_NOTEBOOK = 40  # on average; fifteen notebooks then take ten minutes


def toc_files(node: Any) -> list[str]:
    """Every document that the table of contents names, in its order."""
    if isinstance(node, list):
        return [name for item in node for name in toc_files(item)]
    if not isinstance(node, dict):
        return []
    return [name for key, value in node.items() for name in ([value] if key in ("file", "root") else toc_files(value))]


def test_there_are_notebooks() -> None:
    assert notebooks(), "no notebooks: every test of them would pass"


def test_toc_lists_every_notebook_in_order() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [name for name in toc_files(toc) if name.startswith("notebooks/")]
    assert listed == [f"notebooks/{path.stem}" for path in notebooks()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebook(path: Path, rule: check_notebooks.Rule) -> None:
    assert list(rule(check_notebooks.load(path))) == []


def test_costs_are_those_of_the_notebooks() -> None:
    costs = read_costs()
    assert sorted(costs) == [path.stem for path in notebooks()]
    assert sum(int(cost["seconds"]) for cost in costs.values()) <= SECONDS_A_NOTEBOOK * len(costs)


# A small notebook that follows every rule, and for each rule notebooks that break it.

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
COST: dict[str, int | str] = {"seconds": 12, "peak_mib": 610, "cores": 2, "torch": "2.14.1"}
HEAD = f"""# A title

A paragraph that says what the chapter is about.

**You will be able to**

- do one thing,
- and another.

**You need** chapter 1.

{cost_line(COST)}"""


def exercise_cells(number: str, level: str) -> list[NotebookNode]:
    hint = f"<details><summary>Hint for {number}</summary>\n\nThink.\n\n</details>"
    solution = "Explanation.\n\n```python\ndef f(x):\n    return x\n```"
    return [
        new_markdown_cell(f"### Exercise {number} · {level}\n\nWrite it.\n\n{hint}"),
        new_code_cell(
            f'def f(x):\n    ...  # your code here\n\n\ncheck("{number}", f)',
            metadata={"tags": ["exercise"], "exercise": number},
            outputs=[new_output("stream", name="stdout", text="no answer yet\n")],
        ),
        new_markdown_cell(f"<details><summary>Solution of {number}</summary>\n\n{solution}\n\n</details>"),
    ]


def good() -> NotebookNode:
    """A notebook that follows every rule."""
    figure = new_output("display_data", data={"image/png": PNG, "text/plain": "<Figure>"})
    nb = new_notebook()
    nb.cells = [
        new_markdown_cell(HEAD),
        new_code_cell(colab_cell(None), metadata={"tags": ["colab"]}),
        new_code_cell("from diffbook.notebook import setup\n\nsetup()", metadata={"tags": ["imports"]}),
        new_markdown_cell("## A section\n\nText with $\\mathcal{N}(0, 1)$ and a path: `notebooks/01.ipynb`."),
        new_code_cell(
            "plt.plot([1, 2])\nplt.show()",
            metadata={"mystnb": {"image": {"alt": "A line that rises from one to two."}}},
            outputs=[figure],
        ),
        new_code_cell("train()", metadata={"tags": ["nbval-ignore-output"]}),
        new_code_cell("assert loss < 0.5"),
    ]
    for k, level in enumerate(LEVELS, start=1):
        nb.cells += exercise_cells(f"2.{k}", level)
    return nb


def as_stored(nb: NotebookNode) -> Notebook:
    """The notebook as it would be read from its file, executed from top to bottom unless it says otherwise."""
    number = 0
    for cell in nb.cells:
        if cell.cell_type == "code":
            number += 1
            cell.execution_count = cell.execution_count or number
    return Notebook("02_planted", canonical(nb), address=None, cost=COST)


def cell_with(nb: NotebookNode, text: str) -> NotebookNode:
    found = [cell for cell in nb.cells if text in cell.source]
    assert found, text
    return found[0]


def replaced(old: str, new: str) -> Callable[[NotebookNode], None]:
    """A change of one cell's source."""

    def change(nb: NotebookNode) -> None:
        cell = cell_with(nb, old)
        cell.source = cell.source.replace(old, new, 1)

    return change


def output_added(text: str, *fields: Any) -> Callable[[NotebookNode], None]:
    """One more output under the last cell before the exercises."""

    def change(nb: NotebookNode) -> None:
        kind, values = fields or ("stream", {"name": "stdout", "text": text})
        cell_with(nb, "assert loss").outputs.append(new_output(kind, **values))

    return change


def metadata_set(text: str, **metadata: Any) -> Callable[[NotebookNode], None]:
    def change(nb: NotebookNode) -> None:
        cell_with(nb, text).metadata = nbformat.from_dict(metadata)

    return change


def cell_removed(text: str) -> Callable[[NotebookNode], None]:
    def change(nb: NotebookNode) -> None:
        nb.cells.remove(cell_with(nb, text))

    return change


def exercises_added(count: int) -> Callable[[NotebookNode], None]:
    def change(nb: NotebookNode) -> None:
        for k in range(count):
            nb.cells += exercise_cells(f"2.{4 + k}", LEVELS[0])

    return change


def swapped_order(nb: NotebookNode) -> None:
    cell_with(nb, "train()").execution_count = 5
    cell_with(nb, "assert loss").execution_count = 4


def second_figure(nb: NotebookNode) -> None:
    cell = cell_with(nb, "plt.plot")
    cell.outputs.append(cell.outputs[0])


def same_alt_twice(nb: NotebookNode) -> None:
    nb.cells.append(nbformat.from_dict(cell_with(nb, "plt.plot")))


ERROR = {"ename": "ValueError", "evalue": "no", "traceback": []}
HTML = {"data": {"text/html": '<p><img src="data:image/png;base64,AAAA" alt="A plot"></p>'}}

PLANTED: dict[str, dict[str, Callable[[NotebookNode], None]]] = {
    "is_canonical": {},  # planted in the text, see below
    "was_run_in_order": {
        "another order": swapped_order,
        "an empty cell": replaced("train()", ""),
    },
    "has_no_errors": {
        "an error": output_added("", "error", ERROR),
        "a warning": output_added("", "stream", {"name": "stderr", "text": "UserWarning: x\n"}),
    },
    "tells_nothing_of_the_machine": {
        "home": output_added("saved to /home/ada/x.png\n"),
        "start of a line": output_added("done\n/tmp/x\n"),
        "a warning's place": output_added("lib/python3.11/site-packages/torch/a.py:3\n"),
        "a result": output_added("", "execute_result", {"data": {"text/plain": "PosixPath('/root/x')"}}),
        "Windows": output_added("C:\\Users\\ada\n"),
        "macOS": output_added("saved to /Users/ada/x.png\n"),
        "in the text": replaced("A paragraph", "See /root/notes. A paragraph"),
        "in the source": replaced("train()", "train('/home/ada/data')"),
    },
    "holds_no_secrets": {
        "a token in the source": replaced("train()", f"login('hf_{30 * 'aB1'}')"),
        "a token in an output": output_added(f"ghp_{36 * 'x'}\n"),
        "an address with a password": replaced("A paragraph", "https://ada:12345@example.org A paragraph"),
        "a password": replaced("train()", 'login(token="correcthorse")'),
        "in JSON": output_added("", "display_data", {"data": {"text/plain": '{"api_key": "0123456789"}'}}),
        "a key": output_added("-----BEGIN OPENSSH " + "PRIVATE KEY-----\n"),
        "of a cloud": output_added("AKIA" + "IOSFODNN7EXAMPLE\n"),
        "signed": output_added(f"eyJ{12 * 'a'}.eyJ{12 * 'b'}.{12 * 'c'}\n"),
    },
    "figures_have_texts": {
        "none": metadata_set("plt.plot", tags=["hide-input"]),
        "too short": metadata_set("plt.plot", mystnb={"image": {"alt": "A line."}}),
        "two figures": second_figure,
        "twice the same": same_alt_twice,
        "in HTML": output_added("", "display_data", HTML),
    },
    "ends_without_semicolon": {"a semicolon": replaced("plt.show()", "plt.show();")},
    "is_small": {"large": output_added("x" * check_notebooks.MAX_BYTES)},
    "begins_with_its_head": {
        "no title": replaced("# A title", "A title"),
        "no paragraph": replaced("A paragraph that says what the chapter is about.\n\n", ""),
        "one thing": replaced("- and another.", "and another."),
        "no needs": replaced("**You need** chapter 1.", "**You need**"),
        "code first": lambda nb: nb.cells.reverse(),
    },
    "costs_are_measured": {
        "typed by hand": replaced("12 s", "9 s"),
        "no markers": replaced("<!-- cost -->", ""),
    },
    "begins_with_its_setup": {
        "another Colab cell": replaced("import sys\n", "import sys\n\n!pip install diffbook\n"),
        "not tagged": metadata_set("google.colab"),
        "no imports": metadata_set("setup()"),
        "no setup": replaced("\n\nsetup()", ""),
    },
    "has_known_metadata": {
        "skipped": metadata_set("train()", tags=["nbval-skip"]),
        "misspelt": metadata_set("train()", tags=["hide_input"]),
        "a comment of nbval": replaced("train()", "# NBVAL_IGNORE_OUTPUT\ntrain()"),
    },
    "unchecked_outputs_are_followed_by_a_check": {
        "nothing checked": replaced("assert loss < 0.5", "loss = 0.4"),
        "only an exercise follows": cell_removed("assert loss"),
        "at the end": lambda nb: nb.cells.append(new_code_cell("x", metadata={"tags": ["nbval-ignore-output"]})),
    },
    "exercises_are_complete": {
        "too few": lambda nb: nb.cells.__delitem__(slice(-3, None)),
        "too many": exercises_added(4),
        "wrong number": replaced("### Exercise 2.3 ·", "### Exercise 2.5 ·"),
        "wrong chapter": replaced("### Exercise 2.1 ·", "### Exercise 3.1 ·"),
        "unknown level": replaced(LEVELS[0], "an easy one"),
        "a level is missing": replaced(LEVELS[2], LEVELS[1]),
        "other heading": replaced("### Exercise 2.1 ·", "## Exercise 2.1:"),
        "no text": replaced("Write it.\n\n", ""),
        "no hint": replaced("<details><summary>Hint for 2.2</summary>\n\nThink.\n\n</details>", ""),
        "another's hint": replaced("Hint for 2.2", "Hint for 2.1"),
        "empty hint": replaced("Think.", ""),
        "no stub": lambda nb: nb.cells.remove(nb.cells[-2]),
        "no metadata": metadata_set('check("2.1"', tags=["exercise"]),
        "no tag": metadata_set('check("2.1"', exercise="2.1"),
        "checks another": replaced('check("2.2"', 'check("2.1"'),
        "no solution": cell_removed("Solution of 2.3"),
        "solution of another": replaced("Solution of 2.3", "Solution of 2.2"),
        "solution without code": replaced("```python\ndef f(x):\n    return x\n```", "Easy."),
        "stub without exercise": lambda nb: nb.cells.append(exercise_cells("2.4", LEVELS[0])[1]),
    },
    "reads_everywhere": {
        "a directive": replaced("## A section", "## A section\n\n```{note}\nx\n```"),
        "with colons": replaced("## A section", "## A section\n\n:::{note}\nx\n:::"),
        "a macro": replaced("\\mathcal{N}", "\\N"),
    },
}


def test_every_rule_is_tested() -> None:
    assert list(PLANTED) == [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_good_notebook(rule: check_notebooks.Rule) -> None:
    assert list(rule(as_stored(good()))) == []


@pytest.mark.parametrize(
    ("rule", "fault"),
    [(rule, fault) for rule in RULES for fault in PLANTED[rule.__name__]],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_rule_notices(rule: check_notebooks.Rule, fault: str) -> None:
    nb = good()
    PLANTED[rule.__name__][fault](nb)
    assert list(rule(as_stored(nb)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text + "\n",
        lambda text: text.replace('"kernelspec": {', '"kernelspec": {\n   "extra": 1,', 1),
        lambda text: text.replace('"id": "colab"', '"id": "8f3a21bc"', 1),
        lambda text: text.replace('"metadata": {}', '"metadata": {"execution": {"iopub.status.busy": "now"}}', 1),
    ],
    ids=["newline", "metadata of the file", "random identifier", "time stamps"],
)
def test_rule_notices_another_form(spoil: Callable[[str], str]) -> None:
    book = as_stored(good())
    spoilt = dataclasses.replace(book, text=spoil(book.text))
    assert spoilt.text != book.text
    assert list(check_notebooks.is_canonical(spoilt))


def test_rule_notices_a_notebook_that_was_not_executed() -> None:
    nb = good()
    for cell in nb.cells:
        cell.pop("execution_count", None)
        if cell.cell_type == "code":
            cell.execution_count = None
    book = Notebook("02_planted", canonical(nb), None, COST)
    assert list(check_notebooks.was_run_in_order(book))


def test_rule_notices_a_notebook_that_was_not_measured() -> None:
    assert list(check_notebooks.costs_are_measured(dataclasses.replace(as_stored(good()), cost=None)))


def test_rule_notices_a_colab_cell_for_another_address() -> None:
    book = dataclasses.replace(as_stored(good()), address="https://github.com/owner/name")
    assert list(check_notebooks.begins_with_its_setup(book))
