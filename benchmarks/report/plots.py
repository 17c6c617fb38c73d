"""Pictures of a run: how many times faster it is, and how close to the floor.

The colours are those of Okabe and Ito, which are distinct for every kind of colour vision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

EAGER, COMPILED, RIVAL, FLOOR, INK = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#222222"
BAR = 0.36


def _label(row: dict[str, Any]) -> str:
    if row.get("backend"):  # a GPU's run has several sizes of everything
        return f"{row['name']}, {row['dtype']}, {row['size']}, {row['backend']}"
    return f"{row['name']}, {row['dtype']}" if row["subject"] in ("gates", "cell", "layer") else row["name"]


def _size(rows: list[dict[str, Any]], height: float) -> tuple[float, float]:
    """Return width and height in inches, with room for the longest label."""
    return 9 + max(0, 0.09 * (max((len(_label(row)) for row in rows), default=0) - 30)), 1.5 + height * len(rows)


def _shown(run: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [row for row in run["rows"] if row["failure"] is None]
    if run.get("kind") == "gpu":  # its table is long, so the pictures have bf16 only and no latencies
        rows = [row for row in rows if row["dtype"] == "bf16" and row["subject"] in ("gates", "cell", "layer")]
    return rows


def _figure(row: dict[str, Any], column: str, *kinds: str) -> dict[str, Any] | None:
    return next((figure for figure in row["figures"] if figure["column"] == column and figure["kind"] in kinds), None)


def caption(run: dict[str, Any]) -> str:
    """Return the machine, the versions and the day, for the foot of every picture."""
    machine = run["machine"]
    what = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']}"
    notes = (" · rehearsal, no measurement" if run.get("rehearsal") else "") + (" · quick run" if run["quick"] else "")
    return f"{what} · torch {machine['torch']} · {run['date'][:10]}{notes}"


def _finish(run: dict[str, Any], figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.get_layout_engine().set(rect=(0, 0.35 / figure.get_figheight(), 1, 1 - 0.35 / figure.get_figheight()))
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.012, 0.012, caption(run), fontsize=9, color="#555555")
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _bar(axes: Any, y: float, figure: dict[str, Any], scale: float, colour: str, text: str) -> None:
    value = scale * figure["value"]
    axes.barh(y, value, BAR, color=colour)
    axes.plot([scale * figure["p10"], scale * figure["p90"]], [y, y], color=INK, linewidth=1)
    end = max(value, scale * figure["p90"], scale * (figure["target"] or 0))
    axes.annotate(text, (end, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    if figure["target"] is not None:
        axes.plot(
            [scale * figure["target"]] * 2,
            [y - BAR / 2, y + BAR / 2],
            color=INK,
            linewidth=2,
            linestyle=(0, (1.2, 0.8)),
        )


def _inverted(figure: dict[str, Any]) -> dict[str, Any]:
    """Return a share of the rival's time as a multiple of its speed."""
    target = None if figure["target"] is None else 1 / figure["target"]
    return {"value": 1 / figure["value"], "p10": 1 / figure["p90"], "p90": 1 / figure["p10"], "target": target}


def _speeds(row: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return the row's bars: figures as times faster, each with its colour."""
    found = [(_figure(row, column, "speedup"), colour) for column, colour in (("eager", EAGER), ("compile", COMPILED))]
    rival = _figure(row, "against", "ratio") if row["subject"] in ("layer", "model") else None
    found.append((None if rival is None else _inverted(rival), RIVAL))
    return [(figure, colour) for figure, colour in found if figure is not None]


def speed_plot(run: dict[str, Any], path: Path) -> None:
    """Draw how many times faster fused is than eager, than torch.compile of it, and than torch's residual layer."""
    rows = [row for row in _shown(run) if row["unit"] != "MB" and _figure(row, "eager", "speedup")]
    figure, axes = plt.subplots(figsize=_size(rows, 0.55), layout="constrained")
    for y, row in enumerate(rows):
        bars = _speeds(row)
        for index, (found, colour) in enumerate(bars):
            offset = (index - (len(bars) - 1) / 2) * (BAR + 0.04)
            _bar(axes, y + offset, found, 1, colour, f"{found['value']:.{2 if found['value'] < 10 else 1}f}x")
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_xlabel("times faster (1 = as fast); dotted: target; thin line: p10 to p90")
    axes.margins(x=0.1)
    colours = {"over eager PyTorch": EAGER, "over torch.compile": COMPILED, "over torch.nn's residual twin": RIVAL}
    used = {colour for row in rows for _, colour in _speeds(row)}
    handles = [Rectangle((0, 0), 1, 1, color=colour, label=text) for text, colour in colours.items() if colour in used]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=9)
    _finish(run, figure, axes, "Fused depth-wise LSTM: speed", path)


def floor_plot(run: dict[str, Any], path: Path) -> None:
    """Draw the floor's time as a share of the fused time."""
    rows = [row for row in _shown(run) if row["subject"] in ("gates", "cell") and "against" in row["values"]]
    figure, axes = plt.subplots(figsize=_size(rows, 0.5), layout="constrained")
    for y, row in enumerate(rows):
        found = _figure(row, "against", "share", "ratio")
        if found is not None:
            found = _inverted(found) if found["kind"] == "ratio" else found
            _bar(axes, y, found, 100, FLOOR, f"{found['value']:.0%} of {row['against']}")
    axes.axvline(100, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.set_xlabel("share of the floor's speed, % (100 = only the bytes moved, or only the GEMMs); dotted: target")
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    _finish(run, figure, axes, "Fused depth-wise LSTM: how close to the floor", path)


def write_all(run: dict[str, Any], folder: Path) -> list[Path]:
    """Write speed.png and floor.png into ``folder``, as far as the run has rows for them."""
    written = []
    if any(_figure(row, "eager", "speedup") for row in _shown(run)):
        speed_plot(run, folder / "speed.png")
        written.append(folder / "speed.png")
    if any(row["subject"] in ("gates", "cell") for row in _shown(run)):
        floor_plot(run, folder / "floor.png")
        written.append(folder / "floor.png")
    return written
