"""Exercises that check themselves: ``check("1.2", my_function)`` in a notebook."""

from diffbook.exercises.core import Exercise, Mistake, Result, check, diagnose, exercises

__all__ = ["Exercise", "Mistake", "Result", "check", "diagnose", "exercises"]
