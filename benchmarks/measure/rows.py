"""Interface from a subject to the report: one row of the table, with the figures that have targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .timing import Spread, ratio


@dataclass(frozen=True)
class Figure:
    """One judged number.

    Attributes:
        column: its column in the table: "fused", "eager", "compile" or "against".
        kind: "speedup" (times faster than the column), "share" (of the floor's speed), "ratio" (fused over the column)
            or "value".
        target: the number to reach, or None; ``sense`` says from which side, "at least" or "at most".
    """

    column: str
    kind: str
    value: float
    p10: float
    p90: float
    target: float | None = None
    sense: str = "at least"

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.sense == "at least" else self.value <= self.target


@dataclass
class Row:
    """One line of the table.

    Attributes:
        values: of the present contestants among "eager", "compile", "fused" and "against", in ``unit``.
        against: description of the last contestant, such as "copy of 7D".
        missing: the reason for each absent contestant, by its name.
        failure: why no number of this row may be shown; None if its check is green.
        backend: the fused backend of the row; empty if a run has only one.
        numbers: further quantities by name, such as "gb_per_s".
        others: descriptions of contestants without a column, by their name in ``values``.
    """

    subject: str
    name: str
    dtype: str
    size: str
    unit: str
    repetitions: int = 0
    values: dict[str, Spread] = field(default_factory=dict)
    against: str = ""
    figures: list[Figure] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    note: str = ""
    failure: str | None = None
    backend: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def row_data(row: Row) -> dict[str, Any]:
    """Return a row fit for JSON, each of its figures with its verdict."""
    return {**asdict(row), "figures": [{**asdict(figure), "reached": figure.reached} for figure in row.figures]}


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    ``seconds`` scales every subject's time budget, ``minimum`` is the fewest repetitions.
    """

    minimum: int = 7
    seconds: float = 1.0
    compile: bool = True


QUICK = Settings(minimum=3, seconds=0.3, compile=False)  # enough to see that all is well, not to be quoted


@dataclass(frozen=True)
class Target:
    """A target for one column of a timed row; ``number`` None shows the figure without a target."""

    column: str
    kind: str
    number: float | None = None

    @property
    def sense(self) -> str:
        return "at most" if self.kind in ("ratio", "value") else "at least"


def figure(target: Target, samples: Mapping[str, Sequence[float]]) -> Figure:
    """Return the figure of ``target``, from the seconds of "fused" and of the target's column."""
    other, fused = samples[target.column], samples["fused"]
    found = ratio(fused, other) if target.kind == "ratio" else ratio(other, fused)
    return Figure(target.column, target.kind, found.median, found.p10, found.p90, target.number, target.sense)
