"""The activations: each name with its function and derivative in PyTorch.

The order gives the operators' codes. csrc/common/activations.h and kernels/common/formulas.py repeat the list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """act(a) and d act(a) / d a, elementwise."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _gelu_tanh(a: Tensor) -> Tensor:
    return F.gelu(a, approximate="tanh")


def _gelu_slope(a: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(a * math.sqrt(0.5))) + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(a: Tensor) -> Tensor:
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (a + cubic * a**3))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * scale * (1 + 3 * cubic * a * a)


def _relu_slope(a: Tensor) -> Tensor:
    return (a > 0).to(a.dtype)


def _tanh_slope(a: Tensor) -> Tensor:
    return 1 - torch.tanh(a) ** 2


def _silu_slope(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _sigmoid_slope(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 - s)


FUNCTIONS = {
    "gelu": Activation(F.gelu, _gelu_slope),
    "gelu_tanh": Activation(_gelu_tanh, _gelu_tanh_slope),
    "relu": Activation(F.relu, _relu_slope),
    "tanh": Activation(torch.tanh, _tanh_slope),
    "silu": Activation(F.silu, _silu_slope),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope),
}
ACTIVATIONS = tuple(FUNCTIONS)


def swiglu(a: Tensor) -> Tensor:
    """silu of the first half of a's features times the second half: Shazeer, arXiv 2002.05202."""
    gate, value = a.chunk(2, -1)
    return F.silu(gate) * value


def activate(a: Tensor, activation: str) -> Tensor:
    """Return act(a); raises KeyError for a name that is not in FUNCTIONS."""
    return FUNCTIONS[activation].value(a)
