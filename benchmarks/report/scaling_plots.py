"""Cost and memory as curves.

`scaling.png` has the gates over tokens and width, `depth.png` an encoder over its layers. The colours are those of
Okabe and Ito. Each contestant also has its own marker and line, for reading without colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from .plots import COMPILED, EAGER, FLOOR, INK, RIVAL, caption

STYLES: dict[str, dict[str, Any]] = {
    "fused": {"color": COMPILED, "marker": "o", "linewidth": 2.2, "label": "fused", "zorder": 3},
    "against": {"color": FLOOR, "marker": "s", "linestyle": "--"},
    "eager": {"color": EAGER, "marker": "^", "linestyle": ":", "label": "eager PyTorch"},
}
AXES = {"tokens": "tokens N", "width": "features D", "layers": "layers"}


def _draw(axes: Any, curve: dict[str, Any]) -> None:
    for side, style in STYLES.items():
        points = [point for point in curve["points"] if side in point["values"]]
        if not points:
            continue
        style = dict(style)
        if side == "against":
            style["label"] = curve["against"]
            style["color"] = RIVAL if curve["axis"] == "layers" else FLOOR
        xs = [point["x"] for point in points]
        values = [point["values"][side] for point in points]
        axes.plot(xs, [value["median"] for value in values], markersize=5, **style)
        axes.fill_between(
            xs, [v["p10"] for v in values], [v["p90"] for v in values], color=style["color"], alpha=0.18, linewidth=0
        )
    line = curve["lines"].get("fused")
    if line is not None:
        xs = [point["x"] for point in curve["points"]]
        label = "fixed cost + constant cost each (fused)"
        axes.plot(xs, [line["fixed"] + line["slope"] * x for x in xs], color=INK, linewidth=0.8, label=label, zorder=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(
        xs, [f"{x:,}" for x in xs], rotation=30 if max(xs) > 1000 else 0, ha="right" if max(xs) > 1000 else "center"
    )
    axes.minorticks_off()
    axes.set_xlabel(AXES[curve["axis"]])
    axes.set_ylabel({"ms": "ms", "MB": "MB kept for backward"}[curve["unit"]])
    axes.set_title(f"{curve['name']}\n{curve['fixed']}", fontsize=10, loc="left", color=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _picture(run: dict[str, Any], curves: list[dict[str, Any]], title: str, path: Path) -> None:
    columns = 2
    count = -(-len(curves) // columns)
    figure: Any
    figure, grid = plt.subplots(count, columns, figsize=(11, 0.9 + 3.7 * count), squeeze=False, layout="constrained")
    for axes, curve in zip(grid.flat, curves, strict=False):  # the last cell of an odd number stays empty
        _draw(axes, curve)
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    grid.flat[0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.get_layout_engine().set(rect=(0, 0.4 / figure.get_figheight(), 1, 1 - 0.8 / figure.get_figheight()))
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.012, 0.012, caption(run) + " · band: p10 to p90", fontsize=9, color="#555555")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def write_all(run: dict[str, Any], folder: Path) -> list[Path]:
    """Write scaling.png and depth.png into ``folder``, as far as the run has curves for them."""
    curves = run.get("scaling") or []
    pictures = {
        "scaling.png": (
            [curve for curve in curves if curve["axis"] in ("tokens", "width")],
            "Gates: cost against tokens and width",
        ),
        "depth.png": (
            [curve for curve in curves if curve["axis"] == "layers"],
            "Encoder: cost and memory against depth",
        ),
    }
    written = []
    for name, (chosen, title) in pictures.items():
        if chosen:
            _picture(run, chosen, title, folder / name)
            written.append(folder / name)
    return written
