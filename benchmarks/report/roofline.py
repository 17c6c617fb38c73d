"""`roofline.png`: each row's computation a second, over its computation a byte.

The sloping roof is the copy's bandwidth, the level one the bare GEMMs' speed, both of the same run and dtype. A row's
bytes and FLOPs are the minimum of any implementation. A row therefore lies as far under its roof as it is slower than
perfect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from ..measure.roofs import roofs
from .plots import COMPILED, EAGER, INK, caption

COLOURS = {"fp32": EAGER, "bf16": COMPILED}
MARKERS = {"gates forward": "o", "gates forward + backward": "s", "cell forward + backward": "^"}
Rows = list[dict[str, Any]]


def _points(run: dict[str, Any]) -> Rows:
    wanted = ("bytes", "flops", "gflop_per_s")
    rows = [row for row in run["rows"] if row["failure"] is None and row["name"] in MARKERS]
    return [row for row in rows if all(name in row["numbers"] for name in wanted)]


def write(run: dict[str, Any], folder: Path) -> list[Path]:
    """Write roofline.png into ``folder`` if the run has gates and cells."""
    rows = _points(run)
    tops = {dtype: top for dtype in COLOURS if (top := roofs(rows, dtype)) is not None}
    if not tops:
        return []
    figure, axes = plt.subplots(figsize=(9, 5.6))
    figure.subplots_adjust(left=0.09, right=0.97, top=0.9, bottom=0.16)
    intensities = [0.5, *(row["numbers"]["flops"] / row["numbers"]["bytes"] for row in rows), 2000.0]
    for dtype, (bandwidth, speed) in tops.items():
        corner = speed / bandwidth
        xs = [min(intensities), corner, max(intensities)]
        label = f"{dtype}: copy {bandwidth:.0f} GB/s, GEMMs {speed:,.0f} GFLOP/s"
        axes.plot(xs, [min(bandwidth * x, speed) for x in xs], color=COLOURS[dtype], linewidth=1.6, label=label)
    for row in rows:
        numbers = row["numbers"]
        x, y = numbers["flops"] / numbers["bytes"], numbers["gflop_per_s"]
        axes.plot(
            x,
            y,
            MARKERS[row["name"]],
            color=COLOURS[row["dtype"]],
            markersize=8,
            markeredgecolor=INK,
            markeredgewidth=0.6,
        )
    for name, marker in MARKERS.items():
        axes.plot([], [], marker, color="white", markeredgecolor=INK, markersize=8, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte that has to move")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle(
        "Fused depth-wise LSTM under this machine's roofs",
        x=0.012,
        ha="left",
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    figure.text(0.012, 0.012, caption(run), fontsize=9, color="#555555")
    figure.savefig(folder / "roofline.png", dpi=160)
    plt.close(figure)
    return [folder / "roofline.png"]
