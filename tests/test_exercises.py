"""Every exercise: the solution passes, the blank stub fails kindly, each listed mistake gets its own message."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from diffbook.exercises import Exercise, Mistake, check, core, diagnose, exercises

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
EXERCISES = exercises()


def cells(path):
    return [(c["cell_type"], "".join(c["source"]), c["metadata"]) for c in json.loads(path.read_text())["cells"]]


def stubs():
    """(key, notebook, code of the stub cell) of every exercise in the notebooks."""
    return [(m["exercise"], path, source) for path in NOTEBOOKS for _, source, m in cells(path) if "exercise" in m]


def markdown(path):
    return "\n\n".join(source for kind, source, _ in cells(path) if kind == "markdown")


def block(path, title):
    """The text of one hidden block."""
    found = re.findall(rf"<details><summary>{re.escape(title)}</summary>\n\n(.*?)\n\n</details>", markdown(path), re.S)
    assert len(found) == 1, f"{path.name}: {len(found)} blocks '{title}'"
    return found[0]


def answer_given_to_check(path, key, code):
    """Run a notebook's imports and the answer cell with ``check`` replaced, and return what was passed to it."""
    passed = []
    namespace = {}
    for kind, source, metadata in cells(path):
        if kind == "code" and "imports" in metadata.get("tags", []):
            exec(source, namespace)
    namespace["check"] = lambda k, answer: passed.append((k, answer))
    exec(code, namespace)
    assert len(passed) == 1 and passed[0][0] == key
    return passed[0][1]


@pytest.fixture(autouse=True)
def undo_setup():
    """A notebook's set-up changes global settings of torch and matplotlib."""
    import matplotlib

    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with matplotlib.rc_context():
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_registry_and_notebooks_hold_the_same_exercises():
    keys = [key for key, _, _ in stubs()]
    assert sorted(keys) == sorted(EXERCISES) and len(set(keys)) == len(keys)


@pytest.mark.parametrize("key, path, stub", stubs(), ids=lambda v: v if isinstance(v, str) and len(v) < 6 else "")
class TestExercise:
    def test_has_heading_hint_and_solution(self, key, path, stub):
        levels = "a step of the derivation|a function to write|a planted bug"
        assert len(re.findall(rf"^### Exercise {re.escape(key)} · ({levels})$", markdown(path), re.M)) == 1
        assert len(block(path, f"Hint for {key}")) > 40 and len(block(path, f"Solution of {key}")) > 40

    def test_solution_passes(self, key, path, stub):
        code = re.findall(r"```python\n(.*?)```", block(path, f"Solution of {key}"), re.S)
        assert len(code) == 1, "a solution has one code block"
        call = next(line for line in stub.splitlines() if line.startswith("check("))
        result = diagnose(key, answer_given_to_check(path, key, code[0] + "\n" + call))
        assert result.passed, result.message

    def test_stub_fails_kindly(self, key, path, stub):
        result = diagnose(key, answer_given_to_check(path, key, stub))
        planted = f"### Exercise {key} · a planted bug" in markdown(path)
        assert not result.passed
        if planted:
            assert result.kind in [m.kind for m in EXERCISES[key].mistakes], result.message
        else:
            assert result.kind == "no answer", result.message


@pytest.mark.parametrize("key", sorted(EXERCISES))
def test_oracle_passes_and_each_mistake_is_named(key):
    exercise = EXERCISES[key]
    assert diagnose(key, exercise.oracle).passed
    assert len(exercise.mistakes) >= 2 and len({m.kind for m in exercise.mistakes}) == len(exercise.mistakes)
    for mistake in exercise.mistakes:
        result = diagnose(key, mistake.answer)
        assert result.kind == mistake.kind, f"{mistake.kind}: {result.message}"
        assert mistake.advice in result.message and len(mistake.advice) > 20


# ---- the machinery itself, on an exercise made for the purpose ------------------------------------------------

ROOT = Exercise(
    "9.1",
    lambda b, x: math.sqrt(b) * x,
    [(0.25, torch.tensor([1.0, -2.0])), (0.04, torch.tensor([3.0, 0.5]))],
    [Mistake("missing square root", lambda b, x: b * x, "The factor is a standard deviation, not a variance.")],
)
VALUE = Exercise("9.2", 4.0, [()], [Mistake("forgot the two", 2.0, "Count both of the terms.")])


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(core, "exercises", lambda: {"9.1": ROOT, "9.2": VALUE})


def in_place(b, x):
    x *= math.sqrt(b)
    return x


@pytest.mark.parametrize(
    "answer, kind, words",
    [
        (lambda b, x: b**0.5 * x, "correct", "correct."),
        (lambda b, x: (b**0.5 * x).reshape(2, 1).float(), "correct", "correct."),
        (in_place, "correct", "correct."),
        (lambda b, x: (b**0.5 * x).tolist(), "correct", "correct."),
        (..., "no answer", "Replace the dots"),
        (None, "no answer", "Replace the dots"),
        (lambda b, x: None, "no answer", "return"),
        (lambda b, x: ..., "no answer", "return"),
        (3.0, "not a function", "float"),
        (lambda b: b, "error", "TypeError"),
        (lambda b, x: x / 0 if b > 1 else [][0], "error", "IndexError"),
        (lambda b, x: "text", "not a number", "str"),
        (lambda b, x: torch.ones(3), "wrong shape", r"(2,), got (3,)"),
        (lambda b, x: (x, x), "wrong number of results", "1 result(s) expected, got 2"),
        (lambda b, x: b * x, "missing square root", "standard deviation"),
        (lambda b, x: -(b**0.5) * x, "wrong sign", "sign"),
        (lambda b, x: 3 * b**0.5 * x, "constant factor", "3 times"),
        (lambda b, x: 1 / (b**0.5 * x), "upside down", "one over"),
        (lambda b, x: b**0.5 * x + 1, "wrong value", "got 1.5, expected 0.5"),
        (lambda b, x: b**0.5 * x + 1e-4, "wrong value", "got 0.5001, expected 0.5"),
        (lambda b, x: b**0.5 * x + torch.tensor([0, 2e-5]), "wrong value", "expected -1 for (0.25"),
        (lambda b, x: x * float("nan"), "not finite", "NaN"),
    ],
)
def test_diagnosis(made_up, answer, kind, words):
    result = diagnose("9.1", answer)
    assert result.kind == kind and words in result.message and result.passed == (kind == "correct")


def test_a_value_as_answer(made_up):
    assert diagnose("9.2", 4).passed and diagnose("9.2", torch.tensor(4.0)).passed
    assert diagnose("9.2", 2.0).kind == "forgot the two"
    assert diagnose("9.2", -4.0).kind == "wrong sign" and diagnose("9.2", 7.0).kind == "wrong value"
    assert diagnose("9.2", 16.0).kind == "missing square root"


def test_several_values_as_answer(monkeypatch):
    pair = Exercise("9.3", (-1 / 3, 6.25), [()], [Mistake("swapped", (6.25, -1 / 3), "Read the order once more.")])
    monkeypatch.setattr(core, "exercises", lambda: {"9.3": pair})
    for right in ((-1 / 3, 6.25), [-1 / 3, 6.25], (torch.tensor(-1 / 3, dtype=torch.float64), 6.25)):
        assert diagnose("9.3", right).passed
    assert diagnose("9.3", (6.25, -1 / 3)).kind == "swapped"
    result = diagnose("9.3", (-0.3, 6.25))
    assert result.kind == "wrong value" and "-0.3 is not the value" in result.message and "333" not in result.message
    assert diagnose("9.3", (..., ...)).kind == "no answer"
    assert diagnose("9.3", 1.0).kind == "wrong number of results"


def test_check_prints_and_never_raises(made_up, capsys):
    check("9.1", lambda b, x: b * x)
    assert capsys.readouterr().out.startswith("Exercise 9.1: not yet: missing square root.")
    with pytest.raises(ValueError, match=r"no exercise '9\.9'; there are 9\.1, 9\.2"):
        check("9.9", None)
