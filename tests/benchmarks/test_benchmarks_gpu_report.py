"""The output of `make gpu`: verdicts, counters, both backends side by side, the report."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench.gpu import compare, counters, programs  # noqa: E402
from depthlstm_fast.bench.gpu import report as gpu_report  # noqa: E402
from depthlstm_fast.bench.gpu.jobs import Recorder  # noqa: E402
from depthlstm_fast.bench.measure.accuracy import Check  # noqa: E402
from depthlstm_fast.bench.measure.rows import Row  # noqa: E402
from depthlstm_fast.bench.measure.timing import Spread  # noqa: E402

sys.path.remove(str(ROOT))


# --- verdicts

SANITIZED = {
    "clean": "sanitize: done\n========= ERROR SUMMARY: 0 errors\n",
    "FAULTS": "========= Invalid __global__ read of size 16 bytes\n=========  "
    "   at narrow_backward_kernel+0x340 in gates.py:203\n"
    "sanitize: done\n========= ERROR SUMMARY: 1 error\n",
    "time was up": "========= COMPUTE-SANITIZER\n",
    "faults, none of them in our kernels": (
        "===     at other+0x10\nsanitize: done\n=== RACECHECK SUMMARY: 2 hazards displayed\n"
    ),
    "did not run to its end": "========= Error: Target application terminated before first instrumented API call\n",
}


@pytest.mark.parametrize("verdict", SANITIZED)
def test_verdicts_of_the_sanitizer(verdict: str) -> None:
    outcome = programs.Outcome(None if verdict == "time was up" else 0, 1.0, SANITIZED[verdict])
    assert programs.judge("memcheck", outcome)["verdict"] == verdict


@pytest.mark.parametrize(
    "kernel", ["forward_warp", "forward_block", "forward_any", "narrow_backward", "row_statistics", "wide_backward"]
)
def test_faults_in_cuda_kernels_are_ours_even_where_time_was_up(kernel: str) -> None:
    line = (
        f"=========     at void depthlstm::bfloat16_::<unnamed>::{kernel}<float, "
        f"(int)4>(depthlstm::Launch)+0x340 in kernel.cu:203"
    )
    entry = programs.judge("racecheck", programs.Outcome(None, 60.0, line), "cuda")
    assert (entry["backend"], entry["verdict"], entry["ours"]) == ("cuda", "FAULTS", 1)
    assert not gpu_report.succeeded({"tests": [], "sanitizer": [entry], "jobs": [], "checks": []})


def test_the_names_of_the_kernels_are_known() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*/cuda_*.cu")]
    names = {
        name
        for source in sources
        for name in re.findall(r"__global__ void [^;{]*?(\w+)\((?:const __grid|const float)", source)
    }
    assert {"forward_warp", "forward_any", "wide_backward", "sums_kernel"} <= names
    assert all(any(known in name for known in programs.KERNELS) for name in names), names


# --- the GPU's counters

HEADING = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def counted(number: int, kernel: str, size: str, nanoseconds: str) -> list[str]:
    values = ((counters.BYTES, "byte", size), (counters.SHARE, "%", "80.5"), (counters.SECONDS, "ns", nanoseconds))
    return [f'"{number}","7","{kernel}","{name}","{unit}","{value}"' for name, unit, value in values]


def test_counters_are_read() -> None:
    output = ["==PROF== Connected to process 7", HEADING]
    output += [*counted(0, "forward_warp", "1,000,000", "500"), *counted(1, "narrow_backward", "3000000", "1,500")]
    output += [
        *counted(2, "void depthlstm::x::<unnamed>::forward_block<float, 4>(Launch)", "8000000", "4000"),
        "==PROF== Disconnected",
    ]
    entry = counters.judge("cuda", programs.Outcome(0, 9.0, "\n".join(output)), [(512, 65536), (1024, 32768)])
    assert entry["reason"] == ""
    found = [
        (kernel["kernel"], kernel["features"], kernel["gb_per_s"], kernel["share_of_peak"])
        for kernel in entry["kernels"]
    ]
    assert found == [
        ("forward_warp", 512, pytest.approx(2000), pytest.approx(0.805)),
        ("narrow_backward", 512, pytest.approx(2000), pytest.approx(0.805)),
        ("forward_block", 1024, pytest.approx(2000), pytest.approx(0.805)),
    ]
    lines = gpu_report.counter_lines({"counters": [entry, counters.without("triton", "no ncu")]})
    assert lines[0] == "cuda D=512 forward_warp: 2,000 GB/s of memory, 80% of the peak, 1.0 MB in 0.5 us"
    assert lines[-1] == "triton: no counters: no ncu"


def test_counters_that_may_not_be_read() -> None:
    output = (
        "==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - The user does not have "
        "permission to access Performance Counters.\n==PROF== end"
    )
    entry = counters.judge("triton", programs.Outcome(1, 3.0, output), [(512, 8)])
    assert entry["kernels"] == []
    assert entry["reason"].startswith("ncu ended with status 1; ==ERROR== ERR_NVGPUCTRPERM")
    assert "it printed nothing" in counters.judge("triton", programs.Outcome(None, 3.0, ""), [(512, 8)])["reason"]
    for value in ("n/a", "0"):  # a counter that this GPU lacks
        output = "\n".join([HEADING, *counted(0, "forward_any", "1", value)])
        assert counters.judge("cuda", programs.Outcome(0, 1.0, output), [(33, 8)])["kernels"] == []


# --- both backends


def timed(backend: str, times: tuple[float, float, float], features: int = 512, name: str = compare.DECISIVE) -> Row:
    row = Row("gates", name, "bf16", f"N=65536 D={features}", "ms", backend=backend)
    row.values = {"fused": Spread(*times)}
    return row


def run_of(tmp_path: Path, *rows: Row, **more: Any) -> dict[str, Any]:
    about = {
        "gpu": "NVIDIA H100 80GB HBM3",
        "name": "nvidia-h100-80gb-hbm3",
        "cpu": "x",
        "python": "3",
        "torch": "2",
        "commit": "0123456789",
    }
    run = {"machine": about | {"driver": "1", "cuda": "13.0"}, "date": "today", **more}
    recorder = Recorder(tmp_path, run, gpu_report.render)
    for row in rows:
        recorder.add_row(row)
    return recorder.run


def pair_of(features: int, triton: tuple[float, float, float], cuda: tuple[float, float, float]) -> list[Row]:
    return [timed("triton", triton, features), timed("cuda", cuda, features)]


def test_the_fastest_is_written_as_fastest_py_has_it(tmp_path: Path) -> None:
    rows = [
        *pair_of(512, (2.0, 1.9, 2.1), (1.0, 0.9, 1.1)),
        *pair_of(1024, (1.0, 0.9, 1.1), (2.0, 1.9, 2.1)),
        *pair_of(2048, (1.0, 0.9, 1.1), (1.1, 1.05, 1.2)),  # within the spread
        *pair_of(4096, (1.0, 0.9, 1.1), (2.0, 1.9, 2.1)),  # a check of this width is red
        timed("cuda", (1.0, 1.0, 1.0), 8192),  # without a partner
        *[replace(row, failure="red") for row in pair_of(256, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))],
        *[replace(row, name="gates forward") for row in pair_of(768, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))],
    ]
    run = run_of(tmp_path, *rows)
    run["checks"].append(
        {"subject": "gates", "dtype": "bf16", "size": "N=131 D=4096", "passed": False, "backend": "cuda"}
    )
    text = compare.fastest_text(run)
    table = eval("{" + text + "}", {"torch": torch})
    gpu_name = "NVIDIA H100 80GB HBM3"
    keys = [("depth_lstm", gpu_name, features, torch.bfloat16) for features in (512, 1024)]
    assert table == dict(zip(keys, ("cuda", "triton"), strict=True))
    assert "# benchmarks/results/nvidia-h100-80gb-hbm3: triton 2 ms and cuda 1 ms" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert (tmp_path / "fastest.txt").is_file()
    assert compare.fastest_entries(run | {"rehearsal": True}) == []


def test_both_backends_side_by_side(tmp_path: Path) -> None:
    run = run_of(
        tmp_path, *pair_of(512, (2.0, 1.9, 2.1), (1.0, 0.9, 1.1)), *pair_of(1024, (1.0, 0.9, 1.1), (1.0, 0.9, 1.1))
    )
    table = compare.pair_lines(run)
    assert table[1] == ["gates forward + backward, bf16, N=65536 D=512", "2 ms", "1 ms", "2.00x", "CUDA C++"]
    assert table[2][-2:] == ["1.00x", "within the spread"]
    for text in (gpu_report.text(run), (tmp_path / "report.md").read_text(encoding="utf-8")):
        assert "within the spread" in text
        assert "2.00x" in text
    alone = run_of(tmp_path / "alone", timed("cuda", (1.0, 1.0, 1.0)), absent={"triton": "it is not installed"})
    assert compare.pair_lines(alone) == []
    assert not (tmp_path / "alone" / "fastest.txt").exists()
    assert "without triton: it is not installed" in gpu_report.text(alone)


# --- a whole report


def plan(ms: float, default: bool = False, failure: str | None = None) -> dict[str, Any]:
    resources = {"registers": 60, "spills": 0, "shared": None}
    times = {"ms": ms, "p10": ms, "p90": ms, "share": 0.9} if failure is None else {"ms": 0.0}
    common = {"kind": "forward", "features": 512, "rows": 65536, "warps": 1, "constants": {"ROWS": 1}, "resident": 0}
    return {**common, **resources, **times, "default": default, "failure": failure}


def test_report_of_a_run_that_went_wrong(tmp_path: Path) -> None:
    about = {
        "gpu": "A GPU",
        "driver": "1",
        "cuda": "13.0",
        "cpu": "x",
        "python": "3.12",
        "torch": "2",
        "triton": "3.6",
        "commit": "0123456789",
    }
    recorder = Recorder(
        tmp_path, {"machine": about, "date": "today", "ceilings": {"copy_gb_per_s": 3000, "bf16_tflop_per_s": 790}}
    )
    recorder.run["plans"] = [plan(0.2, default=True), plan(0.0, failure="OutOfResources"), plan(0.1)]
    recorder.add("checks", vars(Check("gates", "bf16", False, "h", 1e-3, 2e-3, 3.0, "triton", "N=3 D=512")))
    recorder.add("sanitizer", programs.judge("memcheck", programs.Outcome(9, 1.0, SANITIZED["FAULTS"])))
    recorder.add(
        "tests",
        {
            "name": "t.py",
            "status": "failed",
            "counts": {"failed": 1},
            "failing": ["x: y"],
            "seconds": 1.0,
            "tail": "the end",
        },
    )
    recorder.note("gates", "gates", "failed", 1.0, "Traceback\nValueError: no")
    recorder.note("later", "plans", "skipped", 0.0, "0 s left")
    gpu_report.render(recorder.run, tmp_path)
    text, markdown = gpu_report.text(recorder.run), (tmp_path / "report.md").read_text(encoding="utf-8")
    for expected in (
        "A GPU",
        "3,000 GB/s",
        "check red: gates bf16",
        "memcheck: FAULTS",
        "t.py: failed (1 failed)",
        "failed: gates: ValueError: no",
    ):
        assert expected in text
        assert expected in markdown
    assert "the end" in markdown
    assert "skipped: later: 0 s left" in text
    assert "forward D=512: default 0.2000 ms; fastest 0.1000 ms" in text
    table = (tmp_path / "plans.md").read_text(encoding="utf-8")
    assert table.index("0.1000") < table.index("0.2000") < table.index("OutOfResources")
    assert json.loads((tmp_path / "plans.json").read_text(encoding="utf-8"))["plans"]["forward D=512"][0]["ms"] == 0.1
    assert not gpu_report.succeeded(recorder.run)
    assert gpu_report.succeeded({"tests": [], "sanitizer": [], "jobs": [], "checks": []})
