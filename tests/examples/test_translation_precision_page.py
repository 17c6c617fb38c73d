"""docs/decoding.md shows what precision costs as it was measured, and the commands of the run that was scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from translation_helpers import train

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "decoding.md"
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "precision"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")


def page() -> str:
    return PAGE.read_text(encoding="utf-8").partition("## What precision costs")[2].partition("\n## ")[0]


def printed() -> list[str]:
    return (RESULTS / "table.md").read_text(encoding="utf-8").splitlines()


def test_the_table_is_the_one_that_was_printed() -> None:
    shown, measured = ([line for line in lines if line.startswith("|")] for lines in (page().splitlines(), printed()))
    assert shown == measured
    assert len(shown) == 2 + 8


def test_costs_are_those_of_the_table() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed() if line.startswith("|")][2:]
    float32 = {row[2]: row for row in rows if row[0] == "float32"}
    for dtype, output_dtype in (("bfloat16", "bfloat16"), ("int8", "int8"), ("int8", "float32")):
        costs = [
            "{} BLEU and {} chrF".format(*(f"{float(row[i]) - float(float32[row[2]][i]):+.2f}" for i in (3, 4)))
            for row in rows
            if row[:2] == [dtype, output_dtype]
        ]
        name = dtype if dtype == output_dtype else f"{dtype} with a {output_dtype} output layer"
        assert f"- {name}: {costs[0]} greedily, {costs[1]} with four beams." in page()


def last_log_line() -> dict[str, float]:
    """Return the dev cross entropy of the run's last step."""
    line: dict[str, float] = json.loads((RESULTS / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return line


def test_the_commands_are_those_of_the_run() -> None:
    (text,) = (line for line in page().splitlines() if "train.py" in line)
    options = train.command_line().parse_args(text.split()[2:])
    settings = json.loads((RESULTS / "run.json").read_text(encoding="utf-8"))["settings"]
    settings["steps"] = last_log_line()["step"]  # the record keeps the number that the run was started with
    assert {name: getattr(options, name) for name in settings} == settings


def test_the_cross_entropy_is_that_of_the_last_step() -> None:
    assert f"{last_log_line()['dev_loss']:.2f} nats" in page()
