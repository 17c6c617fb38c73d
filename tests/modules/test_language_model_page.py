"""docs/language_model.md shows the training speeds and peaks of the run that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "language_model.md"
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "language_model" / "results.json"
CONTESTANTS = {
    "fused": "`depth-lstm`, fused",
    "eager": "`depth-lstm`, plain PyTorch",
    "compile": "`depth-lstm`, plain PyTorch under torch.compile",
    "against": "`pre-norm`, plain PyTorch",
    "compiled_base": "`pre-norm`, plain PyTorch under torch.compile",
}

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")


def test_speeds_and_peaks_are_those_measured() -> None:
    run = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert all(check["passed"] for check in run["checks"])
    (row,) = run["rows"]
    wanted = []
    for name, label in CONTESTANTS.items():
        speed, busy = row["values"][name], row["numbers"][f"{name}_busy_ms"]
        cells = [label, f"{speed['median']:,.0f} ({speed['p10']:,.0f} to {speed['p90']:,.0f})"]
        cells += [f"{busy:.0f}", f"{row['numbers'][f'{name}_peak_mb']:.0f}"]
        wanted.append(f"| {' | '.join(cells)} |")
    part = PAGE.read_text(encoding="utf-8").partition("## What a step costs")[2].partition("\n## ")[0]
    assert [line for line in part.splitlines() if line.startswith("| `")] == wanted
    assert f"{row['repetitions']} repetitions" in part
    busy = {name: row["numbers"][f"{name}_busy_ms"] for name in CONTESTANTS}
    shares = [f"{busy['fused'] / busy[name]:.2f} of " for name in ("eager", "compile", "against", "compiled_base")]
    (line,) = (line for line in part.splitlines() if line.startswith("By these the fused model takes "))
    assert re.findall(r"\d\.\d+ of ", line) == shares
    sizes = re.search(r"([\d.]+) million matrix entries, and the depth-wise LSTM ([\d.]+)\.", part)
    assert sizes is not None
    assert row["note"].startswith(f"{sizes[2]}M matrix entries, {sizes[1]}M in pre-norm")
