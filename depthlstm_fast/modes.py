"""Surroundings that change how a call may be made.

These are autocast, tracers, dispatch modes and saved-tensor hooks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import torch_private
from .torch_private import is_jit_tracing


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast casts products to on devices of this type.

    The result is None where autocast is off or does not know the type, such as "meta".
    """
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def is_traced() -> bool:
    """Return whether torch.compile, torch.export or torch.jit.trace records this call instead of running it."""
    return torch.compiler.is_compiling() or is_jit_tracing()


def is_jit_traced() -> bool:
    """Return whether torch.jit.trace, or the ONNX exporter built on it, records this call."""
    return not torch.compiler.is_compiling() and is_jit_tracing()


def constant(size: int) -> int:
    """Return a size that no call changes as an int.

    torch.jit.trace would record it as variable, and ONNX rejects a variable number of features.
    """
    return int(size) if is_jit_traced() else size


def is_direct(tensor: Tensor) -> bool:
    """Return whether only kernels see an eager call on ``tensor``: no subclass of Tensor, no dispatch mode."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and torch_private.dispatch_modes() == 0


def is_watched() -> bool:
    """Return whether results may be kept without a version counter, so that no product may be written in place.

    Selective activation checkpointing keeps operators' results through a dispatch mode. Plain checkpointing keeps
    tensors saved for backward through hooks. torch.jit.trace records the operators themselves, and ONNX has none with
    ``out=``.
    """
    if torch_private.dispatch_modes() > 0 or is_jit_tracing():
        return True
    return torch.is_grad_enabled() and torch_private.has_saved_tensor_hooks()
