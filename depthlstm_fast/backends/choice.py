"""Choice of the backend that runs a call.

"auto" takes the fastest backend that can run the call. A backend requested by name runs or raises.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from .. import checks, sharding
from ..checks import environment
from ..torch_private import has_forward_gradients, is_export_flag_set, is_jit_tracing, is_transformed
from .cuda import CUDA
from .fastest import FASTEST, winner
from .library import CPP, isa_error
from .record import Backend, BackendStatus
from .triton import TRITON

# A new backend is one more record here. Without a measurement "auto" takes the last record that can run.
RECORDS: dict[str, Backend] = {record.name: record for record in (CPP, CUDA, TRITON)}
BACKENDS = ("auto", "reference", *RECORDS)
# the backends that "auto" tries, by device type
AUTOMATIC = {
    kind: tuple(name for name in reversed(RECORDS) if RECORDS[name].automatic_for == kind) for kind in ("cpu", "cuda")
}

EXPORTED = "export takes the decomposition into PyTorch operators"

logger = logging.getLogger("depthlstm_fast")

_strict = environment.is_on(environment.STRICT)
_default = os.environ.get("DEPTHLSTM_BACKEND") or "auto"
# what is wrong with the other variables; a wrong backend's name is found where it is used
_faults = tuple(filter(None, (isa_error, *environment.find_faults())))
_scoped: ContextVar[str | None] = ContextVar("depthlstm_fast.backend", default=None)
# A copy of _scoped for torch.compile, which reads no ContextVar and has guards for globals only.
_scoped_for_tracers: str | None = None
_blocks = 0  # number of open blocks of use_backend in all threads; at 0 a call reads no ContextVar
_last: str | None = None
_logged: set[str] = set()


def backends() -> dict[str, BackendStatus]:
    """Return every backend by name, with whether it can run here and why not."""
    reference = BackendStatus(True, "plain PyTorch, any device")
    return {"reference": reference, **{name: record.status() for name, record in RECORDS.items()}}


def environment_faults() -> list[str]:
    """Return a message for each variable of the environment that holds a wrong value."""
    wanted = "DEPTHLSTM_BACKEND", os.environ.get("DEPTHLSTM_BACKEND") or "auto", BACKENDS
    wrong_name = environment.message_of(checks.check_name, *wanted)
    return [*_faults, *([] if wrong_name is None else [wrong_name])]


def set_backend(name: str) -> None:
    """Set the process-wide default backend, for calls that name none.

    Raises:
        ValueError: ``name`` is not "auto", "reference", "cpp", "cuda" or "triton".
    """
    global _default
    checks.check_name("name", name, BACKENDS)
    _default = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use ``name`` in place of the default of :func:`set_backend` inside a ``with`` block.

    The block holds for its own thread or asyncio task only. torch.compile knows neither: code that it traces in any
    thread during the block takes ``name`` as well. A backward pass outside the block runs on the backend of its forward
    pass.

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
    """Return the name given to the innermost block of :func:`use_backend` around this call."""
    return _scoped_for_tracers if torch.compiler.is_compiling() else _scoped.get()


def last_backend() -> str | None:
    """Return the backend that ran last in this process, or None before the first call."""
    return _last


def wanted() -> str:
    """Return the backend of a call that names none."""
    return _default if _blocks == 0 else _scoped_name() or _default


def note(name: str) -> None:
    """Let :func:`last_backend` return ``name``, for code that runs a backend without :func:`choose`."""
    global _last
    _last = name


def choose(
    requested: str | None,
    tensor: Tensor,
    op: str,
    features: int,
    against: str | None = None,
    without_kernels: bool = False,
) -> str:
    """Choose the backend that runs ``op`` on ``tensor`` with D = ``features``.

    The requested backend comes first, then the default, then the fastest one that can run the call. ``against`` is a
    reason why no kernels of the op take the other arguments, if there is one. With ``without_kernels`` no backend has
    kernels for that form of the op: the reference then replaces nothing, and is no fallback.

    Raises:
        ValueError: the requested backend is unknown, or cannot run this call; a variable of the environment is wrong.
        RuntimeError: "auto" would fall back and DEPTHLSTM_STRICT=1 forbids it.
    """
    global _last
    if _faults:
        raise ValueError(_faults[0])
    name = requested
    if name is None:
        name = wanted()
    elif not isinstance(requested, str):
        checks.check_name("backend", requested, BACKENDS)
    if name == "auto":
        name = _fastest(tensor, op, features) if against is None else "reference"
        if against is not None and not without_kernels and not is_exporting():
            _report_fallback(against)
    elif name != "reference":
        # set_backend rejects unknown names, so an unknown default comes from the environment
        if name not in RECORDS:
            checks.check_name("DEPTHLSTM_BACKEND" if requested is None else "backend", name, BACKENDS)
        reason = _why_not(RECORDS[name], tensor, op, features) or against
        if reason is not None:
            raise ValueError(f"backend={name!r} cannot run this call: {reason}")
    _last = name
    return name


def _fastest(tensor: Tensor, op: str, features: int) -> str:
    """Return what "auto" takes: the measured winner if it can run, else the device's first backend that can."""
    device = tensor.device.type
    # on an unknown device the reasons name the backends for GPUs
    candidates = AUTOMATIC["cpu" if device == "cpu" else "cuda"]
    best = winner(tensor, op, features) if FASTEST and device == "cuda" else None
    reasons: list[str] = []
    for name in candidates if best is None else sorted(candidates, key=lambda name: name != best):
        reason = _why_not(RECORDS[name], tensor, op, features)
        if reason is None:
            return name
        if reason not in reasons:
            reasons.append(reason)
    # an export wants the decomposition, so this is no fallback
    if not is_exporting():
        _report_fallback("; ".join(reasons))
    return "reference"


def _why_not(record: Backend, tensor: Tensor, op: str, features: int) -> str | None:
    """Say why ``record`` cannot run this call here and now; None where it can."""
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
    return None if type(tensor) is Tensor else sharding.why_not(tensor, op)


def is_exporting() -> bool:
    """Return whether torch.export or torch.onnx.export records this call.

    An exported program consists of PyTorch operators and needs no library of this package.
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
