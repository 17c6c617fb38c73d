"""Terminal output of a run: a progress bar with loss and speed, and the comparison as a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise ImportError("the translation example needs rich: pip install rich") from error

if TYPE_CHECKING:
    from training import StepResult


@contextmanager
def progress_bar(name: str, steps: int, enabled: bool = True, done: int = 0) -> Iterator[Callable[[StepResult], None]]:
    """Show a bar of ``steps`` steps, ``done`` of them done, on stderr if that is a terminal.

    Yields a function that takes the result of each step.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled or not sys.stderr.isatty()) as progress:
        task = progress.add_task(name, total=steps, completed=done, loss=float("nan"), speed=0.0)

        def advance(result: StepResult) -> None:
            progress.update(task, advance=1, loss=result.loss, speed=result.tokens_per_second)

        yield advance


def print_examples(examples: list[tuple[str, str, str]]) -> None:
    """Print sources, reference translations and the model's own, unchanged."""
    print("\nheld-out sentences:")
    for source, target, translation in examples:
        print(f"  source     {source}\n  reference  {target}\n  model      {translation or '(nothing)'}\n")


def print_comparison(result: dict[str, Any]) -> None:
    """Print the result of ``run_comparison``."""
    out = Console(highlight=False)
    out.print(f"{result['dataset']}: {result['pairs']} pairs, {result['heldout_pairs']} of them held out", markup=False)
    layers = f"{result['encoder_layers']}+{result['decoder_layers']} layers of {result['d_model']}"
    out.print(f"{layers}, {result['parameters'] / 1e6:.1f}M parameters, {result['vocabulary']} subwords")
    out.print(f"device: {result['device']}; threads: {result['threads']}; fused backend: {result['backend']}")
    table = Table()
    for heading in ("", "first loss", "last loss", "held-out loss", "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for side, losses in result["losses"].items():
        speed = f"{result['tokens_per_second'][side]:,.0f}"
        table.add_row(side, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{result['heldout_loss'][side]:.4f}", speed)
    out.print(table)
    verdict = "agree" if result["losses_agree"] else "DISAGREE"
    difference = (
        f"{result['max_relative_loss_difference']:.1e} at most over "
        f"{result['steps']} steps, {result['tolerance']:.0e} allowed"
    )
    out.print(f"losses {verdict}: relative difference {difference}")
    out.print(f"fused over reference: {result['speedup']:.2f}x tokens/s, median over steps taken in turn")
    print_examples(result["examples"])


def print_analysis(result: dict[str, Any]) -> None:
    """Print the result of ``analyse``: for each layer the dev cross entropy, and by how much it has risen."""
    out = Console(highlight=False)
    kinds = [name for name in ("ridge", "tuned", "dropped") if name in result["layers"][0]]
    full, bleu = result["full"], result["options"]["bleu"]
    about = f"{result['settings']['architecture']}, {result['checkpoint']}: dev cross entropy {full['dev_loss']:.4f}"
    out.print(about + (f", {bleu} BLEU {full['bleu']:.2f}" if bleu else ""), markup=False)
    table = Table()
    for heading in ("stack", "layer", "scope", "R^2", *kinds, *(f"BLEU {name}" for name in kinds if bleu)):
        table.add_column(heading, justify="left" if heading in ("stack", "scope") else "right", no_wrap=True)
    for row in result["layers"]:
        r2 = [each for found in row["ridge"]["r2"].values() for each in found]
        losses = [f"{row[name]['dev_loss']:.4f} {row[name]['dev_loss'] - full['dev_loss']:+.4f}" for name in kinds]
        scores = [f"{row[name]['bleu']:.2f}" for name in kinds if bleu]
        explained = " ".join("-" if each is None else f"{each:.3f}" for each in r2)
        table.add_row(row["stack"], str(row["layer"]), row["scope"], explained, *losses, *scores)
    # a narrow terminal wraps the rows, where rich would cut figures
    width = Console(width=1000).measure(table).maximum
    Console(highlight=False, width=width).print(table, soft_wrap=True)
