"""What surrounds a call and changes how it may be made: autocast, tracers, dispatch modes, saved-tensor hooks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_private
from .torch_private import is_jit_tracing


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts products to on devices of this type; None where it is off, or unknown to autocast
    as "meta" is.
    """
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records this call instead of running it."""
    return torch.compiler.is_compiling() or is_jit_tracing()


def is_jit_traced() -> bool:
    """Whether torch.jit.trace, or the exporter to ONNX that is built on it, records this call."""
    return not torch.compiler.is_compiling() and is_jit_tracing()


def constant(size: int) -> int:
    """A size that no call changes: torch.jit.trace would record it as one that may vary, which ONNX takes for no number
    of features.
    """
    return int(size) if is_jit_traced() else size


def is_direct(tensor: Tensor) -> bool:
    """Whether only kernels see an eager call on ``tensor``: no subclass of Tensor, no dispatch mode."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and torch_private.dispatch_modes() == 0


def is_watched() -> bool:
    """Whether results may be kept by something that no version counter protects, so that no product may be written in
    place.

    Selective activation checkpointing keeps results of operators by a dispatch mode, and plain checkpointing what is
    saved for backward by hooks. torch.jit.trace records the operators themselves, and ONNX has none with ``out=``.
    """
    if torch_private.dispatch_modes() > 0 or is_jit_tracing():
        return True
    return torch.is_grad_enabled() and torch_private.has_saved_tensor_hooks()
