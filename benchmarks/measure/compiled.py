"""torch.compile of the eager reference: the functions that are compiled, and a second process that fills the compiler's cache.

Compiling costs more than all timing together, and inductor uses one core for it: `python -m depthlstm_fast.bench.measure.compiled bfloat16`
compiles one half while the benchmark process compiles the other and then finds that half in the cache on disk.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import depthlstm_fast as dl

# where Python finds the package: the source tree, or site-packages
ROOT = Path(dl.__file__).resolve().parents[1]


def reference_gates(z: torch.Tensor, c: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference gates, by position."""
    return dl.reference.depth_lstm_gates(z, c, weight, bias)


def reference_cell(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference cell, by position: x, h, c, w, b, weight, bias."""
    return dl.reference.depth_lstm_cell(*inputs)


class Compiled:
    """The compiled reference, or the reason why there is none.

    Attributes:
        reason: why torch.compile cannot be used; None as long as it can.
        mode: torch.compile's; None for its default.
    """

    def __init__(self, enabled: bool = True, mode: str | None = None) -> None:
        self.reason: str | None = None if enabled else "left out"
        self.mode = mode
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def missing(self) -> dict[str, str]:
        """What a row says about a compiled contestant that is not there."""
        return {} if self.reason is None else {"compile": self.reason}

    def get(self, function: Callable[..., Any], first_call: Callable[[Callable[..., Any]], object]) -> Callable[..., Any] | None:
        """``function`` compiled, with ``first_call`` made on it so that nothing is left to compile; None where that fails."""
        if self.reason is not None:
            return None
        try:
            compiled = self._functions.setdefault(function, torch.compile(function, dynamic=False, mode=self.mode))
            first_call(compiled)
        except Exception as error:  # noqa: BLE001  whatever a rival dies of must not end the run
            self.reason = f"torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
            return None
        return compiled


def start_cache_filler(dtype: torch.dtype) -> subprocess.Popen[bytes]:
    """Compile what the benchmarks of ``dtype`` need in a second process, into inductor's cache on disk."""
    command = [sys.executable, "-m", f"{__package__}.compiled", str(dtype).removeprefix("torch.")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compile_all(compiled: Compiled, dtype: torch.dtype) -> None:
    """Compile all that the table shows for one dtype."""
    from ..subjects import cell, gates

    gates.compile_for(compiled, dtype)
    cell.compile_for(compiled, dtype)


if __name__ == "__main__":
    compile_all(Compiled(), getattr(torch, sys.argv[1]))
