"""The curves of a run as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..measure.curves import BEND, Curve


def number(value: float) -> str:
    """Format with three significant digits, never with an exponent."""
    return (
        f"{value:,.0f}" if value >= 100 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "0"
    )


def markdown(curves: Sequence[Curve]) -> str:
    """Return a table for each curve, and the points where it bends."""
    names = {"fused": "fused", "eager": "eager"}
    parts = []
    for found in curves:
        sides = [side for side in ("fused", "against", "eager") if side in found["points"][0]["values"]]
        heads = [f"{names.get(side, found['against'])}, {found['unit']}" for side in sides]
        lines = [f"#### {found['name']} over {found['axis']} ({found['fixed']})", ""]
        counted = "faults" in found["points"][0]
        heads += ["fused in units of the rival", *(["faults of a fused call", "system, ms"] if counted else [])]
        lines += ["| " + " | ".join([found["axis"], *heads]) + " |", "|" + "---:|" * (len(heads) + 1)]
        for entry in found["points"]:
            values = {side: entry["values"][side]["median"] for side in sides if side in entry["values"]}
            cells = [f"{entry['x']:,}", *(number(values[side]) if side in values else "-" for side in sides)]
            cells.append(f"{values['fused'] / values['against']:.2f}")
            cells += [f"{entry['faults']:,}", number(entry["system_ms"])] if counted else []
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *bends(found)]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def bends(found: Curve) -> list[str]:
    """Describe the lines of a curve, one text line a contestant."""
    lines, one = [], {"tokens": "token", "width": "feature", "layers": "layer"}[found["axis"]] if found["lines"] else ""
    for side, line in found["lines"].items():
        who = found["against"] if side == "against" else side
        bent = ", ".join(f"{part:.2f} times the line at {int(x):,}" for x, part in line["bent"].items())
        cost = f"{number(line['fixed'])} {found['unit']} and {number(line['slope'])} {found['unit']} a {one}"
        lines.append(f"- {who}: {cost}; {'not linear: ' + bent if bent else f'within {BEND:.0%} of that everywhere'}")
    return lines
