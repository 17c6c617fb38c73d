"""Checks of a tensor against the weights that it meets."""

from __future__ import annotations

from torch import Tensor, nn

from ..modes import autocast_dtype
from ..plain import hookless, is_plain_linear
from .arguments import check_companion


def check_beside(argument: str, found: Tensor, linear: nn.Module | None, *around: nn.Module) -> None:
    """Raise TypeError or ValueError where ``found`` has another dtype or device than the weight of ``linear``.

    ``around`` are the modules whose calls lead to ``linear``. Nothing is said where something else may bring the two
    together: autocast, a hook, an adapter, or a tool that holds the weight elsewhere until the call.
    """
    # an attribute of a module takes five times as long as an entry of its dictionary
    weight = None if linear is None else linear._parameters.get("weight")
    if linear is None or weight is None or (found.dtype is weight.dtype and found.device == weight.device):
        return
    if weight.is_meta or not is_plain_linear(linear) or not all(hookless(each) for each in around):
        return
    if autocast_dtype(found.device.type) is None:
        check_companion(argument, found, "weight", weight, mixed=False)
