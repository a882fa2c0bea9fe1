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
    names = sorted(
        m.name for m in pkgutil.iter_modules(diffbook.exercises.__path__) if m.name.startswith("ch")
    )
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
    expected = [_call(exercise.oracle, case) for case in exercise.cases]
    given = []
    for case in exercise.cases:
        try:
            value = _call(answer, case)
        except Exception as error:  # whatever the learner's code raises is told, not thrown
            return Result(key, "error", f"your code raised {type(error).__name__}: {error}")
        if _is_blank(value):
            return Result(
                key, "no answer", "no answer yet: the function returned nothing. Did you forget `return`?"
            )
        given.append(value)
    for right, value in zip(expected, given, strict=True):
        problem = _form_problem(right, value)
        if problem:
            return Result(key, *problem)
    if _equal(expected, given, exercise.tolerance):
        return Result(key, "correct", "correct.")
    for mistake in exercise.mistakes:
        wrong = [_call(mistake.answer, case) for case in exercise.cases]
        if _equal(wrong, given, exercise.tolerance):
            return Result(key, mistake.kind, f"not yet: {mistake.kind}. {mistake.advice}")
    return Result(key, *_general_problem(exercise, expected, given))


def _call(answer: Any, case: tuple[Any, ...]) -> Any:
    """The answer to one case. Tensors are copied, so that an answer that works in place spoils nothing."""
    if not callable(answer):
        return answer
    return answer(*(a.clone() if isinstance(a, Tensor) else a for a in case))


def _is_blank(value: Any) -> bool:
    return value is None or value is Ellipsis


def _tensors(value: Any) -> list[Tensor]:
    """The numbers in a result: a number, a tensor, or a tuple of these."""
    parts = value if isinstance(value, tuple | list) else [value]
    return [torch.as_tensor(p).detach().to(torch.float64) for p in parts]


def _form_problem(right: Any, value: Any) -> tuple[str, str] | None:
    """Wrong number of results, not numbers, or wrong shapes; shapes are compared up to broadcasting by ones."""
    try:
        given = _tensors(value)
    except (TypeError, ValueError, RuntimeError):
        return "not a number", f"not yet: the answer should hold numbers, got {type(value).__name__}."
    expected = _tensors(right)
    if len(given) != len(expected):
        return "wrong number of results", f"not yet: {len(expected)} result(s) expected, got {len(given)}."
    for e, g in zip(expected, given, strict=True):
        if g.squeeze().shape != e.squeeze().shape:
            return "wrong shape", f"not yet: expected shape {tuple(e.shape)}, got {tuple(g.shape)}."
    return None


def _equal(expected: list[Any], given: list[Any], tolerance: float) -> bool:
    for e, g in zip(map(_tensors, expected), map(_tensors, given), strict=True):
        for a, b in zip(e, g, strict=True):
            a, b = a.squeeze(), b.squeeze()
            if a.shape != b.shape:
                return False
            scale = float(a.abs().max()) if a.numel() else 0.0
            if not torch.allclose(a, b, rtol=0, atol=tolerance * max(scale, 1e-12), equal_nan=False):
                return False
    return True


def _general_problem(exercise: Exercise, expected: list[Any], given: list[Any]) -> tuple[str, str]:
    """Slips that can be recognised in any exercise, then the first case that is off."""
    general: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        ("wrong sign", "The size is right, the sign is not.", lambda e: -e),
        ("missing square root", "Your result is the square of the right one.", torch.square),
        ("a root too many", "Your result is the square root of the right one.", lambda e: e.abs().sqrt()),
        ("upside down", "Your result is one over the right one.", lambda e: 1 / e),
    ]
    for kind, advice, slip in general:
        if _equal([[slip(p) for p in _tensors(e)] for e in expected], given, exercise.tolerance):
            return kind, f"not yet: {kind}. {advice}"
    factors = [g / e for e, g in zip(_flat(expected), _flat(given), strict=True)]
    factor = torch.cat(factors)[torch.cat(_flat(expected)).abs() > 1e-9]
    if len(factor) > 1 and factor.isfinite().all() and float(factor.std()) < 1e-5 * abs(float(factor.mean())):
        return (
            "constant factor",
            f"not yet: your result is {float(factor.mean()):.3g} times the right one, everywhere.",
        )
    for case, e, g in zip(exercise.cases, _flat(expected), _flat(given), strict=True):
        if not g.isfinite().all():
            return "not finite", f"not yet: the result holds NaN or infinity{_for_case(case)}."
        off = int((e - g).abs().argmax())
        if not _equal([e], [g], exercise.tolerance):
            return (
                "wrong value",
                f"not yet: got {g[off].item():.4g}, expected {e[off].item():.4g}{_for_case(case)}.",
            )
    raise AssertionError("unreachable: the results differ in some case")


def _flat(results: list[Any]) -> list[Tensor]:
    return [torch.cat([p.flatten() for p in _tensors(r)]) for r in results]


def _for_case(case: tuple[Any, ...]) -> str:
    """The arguments of a case, as far as they can be read."""
    short = [f"{a:.4g}" if isinstance(a, float) else str(a) for a in case if isinstance(a, int | float | str)]
    short += [str(a.tolist()) for a in case if isinstance(a, Tensor) and a.numel() <= 4]
    return f" for ({', '.join(short)})" if short else ""
