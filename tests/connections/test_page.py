"""docs/connections.md has every connection, its costs are those of the classes, and its code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from connection_helpers import NAMES, C, make

import depthlstm_fast as dl

PAGE = Path(__file__).resolve().parents[2] / "docs" / "connections.md"
RESULTS = PAGE.parents[1] / "benchmarks" / "results" / "amd-epyc-2-cores"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")


def test_every_connection_has_a_section() -> None:
    assert set(re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == set(NAMES)


def costs() -> dict[str, str]:
    """The formula of each connection in the table."""
    found = {}
    text = PAGE.read_text(encoding="utf-8").partition("## What a connection costs")[2].partition("## The tax")[0]
    for line in text.splitlines():
        cells = line.split("|")
        for name in re.findall(r"`([\w-]+)`", cells[1]) if len(cells) > 3 else ():
            if name in NAMES:
                found[name] = cells[2]
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("layers", "per_layer"), [(1, 1), (3, 2), (4, 3)])
def test_costs(name: str, layers: int, per_layer: int) -> None:
    formula = re.sub(r"(\d|\)|[nLk]) ?(?=[nLk(])", r"\1 * ", costs()[name].replace("^", "**"))
    value = eval(formula, {"n": layers * per_layer, "L": layers, "k": per_layer})
    connection = make(name, layers * per_layer, per_layer=per_layer)
    assert connection.bytes_moved(rows=1, itemsize=1) == C * value


def test_taxes_are_those_measured() -> None:
    """Check the page's table against the run that it names."""
    results = RESULTS / "connections" / "results.json"
    taxes: dict[str, list[str]] = {}
    for row in json.loads(results.read_text(encoding="utf-8"))["rows"]:
        (tax,) = (figure for figure in row["figures"] if figure["column"] == "against")
        taxes.setdefault(row["name"], []).append(f"{tax['value']:.2f} ({tax['p10']:.2f} to {tax['p90']:.2f})")
    shown = {}
    for line in PAGE.read_text(encoding="utf-8").partition("## The tax")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[1].strip("`") in NAMES:
            shown[cells[1].strip("`")] = cells[2:5]
    assert shown == taxes
    assert set(shown) == set(NAMES)


def test_initialisations_are_all_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for each in (*dl.initialisation.INITS, *dl.memories.MEMORIES):
        assert f'`"{each}"`' in text


def test_the_code_runs() -> None:
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(block, str(PAGE), "exec"), names)
        assert names["encoder"].connection is not None


def measured_kernels() -> list[str]:
    """The page's lines of the kernels alone, from the runs that it names; C = 512."""
    lines = []
    for op in ("norm_step", "siamese_step", "depth_gru_gates", "layer_mix", "layer_attend"):
        kinds: dict[str, list[str]] = {}
        for row in json.loads((RESULTS / op / "results.json").read_text(encoding="utf-8"))["rows"]:
            if not row["size"].endswith("C=512"):
                continue
            name, _, mode = row["name"].partition(" forward")
            figures = {figure["column"]: figure["value"] for figure in row["figures"]}
            cells = kinds.setdefault(name.replace(f"{op} ", "").rstrip(":"), [])
            cells.append(f"{figures['compile']:.2f}")
            if "backward" not in mode:
                cells.append(f"{100 * figures['against']:.0f}%")
        for name, (forward, share, both, narrow, narrow_share, narrow_both) in kinds.items():
            cells = [f"`{op}`, {name}", forward, both, share, narrow, narrow_both, narrow_share]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_kernels_are_those_measured() -> None:
    part = PAGE.read_text(encoding="utf-8").partition("## The kernels alone")[2].partition("\n## ")[0]
    assert [line for line in part.splitlines() if line.startswith("| `")] == measured_kernels()
