"""The stages of `make gpu`, what tells most first; each is a list of jobs. What they measure is in gpu_kernels.py and gpu_layers.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import device, external, gpu_report, plans, prepare
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_kernels import AUTOTUNE, MAIN, cell_rows, few_rows, gates_rows, overhead_rows
from benchmarks.gpu_layers import layer_rows, memory_rows, stack_rows
from benchmarks.stages import Budget, Job, Recorder

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS, REHEARSED_TEST = 150.0, "zero_rows"
PREPARE_SECONDS, PLANS_SECONDS, SANITIZER_SECONDS = 75.0, 60.0, 90.0
PLAN_TASKS = 12


class Stages:
    """The jobs of one run: each method that yields jobs is a stage of its name."""

    def __init__(self, bench: Bench, recorder: Recorder, budget: Budget, options: argparse.Namespace) -> None:
        self.bench, self.recorder, self.budget, self.options = bench, recorder, budget, options
        self.rehearse: bool = options.rehearse
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.compile = bench.settings.compile
        self.pool: prepare.Pool | None = None
        self.plan_pool: prepare.Pool | None = None
        # an earlier process has filled the caches already
        self.fill = not recorder.attempted() and "triton" in bench.backends

    def jobs(self) -> list[Job]:
        stages = (
            *(self.report, self.prepare, self.checks, self.gates, self.cell, self.layer, self.memory, self.host, self.pictures),
            *(self.tests, self.plans, self.sanitizer, self.autotune),
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

    def prepare(self) -> Iterable[Job]:
        flags = ["--rehearse"] * self.rehearse + ["--no-compile"] * (not self.compile)
        sizes = self.bench.sizes

        def start() -> None:
            if self.fill:
                tasks = prepare.tasks(sizes, self.compile)
                self.pool = prepare.Pool(tasks[-1:] if self.rehearse else tasks, self.cores - 2, flags)

        def wait() -> None:
            if self.pool is not None:
                self.recorder.run["prepared"] = self.pool.wait(max(1.0, min(PREPARE_SECONDS, self.budget.left() - 60)))
                print("   " + self.recorder.run["prepared"].splitlines()[0][:200], flush=True)

        def ceilings() -> None:
            self.recorder.run["ceilings"] = found = device.ceilings(self.bench.device, sizes.copied_bytes, sizes.matrix)
            print("   " + ", ".join(f"{name} {value:,.0f}" for name, value in found.items()), flush=True)

        yield Job("start compilers", "prepare", start)
        # while the others compile, the checks that need little of it
        yield Job("first checks", "prepare", lambda: self._check(sizes.gates[:1]))
        yield Job("wait for compilers", "prepare", wait)
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

    def gates(self) -> Iterable[Job]:
        for features, rows, dtype in self.bench.sizes.gates:
            compile = dtype.itemsize == 2 or features in MAIN or self.rehearse
            name = f"gates D={features} {str(dtype).removeprefix('torch.')}"
            yield Job(name, "gates", partial(gates_rows, self.bench, features, rows, dtype, compile), 15)

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

    def memory(self) -> Iterable[Job]:
        yield Job("memory", "memory", partial(memory_rows, self.bench))

    def host(self) -> Iterable[Job]:
        yield Job("host time", "host", partial(overhead_rows, self.bench))
        for rows in self.bench.sizes.few[1]:
            yield Job(f"few rows N={rows}", "host", partial(few_rows, self.bench, rows), 15)

    def pictures(self) -> Iterable[Job]:
        def run() -> None:
            from benchmarks import plots

            if self.recorder.run["rows"]:
                plots.write_all(self.recorder.run, self.recorder.folder)

        yield Job("pictures", "pictures", run, need=0)

    def tests(self) -> Iterable[Job]:
        files = ["tests/test_gpu.py", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_triton*.py"))]
        workers = max(1, min(6, self.cores // 2))

        def run(path: str, extra: list[str], share: float) -> None:
            device.release(self.bench.device)
            if "plans" not in self.options.skip and not self.options.only:
                self._compile_plans()
            limit = min(TEST_SECONDS, max(10.0, self.budget.left() * share))
            variables = {"DEPTHLSTM_REHEARSE": "1"} if self.rehearse else {}
            entry = external.run_tests(path, self.recorder.folder / "tests.xml", limit, workers, extra, variables)
            self.recorder.add("tests", entry)
            print("\n".join(["   " + gpu_report.test_line(entry), *(f"     {line}" for line in entry["failing"][:20])]), flush=True)

        if self.rehearse:
            # one short test: what is rehearsed is the starting of pytest
            yield Job(files[0], "tests", partial(run, files[0], ["-k", REHEARSED_TEST], 1.0))
            return
        yield Job(files[0], "tests", partial(run, files[0], ["-m", "gpu"], 0.7), 30, TEST_SECONDS + 30)
        for path in files[1:]:
            yield Job(path, "tests", partial(run, path, [], 0.4), 30, TEST_SECONDS + 30)

    def _compile_plans(self) -> None:
        """Begin to compile the plans in other processes, while this one has something else to do."""
        if self.plan_pool is None and self.fill and not self.rehearse:
            tasks = [["plans", str(index), str(PLAN_TASKS)] for index in range(PLAN_TASKS)]
            self.plan_pool = prepare.Pool(tasks, self.cores // 2)

    def plans(self) -> Iterable[Job]:
        def wait() -> None:
            self._compile_plans()
            if self.plan_pool is not None:
                print("   " + self.plan_pool.wait(max(1.0, min(PLANS_SECONDS, self.budget.left() - 30))).splitlines()[0][:200], flush=True)

        def run(kind: str, features: int) -> None:
            if "triton" in self.bench.backends:
                self.recorder.run["plans"] += plans.explore(self.bench, kind, features, most=3 if self.rehearse else None)
                self.recorder.save()
                lines = [line for line in gpu_report.plan_lines(self.recorder.run) if line.startswith(f"{kind} D={features}:")]
                print("\n".join("   " + line for line in lines), flush=True)

        yield Job("wait for plans", "plans", wait)
        for kind, features in plans.TINY if self.rehearse else plans.FULL:
            yield Job(f"plans {kind} D={features}", "plans", partial(run, kind, features), 10)

    def sanitizer(self) -> Iterable[Job]:
        def run() -> None:
            device.release(self.bench.device)
            tool = external.find_sanitizer()
            if tool is None or self.rehearse:
                for check in external.TOOLS if tool is None else ():
                    entry = {"check": check, "verdict": "not on this machine", "ours": 0, "total": None, "seconds": 0.0, "output": ""}
                    self.recorder.add("sanitizer", entry)
                return
            limit = min(SANITIZER_SECONDS, max(10.0, self.budget.left()))
            for check, outcome in external.run_all(external.sanitizer_commands(tool), limit).items():
                entry = external.judge(check, outcome)
                self.recorder.add("sanitizer", entry)
                print(f"   {check}: {entry['verdict']}", flush=True)

        yield Job("compute-sanitizer", "sanitizer", run, 0 if self.rehearse else 35)

    def autotune(self) -> Iterable[Job]:
        for features, rows, dtype in self.bench.sizes.gates[:3] if self.compile else ():
            name = f"gates D={features} {str(dtype).removeprefix('torch.')}, max-autotune"
            yield Job(name, "autotune", partial(gates_rows, self.bench, features, rows, dtype, True, AUTOTUNE), 25)
        if self.compile:
            yield from (Job("pictures again", "autotune", job.run, 0) for job in self.pictures())
