"""Check, time and test the GPU kernels, unattended and within one time budget.

`make gpu` or `python -m depthlstm_fast.bench.gpu` runs it.

Checks come before timings, and the most informative measurements come first. Every result is written down at once. The
files are results.json, report.md, fastest.txt, plans.json, plans.md, tests.xml, speed.png and floor.png. They go to the
folder that OUT names, else to benchmarks/results/MACHINE. The jobs run in a separate process. If a job crashes it or
hangs, the process is started again behind that job.

--rehearse runs every path on the CPU, on tiny sizes, with Triton's interpreter.
The CPU's kernels then stand in for the CUDA kernels. The numbers mean nothing and go to a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import NoReturn

from depthlstm_fast.command_line import Parser

from ..measure.rows import Row, Settings
from . import report as gpu_report
from . import supervisor
from .jobs import Budget, Recorder, read_run, row_data, run_jobs

RESULTS = Path(__file__).resolve().parents[1] / "results"
FILES = ("results.json", "report.md", "fastest.txt", "plans.json", "plans.md", "tests.xml", "speed.png", "floor.png")
BACKENDS = ("triton", "cuda")  # the backends under test, as far as they are available
STAGES = (
    *("report", "prepare", "checks", "gates", "cell", "layer", "steps", "memory", "host", "decoding", "pictures"),
    *("tests", "sanitizer", "counters", "plans", "autotune"),
)
# exit statuses of the worker: nothing to measure; the GPU's context is lost, so the worker is started again
NO_GPU, LOST = 2, 70


def command_line() -> argparse.ArgumentParser:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="the budget of time; what does not fit is skipped and listed"
    )
    parser.add_argument("--started", type=float, help="when the budget began, in seconds since 1970; default: now")
    parser.add_argument(
        "--output", type=Path, help="the folder for the results; default: OUT, else benchmarks/results/MACHINE"
    )
    stages = {"action": "append", "default": [], "choices": STAGES, "metavar": "STAGE"}
    parser.add_argument("--only", **stages, help=f"one of {', '.join(STAGES)}; may be repeated")  # type: ignore[arg-type]
    parser.add_argument("--skip", **stages, help="leave out a stage; may be repeated")  # type: ignore[arg-type]
    parser.add_argument(
        "--backend", action="append", choices=BACKENDS, help="under test; default: every one of these that is available"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile as a rival; default: yes, in a rehearsal no (it takes minutes)",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, interpreted, tiny: every path, no measurement"
    )
    parser.add_argument("--probe", action="store_true", help="only say whether there is a GPU: exit status 0 or 2")
    parser.add_argument("--worker", type=Path, metavar="STATE", help=argparse.SUPPRESS)
    return parser


def asked_folder(options: argparse.Namespace) -> Path | None:
    """Return the requested folder; None for benchmarks/results/MACHINE."""
    asked = options.output or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    if asked is None and options.rehearse:
        return Path(tempfile.gettempdir()) / "depthlstm-rehearsal"
    return None if asked is None else asked.resolve()


def deadline(options: argparse.Namespace) -> float:
    return options.started + 60 * options.minutes


def describe_row(row: Row) -> str:
    return "  ".join(filter(None, gpu_report.compact(row_data(row), True)))


def probe(options: argparse.Namespace) -> int:
    """Return 0 if there is a GPU, or none is needed; otherwise print a line and return NO_GPU."""
    import torch

    if options.rehearse or torch.cuda.is_available():
        return 0
    print("make gpu: there is no GPU that torch can use; --rehearse runs every path on the CPU", file=sys.stderr)
    return NO_GPU


def backends_under_test(asked: list[str] | None, rehearse: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the requested backends, or all, that can run here, and the reasons for the missing ones."""
    import depthlstm_fast as dl

    from .rehearsal import stand_in_for_cuda

    wanted, absent = [name for name in BACKENDS if name in (asked or BACKENDS)], {}
    for name in wanted:
        if rehearse and name == "cuda":
            reason = stand_in_for_cuda()
        else:
            available, detail = dl.backends()[name]
            reason = None if available else detail
        if reason is not None:
            absent[name] = reason
    return tuple(name for name in wanted if name not in absent), absent


def work(options: argparse.Namespace) -> int:
    """Run the jobs that no earlier process has attempted, as the worker."""
    if probe(options) != 0:
        return NO_GPU
    import torch

    from ..measure import gpu_timing, machine
    from ..measure.accuracy import Check
    from . import bench as gpu_bench
    from . import prepare
    from .checker import Checker
    from .stages import Stages

    backends, absent = backends_under_test(options.backend, options.rehearse)
    if not backends:
        print(
            f"make gpu: nothing to measure: {'; '.join(f'{name}: {reason}' for name, reason in absent.items())}",
            file=sys.stderr,
        )
        return NO_GPU
    on = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    about = machine.describe_gpu(on)
    folder = asked_folder(options) or RESULTS / about["name"]
    earlier = supervisor.hello(options.worker, folder)
    run = read_run(folder) if earlier else None
    if run is None:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        run = {
            "schema": 1,
            "kind": "gpu",
            "date": date,
            "rehearsal": options.rehearse,
            "quick": False,
            "machine": about,
        }
        run |= {"backends": list(backends), "absent": absent, "counters": []}
        for name, reason in absent.items():
            print(f"make gpu: without {name}: {reason}", flush=True)
    recorder = Recorder(folder, run, gpu_report.render)
    compile = not options.rehearse if options.compile is None else options.compile
    if options.rehearse:
        sizes, tokens, least, settings = gpu_bench.TINY, (1, 3), 3, Settings(minimum=1, seconds=0.0, compile=compile)
    else:
        sizes, tokens, least, settings = gpu_bench.FULL, (4, 67), 130, Settings(compile=compile)

    def rows_of_a_check(features: int) -> int:
        return max(least, sizes.check_elements // features) | 1  # odd, so that some tile is not full

    def on_check(check: Check) -> None:
        recorder.add("checks", vars(check))

    checker = Checker(on, rows_of_a_check, sizes.layers[0][1], tokens, on_check)
    bench = gpu_bench.Bench(on, backends, sizes, checker, settings, warmups=1 if options.rehearse else 3)
    if compile:
        prepare.use_no_timings_of_others()
    stages = Stages(bench, recorder, Budget(deadline(options)), options)

    def after() -> None:
        try:
            gpu_timing.synchronize(on)
        except RuntimeError as error:
            print(f"   the GPU's context is lost: {str(error).splitlines()[0]}", flush=True)
            os._exit(LOST)

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        run_jobs(stages.jobs(), recorder, stages.budget, options.worker, say, describe_row, after)
    finally:
        stages.close()
    return 0


def end(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Return 0 if all is well, 1 if a check, a test or a job failed, 2 if there is nothing to measure."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command_line().parse_args(arguments)
    options.started = options.started or time.time()
    folder = asked_folder(options)
    if options.rehearse and folder is not None and RESULTS.resolve() in folder.parents:
        print("make gpu: a rehearsal is no result: name another folder", file=sys.stderr)
        return NO_GPU
    # SIGTERM stops a run that takes too long: it ends the children and prints the results so far
    signal.signal(signal.SIGTERM, end)
    if options.probe:
        return probe(options)
    if options.worker is not None:
        try:
            return work(options)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    command = [sys.executable, "-m", str(__package__), *arguments, f"--started={options.started}"]
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # the worker reads it when it imports the package
    status, folder = supervisor.supervise(command, deadline(options), NO_GPU, gpu_report.render)
    run = None if folder is None else read_run(folder)
    if folder is None or run is None:
        return status or 1
    run["elapsed_seconds"] = round(time.time() - options.started, 1)
    Recorder(folder, run, gpu_report.render).save()
    print("\n" + gpu_report.text(run) + f"{run['elapsed_seconds']:.0f} s; results in {folder}", flush=True)
    return 0 if status == 0 and gpu_report.succeeded(run) else 1
