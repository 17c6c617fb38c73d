"""The measured table of the fastest backend on each GPU, which "auto" follows.

The table is EMPTY: no kernel has been timed on a GPU yet, so "auto" takes Triton wherever Triton can run. A key holds
the op, the GPU's name from torch.cuda.get_device_name(), D and the dtype of z. The value is the winner of forward +
backward, with the backends timed in turn in one process. A comment beside an entry names the run in benchmarks/results:

    ("depth_lstm", "NVIDIA H100 80GB HBM3", 512, torch.bfloat16): "cuda",  # benchmarks/results/<folder>

A missing entry is not guessed from its neighbours.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..torch_private import constant_result

FASTEST: dict[tuple[str, str, int, torch.dtype], str] = {}


@constant_result
def gpu_name(index: int) -> str:
    return _known_gpu_name(index)


_known_gpu_name = functools.cache(torch.cuda.get_device_name)


def winner(tensor: Tensor, op: str, features: int) -> str | None:
    """Return the measured winner for ``op`` with D = ``features`` on the tensor's GPU; None without a measurement."""
    return FASTEST.get((op, gpu_name(tensor.device.index), features, tensor.dtype))
