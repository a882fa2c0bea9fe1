"""Mutation testing: what is planted, what the stored results say, and how the book shows them."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import libcst as cst
import mutants
import mutation
import pytest

from diffbook import schedule

SOURCE = '''import torch


class Table:
    @property
    def root(self):
        """√α."""
        return self.alpha.sqrt()

    def check(self, t):
        if t < 1:
            raise ValueError(
                f"t = {t}"
            )


@torch.no_grad()
def walk(steps):
    for step in steps:
        yield step

'''


def planted(source: str) -> list[str]:
    """All mutants of an expression."""
    found = []

    class Visitor(cst.CSTVisitor):
        def on_visit(self, node: cst.CSTNode) -> bool:
            found.extend(
                tree.deep_replace(node, new).code
                for kind, operator in mutants.operators()
                if isinstance(node, kind)
                for new in operator(node)
            )
            return True

    tree = cst.parse_module(source)
    tree.visit(Visitor())
    return found


def test_decorators_are_written_out_and_messages_marked() -> None:
    """Line by line: none moves, so that a mutant is found where it is in the source."""
    old, new = SOURCE.split("\n"), mutants.to_mutate(SOURCE).split("\n")
    changed = {i + 1: line for i, (a, line) in enumerate(zip(old, new, strict=True)) if a != line}
    mark = "  # pragma: no mutate"
    assert changed == {
        5: "",
        9: "    root = property(root)",
        12: "            raise ValueError(" + mark,
        13: '                f"t = {t}"' + mark,
        14: "            )" + mark,
        17: "",
        21: "walk = torch.no_grad()(walk)",
    }
    with pytest.raises(ValueError, match="line 4: after a decorated function must come an empty line"):
        mutants.to_mutate("@a\ndef f():\n    pass\nx = 1\n")


def test_every_module_can_be_rewritten() -> None:
    for name in mutants.MODULES:
        source = Path(schedule.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        new = mutants.to_mutate(source)
        functions = [node for node in ast.walk(ast.parse(new)) if isinstance(node, ast.FunctionDef)]
        assert functions and not any(node.decorator_list for node in functions)
        assert new.count("\n") == source.count("\n")


def test_formulas_lose_their_functions() -> None:
    assert "a * x" in planted("a.sqrt() * x")
    assert "x" in planted("torch.sqrt(x)") and "x" in planted("math.log(x)") and "x" in planted("x.square()")
    assert planted("x.item()") == []


def test_signs_operators_and_numbers_move_and_nothing_becomes_none() -> None:
    found = planted("(1 - a[t - 1]) / f(x, y=2)")
    for expected in ("(1 + a[t - 1]) / f(x, y=2)", "(1 - a[t - 2]) / f(x, y=2)", "(1 - a[t - 1]) * f(x, y=2)"):
        assert expected in found
    assert "(1 - a[t - 1]) / f(x, )" in found or "(1 - a[t - 1]) / f(x)" in found
    assert not any("None" in code for code in found + planted("a = f(b)"))


def test_where_two_versions_differ() -> None:
    old = ["", "    @a", "    def f(x):", "        y = g(", "            1,", "            2,", "        )"]
    assert mutants.difference(old, [*old[:4], "            2,", *old[5:]]) == (2, "1,", "2,")
    assert mutants.difference(old, [*old[:3], "        y = g(2)"]) == (1, "y = g( 1, 2, )", "y = g(2)")


# what is stored


def stored() -> dict:
    return json.loads(mutants.RESULTS.read_text(encoding="utf-8"))


def test_every_survivor_is_explained_and_the_rates_suffice() -> None:
    """Of the stored results: whether they belong to the present code is said on the page, and is no fault."""
    results = stored()
    assert tuple(results["modules"]) == mutants.MODULES
    assert mutants.faults(results, mutation.reasons(mutants.REASONS)) == []
    counts = results["modules"].values()
    assert sum(c["mutants"] - c["killed"] for c in counts) == len(results["survivors"])


def test_faults_of_results_are_named() -> None:
    survivor = {"function": "a.f", "line": 3, "before": "x + 1", "after": "x - 1"}
    results = {"modules": {"a": {"mutants": 100, "killed": 94}}, "survivors": [survivor]}
    unexplained, low = mutants.faults(results, {})
    assert unexplained.startswith("a.f, line 3: no test notices") and low == "a: only 94 of 100 mutants are killed"
    known = {("a.f", "x + 1", "x - 1"): "It is the same.", ("a.g", "y", "z"): "So is this."}
    results["modules"]["a"]["killed"] = 95
    (idle,) = mutants.faults(results, known)
    assert idle.startswith("a.g: explained, but not a survivor")


# what the book shows


def test_the_table_says_when_the_code_has_changed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('def f(x):\n    """Says."""\n    return x + 1\n')
    counts = {"state": mutation.state_of(tmp_path / "a.py"), "mutants": 8, "killed": 7}
    rest = {"date": "2026-01-01", "tests": 5, "mutmut": "3", "torch": "2", "processes": 2}
    results = {"modules": {"a": counts}, **rest}
    assert "| `a.py` | 8 | 7 | 87.5% |" in mutation.table(results, tmp_path)
    (tmp_path / "a.py").write_text('def f(x):\n    """Says more."""\n    return x + 1  # the next\n')
    assert "earlier state" not in mutation.table(results, tmp_path)
    (tmp_path / "a.py").write_text('def f(x):\n    """Says."""\n    return x + 2\n')
    assert "**Since then `a.py` changed:**" in mutation.table(results, tmp_path)


def test_survivors_stand_under_their_reason() -> None:
    a = {"function": "m.f", "line": 3, "before": "x + 1", "after": "x - 1"}
    b = {"function": "m.g", "line": 9, "before": "y" * 40 + " > 0" + "z" * 40, "after": "y" * 40 + " >= 0" + "z" * 40}
    text = mutation.survivors({"survivors": [a, b]}, {("m.f", "x + 1", "x - 1"): "Nothing reads it."})
    assert text.startswith("Nothing reads it.\n\n- `m.f`, line 3: `x + 1` → `x - 1`\n\nNot yet explained.\n\n- `m.g`")
    assert "yyy > 0zzz" in text and "…" in text and len(text) < 250
