"""DDP and FSDP2 in several processes: the measuring command, and the table of docs/scale.md that shows its run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import depthlstm_fast as dl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench import processes  # noqa: E402

sys.path.remove(str(ROOT))

PAGE = ROOT / "docs" / "scale.md"
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "processes" / "results.json"
NAMES = {"plain": "neither", "ddp": "DDP", "fsdp2": "FSDP2"}
HELD = ("parameter_bytes", "gradient_bytes", "optimiser_bytes")

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")


def held_by_formula(kind: str, world: int, sizes: dict[str, Any]) -> dict[str, int]:
    """The bytes of the process that holds most: FSDP2 cuts the first axis of each parameter, and rounds up."""
    shards = world if kind == "fsdp2" else 1
    shapes = [parameter.shape for parameter in dl.LanguageModel(**sizes, device="meta").parameters()]
    elements = sum(math.ceil(shape[0] / shards) * math.prod(shape[1:]) for shape in shapes)
    # AdamW has two moments, and a counter of four bytes for each parameter
    return dict(zip(HELD, (4 * elements, 4 * elements, 8 * elements + 4 * len(shapes)), strict=True))


@pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")
def test_page_shows_the_run() -> None:
    run = json.loads(RESULTS.read_text(encoding="utf-8"))
    wanted = []
    for row in run["rows"]:
        assert {name: row[name] for name in HELD} == held_by_formula(row["kind"], row["processes"], run["model"])
        speed, busy = row["tokens_per_second"], row["cpu_seconds_per_step"]
        cells = [NAMES[row["kind"]], row["processes"]]
        cells.append(f"{speed['median']:,.0f} ({speed['p10']:,.0f} to {speed['p90']:,.0f})")
        cells += [f"{busy['median']:.2f}", f"{sum(row[name] for name in HELD) / 1e6:.1f}"]
        cells += [f"{row[name] / 1e6:.0f}" for name in ("peak_resident_bytes", "resident_before_bytes")]
        wanted.append(f"| {' | '.join(map(str, cells))} |")
    assert [(row["kind"], row["processes"]) for row in run["rows"]] == list(processes.SETUPS)
    part = PAGE.read_text(encoding="utf-8").partition("## Measured")[2].partition("\n## ")[0]
    assert [
        line for line in part.splitlines() if line.startswith(tuple(f"| {name} " for name in NAMES.values()))
    ] == wanted
    assert f"{run['rounds']} rounds of {run['steps_of_a_round']} steps" in part


def test_wrong_numbers_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for wrong, text in (
        (["--rounds", "0", "--output", str(tmp_path)], "rounds must be at least 1; found 0"),
        (["--steps", "-1", "--output", str(tmp_path)], "steps must be at least 1; found -1"),
        (["--output", "/proc/none"], "output must be a folder that can be written; found /proc/none"),
    ):
        with pytest.raises(SystemExit) as found:
            processes.main(wrong)
        assert found.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m depthlstm_fast.bench.processes: ")
        assert text in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_a_setup_is_measured(tmp_path: Path) -> None:
    setup = processes.Setup("fsdp2", 2, tmp_path)
    setup.ask(1)
    setup.time(1)
    row = setup.row()
    assert {name: row[name] for name in HELD} == held_by_formula("fsdp2", 2, processes.MODEL)
    tokens = 2 * processes.ROWS * processes.LENGTH
    assert row["tokens_per_second"]["median"] == pytest.approx(tokens / setup.seconds[0])
    assert row["cpu_seconds_per_step"]["median"] > 0
    assert row["resident_before_bytes"] + 16 * row["parameter_bytes"] // 4 < row["peak_resident_bytes"] < 4e9


@pytest.mark.slow
def test_a_process_that_dies_is_told(tmp_path: Path) -> None:
    setup = processes.Setup("plain", 1, tmp_path)
    setup.processes[0].kill()
    with pytest.raises(ChildProcessError, match="a process of plain ended before it answered"):
        setup.ask(1)
