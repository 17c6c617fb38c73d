"""What the checks of several processes share."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # sums in another order


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
