"""The pictures of a study."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from study.report import Study, tuned

# Okabe and Ito's colours, each with its own marker and line, so that they are distinct without colour.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#E69F00", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "D", "linestyle": "--"},
    {"color": "#009E73", "marker": "s", "linestyle": ":"},
    {"color": "#CC79A7", "marker": "v", "linestyle": "-."},
    {"color": "#56B4E9", "marker": "P", "linestyle": "-"},
    {"color": "#999999", "marker": "X", "linestyle": "--"},
    {"color": "#B8A800", "marker": "<", "linestyle": ":"},
    {"color": "#7F3C8D", "marker": ">", "linestyle": "-."},
)
RIVAL = "pre-norm"  # drawn in every panel
RIVAL_STYLE = {"color": "#0072B2", "marker": "^", "linestyle": "-.", "linewidth": 2.0}
RESIDUAL = ("post-norm", "sandwich", "deepnorm", "keel", "siamese", "rezero", "layerscale")
INK = "#222222"


def panels_of(variants: list[str]) -> dict[str, list[str]]:
    """Return the variants by panel, the rival apart."""
    lstm = [variant for variant in variants if variant.startswith("depth-lstm")]
    residual = [variant for variant in variants if variant in RESIDUAL]
    rest = [variant for variant in variants if variant not in (*lstm, *residual, RIVAL)]
    found = {"depth-wise LSTM": lstm, "residual connections": residual, "other connections": rest}
    return {title: names for title, names in found.items() if names}


def _finish(study: Study, figure: Any, title: str, path: Path) -> None:
    machine = study["machine"]
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    settings = study["settings"]
    caption = (
        f"{machine['cpu']}, {machine['cores']} cores · torch {machine['torch']} "
        f"· d={settings['d_model']}, {settings['steps']} steps"
    )
    figure.text(0.012, 0.012, caption, fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panels(count: int) -> tuple[Any, Any]:
    figure, grid = plt.subplots(1, count, figsize=(12, 4.6), squeeze=False, sharey=True)
    figure.subplots_adjust(left=0.065, right=0.99, top=0.83, bottom=0.19, wspace=0.07)
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid.flat


def _curves(axes: Any, names: list[str], curves: dict[str, tuple[Any, Any]]) -> None:
    for name, style in (*zip(names, cycle(STYLES), strict=False), (RIVAL, RIVAL_STYLE)):
        if name in curves:
            axes.plot(*curves[name], label=name, markersize=4, **style)


def gradient_plot(study: Study, path: Path) -> None:
    """Plot each decoder layer's gradient over the last layer's, in the deepest models at the first initialisation."""
    deep = max(study["settings"]["gradient_depths"])
    init = study["gradients"][0]["init"]
    curves = {
        entry["variant"]: (range(1, deep + 1), [norm / entry["norms"][-1] for norm in entry["norms"]])
        for entry in study["gradients"]
        if (entry["stack"], entry["layers"], entry["init"]) == ("decoder", deep, init)
    }
    groups = panels_of(study["variants"])
    figure, panels = _panels(len(groups))
    for axes, (title, names) in zip(panels, groups.items(), strict=True):
        _curves(axes, names, curves)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        axes.set_xlabel(f"decoder layer, of {deep}")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    panels[0].set_ylabel("gradient, over the last layer's")
    _finish(study, figure, f"Gradient at each layer's output before training, {init} initialisation", path)


def learning_plot(study: Study, path: Path) -> None:
    """Plot training cross entropy over steps at the tuned rate, at the depth that all variants learned at."""
    layers, every = study["settings"]["cost_depth"], study["settings"]["every"]
    curves = {}
    for variant in study["settings"]["plan"][str(layers)]:
        runs = [run["train_losses"] for run in tuned(study, variant, layers) if None not in run["train_losses"]]
        points = [mean(values) for values in zip(*runs, strict=True)]
        curves[variant] = ([(index + 0.5) * every for index in range(len(points))], points)
    groups = panels_of(list(curves))
    figure, panels = _panels(len(groups))
    for axes, (title, names) in zip(panels, groups.items(), strict=True):
        _curves(axes, names, curves)
        axes.axhline(study["unigram_loss"], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    panels[0].set_ylabel("training cross entropy, nats a token")
    panels[0].annotate(
        "token frequencies alone",
        (0, study["unigram_loss"]),
        xytext=(0, -10),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )
    _finish(study, figure, f"Learning curves, {layers}+{layers} layers", path)
