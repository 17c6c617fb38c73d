"""Measure DDP and FSDP2 of a language model in one and two gloo processes: tokens a second, and bytes a process.

    python -m depthlstm_fast.bench.processes --output FOLDER

Every setup has processes of its own, with one thread each, which wait while another is timed. They take turns round by
round, so that a disturbance of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.command_line import Parser, make_folder

from .measure import machine
from .measure.timing import spread, turn_order

SETUPS = (("plain", 1), ("ddp", 1), ("fsdp2", 1), ("ddp", 2), ("fsdp2", 2))  # what wraps the model, and processes
MODEL: dict[str, Any] = {"vocab_size": 2000, "d_model": 256, "nhead": 4, "num_layers": 6, "kv_heads": 2}
MODEL |= {"ffn": "swiglu", "norm": "rms", "dropout": 0.0, "max_len": 128}
ROWS, LENGTH = 8, 128  # of a process


def build(kind: str, world: int) -> nn.Module:
    """Return the model, wrapped as ``kind`` says."""
    torch.manual_seed(0)
    model = dl.LanguageModel(**MODEL)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimiser: torch.optim.Optimizer, ids: Tensor) -> None:
    optimiser.zero_grad()
    model(ids, labels=ids)[0].backward()
    optimiser.step()


def local_bytes(tensors: Any) -> int:
    """Return the bytes of the parts of ``tensors`` that this process holds."""
    return sum(getattr(tensor, "to_local", lambda tensor=tensor: tensor)().nbytes for tensor in tensors)


def peak_resident() -> int:
    """Return the most bytes that were resident in this process at once."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def work(pipe: Connection, kind: str, world: int, rank: int, store: str) -> None:
    """Train as many steps as ``pipe`` says, again and again, and answer with seconds; at 0 tell the bytes, and end."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # docs/scale.md says why
    before = peak_resident()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(hours=1)
    )
    model = build(kind, world)
    optimiser = torch.optim.AdamW(dl.param_groups(model), 1e-3)
    ids = torch.randint(3, MODEL["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(rank))
    while steps := pipe.recv():
        begun, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            train(model, optimiser, ids)
        pipe.send((time.perf_counter() - begun, time.process_time() - busy))
    parameters = list(model.parameters())
    states = [value for state in optimiser.state.values() for value in state.values()]
    pipe.send(
        {
            "parameter_bytes": local_bytes(parameters),
            "gradient_bytes": local_bytes(parameter.grad for parameter in parameters),
            "optimiser_bytes": local_bytes(states),
            "resident_before_bytes": before,
            "peak_resident_bytes": peak_resident(),
        }
    )
    dist.destroy_process_group()


class Setup:
    """The processes of one setup."""

    def __init__(self, kind: str, world: int, folder: Path) -> None:
        self.kind, self.world = kind, world
        self.seconds: list[float] = []  # of a step
        self.busy: list[float] = []  # of a step and process, on a core
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=work, args=(theirs, kind, world, rank, str(folder / f"{kind}{world}")), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self.processes, pairs, strict=True):
            process.start()
            theirs.close()  # so that a process that has died is the end of its pipe

    def ask(self, steps: int) -> list[Any]:
        try:
            for pipe in self.pipes:
                pipe.send(steps)
            return [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError):
            raise ChildProcessError(f"a process of {self.kind} ended before it answered; its error is above") from None

    def time(self, steps: int) -> None:
        found = self.ask(steps)
        self.seconds.append(max(seconds for seconds, _ in found) / steps)
        self.busy.append(sum(busy for _, busy in found) / steps / self.world)

    def row(self) -> dict[str, Any]:
        """Return what was measured, and let the processes end; bytes are those of the one that holds most."""
        found = self.ask(0)
        for process in self.processes:
            process.join()
        tokens = self.world * ROWS * LENGTH
        return {
            "kind": self.kind,
            "processes": self.world,
            "tokens_per_second": asdict(spread([tokens / seconds for seconds in self.seconds])),
            "cpu_seconds_per_step": asdict(spread(self.busy)),
            **{name: max(each[name] for each in found) for name in found[0]},
        }


def measure(rounds: int, steps: int) -> list[dict[str, Any]]:
    """Return a row for each setup, from ``rounds`` of ``steps`` training steps."""
    with tempfile.TemporaryDirectory() as folder:
        setups = [Setup(kind, world, Path(folder)) for kind, world in SETUPS]
        for setup in setups:
            setup.ask(1)  # buckets, optimiser states and the pool of memory come with the first step
        for turn in range(rounds):
            for index in turn_order(len(setups), turn):
                setups[index].time(steps)
        return [setup.row() for setup in setups]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write ``results.json``, and return the exit status."""
    parser = Parser(prog="python -m depthlstm_fast.bench.processes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="of a round; default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    options: argparse.Namespace = parser.parse_args(arguments)
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"{name} must be at least 1; found {getattr(options, name)}")
    reason = make_folder(options.output)
    if reason is not None:
        parser.error(reason)
    torch.set_num_threads(1)
    about = machine.describe()
    try:
        rows = measure(options.rounds, options.steps)
    except ChildProcessError as error:
        parser.error(str(error))
    run: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": about,
        "model": MODEL,
        "batch": [ROWS, LENGTH],
        "rounds": options.rounds,
        "steps_of_a_round": options.steps,
        "rows": rows,
    }
    (options.output / "results.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    for row in run["rows"]:
        held = row["parameter_bytes"] + row["gradient_bytes"] + row["optimiser_bytes"]
        print(
            f"{row['kind']}, {row['processes']}: {row['tokens_per_second']['median']:,.0f} tokens/s, "
            f"{row['cpu_seconds_per_step']['median']:.3f} s of a core a step, {held / 1e6:.1f} MB held, "
            f"{row['peak_resident_bytes'] / 1e6:.0f} MB resident at most"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
