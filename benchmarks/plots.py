"""A run as pictures: how many times faster, and how close to the floor. Colours of Okabe and Ito, told apart by any eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

EAGER, COMPILED, RIVAL, FLOOR, INK = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#222222"
BAR = 0.36


def _label(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['dtype']}" if row["subject"] in ("gates", "cell", "layer") else row["name"]


def _shown(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in run["rows"] if row["failure"] is None]


def _figure(row: dict[str, Any], column: str, *kinds: str) -> dict[str, Any] | None:
    return next((figure for figure in row["figures"] if figure["column"] == column and figure["kind"] in kinds), None)


def _finish(run: dict[str, Any], figure: Any, axes: Any, title: str, path: Path) -> None:
    machine = run["machine"]
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    caption = f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']} · torch {machine['torch']} · {run['date'][:10]}"
    figure.text(0.012, 0.012, caption + (" · quick run" if run["quick"] else ""), fontsize=9, color="#555555")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _bar(axes: Any, y: float, figure: dict[str, Any], scale: float, colour: str, text: str) -> None:
    value = scale * figure["value"]
    axes.barh(y, value, BAR, color=colour)
    axes.plot([scale * figure["p10"], scale * figure["p90"]], [y, y], color=INK, linewidth=1)
    end = max(value, scale * figure["p90"])
    axes.annotate(text, (end, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    if figure["target"] is not None:
        axes.plot([scale * figure["target"]] * 2, [y - BAR / 2, y + BAR / 2], color=INK, linewidth=2, linestyle=(0, (1.2, 0.8)))


def speed_plot(run: dict[str, Any], path: Path) -> None:
    """Times faster than eager, than torch.compile of it, and than torch's residual layer."""
    rows = [row for row in _shown(run) if row["unit"] != "MB" and _figure(row, "eager", "speedup")]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.55 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    for y, row in enumerate(rows):
        found = [
            (row_figure, colour)
            for column, colour in (("eager", EAGER), ("compile", COMPILED))
            if (row_figure := _figure(row, column, "speedup"))
        ]
        rival = _figure(row, "against", "ratio") if row["subject"] == "layer" else None
        if rival is not None:
            # held as a share of the rival's time; drawn, like the others, as times faster
            found.append(
                ({"value": 1 / rival["value"], "p10": 1 / rival["p90"], "p90": 1 / rival["p10"], "target": 1 / rival["target"]}, RIVAL)
            )
        for index, (row_figure, colour) in enumerate(found):
            offset = (index - (len(found) - 1) / 2) * (BAR + 0.04)
            _bar(
                axes,
                y + offset,
                row_figure,
                1,
                colour,
                f"{row_figure['value']:.2f}x" if row_figure["value"] < 10 else f"{row_figure['value']:.1f}x",
            )
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_xlabel("times faster (1 = as fast); dashed: target; thin line: p10 to p90")
    axes.margins(x=0.1)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (EAGER, COMPILED, RIVAL)]
    axes.legend(
        handles,
        ["over eager PyTorch", "over torch.compile", "over nn.TransformerEncoderLayer"],
        loc="lower right",
        frameon=False,
        fontsize=9,
    )
    _finish(run, figure, axes, "Fused depth-wise LSTM: speed", path)


def floor_plot(run: dict[str, Any], path: Path) -> None:
    """The floor's time as a share of the fused time."""
    rows = [row for row in _shown(run) if row["subject"] in ("gates", "cell") and "against" in row["values"]]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.5 * len(rows)), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94))
    for y, row in enumerate(rows):
        found = _figure(row, "against", "share", "ratio")
        if found is None:
            continue
        if found["kind"] == "ratio":
            found = {"value": 1 / found["value"], "p10": 1 / found["p90"], "p90": 1 / found["p10"], "target": 1 / found["target"]}
        _bar(axes, y, found, 100, FLOOR, f"{found['value']:.0%} of {row['against']}")
    axes.axvline(100, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_xlabel("share of the floor's speed, % (100 = only the bytes moved, or only the GEMMs); dashed: target")
    axes.margins(x=0.28)
    axes.set_xlim(left=0)
    _finish(run, figure, axes, "Fused depth-wise LSTM: how close to the floor", path)


def write_all(run: dict[str, Any], folder: Path) -> list[Path]:
    """speed.png and floor.png in ``folder``, those that the run has rows for."""
    written = []
    if any(_figure(row, "eager", "speedup") for row in _shown(run)):
        speed_plot(run, folder / "speed.png")
        written.append(folder / "speed.png")
    if any(row["subject"] in ("gates", "cell") for row in _shown(run)):
        floor_plot(run, folder / "floor.png")
        written.append(folder / "floor.png")
    return written
