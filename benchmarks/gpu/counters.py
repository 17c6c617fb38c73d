"""Memory traffic of the kernels by the GPU's own counters.

ncu (Nsight Compute) reads them:

    python -m depthlstm_fast.bench.gpu.counters cuda bfloat16 512 65536 1024 65536

This command, under ncu, makes the calls of a backend in a dtype, for (D, rows) pairs. ncu measures each kernel alone,
with cold caches, at the GPU's current clocks. Reading counters may need a permission. Without it ncu's message is kept
in place of numbers.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from typing import Any

from .programs import Outcome

BYTES, SECONDS = "dram__bytes.sum", "gpu__time_duration.sum"
SHARE = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
SCALES = {
    "byte": 1.0,
    "ns": 1e-9,
    "nsecond": 1e-9,
    "us": 1e-6,
    "usecond": 1e-6,
    "ms": 1e-3,
    "msecond": 1e-3,
    "s": 1.0,
    "second": 1.0,
}
SCALES |= {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "%": 0.01}
Size = tuple[int, int]  # D, rows


def command(tool: str, backend: str, dtype: str, sizes: Sequence[Size]) -> list[str]:
    """Return the command that runs ncu on this file."""
    flags = ["--csv", "--print-units", "base", "--clock-control", "none", "--print-kernel-base", "function"]
    flags += ["--profile-from-start", "off", "--metrics"]
    words = [str(number) for size in sizes for number in size]
    return [
        tool,
        *flags,
        ",".join((BYTES, SECONDS, SHARE)),
        sys.executable,
        "-m",
        f"{__package__}.counters",
        backend,
        dtype,
        *words,
    ]


def short_name(kernel: str) -> str:
    """Return the kernel's name without namespaces, template arguments and parameters."""
    plain = re.sub(r"<unnamed>::|\(anonymous namespace\)::", "", kernel.strip().removeprefix("void "))
    return re.split(r"[<(]", plain)[0].split("::")[-1].strip()


def parse(output: str, sizes: Sequence[Size]) -> list[dict[str, Any]]:
    """Return a row for each kernel; each size begins with its single forward kernel."""
    lines = output.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        scale = SCALES.get(row.get("Metric Unit") or "")
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue
        if scale is not None:
            kernels.setdefault(row["ID"], (row["Kernel Name"], {}))[1][row["Metric Name"]] = value * scale
    found: list[dict[str, Any]] = []
    index = -1
    for name, metrics in kernels.values():
        index += "forward" in short_name(name)
        if {BYTES, SECONDS} <= metrics.keys() and metrics[SECONDS] > 0 and 0 <= index < len(sizes):
            features, rows = sizes[index]
            entry = {
                "kernel": short_name(name),
                "features": features,
                "rows": rows,
                "microseconds": metrics[SECONDS] * 1e6,
            }
            entry |= {"gb_per_s": metrics[BYTES] / metrics[SECONDS] / 1e9, "megabytes": metrics[BYTES] / 1e6}
            found.append(entry | {"share_of_peak": metrics.get(SHARE)})
    return found


def without(backend: str, reason: str, seconds: float = 0.0) -> dict[str, Any]:
    """Return the entry of a backend without counters."""
    return {"backend": backend, "kernels": [], "reason": reason, "seconds": round(seconds, 1)}


def judge(backend: str, outcome: Outcome, sizes: Sequence[Size]) -> dict[str, Any]:
    """Return one backend's kernels, or the reason why ncu gave none."""
    kernels = parse(outcome.output, sizes)
    if kernels:
        return without(backend, "", outcome.seconds) | {"kernels": kernels}
    lines = outcome.output.strip().splitlines() or ["it printed nothing"]
    told = next((line for mark in ("==ERROR==", "Error", "==WARNING==") for line in lines if mark in line), lines[-1])
    ended = "time was up" if outcome.code is None else f"ncu ended with status {outcome.code}"
    return without(backend, f"{ended}; {told.strip()[:300]}", outcome.seconds)


def main(backend: str, dtype: str, *words: str) -> None:
    """Run forward and backward of each size once to warm up, then once more for the profiler."""
    import torch

    import depthlstm_fast as dl

    from ..subjects.gates import make_inputs

    for features, rows in zip(map(int, words[::2]), map(int, words[1::2]), strict=True):
        leaves = [tensor.requires_grad_() for tensor in make_inputs(rows, features, getattr(torch, dtype), "cuda")]
        cotangents = [torch.randn_like(leaves[1]) for _ in range(2)]
        for profiled in (False, True):
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.start()
            torch.autograd.grad(dl.depth_lstm_gates(*leaves, backend=backend), leaves, cotangents)
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
