"""Draw docs/idea.png, a residual layer beside a depth-wise LSTM layer: python docs/draw_idea.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

INK, H, C, ATTENTION, NETWORK, CELL = "#222222", "#0072B2", "#D55E00", "#E8EEF4", "#F1EDE4", "#FFF4E0"
Point = tuple[float, float]


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 10) -> None:
    """Draw a rounded box about (x, y)."""
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.12", fc=color, ec=INK, lw=1.2))
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.6)


def line(axes: Axes, *points: Point, color: str = INK, width: float = 1.6, head: bool = True) -> None:
    """Draw a line through ``points``, with a head at the last one."""
    *before, start, end = points
    xs, ys = zip(*before, start, strict=True)
    axes.plot(xs, ys, color=color, lw=width, solid_capstyle="round", solid_joinstyle="round")
    style = "-|>,head_length=5,head_width=2.4" if head else "-"
    arrow = FancyArrowPatch(start, end, arrowstyle=style, color=color, lw=width, shrinkA=0, shrinkB=0, mutation_scale=1)
    axes.add_patch(arrow)


def addition(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(Circle((x, y), 0.2, fc="white", ec=INK, lw=1.2, zorder=3))
    axes.text(x, y - 0.015, "+", ha="center", va="center", fontsize=13, color=INK, zorder=4)


def residual(axes: Axes) -> None:
    """Draw a pre-norm layer: each of two sub-layers adds its output to the stream."""
    stream, branch = 1.1, 3.0
    line(axes, (stream, 0.25), (stream, 6.75), color=H, width=2.2)
    for low, name, color in ((0.75, "attention", ATTENTION), (3.75, "feed-forward\nnetwork", NETWORK)):
        line(axes, (stream, low), (branch, low), (branch, low + 0.4), color=INK)
        box(axes, branch, low + 0.65, 1.9, 0.5, "LayerNorm", "white")
        line(axes, (branch, low + 0.9), (branch, low + 1.2))
        box(axes, branch, low + 1.6, 1.9, 0.8, name, color)
        line(axes, (branch, low + 2.0), (branch, low + 2.4), (stream + 0.2, low + 2.4))
        addition(axes, stream, low + 2.4)
    axes.text(stream, 0.05, "h of the layer below", ha="center", va="top", fontsize=9.5, color=H)
    axes.text(stream, 6.95, "h", ha="center", va="bottom", fontsize=12, color=H, fontstyle="italic")
    axes.set_title("Residual layer", fontsize=13, color=INK, pad=16)


def depth_lstm(axes: Axes) -> None:
    """Draw an encoder layer of this package.

    A cell takes the attention's output and both states of the layer below.
    """
    carry, stream, branch, cell_low, cell_high = 0.75, 2.2, 3.9, 3.35, 6.05
    middle = (carry + branch) / 2
    line(axes, (stream, 0.25), (stream, cell_low), color=H, width=2.2)
    line(axes, (carry, 0.25), (carry, cell_low), color=C, width=2.2)
    line(axes, (stream, 1.0), (branch, 1.0), (branch, 1.5))
    box(axes, branch, 1.95, 1.5, 0.9, "attention", ATTENTION)
    line(axes, (branch, 2.4), (branch, cell_low))
    for x, text, color in ((carry, "c'", C), (stream, "h'", H), (branch, "a", INK)):
        axes.text(x + 0.14, cell_low - 0.3, text, ha="left", va="center", fontsize=11, color=color, fontstyle="italic")
    text = (
        "depth-wise LSTM cell\n"
        r"$i, f, o, g \;=\; \mathrm{LN}(W\,[\,a\,;\,h'\,])$"
        "\n"
        r"$c \;=\; \sigma(f)\,c' \,+\, \sigma(i)\,\mathrm{GELU}(g)$"
        "\n"
        r"$h \;=\; \sigma(o)\,c$"
    )
    box(axes, middle, (cell_low + cell_high) / 2, 4.5, cell_high - cell_low, text, CELL, 11.5)
    line(axes, (carry, cell_high), (carry, 6.75), color=C, width=2.2)
    line(axes, (stream, cell_high), (stream, 6.75), color=H, width=2.2)
    axes.text(carry, 6.95, "c", ha="center", va="bottom", fontsize=12, color=C, fontstyle="italic")
    axes.text(stream, 6.95, "h", ha="center", va="bottom", fontsize=12, color=H, fontstyle="italic")
    axes.text((carry + stream) / 2, 0.05, "c and h of the layer below", ha="center", va="top", fontsize=9.5, color=INK)
    axes.set_title("Depth-wise LSTM layer", fontsize=13, color=INK, pad=16)


def draw(path: Path) -> None:
    """Write the figure to ``path``."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 6.0), gridspec_kw={"width_ratios": (4.0, 5.0)})
    for axes, limits in ((left, (0.1, 4.1)), (right, (-0.15, 4.85))):
        axes.set_xlim(*limits)
        axes.set_ylim(-0.3, 7.4)
        axes.set_aspect("equal")
        axes.axis("off")
    residual(left)
    depth_lstm(right)
    figure.tight_layout(w_pad=1)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("idea.png"))
