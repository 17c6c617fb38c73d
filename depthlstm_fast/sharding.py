"""DTensor: sharding rules of the operators, and plain tensors made to go with a DTensor."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor, without importing torch.distributed.tensor."""
    if type(tensor) is Tensor:
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def replicated(tensor: Tensor, like: Tensor, source_rank: int | None = None) -> Tensor:
    """Return ``tensor``, replicated on the mesh of ``like`` if that is a DTensor.

    Each rank keeps its own values, or takes those of ``source_rank`` where that is given.
    """
    if not is_dtensor(like) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim, src_data_rank=source_rank)


class Layout(NamedTuple):
    """Layout of an operator's arguments and outputs, one letter each.

    "r" is rows, "f" features (the same on every rank), "s" a sum over rows, "-" no tensor. ``numbered`` says, given an
    operator's arguments, whether rows are numbered, as dropout does. Numbered rows are not sharded.
    """

    arguments: str
    outputs: Callable[[tuple[Any, ...]], str]
    numbered: Callable[[tuple[Any, ...]], bool]


_layouts: list[tuple[Any, Layout]] = []
_refused: set[str] = set()  # ops that DTensor cannot shard


def add_operator(operator: Any, layout: Layout) -> None:
    """Let DTensor shard ``operator`` by ``layout``, from the first DTensor on."""
    _layouts.append((operator, layout))


def refuse(op: str) -> None:
    """Let the operators of ``op`` take no DTensor."""
    _refused.add(op)


def why_not(tensor: Tensor, op: str) -> str | None:
    """Say why the operators of ``op`` cannot take ``tensor``; None where they can.

    The reason concerns a DTensor: under a torch without sharding registration, or in a list, which torch cannot shard.
    """
    if not is_dtensor(tensor):
        return None
    return f"{op} takes lists of tensors, and DTensor shards none" if op in _refused else _register()


@functools.cache
def _register() -> str | None:
    """Tell DTensor to shard the operators by rows, unless dropout numbers them, and never by features."""
    try:
        from torch.distributed.tensor import Partial, Replicate, Shard
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError as error:
        return f"this torch registers no sharding of an operator: {error}"

    def strategy_of(layout: Layout) -> Callable[..., list[Any]]:
        def strategy(*inputs: Any) -> list[Any]:
            rows_of = next(
                x for x, letter in zip(inputs, layout.arguments, strict=True) if letter == "r" and x is not None
            )
            dims = () if layout.numbered(inputs) else range(rows_of.ndim - 1)
            one, found = Replicate(), []
            for rows, sums in [(one, one), *((Shard(dim), Partial()) for dim in dims)]:
                place = {"r": rows, "f": one, "s": sums, "-": None}
                wanted = [
                    None if x is None else place[letter] for x, letter in zip(inputs, layout.arguments, strict=True)
                ]
                found.append(([place[letter] for letter in layout.outputs(inputs)], wanted))
            return found

        return strategy

    for operator, layout in _layouts:
        register_sharding(operator)(strategy_of(layout))
    return None
