"""Backward passes that raise a clear error on a second differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..torch_private import delayed_error

Grads = tuple[Tensor | None, ...]
_SECOND_DERIVATIVE = (
    "trying to differentiate twice a function that was marked with "
    "@once_differentiable: the fused kernels have no second derivative; "
    'use backend="reference" where the function takes it, or depthlstm_fast.use_backend("reference")'
)


def once_differentiable(backward: Callable[..., Grads]) -> Callable[..., Grads]:
    """Wrap ``backward(ctx, saved_tensors, *grads)`` like torch's decorator of this name.

    The error of a second differentiation says what to do instead.
    """

    def wrapper(ctx: Any, *grads: Tensor | None) -> Grads:
        saved = ctx.saved_tensors
        with torch.no_grad():
            outputs = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return outputs
        present = [output for output in outputs if output is not None]
        # the error depends on the gradients' sources: torch.autograd.grad runs only nodes that lead to its inputs
        sources = [tensor for tensor in (*grads, *saved) if tensor is not None and tensor.requires_grad]
        marked = iter(
            delayed_error(_SECOND_DERIVATIVE, [*(output.detach().requires_grad_() for output in present), *sources])
        )
        return tuple(None if output is None else next(marked) for output in outputs)

    return wrapper
