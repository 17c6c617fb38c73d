"""Run a worker process that notes its current job.

A worker that crashes or hangs is started again behind that job.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .jobs import GRACE_SECONDS, Recorder, Run, read_run

RESTARTS = 4
Render = Callable[[Run, Path], None]


def hello(state: Path, folder: Path) -> bool:
    """Tell the supervisor where the worker's results are; return whether an earlier worker has written some of them."""
    state.with_suffix(".folder").write_text(str(folder), encoding="utf-8")
    return state.with_suffix(".restarted").exists()


def blame(folder: Path, state: Path, status: str, detail: str, render: Render) -> bool:
    """Note that the running job ended its process; False if no file names the job."""
    run = read_run(folder)
    try:
        job: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if run is None:
        return False
    recorder = Recorder(folder, run, render)
    if job["job"] not in recorder.attempted():
        recorder.note(job["job"], job["stage"], status, time.time() - job["since"], detail)
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the worker, which may end the processes it has started; kill it if it does not stop."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=4)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def watch(process: subprocess.Popen[bytes], state: Path, latest: float) -> bool:
    """Wait for the worker to end.

    The result is False if the worker was stopped: its job outlasted the limit, or the worker the moment ``latest``.
    """
    while process.poll() is None:
        time.sleep(0.1)
        try:
            until = float(json.loads(state.read_text(encoding="utf-8"))["until"])
        except (OSError, ValueError, KeyError):
            until = latest
        if time.time() > min(until, latest):
            stop(process)
            return False
    return True


def supervise(
    command: Sequence[str], deadline: float, final: int, render: Render, restarts: int = RESTARTS
) -> tuple[int, Path | None]:
    """Run the worker to its end; return (its last exit status, the folder of its results).

    The worker is started again after a crash or a hang. ``command`` gets one more argument, --worker=FILE. No worker
    follows the exit status ``final``.
    """
    folder: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory() as temporary:
        state = Path(temporary) / "state.json"
        try:
            for _ in range(1 + restarts):
                state.unlink(missing_ok=True)  # an earlier worker's state is no limit for this one
                process = subprocess.Popen([*command, f"--worker={state}"])
                ended = watch(process, state, deadline + 2 * GRACE_SECONDS)
                mark = state.with_suffix(".folder")
                folder = Path(mark.read_text(encoding="utf-8")) if mark.exists() else None
                if ended and process.returncode in (0, final):
                    break
                status = "crashed" if ended else "hung"
                detail = (
                    f"the process ended with status {process.returncode}" if ended else "stopped when its time was up"
                )
                if folder is None or not blame(folder, state, status, detail, render) or time.time() > deadline:
                    break
                print(f"   {status.upper()}: {detail}; starting again behind this job", flush=True)
                state.with_suffix(".restarted").touch()
        except KeyboardInterrupt:
            print("   interrupted", flush=True)
            mark = state.with_suffix(".folder")
            folder = Path(mark.read_text(encoding="utf-8")) if mark.exists() else folder
        finally:
            if process is not None:
                stop(process)
    return (1 if process is None or process.returncode is None else process.returncode), folder
