"""The benchmark suite in use: the command, pytest-benchmark, and the committed results.

No test asserts a speed.
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import depthlstm_fast as dl

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench import __main__ as command  # noqa: E402
from depthlstm_fast.bench.measure import accuracy, machine, pytest_turns, timing  # noqa: E402
from depthlstm_fast.bench.measure.problems import KeptProblem, Problem  # noqa: E402
from depthlstm_fast.bench.measure.rows import QUICK, Row, Settings, Target  # noqa: E402
from depthlstm_fast.bench.report import tables  # noqa: E402
from depthlstm_fast.bench.subjects import registry, translation  # noqa: E402

sys.path.remove(str(ROOT))

needs_cpp = pytest.mark.skipif(not dl.backends()["cpp"].available, reason="the C++ extension is not built")
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*/results.json"))
COMMITTED = [
    path
    for path in COMMITTED
    if path.parent.name != "latest" and "gpu" not in json.loads(path.read_text(encoding="utf-8"))["machine"]
]
RED = accuracy.Check("gates", "fp32", False, "h", 1.0, 0.1, 5.0, "cpp")


def problem(**changes: Any) -> Problem:
    """Return a problem with three contestants that do nothing."""
    row = Row("gates", "a row", "fp32", "N=2", "ms", against="a floor")
    runs: dict[str, Callable[[], object]] = {"eager": lambda: None, "fused": lambda: None, "against": lambda: None}
    return Problem(
        **{
            "row": row,
            "runs": runs,
            "targets": [Target("eager", "speedup"), Target("against", "share", 0.5)],
            **changes,
        }
    )


SAMPLES = {"eager": [8.0] * 7, "fused": [2.0] * 7, "against": [1.5] * 7}


def test_rates_and_the_share_of_the_floor_come_from_the_medians() -> None:
    (row,) = problem(moved_bytes=10 * 10**9, flops=6 * 10**9, floor="against").finish(SAMPLES)
    assert (row.numbers["gb_per_s"], row.numbers["gflop_per_s"], row.numbers["floor_share"]) == (5, 3, 0.75)
    assert (row.values["fused"].median, row.repetitions, row.figures[1].reached) == (2000, 7, True)
    assert {"fused_op_calls", "eager_op_calls", "fused_peak_mb", "eager_peak_mb"} <= row.numbers.keys()
    assert "floor_share" not in problem().finish(SAMPLES)[0].numbers


def test_batches_of_calls_and_tokens_are_divided_out() -> None:
    calls: list[int] = []
    repeated = problem(runs={"fused": lambda: calls.append(1)}, calls=4, targets=[Target("fused", "value", 600)])
    repeated.row.unit = "us"
    repeated.batches()["fused"]()
    assert len(calls) == 4
    (row,) = repeated.finish({"fused": [0.002] * 3})
    assert (row.values["fused"].median, row.figures[0].value, row.figures[0].reached) == (500, 500, True)
    tokens = problem(tokens=30)
    tokens.row.unit = "tokens/s"
    assert tokens.finish(SAMPLES)[0].values["fused"].median == 15


def test_rows_on_bytes_are_not_timed() -> None:
    kept = KeptProblem(
        Row("memory", "kept", "fp32", "", "MB"),
        {"eager": lambda: None, "fused": lambda: None},
        kept={"eager": 4_000_000, "fused": 1_000_000},
    )
    (row,) = kept.measure(QUICK, lambda: None)
    assert ({name: value.median for name, value in row.values.items()}, row.figures[0].value) == (
        {"eager": 4, "fused": 1},
        0.25,
    )


class Archive:
    """Stand-in for pytest-benchmark's fixture in a pedantic call, with seconds of 3."""

    def __init__(self) -> None:
        self.stats: Any = None

    def pedantic(self, target: Any, setup: Any, teardown: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()
            teardown()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[3.0] * rounds))


def test_rivals_take_their_turns_around_the_clock_of_pytest_benchmark() -> None:
    turns: list[str] = []
    runs: dict[str, Callable[[], object]] = {name: lambda name=name: turns.append(name) for name in SAMPLES}  # type: ignore[misc]
    row = pytest_turns.measure_rounds(Archive(), problem(runs=runs), Settings(minimum=6, seconds=0))
    names = list(SAMPLES)
    wanted = [names[turn] for repetition in range(6) for turn in timing.turn_order(3, repetition)]
    # warm-up and estimate come before these turns; the inspected fused and eager calls come after them
    assert turns == [*names, *names, *wanted, "fused", "eager"]
    assert (row.repetitions, row.values["fused"].median) == (6, 3000)
    assert gc.isenabled()


def test_what_the_timed_call_returned_is_gone_before_a_rival_runs() -> None:
    known: list[Any] = []

    def fused() -> torch.Tensor:
        known.append(weakref.ref(found := torch.zeros(3)))
        return found

    def eager() -> None:
        assert all(reference() is None for reference in known)

    pytest_turns.measure_rounds(
        Archive(), problem(runs={"eager": eager, "fused": fused}, targets=[]), Settings(minimum=4, seconds=0)
    )
    assert len(known) == 7


def test_the_error_of_a_row_is_of_the_tensor_nearest_to_its_bound() -> None:
    found = [
        RED,
        accuracy.Check("gates", "fp32", True, "c", 9.0, 9.0, 0.4, "cpp"),
        accuracy.Check("gates", "bf16", True, "c", 1.0, 1.0, 9.0, "cpp"),
    ]
    assert registry.error_numbers(found, "overhead", "fp32") == {"error": 1.0, "eager_error": 0.1, "bound_share": 5.0}
    assert registry.error_numbers(found, "cell", "fp32") == {}


def test_without_the_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from depthlstm_fast.bench import run

    assert run.default_output() == ROOT / "benchmarks" / "results" / "latest"
    for module in (run, machine, translation):
        monkeypatch.setattr(module, "CHECKOUT", None)
    assert run.default_output() == Path("depthlstm_fast_bench")
    assert (machine.describe()["commit"], machine.describe()["dirty"]) == (None, None)
    with pytest.raises(ImportError, match="needs the source tree"):
        translation.run(1, 1, False)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "rich" else object())
    assert command.main() == 2
    assert capsys.readouterr().err == 'benchmarks: rich not installed: pip install "depthlstm_fast[bench]"\n'


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, because on busy cores threads that wait for each other take seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_cpp
@pytest.mark.usefixtures("one_thread")
def test_the_command_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from depthlstm_fast.bench import run

    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--only", "overhead", "--output", str(tmp_path)])
    assert command.main() == 0
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found["schema"] == tables.SCHEMA
    assert [row["name"] for row in found["rows"]] == ["one gates call, no grad", "one gates call, grad"]
    assert {"error", "eager_error", "bound_share", "fused_op_calls", "fused_peak_mb"} <= found["rows"][0][
        "numbers"
    ].keys()
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == tables.full_markdown(found)
    assert "one gates call, grad" in capsys.readouterr().out
    monkeypatch.setattr(registry, "run_checks", lambda subjects, tick: [RED])
    assert run.main(["--quick", "--only", "overhead", "--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(row["values"], row["numbers"]) for row in found["rows"]] == [({}, {})]


@needs_cpp
def test_a_training_that_diverges_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("rich", "matplotlib", "sentencepiece"):
        pytest.importorskip(package)
    from depthlstm_fast.bench import run

    folder = ROOT / "examples" / "translation"
    monkeypatch.syspath_prepend(str(folder))
    compare = importlib.import_module("compare")

    class Diverging(compare.Trainer):  # type: ignore[name-defined, misc]
        def step(self, batch: Any) -> Any:
            raise compare.DivergedError("the loss is nan in step 1")

    monkeypatch.setattr(compare, "Trainer", Diverging)
    monkeypatch.setattr(registry, "run_checks", lambda subjects, tick: [])
    assert run.main(["--quick", "--only", "translation", "--output", str(tmp_path)]) == 1
    (row,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert (row["failure"], row["values"]) == ("training diverged: reference: the loss is nan in step 1", {})
    output = capsys.readouterr()
    assert len([line for line in output.out.splitlines() if row["failure"] in line]) == 1
    assert "Traceback" not in output.out + output.err


def run_pytest(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any] | None]:
    """Run pytest on the rows of one subject; return its process and its archive."""
    archive = tmp_path / "archive.json"
    words = [
        "-p",
        "no:cacheprovider",
        "benchmarks",
        "--benchmark-only",
        "--quick",
        "-k",
        "overhead",
        f"--benchmark-json={archive}",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return result, json.loads(
        archive.read_text(encoding="utf-8")
    ) if archive.exists() and archive.stat().st_size else None


@needs_cpp
def test_pytest_benchmark_archives_a_row(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    result, found = run_pytest(tmp_path)
    assert result.returncode == 0, result.stdout
    assert found is not None
    entries = {entry["name"]: entry for entry in found["benchmarks"]}
    assert entries.keys() == {"test_row[overhead: no grad]", "test_row[overhead: grad]"}
    entry = entries["test_row[overhead: grad]"]
    extra = entry["extra_info"]
    # the same laps: the archive has batches in seconds, the row calls in microseconds
    assert extra["values"]["fused"]["median"] == pytest.approx(entry["stats"]["median"] / extra["calls"] * 1e6)
    assert (extra["figures"][1]["kind"], extra["repetitions"], extra["quick"]) == (
        "speedup",
        entry["stats"]["rounds"],
        True,
    )
    assert {"eager_op_calls", "fused_peak_mb", "bound_share"} <= extra["numbers"].keys()
    assert found["machine_info"]["depthlstm_fast"]["torch"] == torch.__version__


@needs_cpp
def test_pytest_benchmark_times_nothing_that_is_red(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    plugin = "from benchmarks.measure import accuracy\nfrom benchmarks.subjects import registry\n"
    plugin += (
        "registry.run_checks = lambda subjects: [accuracy.Check('gates', 'fp32', False, 'h', 1.0, 0.1, 5.0, 'cpp')]\n"
    )
    (tmp_path / "red_checks.py").write_text(plugin, encoding="utf-8")
    result, found = run_pytest(tmp_path, "-p", "red_checks")
    assert result.returncode == 1, result.stdout
    assert "no time for what is wrong: gates fp32 RED: h" in result.stdout
    assert found is None or found["benchmarks"] == []


def test_without_pytest_benchmark_the_rows_say_what_to_install(tmp_path: Path) -> None:
    result, found = run_pytest(tmp_path, "-p", "no:benchmark")
    assert (result.returncode, found) == (pytest.ExitCode.USAGE_ERROR, None)
    assert result.stderr == 'ERROR: pytest-benchmark not installed: pip install "depthlstm_fast[bench]"\n\n'


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_committed_reports_are_those_of_the_committed_numbers(path: Path) -> None:
    run = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_name("report.md").read_text(encoding="utf-8") == tables.full_markdown(run)


def test_the_table_of_the_page_is_that_of_committed_numbers() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")

    def holds(run: dict[str, Any]) -> bool:
        return tables.embed(page, tables.markdown(run)) == page

    runs = [json.loads(path.read_text(encoding="utf-8")) for path in COMMITTED]
    (run,) = [run for run in runs if holds(run)]
    changed = copy.deepcopy(run)
    changed["rows"][0]["values"]["fused"]["median"] *= 1.01
    assert not holds(changed)


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_found_before_measuring(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from depthlstm_fast.bench import run

    monkeypatch.setattr(run, "measure", None)
    with pytest.raises(SystemExit) as stopped:
        run.main(["--quick", "--only", "overhead", "--output", folder])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"output must be a folder that can be written; found {folder}: " in printed
    assert printed.count("\n") == 1


def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from depthlstm_fast.bench import run

    for main, name, message in (
        (run.main, "python -m depthlstm_fast.bench", "argument --only: invalid choice: 'nosuch'"),
        (tables.main, "python -m depthlstm_fast.bench.report", "unrecognized arguments: --nosuch"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["--only", "nosuch"] if main is run.main else ["results.json", "--nosuch"])
        assert stopped.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"{name}: {message}")
        assert printed.count("\n") == 1
