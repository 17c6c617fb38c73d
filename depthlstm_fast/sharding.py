"""DTensor: how it shards the gates' operators, and plain tensors made to go with one."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

_OPERATORS = ("gates", "cuda_gates", "triton_gates")


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; torch.distributed.tensor is not imported for the answer."""
    if type(tensor) is Tensor:
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def replicated(tensor: Tensor, like: Tensor, source_rank: int | None = None) -> Tensor:
    """``tensor`` as it is, or beside a DTensor ``like`` replicated on its mesh.

    Each rank keeps its own values, or takes those of ``source_rank`` where that is given.
    """
    if not is_dtensor(like) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim, src_data_rank=source_rank)


def limit(tensor: Tensor) -> str | None:
    """Why the operators cannot take ``tensor``, for a DTensor of a torch that registers no sharding; None where they can."""
    return _register() if is_dtensor(tensor) else None


@functools.cache
def _register() -> str | None:
    """Tell DTensor how the operators shard: by rows, unless dropout numbers them, and never by features."""
    try:
        from torch.distributed.tensor import Partial, Replicate, Shard
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError as error:
        return f"this torch registers no sharding of an operator: {error}"

    def placements(z: Any, dropout_p: float) -> list[tuple[Any, Any]]:
        """Pairs of what tensors with rows and sums over rows may be."""
        shards = [(Shard(dim), Partial()) for dim in range(z.ndim - 1) if dropout_p == 0]
        return [(Replicate(), Replicate()), *shards]

    def given(tensors: tuple[Any, ...], places: list[Any]) -> list[Any]:
        return [None if tensor is None else place for tensor, place in zip(tensors, places, strict=True)]

    def forward(*inputs: Any) -> list[Any]:
        tensors, options = inputs[:7], inputs[7:]
        found, one = [], Replicate()
        for rows, _ in placements(tensors[0], options[3]):
            wanted = given(tensors, [rows, one, rows, rows, one, one, one])
            found.append(([rows, rows], [*wanted, *(None for _ in options)]))
        return found

    def backward(*inputs: Any) -> list[Any]:
        tensors, options = inputs[:9], inputs[9:]
        (_, _, z, _, hidden, *_), (affine, z_bias) = tensors, options[4:6]
        found, one = [], Replicate()
        for rows, sums in placements(z, options[3]):
            wanted = given(tensors, [rows, rows, rows, one, rows, rows, one, one, one])
            dhidden, daffine, dz_bias = (rows if hidden is not None else one), (sums if affine else one), (sums if z_bias else one)
            found.append(([rows, dhidden, rows, daffine, daffine, dz_bias], [*wanted, *(None for _ in options)]))
        return found

    for name in _OPERATORS:
        for suffix, strategy in (("forward", forward), ("backward", backward)):
            operator = getattr(torch.ops.depthlstm_fast, f"{name}_{suffix}", None)
            if operator is not None:
                register_sharding(operator.default)(strategy)
    return None
