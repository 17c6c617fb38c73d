"""The page of a study: every number and every sentence with a number comes from its JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import mean
from typing import Any

Study = dict[str, Any]
NEAREST = 3  # variants that a finding names beside the best


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Format a Markdown table, the first column to the left, the others to the right."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def failed(study: Study, run: dict[str, Any]) -> bool:
    """Return whether a run broke off, or knows no more of the dev set than the tokens' frequencies tell."""
    return run["dev_loss"] is None or run["dev_loss"] >= study["unigram_loss"]


def depths(study: Study) -> list[int]:
    """Return the numbers of layers that models learned with, from few to many."""
    return sorted(int(layers) for layers in study["settings"]["plan"])


def planned(study: Study, layers: int) -> list[str]:
    """Return the variants that learned with so many layers."""
    variants: list[str] = study["settings"]["plan"][str(layers)]
    return variants


def by_loss(study: Study, layers: int) -> list[str]:
    """Return the variants that learned with so many layers, the lowest mean dev cross entropy first."""
    return sorted(planned(study, layers), key=lambda variant: mean(losses(study, variant, layers)))


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


def loss_cell(study: Study, variant: str, layers: int) -> str:
    found = losses(study, variant, layers)
    count = sum(failed(study, run) for run in tuned(study, variant, layers))
    note = f", {count} of {len(found)} failed" if count else ""
    if len(study["settings"]["seeds"]) == 1:
        return f"{found[0]:.3f}{' (failed)' if count else ''}"
    return f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f}{note})"


def loss_table(study: Study) -> str:
    """Return the dev cross entropy by variant and depth, the best at the depth that all learned at first."""
    full = max(depths(study), key=lambda layers: len(planned(study, layers)))
    rows = []
    for variant in by_loss(study, full):
        rows.append(
            [
                variant,
                *(
                    loss_cell(study, variant, layers) if variant in planned(study, layers) else "-"
                    for layers in depths(study)
                ),
            ]
        )
    return table(["", *(f"{layers}+{layers} layers" for layers in depths(study))], rows)


def speeds(study: Study) -> dict[str, float]:
    """Return tokens a second by variant; forget biases take the same time."""
    found = {entry["variant"]: entry["tokens_per_second"]["median"] for entry in study["costs"]}
    base = next(name for name in found if name.startswith("depth-lstm"))
    return {variant: found.get(variant, found[base]) for variant in study["variants"]}


def time_table(study: Study) -> str:
    """Return the training cross entropy after equally many steps, and after equal time.

    The time is what the fastest variant takes for all steps.
    """
    layers, speed = study["settings"]["cost_depth"], speeds(study)
    steps, every = study["settings"]["steps"], study["settings"]["every"]
    end = steps / max(speed[variant] for variant in planned(study, layers))
    rows = []
    for variant in by_loss(study, layers):
        curves = [run["train_losses"] for run in tuned(study, variant, layers) if None not in run["train_losses"]]
        if not curves:
            rows.append([variant, f"{speed[variant]:,.0f}", "-", "broke off", "broke off"])
            continue
        points = [mean(values) for values in zip(*curves, strict=True)]
        index = max(1, int(end * speed[variant] / every + 1e-9)) - 1
        rows.append(
            [
                variant,
                f"{speed[variant]:,.0f}",
                f"{min(steps, (index + 1) * every)}",
                f"{points[index]:.3f}",
                f"{points[-1]:.3f}",
            ]
        )
    return table(["", "tokens/s", "steps in equal time", "loss there", f"loss at step {steps}"], rows)


def rate_table(study: Study) -> str:
    rates = sorted({run["learning_rate"] for run in study["runs"]})
    rows = []
    for variant in study["variants"]:
        for layers in (layers for layers in depths(study) if variant in planned(study, layers)):
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
    rows: dict[tuple[str, str], list[str]] = {}
    for stack in ("encoder", "decoder"):
        for entry in study["gradients"]:
            if entry["stack"] == stack:
                first, last = entry["norms"][0], entry["norms"][-1]
                cell = "none" if last == 0 else f"{first / last:.1e}" if first < 0.01 * last else f"{first / last:.2f}"
                rows.setdefault((entry["variant"], entry["init"]), []).append(cell)
    heads = [
        f"{stack}, {layers}" for stack in ("encoder", "decoder") for layers in study["settings"]["gradient_depths"]
    ]
    return table(["", *heads], ([", ".join(key), *cells] for key, cells in rows.items()))


def cost_table(study: Study) -> str:
    rows = []
    for entry in study["costs"]:
        speed = entry["tokens_per_second"]
        spread = f"{speed['median']:,.0f} ({speed['p10']:,.0f} to {speed['p90']:,.0f})"
        name = "depth-lstm" if entry["variant"].startswith("depth-lstm") else entry["variant"]
        rows.append([name, f"{entry['parameters']:,}", spread, f"{entry['kept_mb']:.1f}"])
    return table(["", "parameters", "tokens/s, median (p10 to p90)", "MB kept for backward"], rows)


def findings(study: Study) -> list[str]:
    """Return the findings, defeats included, one line each."""
    lines = []
    for layers in depths(study):
        found = {variant: losses(study, variant, layers) for variant in planned(study, layers)}
        best, *others = by_loss(study, layers)
        texts = []
        for variant in others[:NEAREST]:
            overlap = len(found[best]) > 1 and min(found[variant]) <= max(found[best])
            texts.append(f"{variant} {change(found[variant], found[best])}{' (the seeds overlap)' if overlap else ''}")
        lines.append(
            f"{layers}+{layers} layers: {best} has the lowest dev cross entropy, "
            f"{mean(found[best]):.3f}; nearest {', '.join(texts)}."
        )
    shallow, deep = min(depths(study)), max(depths(study))
    for variant in (variant for variant in planned(study, deep) if variant in planned(study, shallow)):
        changed = change(losses(study, variant, deep), losses(study, variant, shallow))
        lines.append(
            f"From {shallow}+{shallow} to {deep}+{deep} layers, after as many steps, {variant} changes by {changed}."
        )
    count = sum(failed(study, run) for run in study["runs"])
    limit = f"{study['unigram_loss']:.3f}, what the tokens' frequencies give"
    lines.append(f"{count} of {len(study['runs'])} runs failed: broke off, or ended above {limit}.")
    edge = []
    for variant in study["variants"]:
        for layers in (layers for layers in depths(study) if variant in planned(study, layers)):
            grid, best = tuning(study, variant, layers), tuned(study, variant, layers)[0]["learning_rate"]
            if best in (min(grid), max(grid)):
                edge.append(f"{variant} {layers}+{layers}")
    if edge and len(study["settings"]["rates"]) > 1:
        lines.append(
            f"The best learning rate is at the end of the grid tried, and may "
            f"not be the best there is, for: {'; '.join(edge)}."
        )
    return lines


def markdown(study: Study) -> str:
    """Return the page."""
    machine, settings, corpus = study["machine"], study["settings"], study["corpus"]
    commit = (machine["commit"] or "unknown")[:12]
    seeds, depth = len(settings["seeds"]), f"{settings['cost_depth']}+{settings['cost_depth']}"
    rates, seeds_text = (" ".join(f"{value:g}" for value in settings[name]) for name in ("rates", "seeds"))
    several = len(settings["rates"]) > 1
    learned = {name for names in settings["plan"].values() for name in names}
    chosen = (
        ""
        if learned == set(study["variants"])
        else " ".join(f'"{name}"' for name in study["variants"] if name in learned)
    )
    variants = f" --variants {chosen}" if chosen else ""
    rates_line = (
        "Each variant has its own learning rate at each depth."
        if several
        else f"All have a learning rate of {rates}, which may suit one better than another."
    )
    rates_part = (
        f"""
The learning rates tried with the first seed, and the dev cross entropy that each led to; the chosen one is bold:

{rate_table(study)}
"""
        if several
        else ""
    )
    rates_limit = (
        "The learning rates are on a grid of factors of two.\n"
        "Dev cross entropy picks the learning rate and is then reported, so the first seed's figure is slightly too "
        "good, for all variants alike."
        if several
        else "One learning rate for all, and one seed: the order of variants that lie close means nothing."
    )
    seeds_line = (
        f"Mean of {seeds} seeds (lowest to highest), which change the initial weights only."
        if seeds > 1
        else "One seed: differences of a few hundredths say nothing."
    )
    return f"""# A small study: depth connections, and the forget bias

Made by `examples/translation/study_report.py` from [study.json](study.json), which `examples/translation/study.py` wrote.
No number below is typed by hand.
To repeat it (some hours on two cores):

    python examples/translation/prepare.py --data debian --language de --vocab-size {corpus["vocabulary"]} corpus
    python examples/translation/study.py corpus --output study --rates {rates} --seeds {seeds_text}{variants}
    python examples/translation/study_report.py study --docs docs

Corpus: {corpus["dataset"]}, {corpus["pairs"]["train"]:,} pairs to train on, {corpus["vocabulary"]:,} subwords.
Dev cross entropy is over {settings["dev_pairs"]} of the {corpus["pairs"]["dev"]:,} dev pairs, in nats a target token.

Every model has d = {settings["d_model"]}, {settings["heads"]} heads, GELU, no dropout and no label smoothing.
It has as many layers in the encoder as in the decoder.
At a depth all have equally many matrix weights, but for the depth-wise GRU, which has fewer.
It takes {settings["steps"]} steps, {settings["warmup_steps"]} of them warm-up, of at most {settings["token_budget"]:,} ids.
The batches are the same for all.
So short a training tells whether and how fast a model begins to learn, and nothing of the quality of a trained one.

Machine: {machine["cpu"]}, {machine["cores"]} cores, torch {machine["torch"]}, depthlstm_fast {machine["depthlstm_fast"]} at {commit}.

## What was found

{chr(10).join("- " + line for line in findings(study))}

## Dev cross entropy by depth

{seeds_line}
{rates_line}
Initialisation is lipschitz, and DeepNorm's own for deepnorm.

{loss_table(study)}

![Training cross entropy over steps](study_learning.png)
{rates_part}
## Equal steps, equal time

Training cross entropy at {depth} layers, the mean of the last {settings["every"]} steps.
The time is what the fastest variant takes for all its steps.

{time_table(study)}

## Gradient at initialisation

Norm of the loss's gradient at the first layer's output, over that at the last layer's: 1 is even, 0 is vanished.
The output of a depth-wise LSTM's layer is h; that of another connection's is its whole state.
It was taken before any training, with one batch and one seed.
"none": no gradient reaches the stack at all, because the other stack's branches start at zero.

{gradient_table(study)}

![Gradient at each decoder layer](study_gradients.png)

## Speed and memory

A training step (forward, backward, update) at {depth} layers on {machine["threads"]} threads, all in turn.
Tokens are source and target tokens.

{cost_table(study)}

## What this does not show

One language pair of technical text, one width, {settings["steps"]} steps, no translation quality.
{rates_limit}
The paper trains other sizes for far longer, and its figures are not compared with here.
"""  # noqa: E501
