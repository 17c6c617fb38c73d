"""Which implementation runs: "auto" takes the fastest that can, a backend asked for by name runs or raises."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
LIBRARY = Path(__file__).with_name("_C.abi3.so")

logger = logging.getLogger("depthlstm_fast")


class BackendStatus(NamedTuple):
    """Whether a backend can run here, and a line on what it is or why it cannot."""

    available: bool
    detail: str


def _load_library() -> str | None:
    """Load the compiled extension. Returns None, or the reason why there is none: import must never fail."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not beside the package: the extension was not built (pip install --no-build-isolation .)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} did not load: {error}"
    return None


load_error = _load_library()
CUDA_ERROR = "CUDA C++ kernels are not part of this version"
TRITON_MAX_FEATURES = 8192  # kernels/gates.py: a row of more does not fit the registers of a multiprocessor
TRITON_FLOOR = (3, 6)


def _find_triton() -> str | None:
    """Look for Triton without importing it, which takes half a second. Returns None, or the reason why it cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if not isinstance(version, str):
        return None  # a checkout, a renamed wheel, or what an interrupted pip left: its import will tell
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return f"Triton {version} is too old, {TRITON_FLOOR[0]}.{TRITON_FLOOR[1]} or newer is needed" if found < TRITON_FLOOR else None


@functools.cache
def _import_kernels() -> str | None:
    """Import the Triton kernels. Returns None, or the reason why that fails."""
    try:
        from .kernels import gates  # noqa: F401
    except Exception as error:  # noqa: BLE001
        return f"Triton's kernels do not import: {type(error).__name__}: {error}"
    return None


_triton_error = _find_triton()
_triton_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_strict = os.environ.get("DEPTHLSTM_STRICT", "0") not in ("", "0")
_default = os.environ.get("DEPTHLSTM_BACKEND") or "auto"
_last: str | None = None
_logged: set[str] = set()


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with whether it can run here and why not."""
    triton_error = _triton_error
    if triton_error is None and not _triton_interpreted and not torch.cuda.is_available():
        triton_error = "there is no GPU that torch can use"
    if triton_error is None:
        triton_error = _import_kernels()
    interpreted = "Triton kernels, interpreted on the CPU (TRITON_INTERPRET=1): slow, for tests"
    return {
        "reference": BackendStatus(True, "plain PyTorch, any device"),
        "cpp": BackendStatus(load_error is None, load_error or "C++ kernels for CPU tensors"),
        "cuda": BackendStatus(False, CUDA_ERROR),
        "triton": BackendStatus(triton_error is None, triton_error or (interpreted if _triton_interpreted else "Triton kernels for GPUs")),
    }


def set_backend(name: str) -> None:
    """Set the backend of every call that names none, for the whole process.

    Raises:
        ValueError: ``name`` is not "auto", "reference", "cpp", "cuda" or "triton".
    """
    global _default
    checks.check_name("name", name, BACKENDS)
    _default = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use ``name`` as :func:`set_backend` does, until the end of the ``with`` block."""
    global _default
    before = _default
    set_backend(name)
    try:
        yield
    finally:
        _default = before


def last_backend() -> str | None:
    """The backend that ran last in this process, or None before the first call."""
    return _last


def choose(requested: str | None, tensor: Tensor, features: int) -> str:
    """The backend that runs a call on ``tensor`` with D = ``features``: the requested one, else the default, else the fastest that can.

    Raises:
        ValueError: the requested backend is unknown, or cannot run this call.
        RuntimeError: "auto" would fall back and DEPTHLSTM_STRICT=1 forbids it.
    """
    global _last
    name = _default if requested is None else requested
    if name != "reference":
        fastest = "cpp" if tensor.device.type == "cpu" else "triton"
        limit = _limit(fastest if name == "auto" else name, tensor, features)
        if limit is None:
            name = fastest if name == "auto" else name
        elif name == "auto":
            name = "reference"
            # export asks for the decomposition, which is no fallback
            if not _is_exporting():
                _report_fallback(limit)
        else:
            # set_backend lets no unknown name in, so an unknown default is the environment's
            checks.check_name("DEPTHLSTM_BACKEND" if requested is None else "backend", name, BACKENDS)
            raise ValueError(f"backend={name!r} cannot run this call: {limit}")
    _last = name
    return name


def _limit(name: str, tensor: Tensor, features: int) -> str | None:
    """Why the backend ``name`` cannot run a call on ``tensor``; None where it can."""
    if name == "cpp":
        if load_error is not None:
            return load_error
        if tensor.device.type != "cpu":
            return f"the C++ kernels take CPU tensors; found {tensor.device}"
    elif name == "triton":
        limit = triton_limit(tensor, features)
        if limit is not None:
            return limit
    else:
        return CUDA_ERROR if name == "cuda" else "there is no such backend"
    if _is_exporting():
        return "export takes the decomposition into PyTorch operators"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "torch.func transforms need the decomposition into PyTorch operators"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation needs the decomposition into PyTorch operators"
    return None


def _is_exporting() -> bool:
    # not torch.compiler.is_exporting: under torch.compile torch 2.11 takes that for True
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def triton_limit(tensor: Tensor, features: int) -> str | None:
    """Why the Triton kernels cannot take ``tensor`` with D = ``features``; None where they can."""
    if _triton_error is not None:
        return _triton_error
    if tensor.device.type != "cuda" and not (_triton_interpreted and tensor.device.type == "cpu"):
        return f"the Triton kernels take CUDA tensors, or with TRITON_INTERPRET=1 CPU tensors; found {tensor.device}"
    if tensor.dtype == torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16; found float64"
    if features > TRITON_MAX_FEATURES:
        return f"the Triton kernels take D up to {TRITON_MAX_FEATURES}; found {features}"
    if not torch.compiler.is_compiling():
        error = _import_kernels()
        if error is not None:
            return error
    return None


def _report_fallback(limit: str) -> None:
    if _strict:
        raise RuntimeError(f"DEPTHLSTM_STRICT=1 forbids the fallback to the reference backend: {limit}")
    if not torch.compiler.is_compiling() and limit not in _logged:
        _logged.add(limit)
        logger.warning("falling back to the reference backend: %s", limit)
