"""The roofs of the roofline: the speeds that a machine reached in a run."""

from __future__ import annotations

from typing import Any


def roofs(rows: list[dict[str, Any]], dtype: str) -> tuple[float, float] | None:
    """Return GB/s of the fastest copy and GFLOP/s of the bare GEMMs in ``rows`` of one dtype.

    The result is None if one of them was not timed.
    """
    found: dict[str, float] = {}
    for row in rows:
        if row["dtype"] == dtype and "against" in row["values"]:
            kind = "bytes" if row["subject"] == "gates" else "flops"
            speed = row["numbers"][kind] / row["values"]["against"]["median"] / 1e6  # per ms to giga per s
            found[kind] = max(found.get(kind, 0.0), speed)
    return (found["bytes"], found["flops"]) if len(found) == 2 else None
