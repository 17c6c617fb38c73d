"""A test for each row of the table, but those on request, and each point of the curves, archived by pytest-benchmark.

    pytest benchmarks --benchmark-only --benchmark-autosave      --quick for a look, -k gates for a part

pytest-benchmark's times are those of the fused call. For the rows on bytes they are those of the forward call that
keeps them. Rivals, ratios, rates, operator calls, memory and errors are in ``extra_info``. A call of the overhead rows
is the whole batch (``calls``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from .measure import pytest_turns
from .measure.accuracy import Check
from .measure.place import Place
from .measure.rows import Settings, row_data
from .subjects import registry

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


ROWS = {name: subject.problems for name, subject in registry.SUBJECTS.items() if not subject.on_request}


@pytest.mark.parametrize(
    ("subject", "name"),
    [pytest.param(subject, name, id=f"{subject}: {name}") for subject in ROWS for name in ROWS[subject]],
)
def test_row(
    subject: str,
    name: str,
    benchmark: BenchmarkFixture,
    settings: Settings,
    place: Place,
    checked: Callable[[str], list[Check]],
) -> None:
    red = registry.failure(checked(subject), subject)
    if red is not None:
        pytest.fail(f"no time for what is wrong: {red}", pytrace=False)
    benchmark.group = subject
    problem = ROWS[subject][name](place)
    row = pytest_turns.measure_rounds(benchmark, problem, settings)
    row.numbers |= registry.error_numbers(checked(subject), subject, row.dtype)
    benchmark.extra_info |= {**row_data(row), "calls": problem.calls, "quick": settings.minimum < Settings().minimum}
