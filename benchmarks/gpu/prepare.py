"""Fill the compilers' caches on disk for the benchmark process: Triton and inductor use one core each.

    python -m depthlstm_fast.bench.gpu.prepare gates 512 65536 bfloat16    the timed problems
    python -m depthlstm_fast.bench.gpu.prepare cell 512 65536
    python -m depthlstm_fast.bench.gpu.prepare layer 512 8 32 512
    python -m depthlstm_fast.bench.gpu.prepare few 512 8                   the compiled reference on few rows
    python -m depthlstm_fast.bench.gpu.prepare plans 3 12                  every 12th launch plan, from the third on

--triton and --cuda name the backends under test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch

from ..measure.compiled import Compiled
from ..measure.place import Place
from ..measure.problems import Problem
from ..subjects import cell, gates, latency, layer
from . import launch_plans, programs
from .bench import BF16, Sizes

LIMIT_SECONDS = 150


def use_no_timings_of_others() -> None:
    """Keep inductor from storing timings that it takes while other processes use the GPU.

    The benchmark process calls it, too.
    """
    import torch._inductor.config as config

    if hasattr(config, "autotune_local_cache"):
        config.autotune_local_cache = False


def run_once(problem: Problem, contestants: Sequence[str]) -> None:
    """Call each contestant once, which compiles it; ``compile`` was compiled when the problem was made."""
    with torch.set_grad_enabled(problem.grad):
        for name in contestants:
            problem.runs[name]()


def prepare_gates(features: int, rows: int, dtype: torch.dtype, place: Place) -> None:
    """Prepare Triton's gates and the reference, forward and backward."""
    for make in (gates.forward, gates.training):
        run_once(make(place, dtype, rows, features), [name for name in place.backends if name == "triton"])


def prepare_cell(features: int, rows: int, place: Place) -> None:
    """Prepare the compiled reference cell, with x and h apart and side by side."""
    for beside in (False, True):
        torch._dynamo.reset()
        cell.training(place, BF16, rows, features, beside)


def prepare_layer(place: Place, features: int, heads: int, batch: int, length: int) -> None:
    """Prepare the layers, each compiled, the fused one with every backend."""
    problem = layer.training(place, BF16, features, heads, batch, length, all_compiled=True)
    run_once(problem, list(problem.runs))


def prepare_few(features: int, rows: int, device: torch.device) -> None:
    """Prepare the compiled reference on few rows, as plain calls and with CUDA graphs."""
    for mode in (None, latency.GRAPHS):
        latency.few_rows(Place(Compiled(mode=mode), device, (), gpu=True), BF16, rows, features)


def gates_tasks(sizes: Sizes) -> list[list[str]]:
    """Return the arguments of the tasks that the gates need."""
    return [
        ["gates", str(features), str(rows), str(dtype).removeprefix("torch.")] for features, rows, dtype in sizes.gates
    ]


def layer_tasks(sizes: Sizes) -> list[list[str]]:
    """Return the arguments of the other rivals' tasks, the longest first."""
    found = [["layer", *map(str, size)] for size in sizes.layers]
    found += [["cell", *map(str, size)] for size in sizes.cells]
    return [*found, *(["few", str(sizes.few[0]), str(rows)] for rows in sizes.few[1])]


class Pool:
    """Tasks in separate processes, ``width`` at a time."""

    def __init__(self, waiting: Sequence[Sequence[str]], width: int, flags: Sequence[str] = ()) -> None:
        self.waiting, self.width, self.flags = [list(task) for task in waiting], max(1, width), list(flags)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.failed: list[str] = []
        self.count = len(self.waiting)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the pool
        self.turn()

    def turn(self) -> bool:
        """Start as many tasks as possible; return whether any is left."""
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                if process.returncode:
                    self.failed.append(f"{name} ({process.returncode})")
        while self.waiting and len(self.running) < self.width:
            task = self.waiting.pop(0)
            command = [sys.executable, "-m", f"{__package__}.prepare", *self.flags, *task]
            self.running[" ".join(task)] = programs.start(command, self.log, {"TORCHINDUCTOR_COMPILE_THREADS": "1"})
        return bool(self.waiting or self.running)

    def wait(self, seconds: float) -> str:
        """Wait at most ``seconds``, then end the tasks that still run; return a line about the outcome."""
        begun = time.perf_counter()
        while self.turn() and time.perf_counter() - begun < seconds:
            time.sleep(0.1)
        unfinished = [*self.running, *(" ".join(task) for task in self.waiting)]
        self.stop()
        text = f"{self.count - len(unfinished) - len(self.failed)} of {self.count} tasks done"
        if self.failed:
            self.log.seek(0)
            output = self.log.read().decode("utf-8", errors="replace")[-1500:]
            text += f"; failed: {', '.join(self.failed)}; the output ends in: {output}"
        return text + (f"; not finished: {', '.join(unfinished)}" if unfinished else "")

    def stop(self) -> None:
        self.waiting.clear()
        for process in self.running.values():
            programs.stop(process)
        self.running.clear()


def main(arguments: list[str]) -> None:
    rehearse, compile = "--rehearse" in arguments, "--no-compile" not in arguments
    backends = [name for name in ("triton", "cuda") if f"--{name}" in arguments]
    subject, *words = [word for word in arguments if not word.startswith("--")]
    device = torch.device("cpu" if rehearse else "cuda")
    use_no_timings_of_others()
    signal.alarm(LIMIT_SECONDS)  # ends this process if the run has forgotten it
    place = Place(Compiled(compile), device, tuple(backends), gpu=True)
    if subject == "gates":
        prepare_gates(int(words[0]), int(words[1]), getattr(torch, words[2]), place)
    elif subject == "cell":
        prepare_cell(int(words[0]), int(words[1]), place)
    elif subject == "layer":
        prepare_layer(place, *map(int, words))
    elif subject == "few":
        prepare_few(int(words[0]), int(words[1]), device)
    else:
        launch_plans.compile_share(int(words[0]), int(words[1]), device)


if __name__ == "__main__":
    main(sys.argv[1:])
