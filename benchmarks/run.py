"""Run the benchmark suite: checks first, then one table.

`python -m depthlstm_fast.bench` or `make bench` runs it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import depthlstm_fast as dl
from depthlstm_fast.command_line import Parser, make_folder

from . import CHECKOUT
from .measure import machine
from .measure.accuracy import Check
from .measure.compiled import Compiled
from .measure.curves import Curve
from .measure.place import Place
from .measure.rows import QUICK, Row, Settings, row_data
from .report import plots, roofline, scaling_plots, tables
from .subjects import layer, registry, scaling, translation
from .subjects.registry import SUBJECTS, checked, compile_all

# limit of the translation's training
TRANSLATION_SECONDS = 30
TABLE = tuple(name for name, subject in SUBJECTS.items() if subject.in_table)
NAMES = (*TABLE, "scaling", "translation")
ON_REQUEST = tuple(name for name, subject in SUBJECTS.items() if subject.on_request)
COMPILE_DTYPES = (torch.float32, torch.bfloat16)
# where Python finds the package: the source tree, or site-packages
ROOT = Path(dl.__file__).resolve().parents[1]


def default_output() -> Path:
    """Return the folder for results, inside the source tree if there is one."""
    return Path("depthlstm_fast_bench") if CHECKOUT is None else CHECKOUT / "benchmarks" / "results" / "latest"


class Bar:
    """Progress on stderr; silent if that is not a terminal."""

    def __init__(self, subjects: list[str], settings: Settings) -> None:
        # one tick for each repetition of a subject's minimum
        self.ticks = {
            "checks": sum(len(subject.dtypes) for subject in checked(subjects)),
            "compile": len(COMPILE_DTYPES),
        }
        self.ticks |= {name: SUBJECTS[name].ticks_in(settings) for name in subjects}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
        )
        # redrawn by hand, because a redrawing thread would be timed with the rest
        console = Console(stderr=True)
        self.progress = Progress(
            *columns, console=console, disable=not console.is_terminal, auto_refresh=False, transient=True
        )
        self.task = self.progress.add_task("", total=sum(self.ticks.values()))
        self.before, self.stage, self.count = 0, "", 0
        self.seconds: dict[str, float] = {}
        self.since = time.perf_counter()

    def start(self, stage: str, text: str) -> None:
        self.finish()
        self.before += self.ticks.get(self.stage, 0)
        self.stage, self.count = stage, 0
        self.progress.update(self.task, completed=self.before, description=f"{text:<34}", refresh=True)

    def finish(self) -> None:
        """Note how long the stage took."""
        now = time.perf_counter()
        if self.stage:
            self.seconds[self.stage] = round(now - self.since, 1)
        self.since = now

    def tick(self) -> None:
        # repetitions above the minimum must not push the bar past the stage
        self.count = min(self.count + 1, self.ticks[self.stage])
        self.progress.update(self.task, completed=self.before + self.count, refresh=True)


def command_line() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m depthlstm_fast.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="no torch.compile, three repetitions, few translation steps: not to be quoted",
    )
    parser.add_argument("--no-translation", action="store_true", help="leave out the translation example")
    parser.add_argument(
        "--only", action="append", choices=NAMES, metavar="SUBJECT", help=f"one of {', '.join(NAMES)}; may be repeated"
    )
    parser.add_argument("--output", type=Path, default=default_output(), help="folder for JSON, CSV, Markdown and PNG")
    return parser


def fill_compiler_cache(references: Compiled, subjects: list[str], bar: Bar) -> None:
    """Compile the eager baselines of ``subjects``, half of them in a second process, into inductor's cache on disk."""
    here, there = COMPILE_DTYPES
    command = [sys.executable, "-m", f"{__package__}.subjects", str(there).removeprefix("torch."), *subjects]
    helper = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    compile_all(references, here, subjects)
    bar.tick()
    if references.reason is not None:
        helper.terminate()
    helper.wait()
    compile_all(references, there, subjects)
    bar.tick()


def measure(subjects: list[str], settings: Settings, bar: Bar, found: list[Check]) -> list[Row]:
    """Return all rows but the translation's; a subject with a red check is not timed."""
    place = Place(Compiled(settings.compile))
    if settings.compile and any(name in SUBJECTS and SUBJECTS[name].compile is not None for name in subjects):
        bar.start("compile", "compiling the eager baselines")
        fill_compiler_cache(place.compiled, subjects, bar)
    rows = []
    for subject in (name for name in subjects if name in TABLE):
        bar.start(subject, f"timing: {subject}")
        red = registry.failure(found, subject)
        if red is not None:
            rows.append(Row(subject, subject, "", "", "", failure=red))
            continue
        for make in SUBJECTS[subject].problems.values():
            torch.manual_seed(0)
            for row in make(place).measure(settings, bar.tick):
                row.numbers |= registry.error_numbers(found, subject, row.dtype)
                rows.append(row)
    return rows


def curves(settings: Settings, bar: Bar, found: list[Check]) -> list[Curve]:
    """Return the curves of scaling; none if a check is red."""
    bar.start("scaling", "timing: scaling")
    torch.manual_seed(0)
    return [] if registry.failure(found, "scaling") else scaling.measure_curves(settings, bar.tick)


def translate(settings: Settings, bar: Bar, found: list[Check]) -> tuple[Row, dict[str, Any] | None]:
    """Return the last row, and the example's result; the example draws its own progress bar."""
    bar.start("translation", "training translation models")
    red = registry.failure(found, "translation")
    if red is not None:
        return Row("translation", "translation training", "", "", "", failure=red), None
    bar.progress.stop()
    row = Row("translation", "translation training", "fp32", "", "tokens/s")
    try:
        result = translation.run(TRANSLATION_SECONDS, None if settings.minimum >= 7 else 6, not bar.progress.disable)
    except translation.DivergedError as error:
        row.failure = f"training diverged: {error}"
        return row, None
    except ImportError as error:
        row.missing["translation"] = f"not run: {error}"
        return row, None
    return translation.row(result), result


def show(run: dict[str, Any], folder: Path) -> None:
    """Print checks, table, footnotes and translations on stdout."""
    console = Console(highlight=False)
    if console.width < 120:
        # a narrower table would cut numbers; a line that the terminal wraps can still be read
        console = Console(highlight=False, width=120)
    console.print(tables.machine_text(run), markup=False, soft_wrap=True)
    console.print(tables.terminal_table(run))
    if any(row["against"] == layer.RESIDUAL for row in run["rows"]):
        console.print(f"residual layer: {layer.RESIDUAL}, as many weights, fed the same batch")
    for line in tables.footnotes(run):
        console.print(line, markup=False, soft_wrap=True)
    result = run["translation"]
    if result is not None:
        losses = ", ".join(f"{side} {values[0]:.3f} -> {values[-1]:.3f}" for side, values in result["losses"].items())
        console.print(f"translation losses over {result['steps']} steps: {losses}")
        console.print(f"held-out sentences after so few steps ({result['dataset']}), as they are:")
        for source, target, text in result["examples"]:
            console.print(
                f"  source     {source}\n  reference  {target}\n  model      {text or '(nothing)'}",
                markup=False,
                soft_wrap=True,
            )
    reached, targets = tables.tally(run)
    summary = f"{reached} of {targets} targets met; {run['elapsed_seconds']:.0f} s; results in {folder}"
    console.print(summary, markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Return 0, or 1 if a check is red, or 2 if there is nothing to measure."""
    started = time.perf_counter()
    parser = command_line()
    options = parser.parse_args(arguments)
    status = dl.backends()[registry.BACKEND]
    if not status.available:
        print(
            f"benchmarks: nothing to measure, the {registry.BACKEND} backend is not available: {status.detail}",
            file=sys.stderr,
        )
        return 2
    subjects = [name for name in NAMES if (name in options.only if options.only else name not in ON_REQUEST)]
    if options.no_translation:
        subjects = [name for name in subjects if name != "translation"]
    if not subjects:
        parser.error("--only translation with --no-translation leaves nothing to run")
    reason = make_folder(options.output)  # before minutes of measuring
    if reason is not None:
        parser.error(reason)
    settings = QUICK if options.quick else Settings()
    about = machine.describe()
    bar = Bar(subjects, settings)
    result = None
    # "cpp", not "auto": a call that would fall back raises instead of being timed
    with dl.use_backend(registry.BACKEND), bar.progress if not bar.progress.disable else nullcontext():
        torch.manual_seed(0)
        bar.start("checks", "checking against fp64")
        found = registry.run_checks(subjects, bar.tick)
        rows = measure(subjects, settings, bar, found)
        lines = curves(settings, bar, found) if "scaling" in subjects else []
        if "translation" in subjects:
            row, result = translate(settings, bar, found)
            rows.append(row)
        bar.finish()
    run = {
        "schema": tables.SCHEMA,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": options.quick,
        "machine": about,
        "settings": asdict(settings),
        "checks": [asdict(check) for check in found],
        "rows": [row_data(row) for row in rows],
        "scaling": lines,
        "translation": result,
        "stage_seconds": bar.seconds,
        "elapsed_seconds": time.perf_counter() - started,
    }
    tables.write_all(run, options.output)
    plots.write_all(run, options.output)
    scaling_plots.write_all(run, options.output)
    roofline.write(run, options.output)
    green = sum(check.passed for check in found)
    print(
        f"checks against fp64: {green} of {len(found)} green"
        + "".join(f"\n  {c.subject} {c.dtype} {c.summary}" for c in found if not c.passed)
    )
    show(run, options.output)
    return 1 if green < len(found) or any(row.failure is not None for row in rows) else 0
