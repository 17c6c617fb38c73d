"""Bytes that a call keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def kept_bytes(run: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Return the bytes of all distinct storages that ``run`` saves for backward.

    Parameters are left out. Kept inputs are counted.
    """
    excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    # the graph held every saved tensor until here, so that no address was used twice
    del outputs
    return sum(kept.values())
