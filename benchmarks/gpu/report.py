"""Reports of a `make gpu` run as plain text, Markdown and pictures.

They are made from results.json alone, so that an interrupted run has them as well.

    python -m depthlstm_fast.bench.gpu.report benchmarks/results/MACHINE     prints the text
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report.tables import figure_text, value_text
from . import compare
from .jobs import Run, write_text

HEADINGS = (
    "what",
    "fused",
    "eager",
    "compiled",
    "floor or rival",
    "over eager",
    "over compiled",
    "against",
    "GB/s",
    "error (eager's)",
)
SHOWN_PLANS = 3
TAIL_LINES = 25
ALL_WELL = ("done",)
METHOD = (
    "Times are medians of the GPU's own time, contestants in turn, the cache "
    "cleared before each call; latencies and host times are the "
    "host's. Errors are the check's: the largest over its bound, and eager's of the same tensor."
)
PLAN_HEADINGS = ("plan", "ms", "p10", "p90", "share of copy", "registers", "spills", "shared", "")


def machine_text(run: Run) -> str:
    """Return GPU, versions, commit and date in one sentence."""
    machine = run["machine"]
    commit = (machine.get("commit") or "unknown commit")[:14] + (" with changes" if machine.get("dirty") else "")
    gpu = (
        f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}"
        if machine.get("gpu")
        else f"no GPU: {machine['cpu']}"
    )
    text = (
        f"{gpu}; Python {machine['python']}, torch {machine['torch']}, triton "
        f"{machine.get('triton')}, depthlstm_fast at {commit}"
    )
    ceilings = run.get("ceilings")
    if ceilings:
        text += f"; a large copy moves {ceilings['copy_gb_per_s']:,.0f} GB/s, a large bf16 product runs at "
        text += f"{ceilings['bf16_tflop_per_s']:,.0f} TFLOP/s"
    return f"{text}; {run['date']}"


def label(row: dict[str, Any], several: bool) -> str:
    return ", ".join(filter(None, (row["name"], row["dtype"], row["size"], row["backend"] if several else "")))


def judged(first: str, target: str) -> str:
    return f"{first} ({target})" if target else first


def cells(row: dict[str, Any], several: bool) -> list[str]:
    """Return a row's texts, in the order of HEADINGS."""
    if row["failure"] is not None:
        return [label(row, several), "check red", *[""] * (len(HEADINGS) - 2)]
    numbers, against = row["numbers"], value_text(row, "against")
    fused = judged(value_text(row, "fused"), figure_text(row, "fused")[1])
    # a rate of bytes is useful only against a copy
    rate = f"{numbers['gb_per_s']:,.0f}" if "gb_per_s" in numbers and row["against"].startswith("copy") else ""
    error = f"{numbers['error']:.1e} ({numbers['eager_error']:.1e})" if "error" in numbers else ""
    figures = [judged(*figure_text(row, column)) for column in ("eager", "compile", "against")]
    columns = [value_text(row, column) for column in ("eager", "compile")]
    return [
        label(row, several),
        fused,
        *columns,
        against if against == "-" else f"{against}, {row['against']}",
        *figures,
        rate,
        error,
    ]


def several_backends(run: Run) -> bool:
    return len({row["backend"] for row in run["rows"]}) > 1


def columns_text(table: Sequence[Sequence[str]]) -> list[str]:
    """Format a table in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *others in table:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return lines


SHORT = {"nn.TransformerEncoderLayer": "residual", "nn.TransformerEncoder": "residual", "3 bare GEMMs": "GEMMs"}


def compact(row: dict[str, Any], several: bool) -> list[str]:
    """Return a row for the terminal.

    Its texts are the measurement, fused, over eager, over compiled, against the floor, GB/s, error.
    """
    what = label(row, several).replace("forward + backward", "fwd+bwd").replace("bytes kept by", "bytes of")
    if row["failure"] is not None:
        return [what, "check red", "", "", "", "", ""]
    found = cells(row, several)
    against = SHORT.get(row["against"], row["against"].replace("copy of ", "copy "))
    last = f"{found[7]} of {against}" if found[7] != "-" else ""
    error = found[9].split(" ")[0]
    shown = [what, found[1], *("" if text == "-" else text for text in found[5:7]), last, found[8], error]
    return [text.replace(" met)", ")").replace(" short)", " SHORT)") for text in shown]


def tally(run: Run) -> tuple[int, int]:
    """Return the number of reached targets and of all targets, in rows that may be shown."""
    verdicts = [figure["reached"] for row in run["rows"] if row["failure"] is None for figure in row["figures"]]
    return sum(verdict is True for verdict in verdicts), sum(verdict is not None for verdict in verdicts)


def plan_groups(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Return the plans by kernel and width, the fastest first, those without a time last."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for plan in run["plans"]:
        groups.setdefault(f"{plan['kind']} D={plan['features']}", []).append(plan)
    return {
        name: sorted(plans, key=lambda plan: (plan["failure"] is not None, plan["ms"]))
        for name, plans in groups.items()
    }


def plan_text(plan: dict[str, Any]) -> str:
    constants = " ".join(f"{name}={value}" for name, value in plan["constants"].items())
    return f"{plan['warps']} warps {constants}" + (f" resident={plan['resident']}" if plan["resident"] else "")


def plan_lines(run: Run) -> list[str]:
    """Return the default's time and the fastest plans of each group."""
    lines = []
    for name, plans in plan_groups(run).items():
        if plans[0]["failure"] is not None:
            lines.append(f"{name}: no plan could be timed: {plans[0]['failure'][:100]}")
            continue
        default = next(
            (f"{plan['ms']:.4f} ms" for plan in plans if plan["default"] and plan["failure"] is None), "no time"
        )
        best = "; ".join(f"{plan['ms']:.4f} ms {plan_text(plan)}" for plan in plans[:SHOWN_PLANS])
        lines.append(f"{name}: default {default}; fastest {best}")
    return lines


def test_line(entry: dict[str, Any]) -> str:
    numbers = ", ".join(f"{count} {name}" for name, count in entry["counts"].items())
    return f"{entry['name']}: {entry['status']}" + (f" ({numbers})" if numbers else "") + f", {entry['seconds']:.0f} s"


def sanitizer_line(entry: dict[str, Any]) -> str:
    return f"{entry['backend']} {entry['check']}: {entry['verdict']}, {entry['seconds']:.0f} s".strip()


def counter_lines(run: Run, backend: str | None = None) -> list[str]:
    """Return ncu's figures of each kernel, or the reason for none; of one backend or of all."""
    lines = []
    for entry in run.get("counters", []):
        if backend not in (None, entry["backend"]):
            continue
        if not entry["kernels"]:
            lines.append(f"{entry['backend']}: no counters: {entry['reason']}")
        for kernel in entry["kernels"]:
            share = "" if kernel["share_of_peak"] is None else f", {kernel['share_of_peak']:.0%} of the peak"
            what = (
                f"{entry['backend']} D={kernel['features']} {kernel['kernel']}: "
                f"{kernel['gb_per_s']:,.0f} GB/s of memory{share}"
            )
            lines.append(f"{what}, {kernel['megabytes']:,.1f} MB in {kernel['microseconds']:,.1f} us")
    return lines


def table_lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Format a Markdown table, headings first; the first column to the left, the others to the right."""
    head, *rows = ("| " + " | ".join(texts) + " |" for texts in table)
    return [head, "|---|" + "---:|" * (len(table[0]) - 1), *rows]


def troubles(run: Run) -> list[str]:
    """List absent backends, red checks, jobs that did not end well, and omissions."""
    lines = [f"without {backend}: {reason}" for backend, reason in run.get("absent", {}).items()]
    lines += [
        f"check red: {check['subject']} {check['dtype']} {check['backend']} "
        f"{check['size']}: {check['tensor']} error {check['error']:.2e}, "
        f"eager {check['eager_error']:.2e}"
        for check in run["checks"]
        if not check["passed"]
    ]
    lines += [f"no {column}: {reason}" for column, reason in {i for row in run["rows"] for i in row["missing"].items()}]
    lines += [f"compilers: {said}" for said in run.get("prepared", []) if "failed" in said or "not finished" in said]
    for job in run["jobs"]:
        if job["status"] not in ALL_WELL:
            detail = job["detail"].strip().splitlines()
            lines.append(f"{job['status']}: {job['name']}: {detail[-1][:200] if detail else ''}")
    return lines


def text(run: Run) -> str:
    """Return the whole run for a terminal.

    The most important lines stand last, because a terminal shows the end.
    """
    several = several_backends(run)
    lines = [machine_text(run), *(line[:300] for line in troubles(run)[:20]), *(line[:230] for line in plan_lines(run))]
    lines += [f"counters of {line[:230]}" for line in counter_lines(run)]
    lines += [f"compute-sanitizer {sanitizer_line(entry)}" for entry in run["sanitizer"]]
    for entry in run["tests"]:
        lines += [test_line(entry), *(f"  {line[:160]}" for line in entry["failing"][:8])]
    if run["rows"]:
        headings = ["what (medians)", "fused", "over eager", "over compiled", "against", "GB/s", "error"]
        lines += ["", *columns_text([headings, *(compact(row, several) for row in run["rows"])]), ""]
    if compare.pairs(run):
        lines += [*columns_text(compare.pair_lines(run)), ""]
    if run.get("rehearsal"):
        lines.append("A REHEARSAL on the CPU: every number above is meaningless.")
    green = sum(check["passed"] for check in run["checks"])
    reached, targets = tally(run)
    lines += [f"checks against fp64: {green} of {len(run['checks'])} green; targets met: {reached} of {targets}"]
    return "\n".join(lines) + "\n"


def fenced(content: str) -> list[str]:
    return ["```", content.strip("\n").replace("```", "'''"), "```", ""]


def markdown(run: Run) -> str:
    """Return the whole run in Markdown, with the ends of the outputs and every traceback."""
    several = several_backends(run)
    lines = [f"# {run['machine'].get('gpu') or 'Rehearsal'}", "", f"Measured on {machine_text(run)}.", ""]
    if run.get("rehearsal"):
        lines += ["**A rehearsal on the CPU: every number is meaningless.**", ""]
    table = table_lines([HEADINGS, *(cells(row, several) for row in run["rows"])])
    lines += [line.replace("short)", "**short**)") for line in table]
    reached, targets = tally(run)
    green = sum(check["passed"] for check in run["checks"])
    lines += [
        "",
        f"{reached} of {targets} targets met; {green} of {len(run['checks'])} checks against fp64 green. {METHOD}",
    ]
    lines += ["", *(f"- {line}" for line in troubles(run)), ""]
    if compare.pairs(run):
        lines += ["## Side by side", "", *table_lines(compare.pair_lines(run)), ""]
        lines += [
            "Faster is what took less time at its p90 than the other at its p10; both took turns in one process.",
            "",
        ]
        lines += [f"{compare.FASTEST_FILE}:", "", *fenced(compare.fastest_text(run))]
    if run["tests"]:
        lines += ["## Tests", ""]
        for entry in run["tests"]:
            lines += [f"- {test_line(entry)}", *(f"  - {line}" for line in entry["failing"])]
        for entry in run["tests"]:
            if entry["status"] not in ("passed", "absent"):
                lines += [
                    "",
                    f"End of {entry['name']}:",
                    "",
                    *fenced("\n".join(entry["tail"].splitlines()[-TAIL_LINES:])),
                ]
        lines.append("")
    if run["sanitizer"]:
        lines += ["## compute-sanitizer", ""]
        for entry in run["sanitizer"]:
            lines.append(f"- {sanitizer_line(entry)}")
        for entry in run["sanitizer"]:
            if entry["verdict"] != "clean" and entry["output"]:
                lines += ["", f"{entry['backend']} {entry['check']}:", "", *fenced(entry["output"])]
        lines.append("")
    if run.get("counters"):
        lines += ["## Counters of the GPU", "", *(f"- {line}" for line in counter_lines(run)), ""]
    if run["plans"]:
        lines += ["## Launch plans", "", *(f"- {line}" for line in plan_lines(run)), ""]
    failed = [job for job in run["jobs"] if job["status"] not in (*ALL_WELL, "skipped")]
    for job in failed:
        lines += [f"## {job['status']}: {job['name']}", "", *fenced(job["detail"])]
    if run.get("environment"):
        lines += ["## Environment", "", *fenced(run["environment"])]
    return "\n".join(lines)


def plans_markdown(run: Run) -> str:
    """Return every plan in Markdown, one table for each kernel and width."""
    lines = ["# Launch plans", "", f"Measured on {machine_text(run)}.", ""]
    for name, plans in plan_groups(run).items():
        lines += [f"## {name}", "", "| " + " | ".join(PLAN_HEADINGS) + " |", "|---|" + "---:|" * 7 + "---|"]
        for plan in plans:
            if plan["failure"] is None:
                numbers = [*(f"{plan[key]:.4f}" for key in ("ms", "p10", "p90")), f"{plan['share']:.0%}"]
            else:
                numbers = ["-"] * 4
            resources = ["" if plan[key] is None else str(plan[key]) for key in ("registers", "spills", "shared")]
            remark = "default" if plan["default"] else ""
            if plan["failure"] is not None:
                remark = f"{remark} {plan['failure'][:120]}".strip().replace("|", "/")
            lines.append("| " + " | ".join([plan_text(plan), *numbers, *resources, remark]) + " |")
        lines.append("")
    return "\n".join(lines)


def render(run: Run, folder: Path) -> None:
    """Write report.md into ``folder``.

    fastest.txt is added if two backends were timed, plans.json and plans.md if there are plans.
    """
    write_text(folder / "report.md", markdown(run))
    if compare.pairs(run):
        write_text(folder / compare.FASTEST_FILE, compare.fastest_text(run))
    if run["plans"]:
        write_text(
            folder / "plans.json", json.dumps({"machine": run["machine"], "plans": plan_groups(run)}, indent=1) + "\n"
        )
        write_text(folder / "plans.md", plans_markdown(run))


def succeeded(run: Run) -> bool:
    """Return whether every check is green, every test passed and every attempted job ended well."""
    tests = all(entry["status"] in ("passed", "absent") for entry in run["tests"])
    sanitized = not any(entry["verdict"] == "FAULTS" for entry in run["sanitizer"])
    jobs = all(job["status"] in (*ALL_WELL, "skipped") for job in run["jobs"])
    return tests and sanitized and jobs and all(check["passed"] for check in run["checks"])


if __name__ == "__main__":
    print(text(json.loads((Path(sys.argv[1]) / "results.json").read_text(encoding="utf-8"))), end="")
