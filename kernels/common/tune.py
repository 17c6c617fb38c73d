"""Launch plans found by timing instead of by rule: opt-in by DEPTHLSTM_AUTOTUNE=1.

The first call for a (kernel, GPU, Triton, D, dtypes, flags) times every candidate on its own tensors, with any
number of rows. The fastest plan is kept in this process, and in Triton's cache folder for later ones. Nothing is timed
while a CUDA graph is captured.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from .launch import INTERPRETED, Launch

ENABLED = os.environ.get("DEPTHLSTM_AUTOTUNE") == "1" and not INTERPRETED
_found: dict[str, Launch] = {}
logger = logging.getLogger("depthlstm_fast")


def cache_file() -> Path:
    """Return the file that keeps plans for later processes."""
    return Path(triton.knobs.cache.dir) / "depthlstm_fast-plans.json"


def _read() -> dict[str, Launch]:
    try:
        stored = json.loads(cache_file().read_text(encoding="utf-8"))
        return {key: Launch(int(warps), dict(constants)) for key, (warps, constants) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # a missing or foreign file is written anew


def _write(key: str, plan: Launch) -> None:
    path = cache_file()
    # renamed into place, so that neither a reader nor a kill in between sees half a file
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**_read(), key: plan}, indent=1), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:  # without a writable folder the next process times again
        logger.warning("the launch plan was not kept in %s: %s", path, error)


def fastest(kernel: str, key: tuple[object, ...], plans: Sequence[Launch], run: Callable[[Launch], object]) -> Launch:
    """Return the fastest of ``plans``; ``run(plan)`` launches the kernel and may be called any number of times."""
    name = "; ".join(str(part) for part in (kernel, torch.cuda.get_device_name(), f"triton {triton.__version__}", *key))
    if name not in _found:
        _found.update({stored: plan for stored, plan in _read().items() if stored not in _found})
    if name in _found:
        return _found[name]
    if torch.cuda.is_current_stream_capturing():
        return plans[0]
    times = []
    for plan in plans:
        try:
            times.append(triton.testing.do_bench(lambda plan=plan: run(plan), warmup=10, rep=50, return_mode="median"))
        except triton.runtime.errors.TritonError:  # the plan needs more registers or shared memory than the GPU has
            times.append(float("inf"))
    _found[name] = plans[min(range(len(plans)), key=times.__getitem__)]
    _write(name, _found[name])
    return _found[name]
