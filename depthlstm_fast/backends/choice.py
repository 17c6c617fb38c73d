"""Which backend runs a call: "auto" takes the fastest that can, a backend asked for by name runs or raises."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from .. import checks, sharding
from ..torch_private import has_forward_gradients, is_export_flag_set, is_jit_tracing, is_transformed
from .cuda import CUDA
from .fastest import FASTEST, winner
from .library import CPP
from .record import Backend, BackendStatus
from .triton import TRITON

# A new backend is one more record here. Where nothing was measured "auto" takes the last that can run.
RECORDS: dict[str, Backend] = {record.name: record for record in (CPP, CUDA, TRITON)}
BACKENDS = ("auto", "reference", *RECORDS)
# what "auto" tries on a CPU, and on a GPU
AUTOMATIC = {
    kind: tuple(name for name in reversed(RECORDS) if RECORDS[name].automatic_for == kind) for kind in ("cpu", "cuda")
}

EXPORTED = "export takes the decomposition into PyTorch operators"

logger = logging.getLogger("depthlstm_fast")

_strict = os.environ.get("DEPTHLSTM_STRICT", "0") not in ("", "0")
_default = os.environ.get("DEPTHLSTM_BACKEND") or "auto"
_scoped: ContextVar[str | None] = ContextVar("depthlstm_fast.backend", default=None)
_scoped_for_tracers: str | None = (
    None  # _scoped once more: torch.compile reads no ContextVar, and has guards for globals only
)
_blocks = 0  # how many blocks of use_backend are open, in any thread: a call outside of all asks nothing more
_last: str | None = None
_logged: set[str] = set()


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with whether it can run here and why not."""
    reference = BackendStatus(True, "plain PyTorch, any device")
    return {"reference": reference, **{name: record.status() for name, record in RECORDS.items()}}


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
    """Use ``name`` instead of what :func:`set_backend` set, until the end of the ``with`` block.

    It holds for the block's thread or asyncio task alone. torch.compile has no such notion: what it traces meanwhile,
    in any thread, takes ``name``, too. A backward pass outside the block runs on the backend of its forward pass.

    Raises:
        ValueError: as :func:`set_backend`.
    """
    global _scoped_for_tracers, _blocks
    checks.check_name("name", name, BACKENDS)
    before = _scoped_for_tracers
    token, _scoped_for_tracers = _scoped.set(name), name
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        _scoped.reset(token)
        _scoped_for_tracers = before


def _scoped_name() -> str | None:
    """The name of the innermost block of :func:`use_backend` around this call."""
    return _scoped_for_tracers if torch.compiler.is_compiling() else _scoped.get()


def last_backend() -> str | None:
    """The backend that ran last in this process, or None before the first call."""
    return _last


def choose(requested: str | None, tensor: Tensor, op: str, features: int) -> str:
    """The backend that runs ``op`` on ``tensor`` with D = ``features``: the requested one, else the default, else the
    fastest that can.

    Raises:
        ValueError: the requested backend is unknown, or cannot run this call.
        RuntimeError: "auto" would fall back and DEPTHLSTM_STRICT=1 forbids it.
    """
    global _last
    name = requested
    if name is None:
        name = _default if _blocks == 0 else _scoped_name() or _default
    if name == "auto":
        name = _fastest(tensor, op, features)
    elif name != "reference":
        # set_backend lets no unknown name in, so an unknown default is the environment's
        if name not in RECORDS:
            checks.check_name("DEPTHLSTM_BACKEND" if requested is None else "backend", name, BACKENDS)
        reason = _why_not(RECORDS[name], tensor, op, features)
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot run this call: {reason}")
    _last = name
    return name


def _fastest(tensor: Tensor, op: str, features: int) -> str:
    """What "auto" takes: the first that can run of the device's backends, the measured winner before the others."""
    device = tensor.device.type
    # an unknown device is told why the backends for GPUs do not take it
    candidates = AUTOMATIC["cpu" if device == "cpu" else "cuda"]
    best = winner(tensor, op, features) if FASTEST and device == "cuda" else None
    reasons: list[str] = []
    for name in candidates if best is None else sorted(candidates, key=lambda name: name != best):
        reason = _why_not(RECORDS[name], tensor, op, features)
        if reason is None:
            return name
        if reason not in reasons:
            reasons.append(reason)
    # export asks for the decomposition, which is no fallback
    if not is_exporting():
        _report_fallback("; ".join(reasons))
    return "reference"


def _why_not(record: Backend, tensor: Tensor, op: str, features: int) -> str | None:
    """Why ``record`` cannot run this call here and now; None where it can."""
    reason = record.why_not(tensor, op, features)
    if reason is not None:
        return reason
    if not torch.compiler.is_compiling():
        if is_jit_tracing() and torch.onnx.is_in_onnx_export():
            return EXPORTED
        if is_transformed():
            return "torch.func transforms need the decomposition into PyTorch operators"
        if has_forward_gradients():
            return "forward-mode differentiation needs the decomposition into PyTorch operators"
    if is_export_flag_set():
        return EXPORTED
    return None if type(tensor) is Tensor else sharding.why_not(tensor)


def is_exporting() -> bool:
    """Whether torch.export or torch.onnx.export records this call, into PyTorch operators that need no library of
    ours.
    """
    if is_export_flag_set():
        return True
    return not torch.compiler.is_compiling() and is_jit_tracing() and torch.onnx.is_in_onnx_export()


def _report_fallback(reason: str) -> None:
    if _strict:
        raise RuntimeError(f"DEPTHLSTM_STRICT=1 forbids the fallback to the reference backend: {reason}")
    if not torch.compiler.is_compiling() and reason not in _logged:
        _logged.add(reason)
        logger.warning("falling back to the reference backend: %s", reason)
