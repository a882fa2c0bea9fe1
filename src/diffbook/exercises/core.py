"""How an answer is checked.

An exercise knows a correct answer (the oracle, usually a function of the package), the cases to try it on, and
the mistakes that people make. A mistake is an answer too: if the learner's results equal the results of a listed
mistake, that is the mistake that was made, and its message says so.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import diffbook.exercises


@dataclass(frozen=True)
class Mistake:
    """A wrong answer and what to say about it.

    Attributes:
        kind: what is wrong in a few words, for example "missing square root".
        answer: the wrong answer, of the same form as the right one.
        advice: one or two sentences that point to the step to think about again, without giving the answer away.
    """

    kind: str
    answer: Any
    advice: str


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        key: chapter and number, for example "1.2".
        oracle: a correct answer: a function, or a number or tensor.
        cases: the arguments to call a function with, one tuple a case; ``[()]`` for an answer that is a value.
        mistakes: listed wrong answers, the first that fits is reported.
        tolerance: largest difference from the oracle, relative to the largest value in the case's result.
    """

    key: str
    oracle: Any
    cases: Sequence[tuple[Any, ...]] = field(default_factory=lambda: [()])
    mistakes: Sequence[Mistake] = ()
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Result:
    """What :func:`diagnose` found: ``kind`` is "correct", "no answer", or what went wrong."""

    key: str
    kind: str
    message: str

    @property
    def passed(self) -> bool:
        return self.kind == "correct"

    def __str__(self) -> str:
        return f"Exercise {self.key}: {self.message}"


def exercises() -> dict[str, Exercise]:
    """All exercises of the book by key, from the ``EXERCISES`` lists of the modules ``ch00``, ``ch01``, …"""
    names = sorted(m.name for m in pkgutil.iter_modules(diffbook.exercises.__path__) if m.name.startswith("ch"))
    found = [e for n in names for e in importlib.import_module(f"diffbook.exercises.{n}").EXERCISES]
    return {e.key: e for e in found}


def check(key: str, answer: Any) -> None:
    """Check an answer and print what was found. Never raises for a wrong answer.

    Args:
        key: the exercise, for example "1.2".
        answer: the function, number or tensor that the exercise asks for.

    Raises:
        ValueError: there is no exercise with this key.
    """
    print(diagnose(key, answer))


def diagnose(key: str, answer: Any) -> Result:
    """Compare an answer with the oracle, and if it is wrong, with the listed mistakes and the general ones."""
    table = exercises()
    if key not in table:
        raise ValueError(f"there is no exercise {key!r}; there are {', '.join(table)}")
    exercise = table[key]
    if _is_blank(answer):
        return Result(key, "no answer", "no answer yet. Replace the dots in the cell above and run it again.")
    if callable(exercise.oracle) and not callable(answer):
        return Result(key, "not a function", f"pass the function itself, not {type(answer).__name__}.")
    expected = [_parts(_call(exercise.oracle, case)) for case in exercise.cases]
    given = []
    for case, right in zip(exercise.cases, expected, strict=True):
        try:
            value = _call(answer, case)
        except Exception as error:  # whatever the learner's code raises is told, not thrown
            return Result(key, "error", f"your code raised {type(error).__name__}: {error}")
        if _is_blank(value):
            return Result(key, "no answer", "no answer yet: the function returned nothing. Did you forget `return`?")
        try:
            given.append(_parts(value, len(right)))
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            return Result(key, "not a number", f"not yet: the answer should hold numbers, got {kind}.")
        problem = _form_problem(right, given[-1])
        if problem:
            return Result(key, *problem)
    if _equal(expected, given, exercise.tolerance):
        return Result(key, "correct", "correct.")
    for mistake in exercise.mistakes:
        wrong = [
            _parts(_call(mistake.answer, case), len(right))
            for case, right in zip(exercise.cases, expected, strict=True)
        ]
        if _equal(wrong, given, exercise.tolerance):
            return Result(key, mistake.kind, f"not yet: {mistake.kind}. {mistake.advice}")
    return Result(key, *_general_problem(exercise, expected, given))


def _call(answer: Any, case: tuple[Any, ...]) -> Any:
    """The answer to one case. Tensors are copied, so that an answer that works in place spoils nothing."""
    if not callable(answer):
        return answer
    return answer(*(a.clone() if isinstance(a, Tensor) else a for a in case))


def _is_blank(value: Any) -> bool:
    return value is None or value is Ellipsis or (isinstance(value, tuple | list) and any(v is Ellipsis for v in value))


def _parts(value: Any, count: int | None = None) -> list[Tensor]:
    """A result as a list of tensors: one for a number, a tensor or a list of numbers, several for a tuple.

    Where ``count`` results are expected and count > 1, a list holds the results as a tuple does.
    """
    several = isinstance(value, tuple) or (isinstance(value, list) and count is not None and count > 1)
    return [torch.as_tensor(p).detach().to(torch.float64) for p in (value if several else [value])]


def _form_problem(right: list[Tensor], given: list[Tensor]) -> tuple[str, str] | None:
    """Wrong number of results, or wrong shapes; shapes are compared up to ones."""
    if len(given) != len(right):
        return "wrong number of results", f"not yet: {len(right)} result(s) expected, got {len(given)}."
    for e, g in zip(right, given, strict=True):
        if g.squeeze().shape != e.squeeze().shape:
            return "wrong shape", f"not yet: expected shape {tuple(e.shape)}, got {tuple(g.shape)}."
    return None


def _equal(expected: list[list[Tensor]], given: list[list[Tensor]], tolerance: float) -> bool:
    """Whether all parts of all cases agree, relative to the largest number of each part."""
    for e, g in zip(expected, given, strict=True):
        if len(e) != len(g) or not all(_close(a, b, tolerance) for a, b in zip(e, g, strict=True)):
            return False
    return True


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.squeeze(), b.squeeze()
    scale = float(a.abs().max()) if a.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance * max(scale, 1e-12))


def _general_problem(exercise: Exercise, expected: list[list[Tensor]], given: list[list[Tensor]]) -> tuple[str, str]:
    """Slips that can be recognised in any exercise, then the first case that is off."""
    general: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("wrong sign", "The size is right, the sign is not.", lambda e: -e),
        ("missing square root", "Your result is the square of the right one.", torch.square),
        ("a root too many", "Your result is the square root of the right one.", lambda e: e.abs().sqrt()),
        ("upside down", "Your result is one over the right one.", lambda e: 1 / e),
    ]
    for kind, advice, slip in general:
        if _equal([[slip(part) for part in parts] for parts in expected], given, exercise.tolerance):
            return kind, f"not yet: {kind}. {advice}"
    flat_expected, flat_given = (torch.cat([p.flatten() for parts in r for p in parts]) for r in (expected, given))
    factor = (flat_given / flat_expected)[flat_expected.abs() > 1e-9]
    if len(factor) > 1 and factor.isfinite().all() and float(factor.std()) < 1e-5 * abs(float(factor.mean())):
        times = f"{float(factor.mean()):.3g}"
        return "constant factor", f"not yet: your result is {times} times the right one, everywhere."
    for case, right, value in zip(exercise.cases, expected, given, strict=True):
        for e, g in zip(right, value, strict=True):
            if not g.isfinite().all():
                return "not finite", f"not yet: the result holds NaN or infinity{_for_case(case)}."
            if not _close(e, g, exercise.tolerance):
                return "wrong value", f"not yet: {_difference(exercise, e.flatten(), g.flatten())}{_for_case(case)}."
    raise AssertionError("unreachable: the results differ in some case")


def _difference(exercise: Exercise, e: Tensor, g: Tensor) -> str:
    """Where a result is off the most; what is expected is told for functions only: a value is the whole answer."""
    off = int((e - g).abs().argmax())
    got, right = g[off].item(), e[off].item()
    if not callable(exercise.oracle):
        return f"{got:.4g} is not the value"
    digits = 4 if f"{got:.4g}" != f"{right:.4g}" else 9
    return f"got {got:.{digits}g}, expected {right:.{digits}g}"


def _for_case(case: tuple[Any, ...]) -> str:
    """The arguments of a case, as far as they can be read."""
    short = [f"{a:.4g}" if isinstance(a, float) else str(a) for a in case if isinstance(a, int | float | str)]
    short += [str(a.tolist()) for a in case if isinstance(a, Tensor) and a.numel() <= 4]
    return f" for ({', '.join(short)})" if short else ""
