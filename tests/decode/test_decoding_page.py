"""docs/decoding.md shows the speeds of the run that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "decoding.md"
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "decode_engine" / "results.json"
CAUSAL = RESULTS.parents[1] / "causal_engine" / "results.json"
THREADS = RESULTS.parents[1] / "decode_threads" / "results.json"
CONTESTANTS = ("eager", "against", "rival_int8", "fused", "bfloat16", "int8")

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")


def measured() -> list[str]:
    lines = []
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]:
        search = row["name"].removeprefix("decode engine, ")
        speeds = {name: row["values"][name]["median"] for name in CONTESTANTS}
        ratios = speeds["fused"] / speeds["against"], speeds["int8"] / speeds["rival_int8"]
        cells = [row["size"].split()[0], search, *(f"{speed:,.0f}" for speed in speeds.values())]
        cells += [f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measured_of_language_models() -> list[str]:
    lines = []
    for row in json.loads(CAUSAL.read_text(encoding="utf-8"))["rows"]:
        model = row["name"].removeprefix("language model, ")
        speeds = [row["values"][name]["median"] for name in ("eager", "fused", "bfloat16", "int8")]
        cells = [model, *(f"{speed:,.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}"]
        if "a prompt of" not in model:
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def measured_with_threads() -> list[str]:
    rows, lines = json.loads(THREADS.read_text(encoding="utf-8"))["rows"], []
    for first in range(0, len(rows), 3):
        each = rows[first : first + 3]
        assert [row["busy_programs"] for row in each] == [0, 1, 2]
        assert len({(row["dtype"], row["batch"], row["beams"]) for row in each}) == 1
        search = "greedy" if each[0]["beams"] == 1 else f"beam {each[0]['beams']}"
        cells = [each[0]["dtype"], f"batch {each[0]['batch']}, {search}"]
        cells += [f"{each[0][f'tokens_per_second_{threads}']['median']:,.0f}" for threads in (1, 2)]
        ratios = [row["two_over_one"] for row in each]
        cells += [f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})" for ratio in ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_speeds_with_threads_are_those_measured() -> None:
    part = PAGE.read_text(encoding="utf-8").partition("## Threads")[2].partition("\n## ")[0]
    found = [line for line in part.splitlines() if line.startswith(("| float32", "| bfloat16", "| int8"))]
    assert found == measured_with_threads()
    assert len(found) == 9


def test_speeds_of_language_models_are_those_measured() -> None:
    part = PAGE.read_text(encoding="utf-8").partition("## What it gains")[2].partition("\n## ")[0]
    found = [line for line in part.splitlines() if line.startswith(("| depth-lstm,", "| pre-norm,"))]
    assert found == measured_of_language_models()
    assert len(found) == 4
    times = {}
    for row in json.loads(CAUSAL.read_text(encoding="utf-8"))["rows"]:
        if "a prompt of" in row["name"]:
            speeds = row["values"]
            times[row["name"].split()[-1]] = speeds["eager"]["median"] / speeds["fused"]["median"]
    told = (
        f"A prompt of 512 tokens takes {times['512']:.2f} of PyTorch's time, one of 2,048 tokens {times['2048']:.2f}."
    )
    assert told in part


def test_speeds_are_those_measured() -> None:
    part = PAGE.read_text(encoding="utf-8").partition("## What it gains")[2].partition("\n## ")[0]
    assert [line for line in part.splitlines() if line.startswith("| d=")] == measured()
