"""Private names of torch, each with its reason and its fallback for a torch without it.

Every other module of the package takes them from here. tests/build/test_torch_private.py looks each name up in the
installed torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _find(path: str, fallback: Any) -> Any:
    """Return the attribute of torch at the dotted ``path``, or ``fallback``."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return fallback
    return found


# Every private name that the package uses, by its path below torch. All were seen in torch 2.13.
NAMES = (
    "_C._is_tracing",
    "_C._are_functorch_transforms_active",
    "_C._len_torch_dispatch_stack",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._AutoDispatchBelowAutograd",
    "_C._functions.DelayedError",
    "compiler._is_exporting_flag",
    "autograd.forward_ad._current_level",
)

# Whether torch.jit.trace records. torch.jit.is_tracing makes two Python calls more: 0.5 us of the 20 us of a gates
# call.
is_jit_tracing: Callable[[], bool] = _find("_C._is_tracing", torch.jit.is_tracing)

# Whether a torch.func transform (vmap, grad, ...) is active. torch has no public test. Without the name none is seen.
is_transformed: Callable[[], bool] = _find("_C._are_functorch_transforms_active", lambda: False)

# Number of active dispatch modes (FlopCounterMode, selective checkpointing). Without the name every call counts as
# watched.
dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 1)

# The hooks of torch.autograd.graph.saved_tensors_hooks, or None. Without the name hooks always seem to be there.
_saved_tensor_hooks: Callable[[bool], Any] = _find(
    "_C._autograd._top_saved_tensors_default_hooks", lambda ignore_fx: ()
)

# Calls operators below the dispatcher's autograd key, in an autograd.Function, for a third of the cost of
# torch.library's own autograd. Without the name the registered autograd runs inside the Function, without gradients.
below_autograd: Callable[[], Any] = _find("_C._AutoDispatchBelowAutograd", contextlib.nullcontext)


def has_saved_tensor_hooks() -> bool:
    """Return whether tensors saved for backward go through the caller's hooks, as under activation checkpointing."""
    return _saved_tensor_hooks(False) is not None


def is_export_flag_set() -> bool:
    """Return whether torch.export records.

    torch.compiler.is_exporting is also True under torch.compile in torch 2.11.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def has_forward_gradients() -> bool:
    """Return whether torch.autograd.forward_ad.dual_level is open; the public query needs the tensors."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def constant_result(function: Any) -> Any:
    """Mark ``function`` as torch.compiler.assume_constant_result does: tracers do not look inside.

    torch's own decorator would import torch._dynamo.
    """
    function._dynamo_marked_constant = True
    return function


class _DelayedError(torch.autograd.Function):
    """Return the tensors unchanged; their backward raises."""

    @staticmethod
    def forward(ctx: Any, message: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(ctx.message)


def delayed_error(message: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors; a derivative of them raises ``message``.

    torch's once_differentiable is built on the same function.
    """
    error = _find("_C._functions.DelayedError", None)
    return _DelayedError.apply(message, *tensors) if error is None else error(message.encode(), len(tensors))(*tensors)
