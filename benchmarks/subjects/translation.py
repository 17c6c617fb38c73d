"""The translation example on real text: reference beside fused, step by step in turn."""

from __future__ import annotations

import sys
from typing import Any

from .. import CHECKOUT
from ..measure.problems import Subject
from ..measure.rows import Figure, Row
from ..measure.timing import Spread


class DivergedError(RuntimeError):
    """The example's training diverged, so that there is nothing to compare."""


def run(limit_seconds: float, steps: int | None, progress: bool) -> dict[str, Any]:
    """Return the result of the example's ``run_comparison``.

    Raises:
        DivergedError: a loss or gradient of one side is not finite; the message names side and step.
        ImportError: one of the example's packages is missing, or the example itself, which only the source tree has.
    """
    if CHECKOUT is None:
        raise ImportError("it needs the source tree")
    folder = str(CHECKOUT / "examples" / "translation")
    sys.path.insert(0, folder)
    try:
        from compare import run_comparison  # type: ignore[import-not-found]
        from training import DivergedError as NotFiniteError  # type: ignore[import-not-found]
    finally:
        sys.path.remove(folder)
    try:
        return run_comparison(steps, backend="cpp", examples=3, progress=progress, limit_seconds=limit_seconds)
    except NotFiniteError as error:
        raise DivergedError(str(error)) from None


def row(result: dict[str, Any]) -> Row:
    """Return the table's last row: tokens a second of both, shown only if the losses agree."""
    size = f"d={result['d_model']} {result['encoder_layers']}+{result['decoder_layers']} layers"
    found = Row("translation", "translation training", "fp32", size, "tokens/s", repetitions=result["steps"])
    difference = (
        f"losses differ by {result['max_relative_loss_difference']:.1e} at most, {result['tolerance']:.0e} allowed"
    )
    found.note = f"{result['dataset']}, {result['pairs']} pairs; {result['steps']} steps; {difference}"
    if not result["losses_agree"]:
        found.failure = f"losses disagree: {difference}"
        return found
    if result["backend"] != "cpp":
        found.failure = f"ran on {result['backend']}, not cpp"
        return found
    speeds = {"eager": result["tokens_per_second"]["reference"], "fused": result["tokens_per_second"]["fused"]}
    found.values = {name: Spread(speed, speed, speed) for name, speed in speeds.items()}
    found.figures = [Figure("eager", "speedup", result["speedup"], result["speedup"], result["speedup"])]
    return found


SUBJECT = Subject("translation", needs=("layer", "decoding"), in_table=False, ticks=lambda settings: 1)
