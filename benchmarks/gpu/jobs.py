"""Jobs under one time budget.

An error in a job does not end the run. Results are written down at once, and jobs that did not run are listed.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..measure.rows import Row, row_data

Run = dict[str, Any]
GRACE_SECONDS = 15.0  # how long a job may outlast the budget before it is stopped
TRACEBACK_CHARACTERS = 3000


@dataclass(frozen=True)
class Job:
    """The smallest unit that runs, fails or is skipped.

    Attributes:
        run: does the work; the rows that it yields are written down one by one.
        need: seconds that must be left in the budget for the job to start.
        limit: seconds after which the job counts as hanging.
    """

    name: str
    stage: str
    run: Callable[[], Iterable[Row] | None]
    need: float = 8.0
    limit: float = 120.0


class Budget:
    """Seconds until a moment of the wall clock, which several processes can share."""

    def __init__(self, deadline: float, clock: Callable[[], float] = time.time) -> None:
        self.deadline, self.clock = deadline, clock

    def left(self) -> float:
        return self.deadline - self.clock()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` through a rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class Recorder:
    """The results of a run so far, in memory and in ``folder``.

    The folder has results.json, and the files that ``render`` writes beside it.
    """

    def __init__(self, folder: Path, run: Run, render: Callable[[Run, Path], None] | None = None) -> None:
        self.folder, self.run, self.render = folder, run, render
        for name in ("checks", "rows", "jobs", "tests", "sanitizer", "plans"):
            run.setdefault(name, [])

    def save(self) -> None:
        write_text(self.folder / "results.json", json.dumps(self.run, indent=1, ensure_ascii=False, default=str) + "\n")
        if self.render is not None:
            self.render(self.run, self.folder)

    def add_row(self, row: Row) -> None:
        self.run["rows"].append(row_data(row))
        self.save()

    def add(self, name: str, entry: dict[str, Any]) -> None:
        self.run[name].append(entry)
        self.save()

    def note(self, job: str, stage: str, status: str, seconds: float = 0.0, detail: str = "") -> None:
        """Note how a job ended: "done", "failed", "skipped", "crashed" or "hung"."""
        self.add(
            "jobs", {"name": job, "stage": stage, "status": status, "seconds": round(seconds, 1), "detail": detail}
        )

    def attempted(self) -> set[str]:
        return {job["name"] for job in self.run["jobs"]}


def read_run(folder: Path) -> Run | None:
    """Return the results of an earlier process in ``folder``; None if there are no readable ones."""
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run_jobs(
    jobs: Sequence[Job],
    recorder: Recorder,
    budget: Budget,
    state: Path | None = None,
    say: Callable[[str], None] = print,
    describe: Callable[[Row], str] = repr,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run ``jobs`` in order, except those that an earlier process has attempted.

    ``state`` tells a watching process which job runs and until when it may run. ``after`` is called after each job and
    may end the process.
    """
    attempted = recorder.attempted()
    for job in jobs:
        if job.name in attempted:
            continue
        left = budget.left()
        if left < job.need:
            recorder.note(job.name, job.stage, "skipped", detail=f"{max(left, 0):.0f} s left, {job.need:.0f} s wanted")
            say(f"-- {job.name}: skipped, {max(left, 0):.0f} s left")
            continue
        if state is not None:
            until = time.time() + min(job.limit, left + GRACE_SECONDS)
            write_text(state, json.dumps({"job": job.name, "stage": job.stage, "until": until, "since": time.time()}))
        say(f"-- {job.name} ({left:.0f} s left)")
        before = time.perf_counter()
        try:
            for row in job.run() or ():
                recorder.add_row(row)
                say(f"   {describe(row)}")
        except Exception as error:  # noqa: BLE001  the next job must run
            detail = traceback.format_exc()[-TRACEBACK_CHARACTERS:]
            recorder.note(job.name, job.stage, "failed", time.perf_counter() - before, detail)
            say(f"   FAILED: {type(error).__name__}: {str(error).strip()[:300]}")
        else:
            recorder.note(job.name, job.stage, "done", time.perf_counter() - before)
        after()
