"""Which implementation runs: "auto" takes the fastest that can, a backend asked for by name runs or raises."""

from __future__ import annotations

import contextlib
import logging
import os
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
_NOT_BUILT = {"cuda": "CUDA C++ kernels are not part of this version", "triton": "Triton kernels are not part of this version"}
_strict = os.environ.get("DEPTHLSTM_STRICT", "0") not in ("", "0")
_default = os.environ.get("DEPTHLSTM_BACKEND") or "auto"
_last: str | None = None
_logged: set[str] = set()


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with whether it can run here and why not."""
    cpp = BackendStatus(load_error is None, load_error or "C++ kernels for CPU tensors")
    return {
        "reference": BackendStatus(True, "plain PyTorch, any device"),
        "cpp": cpp,
        **{name: BackendStatus(False, reason) for name, reason in _NOT_BUILT.items()},
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


def choose(requested: str | None, tensor: Tensor) -> str:
    """The backend that runs a call on ``tensor``: the requested one, else the default one, else the fastest that can.

    Raises:
        ValueError: the requested backend is unknown, or cannot run this call.
        RuntimeError: "auto" would fall back and DEPTHLSTM_STRICT=1 forbids it.
    """
    global _last
    name = _default if requested is None else requested
    if name != "reference":
        limit = _limit("cpp" if name == "auto" else name, tensor)
        if limit is None:
            name = "cpp" if name == "auto" else name
        elif name == "auto":
            name = "reference"
            # export asks for the decomposition, which is no fallback
            if not torch.compiler.is_exporting():
                _report_fallback(limit)
        else:
            # set_backend lets no unknown name in, so an unknown default is the environment's
            checks.check_name("DEPTHLSTM_BACKEND" if requested is None else "backend", name, BACKENDS)
            raise ValueError(f"backend={name!r} cannot run this call: {limit}")
    _last = name
    return name


def _limit(name: str, tensor: Tensor) -> str | None:
    """Why the backend ``name`` cannot run a call on ``tensor``; None where it can."""
    if name != "cpp":
        return _NOT_BUILT.get(name, "there is no such backend")
    if load_error is not None:
        return load_error
    if tensor.device.type != "cpu":
        return f"the C++ kernels take CPU tensors; found {tensor.device}"
    if torch.compiler.is_exporting():
        return "export takes the decomposition into PyTorch operators"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "torch.func transforms need the decomposition into PyTorch operators"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation needs the decomposition into PyTorch operators"
    return None


def _report_fallback(limit: str) -> None:
    if _strict:
        raise RuntimeError(f"DEPTHLSTM_STRICT=1 forbids the fallback to the reference backend: {limit}")
    if not torch.compiler.is_compiling() and limit not in _logged:
        _logged.add(limit)
        logger.warning("falling back to the reference backend: %s", limit)
