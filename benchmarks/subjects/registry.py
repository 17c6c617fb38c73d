"""All subjects by name: every file in this folder with a ``SUBJECT``.

This file also makes the checks that the rows of each subject need.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..measure.accuracy import Check
from ..measure.compiled import Compiled
from ..measure.problems import Subject

BACKEND = "cpp"  # the backend of the command line and of pytest
# the table's order; other subjects follow, by name
FIRST = ("gates", "cell", "layer", "model", "decoding", "memory", "overhead")


def find() -> dict[str, Subject]:
    """Return the subjects of the files in this folder."""
    names = [entry.name for entry in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [
        importlib.import_module(f".{name}", __package__) for name in names if name not in ("__main__", "registry")
    ]
    found = {module.SUBJECT.name: module.SUBJECT for module in modules}
    return {name: found[name] for name in (*FIRST, *sorted(found.keys() - set(FIRST)))}


SUBJECTS = find()


def compile_all(compiled: Compiled, dtype: torch.dtype, subjects: Sequence[str]) -> None:
    """Compile everything that the rows of ``subjects`` need for one dtype."""
    for name in subjects:
        found = SUBJECTS.get(name)
        if found is not None and found.compile is not None:
            found.compile(compiled, dtype)


def checked(subjects: Sequence[str]) -> list[Subject]:
    """Return the subjects whose checks ``subjects`` need."""
    names = dict.fromkeys(name for subject in subjects for name in SUBJECTS[subject].stands_on)
    return [SUBJECTS[name] for name in names]


def run_checks(subjects: Sequence[str], tick: Callable[[], None] = lambda: None) -> list[Check]:
    """Make all checks that ``subjects`` need; a check whose call did not run on the compiled backend is red."""
    found = []
    for subject in checked(subjects):
        if subject.check is None:
            raise ValueError(f"{subject.name} has no check, and rows that stand on it")
        for dtype in subject.dtypes:
            for check in subject.check(dtype):
                if check.backend != BACKEND:
                    check = replace(check, passed=False, tensor=f"ran on {check.backend}, not {BACKEND}:")
                found.append(check)
            tick()
    return found


def failure(checks: Sequence[Check], subject: str) -> str | None:
    """Say why no number of ``subject`` may be shown; None if all its checks are green."""
    red = [check for check in checks if check.subject in SUBJECTS[subject].stands_on and not check.passed]
    return "; ".join(f"{check.subject} {check.dtype} {check.summary}" for check in red) or None


def error_numbers(checks: Sequence[Check], subject: str, dtype: str) -> dict[str, float]:
    """Return the error against fp64 for the row of a subject and dtype.

    Of the checks the one nearest to its bound is taken.
    """
    own = [check for check in checks if check.subject in SUBJECTS[subject].stands_on and check.dtype == dtype]
    if not own:
        return {}
    worst = max(own, key=lambda check: check.used)
    return {"error": worst.error, "eager_error": worst.eager_error, "bound_share": worst.used}
