"""One run as a terminal table, Markdown, CSV and JSON; as a program, it puts a run's table into a README.

    python -m depthlstm_fast.bench.report benchmarks/results/MACHINE/results.json
    python -m depthlstm_fast.bench.report --readme docs/benchmarks.md benchmarks/results/MACHINE/results.json

The first command prints the Markdown. The second rewrites the text between <!-- benchmarks:begin --> and <!--
benchmarks:end -->, and report.md beside the results.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthlstm_fast.command_line import Parser

from . import scaling_tables

if TYPE_CHECKING:
    from rich.table import Table

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
# 2: rows have numbers (bytes, rates, operator calls, memory, errors) and contestants without a column; a run has curves
SCHEMA = 2
SHORT = {"nn.TransformerEncoderLayer": "residual layer", "pre-norm Transformer": "residual model"}
Run = dict[str, Any]
RowData = dict[str, Any]


def significant(number: float) -> str:
    """Format three significant digits, never with an exponent: 1.93, 22.2, 501, 12345 -> "12,345"."""
    magnitude = abs(number)
    digits = 2 if magnitude < 10 else 1 if magnitude < 100 else 0
    return f"{number:,.{digits}f}"


def value_text(row: RowData, column: str) -> str:
    """Return a contestant's median with its unit; "-" if it did not take part."""
    if row["failure"] is not None or column not in row["values"]:
        return "-"
    return f"{significant(row['values'][column]['median'])} {row['unit']}"


def _number(kind: str, value: float, unit: str) -> str:
    if kind == "share":
        return f"{value:.0%}"
    if kind == "value":
        return f"{significant(value)} {unit}"
    # a ratio near 1 with an "at most" target needs the second digit
    return f"{value:.2f}x" if kind == "ratio" or value < 10 else f"{value:.1f}x"


def target_text(figure: dict[str, Any], unit: str) -> str:
    """Return "≥8x met" or "≤1.06x short"; empty without a target."""
    if figure["target"] is None:
        return ""
    sign = "≥" if figure["sense"] == "at least" else "≤"
    number = {"share": f"{figure['target']:.0%}", "value": f"{figure['target']:g} {unit}"}.get(
        figure["kind"], f"{figure['target']:g}x"
    )
    return f"{sign}{number} {'met' if figure['reached'] else 'short'}"


def figure_of(row: RowData, column: str) -> dict[str, Any] | None:
    """Return the row's figure in one column; None if there is none or none may be shown."""
    if row["failure"] is not None:
        return None
    return next((figure for figure in row["figures"] if figure["column"] == column), None)


def figure_text(row: RowData, column: str) -> tuple[str, str]:
    """Return a figure and its target with the verdict, as two texts."""
    figure = figure_of(row, column)
    if figure is None:
        return "-", ""
    return _number(figure["kind"], figure["value"], row["unit"]), target_text(figure, row["unit"])


def label_of(row: RowData) -> str:
    return ", ".join(filter(None, (row["name"], row["dtype"], row["size"])))


def tally(run: Run) -> tuple[int, int]:
    """Return the number of reached targets and of all targets, in rows that may be shown."""
    judged = [
        f["reached"]
        for row in run["rows"]
        if row["failure"] is None
        for f in row["figures"]
        if f["reached"] is not None
    ]
    return sum(judged), len(judged)


def terminal_table(run: Run) -> Table:
    """Return the run as a rich table of at most 118 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def cell(first: str, second: str, style: str = "dim") -> Text:
        return Text.assemble(first, ("\n" + second, style)) if second else Text(first)

    def judged(first: str, target: str) -> Text:
        return cell(first, target, "green" if target.endswith("met") else "red")

    def value(row: RowData, column: str) -> str:
        return value_text(row, column).replace("tokens/s", "tok/s")

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", min_width=25, no_wrap=True)
    for heading in ("eager", "compiled", "fused", "floor or rival", "over eager", "over\ncompiled", "against\nfloor"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(run["rows"]):
        if index and row["subject"] != run["rows"][index - 1]["subject"]:
            table.add_section()
        label = cell(row["name"], ", ".join(filter(None, (row["dtype"], row["size"]))))
        if row["failure"] is not None:
            table.add_row(label, Text("check red", "bold red"), *[""] * 6)
            continue
        table.add_row(
            label,
            value(row, "eager"),
            value(row, "compile"),
            judged(value(row, "fused"), figure_text(row, "fused")[1]),
            cell(value(row, "against"), SHORT.get(row["against"], row["against"])),
            *(judged(*figure_text(row, column)) for column in ("eager", "compile", "against")),
        )
    return table


def footnotes(run: Run) -> list[str]:
    """Return contestants without a column, omissions with their reasons, and every red check."""
    shown = [row for row in run["rows"] if row["failure"] is None]
    others = [
        f"{row['name']}, {row['dtype']}: {what} {value_text(row, name)}, the fused one {ratio:.2f}x that"
        for row in shown
        for name, what in row.get("others", {}).items()
        for ratio in [row["values"]["fused"]["median"] / row["values"][name]["median"]]
    ]
    lines = dict.fromkeys(f"{column}: {reason}" for row in run["rows"] for column, reason in row["missing"].items())
    red = [f"no numbers for {label_of(row)}: {row['failure']}" for row in run["rows"] if row["failure"] is not None]
    return [*others, *lines, *red]


def machine_text(run: Run) -> str:
    """Return machine, versions and date in one sentence."""
    machine = run["machine"]
    commit = (machine["commit"] or "unknown")[:12] + (" with changes" if machine["dirty"] else "")
    cache = machine["last_level_cache"]
    if re.fullmatch(r"\d+K", cache):
        cache = f"{int(cache[:-1]) / 1024:g} MiB"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} "
        f"threads, {machine['isa']}, {cache} last-level cache, "
        f"{machine['memory_gib']} GiB; {machine['os']}, Python {machine['python']}, torch {machine['torch']}, "
        f"depthlstm_fast {machine['depthlstm_fast']} at {commit}; {run['date']}"
    )


def markdown(run: Run) -> str:
    """Return the run as a Markdown table with the machine above it."""
    headings = (
        "",
        "eager",
        "compiled",
        "fused",
        "floor or rival",
        "fused over eager",
        "over compiled",
        "against floor or rival",
    )
    lines = [f"Measured on {machine_text(run)}.", ""]
    lines += ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]

    def joined(first: str, second: str) -> str:
        verdict = second.replace("short", "**short**")
        return f"{first} ({verdict})" if second else first

    for row in run["rows"]:
        label = label_of(row)
        if row["failure"] is not None:
            lines.append(f"| {label} | check red |" + " |" * (len(headings) - 2))
            continue
        against = value_text(row, "against")
        cells = (
            label,
            value_text(row, "eager"),
            value_text(row, "compile"),
            joined(value_text(row, "fused"), figure_text(row, "fused")[1]),
            against if against == "-" else f"{against}, {row['against']}",
            *(joined(*figure_text(row, column)) for column in ("eager", "compile", "against")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    reached, targets = tally(run)
    lines += [
        "",
        f"{reached} of {targets} targets met. Times are medians, contestants timed in turn; ratios are of medians.",
    ]
    if run["quick"]:
        lines.append("A quick run: fewer repetitions than a figure to quote needs.")
    lines += ["", *(f"- {line}" for line in footnotes(run))] if footnotes(run) else []
    return "\n".join(lines) + "\n"


def details(run: Run) -> str:
    """Return a second table: spread, share of the floor, rate, operator calls, peak memory and errors.

    It is empty for a run without any of these.
    """
    rows = [row for row in run["rows"] if row["failure"] is None and row.get("numbers")]
    if not rows:
        return ""
    headings = (
        "",
        "fused, p10 to p90",
        "of its floor",
        "rate",
        "operator calls, eager",
        "peak MB, eager",
        "error, eager",
        "of its bound",
    )
    lines = ["", "| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += ["| " + " | ".join(detail_cells(row)) + " |" for row in rows]
    lines += [
        "",
        "Rates count the bytes that have to move, or the FLOPs of the matrix "
        "products, by formula. Operator calls and the peak of torch's "
        "allocator are those of one call. Errors are against fp64, of the checked tensor that is nearest to its bound.",
    ]
    return "\n".join(lines) + "\n"


def detail_cells(row: RowData) -> list[str]:
    """Return one line of :func:`details`."""
    numbers, fused = row["numbers"], row["values"]["fused"]

    def both(name: str, form: Callable[[float], str]) -> str:
        return (
            ", ".join(form(numbers[f"{side}_{name}"]) for side in ("fused", "eager") if f"{side}_{name}" in numbers)
            or "-"
        )

    rates = [
        f"{numbers[name]:.3g} {unit}"
        for name, unit in (("gb_per_s", "GB/s"), ("gflop_per_s", "GFLOP/s"))
        if name in numbers
    ]
    return [
        label_of(row),
        f"{significant(fused['p10'])} to {significant(fused['p90'])} {row['unit']}",
        f"{numbers['floor_share']:.0%}" if "floor_share" in numbers else "-",
        ", ".join(rates) or "-",
        both("op_calls", lambda count: f"{count:,}"),
        both("peak_mb", lambda size: f"{size:.3g}"),
        f"{numbers['error']:.1e}, {numbers['eager_error']:.1e}" if "error" in numbers else "-",
        f"{numbers['bound_share']:.0%}" if "bound_share" in numbers else "-",
    ]


def full_markdown(run: Run) -> str:
    """Return all of report.md: the table, the details, the curves."""
    found = markdown(run) + details(run)
    if run.get("scaling"):
        found += "\n" + scaling_tables.markdown(run["scaling"])
    return found


def write_csv(run: Run, path: Path) -> None:
    """Write one line a number: every contestant and every figure of every row."""
    fields = (
        "subject",
        "name",
        "dtype",
        "size",
        "quantity",
        "unit",
        "median",
        "p10",
        "p90",
        "repetitions",
        "target",
        "reached",
        "failure",
    )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for row in run["rows"]:
            common = [row[name] for name in ("subject", "name", "dtype", "size")]
            if row["failure"] is not None:
                writer.writerow([*common, *[""] * 8, row["failure"]])
                continue
            for column, found in row["values"].items():
                quantity = row["against"] if column == "against" else row.get("others", {}).get(column, column)
                writer.writerow(
                    [
                        *common,
                        quantity,
                        row["unit"],
                        found["median"],
                        found["p10"],
                        found["p90"],
                        row["repetitions"],
                        "",
                        "",
                        "",
                    ]
                )
            for figure in row["figures"]:
                quantity = (
                    f"fused {figure['kind']} to {row['against'] if figure['column'] == 'against' else figure['column']}"
                )
                numbers = [figure["value"], figure["p10"], figure["p90"], row["repetitions"]]
                target = ["" if figure[name] is None else figure[name] for name in ("target", "reached")]
                writer.writerow([*common, quantity, figure["kind"], *numbers, *target, ""])
            for name, number in row.get("numbers", {}).items():
                writer.writerow([*common, name, "", number, "", "", "", "", "", ""])


def write_all(run: Run, folder: Path) -> None:
    """Write results.json, results.csv and report.md into ``folder``, which is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_csv(run, folder / "results.csv")
    (folder / "report.md").write_text(full_markdown(run), encoding="utf-8")


def embed(readme: str, block: str) -> str:
    """Return ``readme`` with ``block`` between the two markers.

    Raises:
        ValueError: the markers are not there once each, in this order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"readme must hold {BEGIN} and then {END}, once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{block.strip()}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    description = "A benchmark run as Markdown, printed or put into a README."
    parser = Parser(prog="python -m depthlstm_fast.bench.report", description=description)
    parser.add_argument("results", type=Path, help="results.json of a run")
    parser.add_argument("--readme", type=Path, help=f"rewrite what stands between {BEGIN} and {END} in this file")
    options = parser.parse_args(arguments)
    try:
        run = json.loads(options.results.read_text(encoding="utf-8"))
        block = markdown(run)
        if options.readme is None:
            print(block, end="")
        else:
            options.readme.write_text(embed(options.readme.read_text(encoding="utf-8"), block), encoding="utf-8")
            options.results.with_name("report.md").write_text(full_markdown(run), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0
