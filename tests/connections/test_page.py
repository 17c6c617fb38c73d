"""docs/connections.md has every connection, its costs are those of the classes, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from connection_helpers import NAMES, C, make

import depthlstm_fast as dl

PAGE = Path(__file__).resolve().parents[2] / "docs" / "connections.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")


def test_every_connection_has_a_section() -> None:
    assert set(re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == set(NAMES)


def costs() -> dict[str, str]:
    """The formula of each connection in the table."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
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


def test_initialisations_are_all_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for each in (*dl.initialisation.INITS, *dl.memories.MEMORIES):
        assert f'`"{each}"`' in text


def test_the_code_runs() -> None:
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(block, str(PAGE), "exec"), names)
        assert names["encoder"].connection is not None
