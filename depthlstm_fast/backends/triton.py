"""The backend "triton": the kernels of depthlstm_fast/kernels, imported at their first run."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from types import ModuleType

import torch
from torch import Tensor

from .cuda import NO_GPU
from .record import GPU_FLOATS, Backend, BackendStatus

VERSION_FLOOR = (3, 6)


def _find_triton() -> str | None:
    """Look for Triton; return None, or the reason why it cannot be used.

    Triton is not imported for this: the import takes half a second.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if not isinstance(version, str):
        return None  # a checkout, a renamed wheel or the rest of an interrupted pip run: the import decides
    found, wanted = tuple(int(part) for part in re.findall(r"\d+", version)[:2]), VERSION_FLOOR
    return f"Triton {version} is too old, {wanted[0]}.{wanted[1]} or newer is needed" if found < wanted else None


@functools.cache
def kernels(op: str) -> ModuleType:
    """Return the module depthlstm_fast.kernels.<op>."""
    return importlib.import_module(f"..kernels.{op}", __package__)


@functools.cache
def _import_kernels() -> str | None:
    """Import the kernels of every op; return None, or the reason why that fails."""
    try:
        for op in TRITON.widest:
            kernels(op)
    except Exception as error:  # noqa: BLE001
        return f"Triton's kernels do not import: {type(error).__name__}: {error}"
    return None


_error = _find_triton()
_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _why_not_here() -> str | None:
    return _error


def _why_not_on(tensor: Tensor) -> str | None:
    return None if torch.compiler.is_compiling() else _import_kernels()


def _status() -> BackendStatus:
    error = _error
    if error is None and not _interpreted and not torch.cuda.is_available():
        error = NO_GPU
    if error is None:
        error = _import_kernels()
    if error is not None:
        return BackendStatus(False, error)
    interpreted = "Triton kernels, interpreted on the CPU (TRITON_INTERPRET=1): slow, for tests"
    return BackendStatus(True, interpreted if _interpreted else "Triton kernels for GPUs")


TRITON = Backend(
    name="triton",
    title="Triton",
    prefix="triton_",
    automatic_for="cuda",
    devices="CUDA tensors, or with TRITON_INTERPRET=1 CPU",
    device_types=("cuda", "cpu") if _interpreted else ("cuda",),
    dtypes=GPU_FLOATS,
    # a longer row does not fit the registers of a multiprocessor
    widest={
        "depth_lstm": 8192,
        "depth_gru_gates": 8192,
        "norm_step": 8192,
        "siamese_step": 8192,
        "layer_mix": None,
        "layer_attend": 8192,
    },
    status=_status,
    why_not_here=_why_not_here,
    why_not_on=_why_not_on,
    kernels=kernels,
    writes_into_buffer=True,
)
