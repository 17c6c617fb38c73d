"""The benchmark suite's own arithmetic: turns, ratios, bytes, bounds and reports. Nothing here asserts a speed."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import depthlstm_fast as dl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench.measure import accuracy, gpu_timing, kept, machine, matrix_products, timing  # noqa: E402
from depthlstm_fast.bench.measure.compiled import Compiled  # noqa: E402
from depthlstm_fast.bench.measure.place import Place  # noqa: E402
from depthlstm_fast.bench.measure.problems import Problem  # noqa: E402
from depthlstm_fast.bench.measure.rows import Figure, Row, Settings, Target, figure  # noqa: E402
from depthlstm_fast.bench.report import tables  # noqa: E402
from depthlstm_fast.bench.subjects import decoding, gates, layer, memory, registry, translation  # noqa: E402

sys.path.remove(str(ROOT))

needs_cpp = pytest.mark.skipif(not dl.backends()["cpp"].available, reason="the C++ extension is not built")


class Watch:
    """A clock that moves only when a contestant says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Any:
        durations = itertools.cycle(seconds)

        def run() -> None:
            self.now += next(durations)

        return run


def test_quantiles_interpolate_between_neighbours() -> None:
    assert [timing.quantile([4, 1, 3, 2, 5], fraction) for fraction in (0, 0.1, 0.5, 0.9, 1)] == [1, 1.4, 3, 4.6, 5]
    assert timing.spread([7.0], 2) == timing.Spread(14, 14, 14)
    with pytest.raises(ValueError, match="samples"):
        timing.spread([])


def test_a_ratio_is_of_medians_and_its_spread_of_pairs() -> None:
    found = timing.ratio([10, 20, 90], [1, 4, 3])
    assert found.median == 20 / 3
    assert found.p10 == pytest.approx(6)  # ratios of the pairs: 10, 5, 30
    assert found.p90 == pytest.approx(26)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_contestant_follows_every_other_equally_often(count: int) -> None:
    orders = [timing.turn_order(count, repetition) for repetition in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    follows = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert follows == dict.fromkeys(itertools.permutations(range(count), 2), 2)


def test_contestants_take_turns_until_the_budget_is_spent() -> None:
    watch, turns = Watch(), []
    runs = {name: watch.taking(seconds) for name, seconds in (("slow", 3.0), ("fast", 1.0))}
    named = {name: lambda name=name: (turns.append(name), runs[name]())[1] for name in runs}
    samples = timing.interleave(named, seconds=20, minimum=2, clock=watch)
    assert samples == {"slow": [3.0] * 5, "fast": [1.0] * 5}
    rounds = [turns[i : i + 2] for i in range(2, len(turns), 2)]  # the first round is the warm-up
    assert all(sorted(names) == ["fast", "slow"] for names in rounds)
    assert len({tuple(names) for names in rounds}) == 2


def test_what_was_computed_is_noted_beside_the_time() -> None:
    wall, busy = Watch(), Watch()

    def run() -> None:
        wall.now += 5
        busy.now += 2

    watch = timing.BusyStopwatch(wall, busy)
    watch.begin("earlier")
    watch.end()
    samples = timing.interleave({"a": run}, seconds=0, minimum=3, clock=wall, stopwatch=watch)
    assert samples == {"a": [5] * 3}
    assert watch.busy == {"a": [2] * 4}  # the warm-up, too


def test_the_fewest_repetitions_go_before_the_budget() -> None:
    watch, ticks = Watch(), []
    samples = timing.interleave({"a": watch.taking(5)}, seconds=0, clock=watch, on_repetition=lambda: ticks.append(1))
    assert len(samples["a"]) == len(ticks) == 7
    assert len(timing.interleave({"a": watch.taking(0)}, seconds=1, maximum=9, clock=watch)["a"]) == 9


def test_figures_of_a_timed_row() -> None:
    samples = {"eager": [8.0] * 7, "fused": [2.0] * 7, "against": [1.0] * 7}
    speedup = figure(Target("eager", "speedup", 3.5), samples)
    assert (speedup.value, speedup.reached) == (4, True)
    share = figure(Target("against", "share", 0.8), samples)
    assert (share.value, share.reached) == (0.5, False)
    units = figure(Target("against", "ratio", 2.0), samples)
    assert (units.value, units.sense, units.reached) == (2, "at most", True)
    row = Row("gates", "a", "fp32", "", "ms")
    runs = {"eager": lambda: None, "fused": lambda: None}
    problem = Problem(row, runs, [Target("eager", "speedup"), Target("compile", "speedup")])
    (row,) = problem.measure(Settings(minimum=3, seconds=0), lambda: None)
    assert row.repetitions == 3
    assert set(row.values) == set(runs)
    assert [f.column for f in row.figures] == ["eager"]  # an absent contestant has no figure


def test_bytes_moved_by_the_gates() -> None:
    assert gates.moved_bytes(4096, 512, torch.float32, 7) == 58_720_256
    assert gates.moved_bytes(4096, 512, torch.bfloat16, 19) == 79_691_776


def test_the_copies_move_what_they_say() -> None:
    z, c, dh, scratch = torch.randn(6, 20), torch.randn(6, 5), torch.randn(6, 5), torch.full((60,), float("nan"))
    h, c_out = gates.copy_forward(z, scratch)()  # type: ignore[misc]
    written = h.numel() + c_out.numel() + int(scratch.isfinite().sum())
    assert 2 * written == gates.FORWARD_ELEMENTS * c.numel()
    scratch.fill_(float("nan"))
    dz, dc = gates.copy_backward(z, c, dh, scratch)()  # type: ignore[misc]
    assert torch.equal(dz, z)
    assert torch.equal(dc, c)
    assert 2 * (dz.numel() + dc.numel() + int(scratch.isfinite().sum())) == gates.BACKWARD_ELEMENTS * c.numel()


def test_kept_bytes_counts_a_storage_once_and_no_parameter() -> None:
    x, weight = torch.randn(8, requires_grad=True), nn.Parameter(torch.randn(8))
    assert kept.kept_bytes(lambda: x * weight, [weight]) == 32
    assert kept.kept_bytes(lambda: x.view(2, 4) * x.view(2, 4) * weight.view(2, 4), [weight]) == 64
    assert kept.kept_bytes(lambda: x + x, []) == 0


@needs_cpp
def test_a_fused_cell_keeps_its_inputs_and_z() -> None:
    rows, features = 8, 16
    found = memory.cell_memory(Place(), rows=rows, features=features).kept
    assert found["fused"] == 7 * features * rows * 4
    assert found["fused"] <= memory.CELL_SHARE * found["eager"]


def test_the_rival_layer_has_as_many_weights() -> None:
    layers = layer.depth_lstm_layers(32, 4)
    assert (
        matrix_products.matrix_entries(layer.residual_layer(32, 4))
        == matrix_products.matrix_entries(layers["fused"])
        == 12 * 32**2
    )


def test_decoding_models_never_stop_early() -> None:
    models = decoding.build(32, 1, 400)
    source = torch.randint(3, 400, (2, 5))
    assert {tuple(model.generate(source, max_length=6).shape) for model in models.values()} == {(2, 6)}


def test_the_bound_refuses_what_is_wrong_and_what_is_not_finite() -> None:
    exact = torch.randn(4, 5, dtype=torch.float64)
    eager = exact.float()
    assert accuracy.compare("gates", torch.float32, ["h"], [exact], [eager], [eager]).passed
    assert not accuracy.compare("gates", torch.float32, ["h"], [exact], [eager], [eager * (1 + 1e-5)]).passed
    spoiled = eager.clone()
    spoiled[1, 2] = float("nan")
    found = accuracy.compare("gates", torch.float32, ["c", "h"], [exact] * 2, [eager] * 2, [eager, spoiled])
    assert (found.passed, found.tensor) == (False, "h")


@needs_cpp
def test_checks_are_green_and_ran_on_the_compiled_backend() -> None:
    with dl.use_backend("cpp"):
        found = registry.run_checks(["overhead", "decoding"])
    assert {check.subject for check in found} == {"gates", "decoding"}
    assert [check.summary for check in found if not check.passed] == []
    assert registry.failure(found, "overhead") is None


def test_the_registry_finds_every_file_and_all_that_rows_stand_on_has_a_check() -> None:
    files = {path.stem for path in (ROOT / "benchmarks" / "subjects").glob("*.py")} - {
        "__init__",
        "__main__",
        "registry",
    }
    assert registry.SUBJECTS.keys() == files
    assert all(name == subject.name for name, subject in registry.SUBJECTS.items())
    needed = registry.checked(list(registry.SUBJECTS))
    assert [subject.name for subject in needed if subject.check is None] == []
    assert tuple(registry.SUBJECTS)[: len(registry.FIRST)] == registry.FIRST


def test_a_check_on_another_backend_is_red() -> None:
    with dl.use_backend("reference"):
        found = registry.run_checks(["gates"])
    assert not any(check.passed for check in found)
    assert "not cpp" in (registry.failure(found, "overhead") or "")


def test_a_compiler_that_fails_is_reported_not_raised() -> None:
    references = Compiled()

    def fail(function: Any) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    assert references.get(gates.reference_gates, fail) is None
    assert references.reason == "torch.compile failed: RuntimeError: no C++ compiler"
    assert Compiled(enabled=False).get(gates.reference_gates, fail) is None


def test_compiled_rivals_of_one_factory_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch compiles one code object eight times, and then runs it uncompiled
    graphs: list[Any] = []
    torch_compile = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compile(function: Any, *, dynamic: bool, mode: str | None) -> Any:
        return torch_compile(function, dynamic=dynamic, mode=mode, backend=backend)

    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    references = Compiled()
    for factor in range(12):
        found = references.get(lambda x, factor=float(factor): x * factor, lambda call: call(torch.ones(3)))
        assert found is not None
        assert references.reason is None
    assert len(graphs) == 12


@pytest.mark.parametrize(("clock", "seconds"), [("call", 1.0), ("latency", 5.0)])
def test_the_hosts_stopwatch_starts_on_an_idle_device(
    monkeypatch: pytest.MonkeyPatch, clock: str, seconds: float
) -> None:
    """Check a call that takes the host one second and the device five."""
    now, done = [0.0], [7.0]  # an earlier call's work keeps the device until 7

    def call() -> None:
        done[0] = max(done[0], now[0]) + 5
        now[0] += 1

    monkeypatch.setattr(gpu_timing, "synchronize", lambda device: now.append(max(now.pop(), done[0])))
    watch = gpu_timing.stopwatch(torch.device("cpu"), clock)
    watch.host.clock = lambda: now[0]  # type: ignore[attr-defined]
    for _ in range(3):
        watch.begin("a")
        call()
        watch.end()
    assert list(watch.laps()) == [("a", seconds)] * 3


def test_machine_has_a_folder_name() -> None:
    assert machine.slug("Some(R) CPU(TM) v2 @ 2.00GHz", 8) == "some-cpu-v2-2.00ghz-8-cores"
    json.dumps(machine.describe())


COMPARISON = {
    "dataset": "builtin", "pairs": 24, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "steps": 4, "backend": "cpp",
    "tolerance": 1e-3, "max_relative_loss_difference": 1e-6, "losses_agree": True,
    "tokens_per_second": {"reference": 100.0, "fused": 150.0}, "speedup": 1.5,
}  # fmt: skip


def test_translation_shows_speed_only_where_losses_agree() -> None:
    row = translation.row(COMPARISON)
    assert (row.failure, row.values["fused"].median, row.figures[0].value) == (None, 150.0, 1.5)
    assert translation.row(COMPARISON | {"losses_agree": False}).figures == []
    assert "not cpp" in (translation.row(COMPARISON | {"backend": "reference"}).failure or "")


def flat(number: float) -> dict[str, float]:
    return {"median": number, "p10": number, "p90": number}


def judged(column: str, kind: str, value: float, target: float | None, sense: str = "at least") -> dict[str, Any]:
    found = Figure(column, kind, value, value, value, target, sense)
    return {**vars(found), "reached": found.reached}


@pytest.fixture
def run() -> dict[str, Any]:
    """A made-up run: a row of each kind, one of them with a red check."""
    common = {
        "dtype": "fp32",
        "size": "N=2 D=3",
        "repetitions": 7,
        "missing": {},
        "note": "",
        "failure": None,
        "against": "",
        "figures": [],
    }
    values = {"eager": flat(20.0), "compile": flat(9.0), "fused": flat(2.0), "against": flat(1.5)}
    speeds = [
        judged("eager", "speedup", 10.0, 8.0),
        judged("compile", "speedup", 4.5, 5.0),
        judged("against", "share", 0.75, None),
    ]
    rows = [
        {
            **common,
            "subject": "gates",
            "name": "gates forward",
            "unit": "ms",
            "values": values,
            "figures": speeds,
            "against": "copy of 7D",
        },
        {
            **common,
            "subject": "cell",
            "name": "cell",
            "unit": "ms",
            "values": {"fused": flat(123.0)},
            "failure": "cell fp32 RED: h",
        },
        {
            **common,
            "subject": "layer",
            "name": "encoder layer step",
            "unit": "ms",
            "values": {key: values[key] for key in ("eager", "fused", "against")},
            "figures": [judged("eager", "speedup", 10.0, None), judged("against", "ratio", 1.33, 0.95, "at most")],
            "against": layer.RESIDUAL,
            "missing": {"compile": "torch.compile failed: no compiler"},
        },
        {
            **common,
            "subject": "overhead",
            "name": "one gates call",
            "unit": "us",
            "values": {"fused": flat(12.0)},
            "figures": [judged("fused", "value", 12.0, 15.0, "at most")],
        },
    ]
    about = {
        "cpu": "A CPU",
        "cores": 2,
        "threads": 2,
        "isa": "avx2",
        "last_level_cache": "32768K",
        "memory_gib": 16,
        "os": "An OS",
    }
    about |= {"python": "3.12", "torch": "2.13", "depthlstm_fast": "0.1.0", "commit": "0123456789abcdef", "dirty": True}
    return {
        "schema": 1,
        "date": "2026-01-01 00:00 UTC",
        "quick": False,
        "machine": about,
        "rows": rows,
        "translation": None,
    }


def test_markdown_holds_figures_targets_and_no_number_of_a_red_row(run: dict[str, Any]) -> None:
    text = tables.markdown(run)
    assert "10.0x (≥8x met)" in text
    assert "4.50x (≥5x **short**)" in text
    assert "1.33x (≤0.95x **short**)" in text
    assert "12.0 us (≤15 us met)" in text
    assert "1.50 ms, copy of 7D" in text
    assert "32 MiB last-level cache" in text
    assert "0123456789ab with changes" in text
    assert "2 of 4 targets met" in text
    assert "check red" in text
    assert "123" not in text.replace("0123456789ab", "")
    assert "no compiler" in text


def test_terminal_table_fits_118_columns_uncut(run: dict[str, Any]) -> None:
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(width=118, file=io.StringIO())
    console.print(tables.terminal_table(run))
    text = console.file.getvalue()
    assert "…" not in text
    assert "≥8x met" in text
    assert "123" not in text


def test_csv_and_json_hold_every_number(run: dict[str, Any], tmp_path: Path) -> None:
    tables.write_all(run, tmp_path / "new")
    with (tmp_path / "new" / "results.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == (4 + 3) + 1 + (3 + 2) + (1 + 1)
    (speedup,) = [line for line in lines if line["quantity"] == "fused speedup to eager" and line["target"]]
    assert (speedup["median"], speedup["target"], speedup["reached"]) == ("10.0", "8.0", "True")
    assert json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8")) == run


def test_readme_block_is_replaced_and_nothing_else(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results.json"
    results.write_text(json.dumps(run), encoding="utf-8")
    readme.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n", encoding="utf-8")
    for _ in range(2):
        assert tables.main([str(results), "--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"above\n{tables.BEGIN}\nMeasured on A CPU")
    assert text.endswith(f"\n{tables.END}\nbelow\n")
    assert "old" not in text.split()
    assert text.count("Measured on") == 1
    readme.write_text("no markers", encoding="utf-8")
    assert tables.main([str(results), "--readme", str(readme)]) == 1
    assert "once each" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "no markers"


def test_plots_are_written_for_what_a_run_has(run: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from depthlstm_fast.bench.report import plots

    assert [path.name for path in plots.write_all(run, tmp_path)] == ["speed.png", "floor.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("speed.png", "floor.png"))
    bare = copy.deepcopy(run)
    bare["rows"] = bare["rows"][3:]
    assert plots.write_all(bare, tmp_path) == []


def test_without_the_backend_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from depthlstm_fast.bench import run as runner

    monkeypatch.setattr(
        dl, "backends", lambda: {"cpp": type("Status", (), {"available": False, "detail": "it was not built"})}
    )
    assert runner.main(["--output", str(tmp_path / "out")]) == 2
    assert "it was not built" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
