"""The page of a study: every number and every sentence with a number comes from its JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, each with its own marker and line, so that they are distinct without colour.
STYLES: dict[str, dict[str, Any]] = {
    "depth-lstm": {"color": "#E69F00", "marker": "o", "linestyle": "-"},
    "depth-lstm, forget bias 2": {"color": "#D55E00", "marker": "D", "linestyle": "--"},
    "pre-norm": {"color": "#0072B2", "marker": "^", "linestyle": "-."},
    "post-norm": {"color": "#009E73", "marker": "s", "linestyle": ":"},
}
INK = "#222222"
Study = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a Markdown table, the first column to the left, the others to the right."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def failed(study: Study, run: dict[str, Any]) -> bool:
    """Return whether a run broke off, or knows no more of the dev set than the tokens' frequencies tell."""
    return run["dev_loss"] is None or run["dev_loss"] >= study["unigram_loss"]


def tuning(study: Study, variant: str, layers: int) -> dict[float, dict[str, Any]]:
    """Return the runs of the first seed by their learning rates."""
    first = study["settings"]["seeds"][0]
    runs = [run for run in study["runs"] if (run["variant"], run["layers"], run["seed"]) == (variant, layers, first)]
    return {run["learning_rate"]: run for run in runs}


def tuned(study: Study, variant: str, layers: int) -> list[dict[str, Any]]:
    """Return the runs with the best learning rate, one a seed."""
    grid = tuning(study, variant, layers)
    best = min(grid, key=lambda rate: float("inf") if grid[rate]["dev_loss"] is None else grid[rate]["dev_loss"])
    chosen = [
        run for run in study["runs"] if (run["variant"], run["layers"], run["learning_rate"]) == (variant, layers, best)
    ]
    return sorted(chosen, key=lambda run: run["seed"])


def losses(study: Study, variant: str, layers: int) -> list[float]:
    """Return the dev cross entropy of each seed at the tuned learning rate; infinite if a run broke off."""
    return [float("inf") if run["dev_loss"] is None else run["dev_loss"] for run in tuned(study, variant, layers)]


def change(now: list[float], before: list[float]) -> str:
    """Return the difference of the means as text; there is none if runs broke off."""
    difference = mean(now) - mean(before)
    return f"{difference:+.3f}" if math.isfinite(difference) else "no number (runs broke off)"


def loss_table(study: Study) -> str:
    rows = []
    for variant in study["variants"]:
        cells = []
        for layers in study["settings"]["depths"]:
            found = losses(study, variant, layers)
            count = sum(failed(study, run) for run in tuned(study, variant, layers))
            note = f", {count} of {len(found)} failed" if count else ""
            cells.append(f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f}{note})")
        rows.append([variant, *cells])
    return table(["", *(f"{layers}+{layers} layers" for layers in study["settings"]["depths"])], rows)


def rate_table(study: Study) -> str:
    rates = sorted({run["learning_rate"] for run in study["runs"]})
    rows = []
    for variant in study["variants"]:
        for layers in study["settings"]["depths"]:
            grid, best = tuning(study, variant, layers), tuned(study, variant, layers)[0]["learning_rate"]
            cells = []
            for rate in rates:
                text = (
                    "-"
                    if rate not in grid
                    else "broke off"
                    if grid[rate]["dev_loss"] is None
                    else f"{grid[rate]['dev_loss']:.3f}"
                )
                cells.append(f"**{text}**" if rate == best else text)
            rows.append([f"{variant}, {layers}+{layers}", *cells])
    return table(["", *(f"{rate:g}" for rate in rates)], rows)


def gradient_table(study: Study) -> str:
    depths = study["settings"]["depths"]
    rows: dict[tuple[str, str], list[str]] = {}
    for stack in ("encoder", "decoder"):
        for entry in study["gradients"]:
            if entry["stack"] == stack:
                ratio = entry["norms"][0] / entry["norms"][-1]
                rows.setdefault((entry["variant"], entry["init"]), []).append(
                    f"{ratio:.1e}" if ratio < 0.01 else f"{ratio:.2f}"
                )
    heads = [f"{stack}, {layers}" for stack in ("encoder", "decoder") for layers in depths]
    return table(["", *heads], ([", ".join(key), *cells] for key, cells in rows.items()))


def cost_table(study: Study) -> str:
    rows = []
    for layers in study["settings"]["depths"]:
        for entry in (entry for entry in study["costs"] if entry["layers"] == layers):
            speed = entry["tokens_per_second"]
            spread = f"{speed['median']:,.0f} ({speed['p10']:,.0f} to {speed['p90']:,.0f})"
            rows.append(
                [
                    f"{entry['variant']}, {layers}+{layers}",
                    f"{entry['parameters']:,}",
                    spread,
                    f"{entry['kept_mb']:.1f}",
                ]
            )
    return table(["", "parameters", "tokens/s, median (p10 to p90)", "MB kept for backward"], rows)


def findings(study: Study) -> list[str]:
    """Return the findings, defeats included, one line each."""
    lines = []
    for layers in study["settings"]["depths"]:
        found = {variant: losses(study, variant, layers) for variant in study["variants"]}
        ranked = sorted(found, key=lambda variant: mean(found[variant]))
        best = ranked[0]
        others = []
        for variant in ranked[1:]:
            overlap = min(found[variant]) <= max(found[best])
            others.append(f"{variant} {change(found[variant], found[best])}{' (the seeds overlap)' if overlap else ''}")
        lines.append(
            f"{layers}+{layers} layers: {best} has the lowest dev cross entropy, "
            f"{mean(found[best]):.3f}; then {', '.join(others)}."
        )
    shallow, deep = min(study["settings"]["depths"]), max(study["settings"]["depths"])
    for variant in study["variants"]:
        changed = change(losses(study, variant, deep), losses(study, variant, shallow))
        lines.append(
            f"From {shallow}+{shallow} to {deep}+{deep} layers, after as many steps, {variant} changes by {changed}."
        )
    count = sum(failed(study, run) for run in study["runs"])
    limit = f"{study['unigram_loss']:.3f}, what the tokens' frequencies give"
    lines.append(f"{count} of {len(study['runs'])} runs failed: broke off, or ended above {limit}.")
    edge = []
    for variant in study["variants"]:
        for layers in study["settings"]["depths"]:
            grid, best = tuning(study, variant, layers), tuned(study, variant, layers)[0]["learning_rate"]
            if best in (min(grid), max(grid)):
                edge.append(f"{variant} {layers}+{layers}")
    if edge:
        lines.append(
            f"The best learning rate is at the end of the grid tried, and may "
            f"not be the best there is, for: {'; '.join(edge)}."
        )
    return lines


def markdown(study: Study) -> str:
    """Return the page."""
    machine, settings, corpus = study["machine"], study["settings"], study["corpus"]
    commit = (machine["commit"] or "unknown")[:12]
    return f"""# A small study: depth-wise LSTM, pre-norm, post-norm

Made by `examples/translation/study_report.py` from [study.json](study.json), which `examples/translation/study.py` wrote.
No number below is typed by hand.
To repeat it (some 40 minutes on two cores):

    python examples/translation/prepare.py --data debian --language de --vocab-size {corpus["vocabulary"]} corpus
    python examples/translation/study.py corpus --output study
    python examples/translation/study_report.py study --docs docs

Corpus: {corpus["dataset"]}, {corpus["pairs"]["train"]:,} pairs to train on, {corpus["vocabulary"]:,} subwords.
Dev cross entropy is over {settings["dev_pairs"]} of the {corpus["pairs"]["dev"]:,} dev pairs, in nats a target token.

Every model has d = {settings["d_model"]}, {settings["heads"]} heads, GELU, no dropout and no label smoothing.
It has as many layers in the encoder as in the decoder, and equally many matrix weights at a depth.
It takes {settings["steps"]} steps, {settings["warmup_steps"]} of them warm-up, of at most {settings["token_budget"]:,} ids.
The batches are the same for all.
So short a training tells whether and how fast a model begins to learn, and nothing of the quality of a trained one.

Machine: {machine["cpu"]}, {machine["cores"]} cores, torch {machine["torch"]}, depthlstm_fast {machine["depthlstm_fast"]} at {commit}.

## What was found

{chr(10).join("- " + line for line in findings(study))}

## Dev cross entropy by depth

Mean of {len(settings["seeds"])} seeds (lowest to highest), each variant with its own learning rate at each depth, lipschitz initialisation.
The seeds change the initial weights only.

{loss_table(study)}

![Training cross entropy over steps, by depth](study_learning.png)

The learning rates tried with the first seed, and the dev cross entropy that each led to; the chosen one is bold:

{rate_table(study)}

## Gradient at initialisation

Norm of the loss's gradient at the first layer's output, over that at the last layer's: 1 is even, 0 is vanished.
It was taken before any training, with one batch and one seed.

{gradient_table(study)}

![Gradient at each decoder layer](study_gradients.png)

## Speed and memory

A training step (forward, backward, update) on {machine["threads"]} threads, all four in turn; tokens are source and target tokens.
The residual models are `torch.nn`'s layers; "plain PyTorch" is the reference that the fused depth-wise LSTM is held to.

{cost_table(study)}

## What this does not show

One language pair of technical text, one width, {settings["steps"]} steps, no translation quality.
The learning rates are on a grid of factors of two.
Dev cross entropy picks the learning rate and is then reported, so the first seed's figure is slightly too good, for all variants alike.
The paper trains other sizes for far longer, and its figures are not compared with here.
"""  # noqa: E501


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


def gradient_plot(study: Study, path: Path) -> None:
    """Plot each decoder layer's gradient over the last layer's.

    The figure has the deepest models, with one panel for each initialisation.
    """
    deep = max(study["settings"]["depths"])
    entries = [entry for entry in study["gradients"] if entry["stack"] == "decoder" and entry["layers"] == deep]
    inits = list(dict.fromkeys(entry["init"] for entry in entries))
    figure, panels = _panels(len(inits))
    for axes, init in zip(panels, inits, strict=True):
        for entry in (entry for entry in entries if entry["init"] == init):
            shares = [norm / entry["norms"][-1] for norm in entry["norms"]]
            axes.plot(range(1, deep + 1), shares, label=entry["variant"], markersize=4, **STYLES[entry["variant"]])
        axes.set_yscale("log")
        axes.set_title(f"{init} initialisation", fontsize=10, loc="left", color=INK)
        axes.set_xlabel(f"decoder layer, of {deep}")
    panels[0].set_ylabel("gradient, over the last layer's")
    panels[-1].legend(frameon=False, fontsize=9, loc="lower right")
    _finish(study, figure, "Gradient at each layer's output before training", path)


def learning_plot(study: Study, path: Path) -> None:
    """Plot training cross entropy over steps at the tuned rate, as the mean of the seeds.

    The figure has one panel for each depth.
    """
    depths, steps = study["settings"]["depths"], study["settings"]["steps"]
    figure, panels = _panels(len(depths))
    for axes, layers in zip(panels, depths, strict=True):
        for variant in study["variants"]:
            curves = [run["train_losses"] for run in tuned(study, variant, layers) if None not in run["train_losses"]]
            points = [mean(values) for values in zip(*curves, strict=False)]
            width = steps / max(len(points), 1)
            axes.plot(
                [(index + 0.5) * width for index in range(len(points))],
                points,
                label=variant,
                markersize=4,
                **STYLES[variant],
            )
        axes.axhline(study["unigram_loss"], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_title(f"{layers}+{layers} layers", fontsize=10, loc="left", color=INK)
        axes.set_xlabel("step")
    panels[0].set_ylabel("training cross entropy, nats a token")
    panels[0].annotate(
        "token frequencies alone",
        (steps, study["unigram_loss"]),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=INK,
    )
    panels[-1].legend(frameon=False, fontsize=9, loc="upper right")
    _finish(study, figure, "Learning curves at the tuned learning rates", path)
