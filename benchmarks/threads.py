"""Measure the decode engine with one thread and with two, alone and beside programs that keep cores busy.

    python -m depthlstm_fast.bench.threads --output FOLDER

Both take turns in one process. The busy programs are processes of the usual priority, which never wait.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import depthlstm_fast as dl
from depthlstm_fast.command_line import Parser, make_folder

from .measure import machine
from .measure.timing import spread
from .subjects.decode_engine import SIZES, model
from .subjects.decoding import SOURCE_LENGTH, TOKENS

DTYPES = ("float32", "bfloat16", "int8")
SEARCHES = ((1, 1), (8, 1), (8, 4))  # sources and beams
BUSY = (0, 1, 2)
BUSY_PROGRAM = "while True: pass"


@contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Keep ``count`` cores busy meanwhile."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY_PROGRAM]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def seconds_of(search: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    began = time.perf_counter()
    search()
    return time.perf_counter() - began


def measure(search: Callable[[], object], tokens: int, rounds: int) -> dict[str, Any]:
    """Return tokens a second with one thread and with two, and their ratio round by round."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for threads in seconds:
        seconds_of(search, threads)  # memory and helpers come with the first search
    for turn in range(rounds):
        for threads in (1, 2) if turn % 2 else (2, 1):
            seconds[threads].append(seconds_of(search, threads))
    found = {f"tokens_per_second_{n}": asdict(spread([tokens / s for s in each])) for n, each in seconds.items()}
    return {**found, "two_over_one": asdict(spread([a / b for a, b in zip(seconds[1], seconds[2], strict=True)]))}


def rows(size: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Measure every search in every dtype, beside each number of busy programs."""
    features, heads, vocabulary = SIZES[size]
    each = model(features, heads, vocabulary)
    for dtype in DTYPES:
        served = dl.compile_decoder(each, dtype)
        for batch, beams in SEARCHES:
            source = torch.randint(4, vocabulary, (batch, SOURCE_LENGTH))
            search = functools.partial(served.generate, source, TOKENS, beams)
            for busy in BUSY:
                with busy_programs(busy):
                    found = measure(search, batch * TOKENS, rounds)
                yield {"dtype": dtype, "batch": batch, "beams": beams, "busy_programs": busy, **found}


def main(arguments: list[str] | None = None) -> int:
    """Measure, write ``results.json``, and return the exit status."""
    parser = Parser(prog="python -m depthlstm_fast.bench.threads", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--size", choices=list(SIZES), default="d=256", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"rounds must be at least 1; found {options.rounds}")
    reason = make_folder(options.output)
    if reason is not None:
        parser.error(reason)
    run: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.describe(),
        "size": options.size,
        "rounds": options.rounds,
        "rows": [],
    }
    for row in rows(options.size, options.rounds):
        run["rows"].append(row)
        search = "greedy" if row["beams"] == 1 else f"beam {row['beams']}"
        ratio = row["two_over_one"]
        print(
            f"{row['dtype']}, batch {row['batch']}, {search}, {row['busy_programs']} busy programs: "
            f"{row['tokens_per_second_1']['median']:,.0f} tokens/s with one thread, "
            f"{row['tokens_per_second_2']['median']:,.0f} with two; "
            f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})",
            flush=True,
        )
    (options.output / "results.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
