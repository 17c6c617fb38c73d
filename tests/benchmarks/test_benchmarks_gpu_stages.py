"""`make gpu` without a GPU: the programs that it starts, its build, the order of its jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import simulated
import torch
from helpers import needs_cpp

import depthlstm_fast as dl

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = tuple(f"tests/backends/gpu/{name}.py" for name in ("test_gpu", "test_gpu_decoding", "test_gpu_device"))
CUDA_TESTS, TRITON_TESTS = "tests/backends/cuda/test_cuda.py", "tests/backends/triton/test_triton.py"
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench.gpu import bench as gpu_bench  # noqa: E402
from depthlstm_fast.bench.gpu import build_library, counters, prepare, programs, rehearsal, sanitize, stages  # noqa: E402
from depthlstm_fast.bench.gpu import checker as gpu_checker  # noqa: E402
from depthlstm_fast.bench.gpu import run as gpu_run  # noqa: E402
from depthlstm_fast.bench.gpu.jobs import Budget, Job, Recorder, run_jobs  # noqa: E402
from depthlstm_fast.bench.measure.compiled import Compiled  # noqa: E402
from depthlstm_fast.bench.measure.place import Place  # noqa: E402
from depthlstm_fast.bench.subjects.gates import GPU_WIDTHS  # noqa: E402

sys.path.remove(str(ROOT))

CPU = torch.device("cpu")


# --- started programs


def test_programs_run_side_by_side_under_a_limit() -> None:
    script = "import time; print('begun', flush=True); time.sleep({})"
    commands = {str(seconds): [sys.executable, "-c", script.format(seconds)] for seconds in (0, 60)}
    told: list[str] = []
    outcomes = programs.run_all(
        commands, 2.0, on_end=lambda name, outcome: told.append(f"{name} {outcome.output.split()[0]}")
    )
    assert told == ["0 begun", "60 begun"]
    assert (outcomes["0"].code, outcomes["60"].code) == (0, None)
    assert all(outcome.output.startswith("begun\n") for outcome in outcomes.values())
    assert max(outcome.seconds for outcome in outcomes.values()) < 10


def test_suites_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    (tmp_path / "test_a.py").write_text("def test_one(): pass\ndef test_two(): assert 1 == 2\n", encoding="utf-8")
    suites = tmp_path / "out" / "tests.xml"
    entry = programs.run_tests("test_a.py", suites, 60, 1)
    assert (entry["status"], entry["counts"]) == ("failed", {"passed": 1, "failed": 1, "skipped": 0})
    assert entry["failing"] == ["test_two: assert 1 == 2"]
    assert "1 failed, 1 passed" in entry["tail"]
    assert programs.run_tests("test_b.py", suites, 60, 1)["status"] == "absent"
    assert programs.append_suite(suites, tmp_path / "nothing.xml") is None


def test_tasks_of_the_compilers() -> None:
    sizes = gpu_bench.FULL
    found = prepare.gates_tasks(sizes)
    assert ["gates", "512", "65536", "bfloat16"] in found
    assert len(found) == len(sizes.gates)
    assert len(prepare.layer_tasks(sizes)) == len(sizes.cells) + len(sizes.layers) + len(sizes.few[1])


@needs_cpp
def test_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated.use(monkeypatch, simulated.stand_in())
    ran: list[str | None] = []

    def compile(function: Any, **_: Any) -> Any:
        def call(*inputs: Any) -> Any:
            outputs = function(*inputs)
            ran.append(dl.last_backend())
            return outputs

        return call

    monkeypatch.setattr(torch, "compile", compile)
    prepare.prepare_gates(16, 3, torch.bfloat16, Place(device=CPU, backends=("cuda",), gpu=True))
    assert ran == []
    prepare.prepare_layer(Place(Compiled(), CPU, ("cuda", "cpp"), gpu=True), 16, 2, 1, 3)
    assert ran[-3:-1] == ["cuda", "cpp"]
    assert len(ran) == 4
    prepare.prepare_few(16, 2, CPU)
    assert len(ran) == 4 + 2 * 3


# --- the build, and the order of measurements


def test_the_library_is_built_for_the_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DEPTHLSTM_CUDA_ARCHS", raising=False)
    start, script = programs.start, "import os; print(os.environ.get('DEPTHLSTM_CUDA_ARCHS'), flush=True)"
    monkeypatch.setattr(programs, "start", lambda command, *rest: start([sys.executable, "-c", script], *rest))
    assert build_library.build("90") is None
    monkeypatch.setenv("DEPTHLSTM_CUDA_ARCHS", "80;90")
    assert build_library.build("90") is None
    assert capfd.readouterr().out.split() == ["90", "80;90"]
    monkeypatch.setattr(
        programs, "start", lambda command, *rest: start([sys.executable, "-c", "import time; time.sleep(60)"], *rest)
    )
    assert build_library.build("90", limit=0.5) == "the build was stopped after 0 s"
    monkeypatch.setattr(
        programs, "start", lambda command, *rest: start([sys.executable, "-c", "raise SystemExit(3)"], *rest)
    )
    assert build_library.build(None) == "the build ended with status 3"


def test_without_nvcc_a_library_that_serves_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[str | None] = []
    monkeypatch.setattr(build_library, "build", built.append)
    monkeypatch.setattr(build_library, "architecture", lambda: "90")
    for nvcc, serves in ((False, True), (True, True), (False, False)):
        monkeypatch.setattr(build_library, "has_nvcc", lambda nvcc=nvcc: nvcc)
        monkeypatch.setattr(build_library, "runs_here", lambda serves=serves: serves)
        assert build_library.main() == 0
    assert built == ["90", "90"]
    assert "there is no nvcc; the library stays" in capsys.readouterr().out


def test_a_backend_that_is_missing_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"triton": (True, "Triton"), "cuda": (False, "no CUDA kernels in the library"), "cpp": (True, "")}
    monkeypatch.setattr(dl, "backends", lambda: found)
    assert gpu_run.backends_under_test(None, False) == (("triton",), {"cuda": "no CUDA kernels in the library"})
    assert gpu_run.backends_under_test(["cuda"], False) == ((), {"cuda": "no CUDA kernels in the library"})
    monkeypatch.setattr(rehearsal, "stand_in_for_cuda", lambda: None)
    assert gpu_run.backends_under_test(["cuda", "triton"], True) == (("triton", "cuda"), {})
    monkeypatch.setattr(rehearsal, "stand_in_for_cuda", lambda: "no compiler")
    assert gpu_run.backends_under_test(None, True) == (("triton",), {"cuda": "no compiler"})


def jobs_of(tmp_path: Path, *arguments: str, backends: tuple[str, ...] = ("triton", "cuda")) -> list[Job]:
    bench = gpu_bench.Bench(CPU, backends, gpu_bench.FULL, gpu_checker.Checker(CPU, lambda _: 3))
    return stages.Stages(
        bench, Recorder(tmp_path, {}), Budget(1e12), gpu_run.command_line().parse_args(list(arguments))
    ).jobs()


def test_what_tells_most_comes_first(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)  # a job with a known name is not run again
    assert {job.stage for job in jobs} == set(gpu_run.STAGES)
    gates_jobs = [f"gates D={features} bfloat16" for features in GPU_WIDTHS]
    order = [
        *gates_jobs,
        "checks",
        "gates D=8192 float32",
        GPU_TESTS[0],
        CUDA_TESTS,
        "compute-sanitizer cuda",
    ]
    order += ["compute-sanitizer triton", "counters cuda", TRITON_TESTS, "plans forward D=512"]
    assert [name for name in names if name in order] == order
    assert [job.stage for job in jobs[:5]] == ["report", "prepare", "prepare", "prepare", "gates"]


def test_without_a_backend_its_own_jobs_are_absent(tmp_path: Path) -> None:
    names = " ".join(job.name for job in jobs_of(tmp_path, backends=("cuda",)))
    assert "test_triton" not in names
    assert "plans" not in names
    assert "compute-sanitizer cuda" in names
    names = " ".join(job.name for job in jobs_of(tmp_path, "--no-compile", backends=("triton",)))
    assert "cuda" not in names


@needs_cpp
def test_calls_for_the_sanitizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    simulated.use(monkeypatch, simulated.stand_in())
    sanitize.main("cuda", [*sanitize.TINY, (24, 0, sanitize.DROPOUT)], "cpu")
    assert capsys.readouterr().out == "sanitize: done\n"


# --- tools that watch the kernels


def test_plans_are_compiled_while_triton_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    entry = {"status": "passed", "counts": {}, "failing": [], "seconds": 1.0, "tail": ""}
    monkeypatch.setattr(programs, "run_tests", lambda path, *_: calls.append(path) or {"name": path, **entry})
    monkeypatch.setattr(stages.Stages, "_compile_plans", lambda self: calls.append("plans"))
    for job in jobs_of(tmp_path):
        if job.stage == "tests":
            job.run()
    assert calls[:6] == [*GPU_TESTS, CUDA_TESTS, "plans", TRITON_TESTS]
    assert not [path for path in calls if path != "plans" and not (ROOT / path).is_file()]


def run_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, tool: str | None) -> dict[str, Any]:
    """Return the records of a run in which compute-sanitizer or ncu is a shell script with that text, or absent."""
    program = tmp_path / "tool"
    if tool is not None:
        program.write_text(f"#!/bin/sh\n{tool}\n", encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.setattr(programs, "find_tool", lambda name: None if tool is None else str(program))
    bench = gpu_bench.Bench(CPU, ("triton", "cuda"), gpu_bench.FULL, gpu_checker.Checker(CPU, lambda _: 3))
    recorder = Recorder(tmp_path, {"counters": []})
    options = gpu_run.command_line().parse_args(["--only", stage])
    run_jobs(stages.Stages(bench, recorder, Budget(1e12), options).jobs(), recorder, Budget(1e12), say=lambda _: None)
    assert {job["status"] for job in recorder.run["jobs"]} == {"done"}, recorder.run["jobs"]
    return recorder.run


def test_every_check_of_the_sanitizer_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_stage(
        tmp_path, monkeypatch, "sanitizer", 'echo "$2"; for last; do :; done; echo "$last"; echo "sanitize: done"'
    )["sanitizer"]
    assert [entry["backend"] for entry in found] == ["cuda"] * 4 + ["triton"] * 4
    assert {entry["check"] for entry in found} == set(programs.TOOLS)
    assert all(entry["verdict"] == "clean" for entry in found)
    assert all(entry["output"].split()[:2] == [entry["check"], entry["backend"]] for entry in found)
    found = run_stage(tmp_path, monkeypatch, "sanitizer", None)["sanitizer"]
    assert {entry["verdict"] for entry in found} == {"compute-sanitizer is not on this machine"}


def test_counters_are_recorded_or_why_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = '"0","forward_warp","{}","{}","{}"'
    lines = ['"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    lines += [row.format(counters.BYTES, "byte", "1000"), row.format(counters.SECONDS, "ns", "2000")]
    found = run_stage(tmp_path, monkeypatch, "counters", "\n".join(f"echo '{line}'" for line in lines))["counters"]
    assert [entry["kernels"][0]["gb_per_s"] for entry in found] == [pytest.approx(0.5)] * 2
    assert found[0]["kernels"][0]["share_of_peak"] is None
    found = run_stage(tmp_path, monkeypatch, "counters", "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1")["counters"]
    assert all("ERR_NVGPUCTRPERM" in entry["reason"] for entry in found)
    found = run_stage(tmp_path, monkeypatch, "counters", None)["counters"]
    assert all(entry["reason"] == "ncu is not on this machine" for entry in found)
