"""`make gpu` without a GPU: bytes, guards, the time budget, the supervisor, and a rehearsal of the whole.

test_benchmarks_gpu_stages.py has the programs that it starts and the order of its jobs. test_benchmarks_gpu_report.py
has the reports of its results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_cpp

import depthlstm_fast as dl
from depthlstm_fast.backends.choice import RECORDS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench.gpu import bench as gpu_bench  # noqa: E402
from depthlstm_fast.bench.gpu import checker as gpu_checker  # noqa: E402
from depthlstm_fast.bench.gpu import launch_plans, subject_rows, supervisor  # noqa: E402
from depthlstm_fast.bench.gpu import report as gpu_report  # noqa: E402
from depthlstm_fast.bench.gpu import run as gpu_run  # noqa: E402
from depthlstm_fast.bench.gpu import steps as gpu_steps  # noqa: E402
from depthlstm_fast.bench.gpu.jobs import Budget, Job, Recorder, read_run, run_jobs  # noqa: E402
from depthlstm_fast.bench.measure import gpu_timing, machine, poison  # noqa: E402
from depthlstm_fast.bench.measure.accuracy import Check  # noqa: E402
from depthlstm_fast.bench.measure.place import Place  # noqa: E402
from depthlstm_fast.bench.measure.problems import Problem, Timekeeper  # noqa: E402
from depthlstm_fast.bench.measure.rows import Row, Settings, Target  # noqa: E402
from depthlstm_fast.bench.measure.timing import HostStopwatch, interleave  # noqa: E402
from depthlstm_fast.bench.subjects import gates  # noqa: E402

sys.path.remove(str(ROOT))

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    torch.cuda.is_available() or not dl.backends()["triton"].available, reason="Triton's interpreter is not there"
)


# --- measurements


def test_bytes_of_the_main_problems() -> None:
    assert gates.moved_bytes(65536, 512, torch.bfloat16, gates.FORWARD_ELEMENTS) == 469_762_048
    assert (
        gates.moved_bytes(32768, 2048, torch.bfloat16, gates.FORWARD_ELEMENTS + gates.BACKWARD_ELEMENTS)
        == 2_550_136_832
    )
    cache = 64 << 20
    for features, rows, dtype in gpu_bench.FULL.gates:
        assert gates.moved_bytes(rows, features, dtype, gates.FORWARD_ELEMENTS) > 6 * cache
    assert {size[0] for size in gpu_bench.FULL.gates[:3]} == set(gates.GPU_WIDTHS)


def test_one_copy_is_of_half_the_bytes_that_it_moves() -> None:
    source = torch.randn(40)
    copied = gates.copy_once(source, 35)()
    assert torch.equal(copied, source[:35])  # type: ignore[arg-type]
    assert copied.data_ptr() != source.data_ptr()  # type: ignore[attr-defined]


def test_backends_share_their_rivals() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in ("eager", "one", "two", "against")}
    asked: list[str] = []
    place, keeper = (
        Place(backends=("one", "two"), gpu=True),
        Timekeeper(lambda name: asked.append(name) or HostStopwatch()),
    )  # type: ignore[func-returns-value]
    problem = Problem(
        Row("gates", "a", "fp32", "", "ms"), runs, [Target("eager", "speedup")], place=place, clock="latency"
    )
    found = problem.measure(Settings(minimum=2, seconds=0.0), lambda: None, keeper)
    assert asked == ["latency"]
    assert [row.backend for row in found] == ["one", "two"]
    assert all(set(row.values) == {"eager", "against", "fused"} for row in found)
    assert found[0].values["eager"] == found[1].values["eager"]
    assert sorted(calls) == sorted(["eager", "one", "two", "against"] * 3)


class Event:
    """A device event of a simulated GPU; enqueued work moves its clock."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


def test_the_stopwatch_keeps_waiting_out_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(cycles: int) -> None:
        Event.now += cycles / 1e9
        slept.append(cycles / 1e9)

    slept: list[float] = []
    for name, stand_in in (("Event", Event), ("_sleep", sleep), ("synchronize", lambda *_: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(gpu_timing, "FLUSH_BYTES", 64)
    watch = gpu_timing.EventStopwatch(CPU)

    def work() -> None:
        Event.now += 0.25
        time.sleep(0.002)

    samples = interleave({"a": work, "b": work}, seconds=0, minimum=3, warmups=2, stopwatch=watch)
    assert samples == {"a": pytest.approx([0.25] * 3), "b": pytest.approx([0.25] * 3)}
    # one and a half of the host's 2 ms
    assert all(0.003 <= seconds <= gpu_timing.LONGEST_HOST_SECONDS for seconds in slept[-6:])
    watch.reset()
    watch.begin("a")
    assert slept[-1] == pytest.approx(gpu_timing.SLACK_SECONDS)


# --- checks before timings


def check_of(passed: bool, backend: str = "triton", tensor: str = "h") -> Check:
    return Check("gates", "bf16", passed, tensor, 1e-3, 2e-3, 0.3 if passed else 3.0, backend)


def bench_with(checker: Any, backends: tuple[str, ...] = ("triton",)) -> gpu_bench.Bench:
    settings = Settings(minimum=1, seconds=0.0, compile=False)
    return gpu_bench.Bench(CPU, backends, gpu_bench.TINY, checker, settings, warmups=1)


def test_a_red_check_keeps_a_row_from_being_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_checker.Checker, "_make", lambda *_: check_of(False))
    monkeypatch.setattr(Problem, "measure", lambda *_: pytest.fail("a red subject was timed"))
    bench = bench_with(gpu_checker.Checker(CPU, lambda _: 3))
    subjects = (
        lambda: subject_rows.gates_rows(bench, 16, 5, torch.bfloat16),
        lambda: subject_rows.cell_rows(bench, 16, 5, True),
        lambda: subject_rows.few_rows(bench, 1),
        lambda: subject_rows.overhead_rows(bench),
    )
    recorder = Recorder(
        tmp_path, {"machine": {"cpu": "x", "python": "3", "torch": "2"}, "date": "today"}, gpu_report.render
    )
    for subject in subjects:
        for row in subject():
            recorder.add_row(row)
    assert len(recorder.run["rows"]) == 2 + 1 + 2 + 2
    assert all("RED" in row["failure"] for row in recorder.run["rows"])
    for text in (gpu_report.text(recorder.run), (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert text.count("check red") == 7
        assert " ms" not in text
        assert " us" not in text.replace(" use", "")


def test_a_check_that_raises_or_ran_elsewhere_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Check] = []
    checker = gpu_checker.Checker(CPU, lambda _: 3, on_check=told.append)

    def fail(*_: Any) -> Check:
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(gpu_checker.Checker, "_make", fail)
    assert "raised RuntimeError: out of registers" in str(checker.failure("gates", "triton", torch.bfloat16, 512))
    monkeypatch.setattr(gpu_checker.Checker, "_make", lambda *_: check_of(True, "reference"))
    assert "ran on reference, not triton" in str(checker.failure("gates", "triton", torch.bfloat16, 1024))
    monkeypatch.setattr(gpu_checker.Checker, "_make", lambda *_: check_of(True))
    assert checker.failure("gates", "triton", torch.bfloat16, 2048) is None
    assert checker.failure("gates", "triton", torch.bfloat16, 512) is not None  # made once
    assert [made.passed for made in told] == [False, False, True]


def test_poison_reaches_what_torch_allocates() -> None:
    with poison.poisoned():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@needs_triton
def test_last_rows_are_held_to_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Check] = []
    monkeypatch.setattr(gpu_checker.Checker, "_make", lambda *_: check_of(True))
    monkeypatch.setattr(gates, "LAST_ROWS", 3)

    def rows() -> list[Row]:
        bench = bench_with(gpu_checker.Checker(CPU, lambda _: 3, on_check=told.append))
        return list(subject_rows.gates_rows(bench, 16, 6, torch.bfloat16))

    assert [row.failure for row in rows()] == [None, None]
    assert told[-1].size == "N=6 D=16"
    right = dl.depth_lstm_gates
    monkeypatch.setattr(dl, "depth_lstm_gates", lambda *a, **k: [1.05 * tensor for tensor in right(*a, **k)])
    monkeypatch.setattr(Problem, "measure", lambda *_: pytest.fail("a red subject was timed"))
    assert ["RED: last" in str(row.failure) for row in rows()] == [True, True]
    assert len(told) == 2 * 2  # the check of the width and that of the last rows, each made once


def test_every_op_of_depth_connections_is_measured() -> None:
    assert {call.op for call in gpu_steps.CALLS.values()} == RECORDS["triton"].widest.keys() - {"depth_lstm"}
    assert {gpu_steps.backends_of(label, ("triton", "cuda")) for label in gpu_steps.CALLS} == {("triton",)}
    assert not list(gpu_steps.step_rows(bench_with(None, ("cuda",)), "siamese_step", 16, 4, torch.bfloat16))


@needs_triton
@pytest.mark.parametrize("label", gpu_steps.CALLS)
def test_ops_of_depth_connections_are_checked_and_timed(label: str) -> None:
    told: list[Check] = []
    bench = bench_with(gpu_checker.Checker(CPU, lambda _: 2, on_check=told.append), ("triton", "cuda"))
    rows = list(gpu_steps.step_rows(bench, label, 16, 3, torch.bfloat16, compile=False))
    assert [(made.passed, made.backend, made.subject) for made in told] == [(True, "triton", gpu_steps.CALLS[label].op)]
    assert [row.failure for row in rows] == [None, None]
    assert all(row.values.keys() >= {"eager", "against", "fused"} for row in rows)
    assert [row.backend for row in rows] == ["triton"] * 2


@needs_triton
def test_a_wrong_step_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "measure", lambda *_: pytest.fail("a red subject was timed"))
    right = gpu_steps.siamese_step.STEP
    wrong = replace(right, fused=lambda *inputs: [1.05 * each for each in right.fused(*inputs)])
    monkeypatch.setitem(gpu_steps.CALLS, "siamese_step", gpu_steps._step(wrong))
    bench = bench_with(gpu_checker.Checker(CPU, lambda _: 2))
    rows = list(gpu_steps.step_rows(bench, "siamese_step", 16, 3, torch.bfloat16, compile=False))
    assert ["RED" in str(row.failure) for row in rows] == [True, True]


# --- guards, budget, results as they come


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_jobs_are_guarded_skipped_and_written_down(tmp_path: Path) -> None:
    clock, recorder, seen = Clock(), Recorder(tmp_path, {}), []

    def rows() -> Iterator[Row]:
        yield Row("gates", "first", "fp32", "", "ms")
        seen.append(read_run(tmp_path)["rows"][0]["name"])  # type: ignore[index]
        raise ValueError("one bad row")

    def long() -> None:
        clock.now += 50

    jobs = [
        Job("a", "one", rows),
        Job("b", "two", long),
        Job("c", "two", lambda: None, need=20),
        Job("d", "three", lambda: None, need=0),
    ]
    run_jobs(jobs, recorder, Budget(60, clock), tmp_path / "state", say=lambda _: None)
    assert seen == ["first"]
    run = read_run(tmp_path)
    assert run is not None
    assert [(job["name"], job["status"]) for job in run["jobs"]] == [
        ("a", "failed"),
        ("b", "done"),
        ("c", "skipped"),
        ("d", "done"),
    ]
    assert "ValueError: one bad row" in run["jobs"][0]["detail"]
    assert "10 s left, 20 s wanted" in run["jobs"][2]["detail"]
    assert not list(tmp_path.glob("*.partial"))
    run_jobs(jobs, recorder, Budget(1e9, clock), say=lambda _: None)  # all jobs were attempted before
    assert len(recorder.run["jobs"]) == 4


WORKER = """
import os, sys, time
from pathlib import Path
from depthlstm_fast.bench.gpu import supervisor
from depthlstm_fast.bench.gpu.jobs import Budget, Job, Recorder, read_run, run_jobs

state, folder = Path(sys.argv[-1].removeprefix("--worker=")), Path(sys.argv[1])
restarted = supervisor.hello(state, folder)
recorder = Recorder(folder, (read_run(folder) if restarted else None) or {})

def crash():
    os._exit(70)

def hang():
    time.sleep(600)

jobs = [Job("good", "a", lambda: None), Job("crash", "b", crash)]
jobs += [Job("hang", "c", hang, limit=0.5), Job("last", "d", lambda: None)]
run_jobs(jobs, recorder, Budget(time.time() + 300), state)
"""


def test_the_worker_is_started_again_behind_a_crash_and_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    # Far above the needed time: after its deadline the supervisor starts no worker again, and returns the status of the
    # worker it stopped.
    status, folder = supervisor.supervise(command, time.time() + 600, 2, lambda run, where: None)
    assert (status, folder) == (0, tmp_path)
    run = read_run(tmp_path)
    assert run is not None
    assert [(job["name"], job["status"]) for job in run["jobs"]] == [
        *(("good", "done"), ("crash", "crashed"), ("hang", "hung"), ("last", "done"))
    ]
    assert "status 70" in run["jobs"][1]["detail"]


def test_a_worker_without_a_gpu_is_not_started_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit(2)"]
    assert supervisor.supervise(command, time.time() + 60, 2, lambda run, where: None) == (2, None)


# --- launch plans


@needs_triton
def test_candidates_begin_with_the_default_and_are_undone() -> None:
    from depthlstm_fast.kernels import depth_lstm as module

    before = dict(vars(module))
    for kind, features in launch_plans.FULL:
        found = launch_plans.candidates(module, kind, features)
        assert found[0].warps > 0
        assert len(found) > 4
        assert all(one.default is (one is found[0]) for one in found[1:])
        assert len({(one.warps, str(one.constants), one.resident) for one in found}) == len(found)
        patches = launch_plans.Patches(module)
        patches.apply(found[1].patches)
        assert any(vars(module)[name] is not before[name] for name in found[1].patches)
        patches.apply({})
        assert all(vars(module)[name] is before[name] for name in found[1].patches)


@needs_triton
def test_a_plan_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    right = launch_plans.KernelCall.call

    def wrong(self: launch_plans.KernelCall) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        return tuple(tensor + (len(calls) == 3) for tensor in right(self))

    monkeypatch.setattr(launch_plans.KernelCall, "call", wrong)
    entries = launch_plans.explore(bench_with(None), "forward", 128, most=3)
    assert [entry["failure"] is None for entry in entries] == [True, False, True]
    assert "check red" in entries[1]["failure"]
    assert entries[1]["ms"] == 0


# --- the whole


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_run.main(["--probe"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "make gpu: there is no GPU that torch can use; --rehearse runs every path on the CPU"
    ]


def test_a_rehearsal_is_never_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_run.main(["--rehearse", "--output", str(gpu_run.RESULTS / "some-gpu")]) == 2
    assert "rehearsal" in capsys.readouterr().err
    assert not (gpu_run.RESULTS / "some-gpu").exists()


def test_the_folder_of_a_gpu() -> None:
    assert machine.gpu_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.slow
@needs_triton
@needs_cpp
def test_rehearsal(tmp_path: Path) -> None:
    """Check every stage but pytest's, in the processes of `make gpu`; takes under 20 s on two slow cores."""
    pytest.importorskip("matplotlib")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    command = [
        sys.executable,
        "-m",
        "depthlstm_fast.bench.gpu",
        "--rehearse",
        "--output",
        str(tmp_path),
        "--skip",
        "tests",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {job["status"] for job in run["jobs"]} == {"done"}
    assert {job["stage"] for job in run["jobs"]} == set(gpu_run.STAGES) - {"tests", "autotune"}
    assert run["rehearsal"]
    assert run["backends"] == ["triton", "cuda"], run["absent"]
    assert {row["backend"] for row in run["rows"]} == {"triton", "cuda"}
    assert [entry["reason"] for entry in run["counters"]] == ["rehearsed"] * 2
    assert "A REHEARSAL" in done.stdout
    assert "Triton and CUDA C++ (medians)" in done.stdout
    assert "there is no entry" in (tmp_path / "fastest.txt").read_text(encoding="utf-8")
    for name in ("report.md", "plans.json", "plans.md"):
        assert (tmp_path / name).stat().st_size > 200
