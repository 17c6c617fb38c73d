"""The stages of `make gpu`, the most informative first; each is a list of jobs.

subject_rows.py has the measurements.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..measure import gpu_timing
from ..subjects.gates import GPU_WIDTHS
from . import counters, launch_plans, prepare, programs, sanitize
from . import report as gpu_report
from .bench import BF16, Bench
from .jobs import Budget, Job, Recorder
from .steps import CALLS, backends_of, step_rows
from .subject_rows import (
    AUTOTUNE,
    cell_rows,
    decoding_rows,
    few_rows,
    gates_rows,
    layer_rows,
    memory_rows,
    overhead_rows,
    stack_rows,
)

ROOT = Path(__file__).resolve().parents[2]
TEST_SECONDS, REHEARSED_TEST = 150.0, "zero_rows"
PREPARE_SECONDS, PLANS_SECONDS, SANITIZER_SECONDS, COUNTERS_SECONDS = 60.0, 60.0, 60.0, 30.0
PLAN_TASKS = 12


class Stages:
    """The jobs of one run: each method that yields jobs is a stage of the same name."""

    def __init__(self, bench: Bench, recorder: Recorder, budget: Budget, options: argparse.Namespace) -> None:
        self.bench, self.recorder, self.budget, self.options = bench, recorder, budget, options
        self.rehearse: bool = options.rehearse
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.compile = bench.settings.compile
        self.main = bench.sizes.gates[: bench.sizes.main]
        self.pool: prepare.Pool | None = None
        self.plan_pool: prepare.Pool | None = None
        # an earlier process has filled the cache already
        self.fill_plans = not recorder.attempted() and "triton" in bench.backends and not self.rehearse

    def jobs(self) -> list[Job]:
        stages = (
            *(
                self.report,
                self.prepare,
                self.main_gates,
                self.prepare_layers,
                self.checks,
                self.wait_for_layers,
                self.gates,
            ),
            *(self.cell, self.layer, self.steps, self.memory, self.host, self.decoding, self.pictures),
            *(self.tests, self.sanitizer, self.counters, self.older_tests, self.plans, self.autotune),
        )
        found = [job for stage in stages for job in stage()]
        if self.options.only:
            found = [job for job in found if job.stage in self.options.only]
        return [job for job in found if job.stage not in self.options.skip]

    def close(self) -> None:
        for pool in (self.pool, self.plan_pool):
            if pool is not None:
                pool.stop()

    def report(self) -> Iterable[Job]:
        def run() -> None:
            from depthlstm_fast.__main__ import report

            self.recorder.run["environment"] = report()
            print(self.recorder.run["environment"], flush=True)

        yield Job("report", "report", run, need=0)

    def _start_compilers(self, tasks: list[list[str]]) -> None:
        flags = (
            ["--rehearse"] * self.rehearse
            + ["--no-compile"] * (not self.compile)
            + [f"--{name}" for name in self.bench.backends]
        )
        # torch.compile needs Triton, too
        if programs.has("triton") and (self.compile or "triton" in self.bench.backends):
            self.pool = prepare.Pool(tasks[-1:] if self.rehearse else tasks, self.cores - 2, flags)

    def _wait_for_compilers(self) -> None:
        if self.pool is not None:
            found = self.pool.wait(max(1.0, min(PREPARE_SECONDS, self.budget.left() - 60)))
            self.recorder.run["prepared"] = [*self.recorder.run.get("prepared", []), found]
            self.pool = None
            print("   " + found.splitlines()[0][:200], flush=True)

    def prepare(self) -> Iterable[Job]:
        yield Job("start compilers", "prepare", lambda: self._start_compilers(prepare.gates_tasks(self.bench.sizes)))
        # checks that compile little run while the compilers work
        yield Job("first checks", "prepare", lambda: self._check(self.bench.sizes.gates[:1]))
        yield Job("wait for compilers", "prepare", self._wait_for_compilers)

    def prepare_layers(self) -> Iterable[Job]:
        if self.compile:
            yield Job(
                "start compilers of layers",
                "prepare",
                lambda: self._start_compilers(prepare.layer_tasks(self.bench.sizes)),
            )

    def wait_for_layers(self) -> Iterable[Job]:
        def ceilings() -> None:
            sizes = self.bench.sizes
            self.recorder.run["ceilings"] = found = gpu_timing.ceilings(
                self.bench.device, sizes.copied_bytes, sizes.matrix
            )
            print("   " + ", ".join(f"{name} {value:,.0f}" for name, value in found.items()), flush=True)

        if self.compile:
            yield Job("wait for compilers of layers", "prepare", self._wait_for_compilers)
        yield Job("ceilings", "prepare", ceilings)

    def _check(self, problems: Iterable[tuple[int, int, Any]]) -> None:
        for features, _, dtype in problems:
            for backend in self.bench.backends:
                made = self.bench.checker.check("gates", backend, dtype, features)
                print(f"   {made.subject} {made.backend} {made.dtype} {made.size} {made.summary}", flush=True)

    def checks(self) -> Iterable[Job]:
        widths = list(dict.fromkeys(features for features, _, _ in self.bench.sizes.gates))

        def halves() -> None:
            self._check((features, 0, torch.float16) for features in widths[:3])

        yield Job("checks", "checks", lambda: self._check(self.bench.sizes.gates))
        yield Job("checks fp16", "checks", halves)

    def _gates(self, problems: Iterable[tuple[int, int, Any]]) -> Iterable[Job]:
        for features, rows, dtype in problems:
            compile = dtype.itemsize == 2 or features in GPU_WIDTHS or self.rehearse
            name = f"gates D={features} {str(dtype).removeprefix('torch.')}"
            yield Job(name, "gates", partial(gates_rows, self.bench, features, rows, dtype, compile), 15)

    def main_gates(self) -> Iterable[Job]:
        """Yield the problems with targets; each job makes its own check."""
        yield from self._gates(self.main)

    def gates(self) -> Iterable[Job]:
        yield from self._gates(self.bench.sizes.gates[len(self.main) :])

    def cell(self) -> Iterable[Job]:
        for features, rows in self.bench.sizes.cells:
            for beside in (True, False):
                name = f"cell D={features}{', x beside h' if beside else ''}"
                yield Job(name, "cell", partial(cell_rows, self.bench, features, rows, beside), 15)

    def layer(self) -> Iterable[Job]:
        for size in self.bench.sizes.layers:
            yield Job(f"layer D={size[0]}", "layer", partial(layer_rows, self.bench, *size, False), 15)
        yield Job("encoder", "layer", partial(stack_rows, self.bench, *self.bench.sizes.stack), 15)
        if self.compile:
            for size in self.bench.sizes.layers:
                yield Job(f"layer D={size[0]} compiled", "layer", partial(layer_rows, self.bench, *size, True), 25)

    def steps(self) -> Iterable[Job]:
        """Yield the ops of depth connections, at the main size against torch.compile, too."""
        for index, (features, rows, dtype) in enumerate(self.bench.sizes.steps):
            for label in CALLS:
                name = f"{label} C={features} {str(dtype).removeprefix('torch.')}"
                if backends_of(label, self.bench.backends):
                    yield Job(
                        name, "steps", partial(step_rows, self.bench, label, features, rows, dtype, index == 0), 10
                    )

    def memory(self) -> Iterable[Job]:
        yield Job("memory", "memory", partial(memory_rows, self.bench))

    def host(self) -> Iterable[Job]:
        yield Job("host time", "host", partial(overhead_rows, self.bench))
        for rows in self.bench.sizes.few[1]:
            yield Job(f"few rows N={rows}", "host", partial(few_rows, self.bench, rows), 15)

    def decoding(self) -> Iterable[Job]:
        """Yield searches whose steps are CUDA graphs."""
        for batch, beams in ((1, 1), (8, 4)):
            name = f"captured decoding, batch {batch}, beams {beams}"
            yield Job(name, "decoding", partial(decoding_rows, self.bench, batch, beams), 20)

    def pictures(self) -> Iterable[Job]:
        def run() -> None:
            from ..report import plots

            if self.recorder.run["rows"]:
                plots.write_all(self.recorder.run, self.recorder.folder)

        yield Job("pictures", "pictures", run, need=0)

    def _tests(self, path: str, extra: list[str], share: float) -> None:
        gpu_timing.release(self.bench.device)
        limit = min(TEST_SECONDS, max(10.0, self.budget.left() * share))
        variables = {"DEPTHLSTM_REHEARSE": "1"} if self.rehearse else {}
        workers = max(1, min(6, self.cores // 2))
        entry = programs.run_tests(path, self.recorder.folder / "tests.xml", limit, workers, extra, variables)
        self.recorder.add("tests", entry)
        print(
            "\n".join(["   " + gpu_report.test_line(entry), *(f"     {line}" for line in entry["failing"][:20])]),
            flush=True,
        )

    def tests(self) -> Iterable[Job]:
        if self.rehearse:
            # one short test, because a rehearsal tests only that pytest starts
            path = "tests/backends/gpu/test_gpu.py"
            yield Job(path, "tests", partial(self._tests, path, ["-k", REHEARSED_TEST], 1.0))
            return
        for name in ("test_gpu.py", "test_gpu_decoding.py", "test_gpu_device.py"):
            path = f"tests/backends/gpu/{name}"
            yield Job(path, "tests", partial(self._tests, path, ["-m", "gpu"], 0.35), 30, TEST_SECONDS + 30)
        if "cuda" in self.bench.backends:
            path = "tests/backends/cuda/test_cuda.py"
            yield Job(path, "tests", partial(self._tests, path, [], 0.4), 30, TEST_SECONDS + 30)

    def older_tests(self) -> Iterable[Job]:
        """Yield tests of Triton alone, most of which its interpreter has run before.

        The plans are compiled meanwhile, as nothing is timed.
        """

        def run(path: str) -> None:
            if "plans" not in self.options.skip and not self.options.only:
                self._compile_plans()
            self._tests(path, [], 0.4)

        paths = [path.relative_to(ROOT) for path in (ROOT / "tests" / "backends" / "triton").glob("test_triton*.py")]
        found = sorted(str(path) for path in paths if not path.stem.endswith("_ptx"))  # the others simulate a GPU
        for path in found if "triton" in self.bench.backends and not self.rehearse else ():
            yield Job(path, "tests", partial(run, path), 30, TEST_SECONDS + 30)

    def _compile_plans(self) -> None:
        """Begin to compile the plans in other processes, while this one has other work."""
        if self.plan_pool is None and self.fill_plans:
            tasks = [["plans", str(index), str(PLAN_TASKS)] for index in range(PLAN_TASKS)]
            self.plan_pool = prepare.Pool(tasks, self.cores // 2)

    def plans(self) -> Iterable[Job]:
        def wait() -> None:
            self._compile_plans()
            if self.plan_pool is not None:
                print(
                    "   "
                    + self.plan_pool.wait(max(1.0, min(PLANS_SECONDS, self.budget.left() - 30))).splitlines()[0][:200],
                    flush=True,
                )

        def run(kind: str, features: int) -> None:
            self.recorder.run["plans"] += launch_plans.explore(
                self.bench, kind, features, most=3 if self.rehearse else None
            )
            self.recorder.save()
            lines = [
                line for line in gpu_report.plan_lines(self.recorder.run) if line.startswith(f"{kind} D={features}:")
            ]
            print("\n".join("   " + line for line in lines), flush=True)

        if "triton" not in self.bench.backends:
            return
        yield Job("wait for plans", "plans", wait)
        for kind, features in launch_plans.TINY if self.rehearse else launch_plans.FULL:
            yield Job(f"plans {kind} D={features}", "plans", partial(run, kind, features), 10)

    def sanitizer(self) -> Iterable[Job]:
        def run(backend: str) -> None:
            def record(entry: dict[str, Any]) -> None:
                self.recorder.add("sanitizer", entry)
                print(f"   {entry['check']}: {entry['verdict']}", flush=True)

            tool = programs.find_tool("compute-sanitizer")
            if self.rehearse:
                sanitize.main(backend, sanitize.TINY, "cpu")
            if self.rehearse or tool is None:
                said = "rehearsed" if self.rehearse else "compute-sanitizer is not on this machine"
                for check in programs.TOOLS:
                    record(programs.verdict(check, backend, said))
                return
            gpu_timing.release(self.bench.device)
            limit = min(SANITIZER_SECONDS, max(10.0, self.budget.left()))
            commands = programs.sanitizer_commands(tool, backend)
            programs.run_all(
                commands, limit, on_end=lambda check, outcome: record(programs.judge(check, outcome, backend))
            )

        # the CUDA kernels come first, because nothing else checks them at run time
        for backend in sorted(self.bench.backends):
            yield Job(f"compute-sanitizer {backend}", "sanitizer", partial(run, backend), 0 if self.rehearse else 35)

    def counters(self) -> Iterable[Job]:
        """Yield the jobs that read the GPU's counters of the main kernels."""
        problems = [(features, rows) for features, rows, _ in self.main]

        def run(backend: str) -> None:
            tool = programs.find_tool("ncu")
            if self.rehearse or tool is None:
                entry = counters.without(backend, "rehearsed" if self.rehearse else "ncu is not on this machine")
            else:
                gpu_timing.release(self.bench.device)
                command = counters.command(tool, backend, str(BF16).removeprefix("torch."), problems)
                limit = min(COUNTERS_SECONDS, max(10.0, self.budget.left()))
                entry = counters.judge(backend, programs.run_all({backend: command}, limit)[backend], problems)
            self.recorder.add("counters", entry)
            print("\n".join("   " + line for line in gpu_report.counter_lines(self.recorder.run, backend)), flush=True)

        for backend in self.bench.backends:
            yield Job(f"counters {backend}", "counters", partial(run, backend), 0 if self.rehearse else 20)

    def autotune(self) -> Iterable[Job]:
        for features, rows, dtype in self.main if self.compile else ():
            name = f"gates D={features} {str(dtype).removeprefix('torch.')}, max-autotune"
            yield Job(name, "autotune", partial(gates_rows, self.bench, features, rows, dtype, True, AUTOTUNE), 25)
        if self.compile:
            yield from (Job("pictures again", "autotune", job.run, 0) for job in self.pictures())
