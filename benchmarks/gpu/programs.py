"""Programs that a run starts: pytest and compute-sanitizer.

Each has its own process group and a time limit. The end of its output is kept.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
TAIL_CHARACTERS = 6000
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# parts of the kernels' names: those of Triton, then those of CUDA C++
KERNELS = (
    *("forward_kernel", "row_sums_kernel", "sums_kernel", "narrow_backward", "wide_backward"),
    *("forward_warp", "forward_block", "forward_any", "row_statistics"),
)


@dataclass
class Outcome:
    """The end of a program: its exit status (None after a timeout), and the end of its output."""

    code: int | None
    seconds: float
    output: str


def start(
    command: Sequence[str], output: IO[bytes] | None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program in the repository's root, in its own process group.

    Without ``output`` it prints to this process's output.
    """
    variables = {**os.environ, **(environment or {})}
    return subprocess.Popen(
        list(command),
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program of :func:`start` and the processes it has started.

    An interrupted pytest still reports the tests it has run.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            return
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue


def run_all(
    commands: Mapping[str, Sequence[str]],
    limit: float,
    environment: Mapping[str, str] | None = None,
    on_end: Callable[[str, Outcome], None] = lambda name, outcome: None,
) -> dict[str, Outcome]:
    """Run programs side by side, each for at most ``limit`` seconds; ``on_end`` is called with each as it ends."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{index}.log" for index, name in enumerate(commands)}
        files = {name: path.open("wb") for name, path in paths.items()}
        processes: dict[str, subprocess.Popen[bytes]] = {}
        outcomes: dict[str, Outcome] = {}
        try:
            for name, command in commands.items():
                processes[name] = start(command, files[name], environment)
            while len(outcomes) < len(processes):
                took = time.perf_counter() - begun
                for name, process in processes.items():
                    if name in outcomes:
                        continue
                    code = process.poll()
                    if code is None and took > limit:
                        stop(process)
                    if code is not None or took > limit:
                        outcomes[name] = Outcome(code, took, paths[name].read_text(encoding="utf-8", errors="replace"))
                        on_end(name, outcomes[name])
                time.sleep(0.05)
        finally:
            for process in processes.values():
                stop(process)
            for file in files.values():
                file.close()
    return outcomes


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def pytest_command(path: str, report: Path, workers: int, extra: Sequence[str] = ()) -> list[str]:
    """Return the pytest command for one file.

    With the plugins for it, pytest runs in several processes and limits each test's time.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, f"--junitxml={report}", *extra]
    if workers > 1 and has("xdist"):
        command += ["-n", str(workers)]
    if has("pytest_timeout"):
        command += ["--timeout=100"]
    return command


def counts(suite: ET.Element) -> dict[str, int]:
    """Count the tests of a JUnit suite by outcome."""
    found = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    passed = found["tests"] - found["failures"] - found["errors"] - found["skipped"]
    return {"passed": passed, "failed": found["failures"] + found["errors"], "skipped": found["skipped"]}


def failing(suite: ET.Element) -> list[str]:
    """Return a line for each failed test: its name and the first line of its error."""
    lines = []
    for case in suite.iter("testcase"):
        for fault in [*case.findall("failure"), *case.findall("error")]:
            message = (fault.get("message") or "").strip().splitlines()
            lines.append(f"{case.get('name')}: {message[0][:200] if message else 'no message'}")
    return lines


def append_suite(suites: Path, report: Path) -> ET.Element | None:
    """Move pytest's suite in ``report`` into the collection ``suites``; None if pytest wrote none."""
    try:
        found = ET.parse(report).getroot()
    except (OSError, ET.ParseError):
        return None
    suite = found if found.tag == "testsuite" else found.find("testsuite")
    if suite is None:
        return None
    try:
        root = ET.parse(suites).getroot()
    except (OSError, ET.ParseError):
        root = ET.Element("testsuites")
    root.append(suite)
    suites.parent.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(root).write(suites, encoding="utf-8", xml_declaration=True)
    return suite


def run_tests(
    path: str,
    suites: Path,
    limit: float,
    workers: int,
    extra: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run one test file; return its outcome in words and numbers, and the end of its output."""
    entry: dict[str, Any] = {"name": path, "status": "absent", "counts": {}, "failing": [], "seconds": 0.0, "tail": ""}
    if not (ROOT / path).is_file():
        return entry
    variables = {"PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        outcome = run_all({path: pytest_command(path, report, workers, extra)}, limit, variables)[path]
        if workers > 1 and "Different tests were collected" in outcome.output:  # random numbers in some tests' names
            outcome = run_all(
                {path: pytest_command(path, report, 1, extra)}, max(10.0, limit - outcome.seconds), variables
            )[path]
        suite = append_suite(suites, report)
    status = {None: "time was up", 0: "passed", 5: "no test was selected"}.get(outcome.code, "failed")
    found = {} if suite is None else counts(suite)
    if status == "passed" and not found.get("passed"):
        status = "all skipped"
    lines = [] if suite is None else failing(suite)
    tail = outcome.output[-TAIL_CHARACTERS:]
    return entry | {
        "status": status,
        "counts": found,
        "failing": lines,
        "seconds": round(outcome.seconds, 1),
        "tail": tail,
    }


def find_tool(name: str) -> str | None:
    """Return the path of a program that comes with CUDA; None if this machine lacks it."""
    candidates = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().with_name(name)))
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def sanitizer_commands(tool: str, backend: str) -> dict[str, list[str]]:
    """Return the command of every check of compute-sanitizer on sanitize.py."""
    script = [sys.executable, "-m", f"{__package__}.sanitize", backend]
    return {check: [tool, "--tool", check, "--print-limit", "20", "--error-exitcode", "9", *script] for check in TOOLS}


def verdict(check: str, backend: str, said: str, seconds: float = 0.0) -> dict[str, Any]:
    """Return the entry of a check without counts."""
    return {
        "check": check,
        "backend": backend,
        "verdict": said,
        "ours": 0,
        "total": None,
        "seconds": round(seconds, 1),
        "output": "",
    }


def judge(check: str, outcome: Outcome, backend: str = "") -> dict[str, Any]:
    """Return the verdict on one check: faults that name one of the package's kernels, and all counted faults."""
    ours = sum(
        1
        for line in outcome.output.splitlines()
        if re.search(r"\bat\b|\bin\b", line) and any(name in line for name in KERNELS)
    )
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", outcome.output)
    total = int(summary.group(1)) if summary else None
    finished = "sanitize: done" in outcome.output
    if ours:
        said = "FAULTS"
    elif outcome.code is None:
        said = "time was up"
    elif not finished:
        said = "did not run to its end"
    elif total:
        said = "faults, none of them in our kernels"
    else:
        said = "clean"
    # the summary stands at the end, and the first faults say most
    output = (
        outcome.output if len(outcome.output) < 4000 else outcome.output[:2500] + "\n[...]\n" + outcome.output[-1500:]
    )
    return verdict(check, backend, said, outcome.seconds) | {"ours": ours, "total": total, "output": output}
