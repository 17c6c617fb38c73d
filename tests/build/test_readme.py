"""The code of README.md and docs/quickstart.md runs, and the README's figures are those of docs/benchmarks.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README, MEASURED = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="no checkout")


def cells(page: Path, heading: str) -> dict[str, list[str]]:
    """Return the tables' rows of ``page`` from ``heading`` on, by their first cell."""
    lines = page.read_text(encoding="utf-8").partition(heading)[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {name: rest for name, *rest in rows}


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/language_model.md"])
def test_code_runs(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    ids = names["ids"]
    assert isinstance(ids, torch.Tensor)
    assert ids.shape[0] == 2


def test_use_takes_eight_lines() -> None:
    text = README.read_text(encoding="utf-8")
    use = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[0]
    assert len([line for line in use.splitlines() if line]) <= 8
    assert len(text.splitlines()) <= 100


def test_results_are_rows_of_the_measured_table() -> None:
    measured, shown = cells(MEASURED, "# Measured"), cells(README, "## Results")
    rows = {name: found for name, found in shown.items() if name in measured}
    rows.pop("---")  # the line under the head
    assert len(rows) == len(shown) - 2 == 6
    for name, (eager, compiled, rival, fused) in rows.items():
        assert [eager, compiled, fused] == [cell.partition(" (")[0] for cell in measured[name][:3]], name
        assert rival in ("-", measured[name][3].partition(",")[0]), name


def test_gains_are_measured() -> None:
    measured = cells(MEASURED, "# Measured")
    gains = README.read_text(encoding="utf-8").partition("## What you gain")[2].partition("## Install")[0]
    gates = measured["gates forward, fp32, N=4096 D=512"]
    kept = measured["bytes kept by a layer, fp32, 16x256 D=512"]
    step = measured["encoder layer step, fp32, 16x256 D=512"]
    decoding = measured["decoding, batch 1, fp32, d=256 6+6 layers"]
    wanted = [f"{gates[2]} where eager PyTorch takes {gates[0]} and torch.compile {gates[1]}"]
    wanted += [f"keeps {kept[2]} for its", f"twin {kept[0]}"]
    wanted += [f"`nn.TransformerEncoderLayer` {kept[3].partition(',')[0]}"]
    wanted += [f"{step[6].partition('x')[0]} times the time"]
    wanted += [f"{decoding[2]} against {decoding[0].partition(' ')[0]} of"]
    assert not [text for text in wanted if text not in gains]
