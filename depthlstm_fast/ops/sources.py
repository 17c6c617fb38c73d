"""What the ops share that take a list of tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..sharding import is_dtensor


def widest_dtype(sources: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that torch promotes the sources' dtypes to."""
    return functools.reduce(torch.promote_types, [source.dtype for source in sources])


def leading(sources: Sequence[Tensor]) -> Tensor:
    """Return the source that decides on the backend: a DTensor or one of float64, where there is one."""
    chosen = next((source for source in sources if is_dtensor(source)), None)
    if chosen is None:
        chosen = next((source for source in sources if source.dtype == torch.float64), sources[0])
    return chosen


def stand_ins(dtypes: Sequence[torch.dtype], like: Tensor) -> list[Tensor]:
    """Return tensors of the shape of ``like`` that tell dtypes and have no values: one element of memory each."""
    return [like.new_empty(1, dtype=dtype).expand(like.shape) for dtype in dtypes]
