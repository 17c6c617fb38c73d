"""Scaling curves and roofline.

A linear curve is reported as linear, and bends are named. Pictures are drawn. No time is asserted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import depthlstm_fast as dl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench.measure import allocator, curves, roofs, timing  # noqa: E402
from depthlstm_fast.bench.measure.rows import Settings  # noqa: E402
from depthlstm_fast.bench.report import scaling_tables  # noqa: E402
from depthlstm_fast.bench.subjects import scaling  # noqa: E402

sys.path.remove(str(ROOT))

needs_cpp = pytest.mark.skipif(not dl.backends()["cpp"].available, reason="the C++ extension is not built")
MACHINE = {"cpu": "A CPU", "cores": 2, "isa": "generic", "torch": "2.11"}


def values(**medians: float) -> dict[str, dict[str, float]]:
    return {name: {"median": median, "p10": median, "p90": median} for name, median in medians.items()}


def test_a_line_is_found_and_a_bend_is_named() -> None:
    xs = [1, 16, 256, 4096]
    fixed, slope, over = curves.fit(xs, [3 + 0.5 * x for x in xs])
    assert (fixed, slope) == (pytest.approx(3), pytest.approx(0.5))
    assert over == pytest.approx([1, 1, 1, 1])
    points = [{"x": x, "values": values(fused=3 + 0.5 * x, against=2 + x * x)} for x in xs]
    found = curves.curve("gates forward", "tokens", "D=4", "copy", points)
    assert found["lines"]["fused"]["bent"] == {}
    assert found["lines"]["against"]["bent"]
    lines = scaling_tables.bends(found)
    assert "within 25%" in lines[0]
    assert "not linear" in lines[1]


@pytest.mark.parametrize("times", [[1.0, 2.0, 40.0], [5.0, 4.0, 3.0]])
def test_neither_cost_is_negative(times: list[float]) -> None:
    fixed, slope, over = curves.fit([1, 10, 100], times)
    assert fixed >= 0
    assert slope >= 0
    assert all(part > 0 for part in over)


def test_stacks_of_a_depth_have_equally_many_matrix_entries_and_the_same_function() -> None:
    stacks = scaling.encoders(3)
    norms = (torch.nn.LayerNorm, dl.reference.GateNorm)
    sizes = {}
    for name, stack in stacks.items():
        excluded = {id(p) for module in stack.modules() if isinstance(module, norms) for p in module.parameters()}
        sizes[name] = sum(p.numel() for p in stack.parameters() if p.dim() == 2 and id(p) not in excluded)
    assert len(set(sizes.values())) == 1
    x = torch.randn(2, 3, scaling.LAYER_FEATURES)
    torch.testing.assert_close(stacks["fused"](x), stacks["eager"](x))


@needs_cpp
def test_curves_have_all_axes_and_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from depthlstm_fast.bench.report import scaling_plots

    monkeypatch.setattr(scaling, "TOKENS", (1, 2, 4, 8))
    monkeypatch.setattr(scaling, "WIDTHS", (8, 16, 32, 64))
    monkeypatch.setattr(scaling, "DEPTHS", (1, 2, 3, 4))
    monkeypatch.setattr(scaling, "ROWS", 8)
    monkeypatch.setattr(scaling, "LAYER_FEATURES", 16)
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # half a second at each of 42 points
    threads, ticks = torch.get_num_threads(), []
    settings = Settings(minimum=7, seconds=0.0, compile=False)
    with dl.use_backend("cpp"):
        found = scaling.measure_curves(settings, lambda: ticks.append(1))
    assert torch.get_num_threads() == threads
    assert len(ticks) == scaling.points_in(settings)
    assert [curve["axis"] for curve in found] == [*["tokens"] * 4, *["width"] * 4, "threads", *["layers"] * 3]
    assert [allocator.KEPT in curve["name"] for curve in found[:8]] == [False, True] * 4
    assert all(point["faults"] >= 0 for curve in found[:-1] for point in curve["points"])
    assert dl.last_backend() in ("cpp", "reference")
    assert found[0]["points"][0]["bytes"] == 7 * scaling.FEATURES * 4
    kept = found[-1]
    assert kept["unit"] == "MB"
    # memory is counted, not timed: it must grow linearly in layers, and the fused stack keeps less
    assert kept["lines"]["fused"]["bent"] == {}
    assert all(point["values"]["fused"]["median"] < point["values"]["eager"]["median"] for point in kept["points"])
    text = scaling_tables.markdown(found)
    assert text.count("####") == len(found)
    run: dict[str, Any] = {"machine": MACHINE, "date": "2026-01-01", "quick": True, "scaling": found}
    assert [path.name for path in scaling_plots.write_all(run, tmp_path)] == ["scaling.png", "depth.png"]
    assert scaling_plots.write_all(run | {"scaling": []}, tmp_path) == []


def row(name: str, subject: str, milliseconds: float, floor: float, moved: float, flops: float) -> dict[str, Any]:
    numbers = {"bytes": moved, "flops": flops, "gflop_per_s": flops / milliseconds / 1e6}
    found = values(fused=milliseconds, against=floor)
    return {"name": name, "subject": subject, "dtype": "fp32", "failure": None, "values": found, "numbers": numbers}


def test_the_roofs_are_what_the_floors_reached(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from depthlstm_fast.bench.report import roofline

    rows = [
        row("gates forward", "gates", 2.0, 1.0, moved=5e6, flops=1e7),
        row("gates forward + backward", "gates", 4.0, 2.0, moved=2e7, flops=4e7),
        row("cell forward + backward", "cell", 20.0, 10.0, moved=1e7, flops=1e9),
    ]
    assert roofs.roofs(rows, "fp32") == (pytest.approx(10.0), pytest.approx(100.0))  # 20 MB in 2 ms, 1 GFLOP in 10 ms
    assert roofs.roofs(rows, "bf16") is None
    run: dict[str, Any] = {"machine": MACHINE, "date": "2026-01-01", "quick": False, "rows": rows}
    assert [path.name for path in roofline.write(run, tmp_path)] == ["roofline.png"]
    assert roofline.write(run | {"rows": rows[:2]}, tmp_path) == []
