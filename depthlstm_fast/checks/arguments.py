"""Argument checks shared by every backend: each error names the argument, what was found and what was wanted."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

NORMS = ("gate", "joint", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "tanh", "silu", "sigmoid")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_FEATURES = 65536  # the CPU kernels keep a few fp32 rows of 4D on each thread: 16 MiB at this width


def check_name(argument: str, found: Any, wanted: tuple[str, ...]) -> None:
    """Raise ValueError unless ``found`` is one of the names ``wanted``."""
    if found not in wanted:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, wanted))}; found {found!r}")


def check_float_tensor(argument: str, found: Any) -> None:
    """Raise TypeError or ValueError unless ``found`` is a dense float32, float64, bfloat16 or float16 tensor."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; found {type(found).__name__}")
    if found.dtype not in FLOATS:
        raise TypeError(f"{argument} must be float32, float64, bfloat16 or float16; found {found.dtype}")
    if found.layout != torch.strided or found.is_nested:
        raise ValueError(f"{argument} must be a dense tensor; found {'a nested one' if found.is_nested else found.layout}")


def check_probability(argument: str, found: Any) -> None:
    """Raise TypeError or ValueError unless ``found`` is a number in [0, 1)."""
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{argument} must be a float; found {type(found).__name__}")
    if not 0.0 <= found < 1.0:
        raise ValueError(f"{argument} must be in [0, 1); found {found}")


def check_finite(argument: str, found: Any, least: float = -sys.float_info.max) -> None:
    """Raise TypeError or ValueError unless ``found`` is a finite number of at least ``least``."""
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{argument} must be a float; found {type(found).__name__}")
    if not least <= found <= sys.float_info.max:
        shown = found if isinstance(found, float) or abs(found) < 2**64 else "an integer too large for a float"
        raise ValueError(f"{argument} must be finite{' and not negative' if least == 0 else ''}; found {shown}")


def check_eps(argument: str, found: Any) -> None:
    """Raise TypeError or ValueError unless ``found`` is a finite number that is not negative."""
    check_finite(argument, found, 0.0)


def check_shape(argument: str, found: Tensor, wanted: tuple[int, ...]) -> None:
    """Raise ValueError unless ``found`` has the shape ``wanted``."""
    if tuple(found.shape) != tuple(wanted):
        raise ValueError(f"{argument} must have shape {tuple(wanted)}; found {tuple(found.shape)}")


def check_size(argument: str, found: Any, least: int = 1) -> None:
    """Raise TypeError or ValueError unless ``found`` is an integer of at least ``least``."""
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{argument} must be an int; found {type(found).__name__}")
    if found < least:
        raise ValueError(f"{argument} must be at least {least}; found {found}")


def check_companion(argument: str, found: Any, beside: str, other: Tensor, mixed: bool = True) -> None:
    """Raise TypeError or ValueError unless ``found`` has the device of ``other`` and a dtype that goes with it.

    Beside a bfloat16 or float16 ``other`` float32 is accepted too when ``mixed``: what eager autocast produces.
    """
    check_float_tensor(argument, found)
    if found.dtype != other.dtype and not (mixed and found.dtype == torch.float32 and other.dtype in (torch.bfloat16, torch.float16)):
        wanted = _name(other.dtype)
        if mixed and other.dtype in (torch.bfloat16, torch.float16):
            wanted += " or float32"
        raise TypeError(f"{argument} must be {wanted} beside a {_name(other.dtype)} {beside}; found {_name(found.dtype)}")
    if found.device != other.device:
        raise ValueError(f"{argument} must be on the device of {beside}, {other.device}; found {found.device}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_options(norm: str, activation: str, eps: float, dropout_p: float) -> None:
    """Check the options that are no tensors; raises ValueError or TypeError."""
    check_name("norm", norm, NORMS)
    check_name("activation", activation, ACTIVATIONS)
    check_eps("eps", eps)
    check_probability("dropout_p", dropout_p)


def _check_state(
    z_name: str,
    z: Tensor,
    c: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    seed: Tensor | None,
) -> None:
    check_companion("c", c, z_name, z)
    if c.dim() == 0 or c.shape[-1] == 0:
        raise ValueError(f"c must have shape (..., D) with D >= 1; found {tuple(c.shape)}")
    features = c.shape[-1]
    if features > MAX_FEATURES:
        raise ValueError(f"c must have at most {MAX_FEATURES} features; found {features}")
    if hidden is not None:
        check_companion("hidden", hidden, z_name, z, mixed=False)
        check_shape("hidden", hidden, tuple(c.shape))
    if (weight is None) != (bias is None):
        missing, given = ("weight", "bias") if weight is None else ("bias", "weight")
        raise ValueError(f"{missing} must be given with {given}, or both be None; found {missing}=None")
    if weight is not None and bias is not None:
        if norm == "none":
            raise ValueError('weight and bias must be None with norm="none"; found a tensor')
        for argument, parameter in (("weight", weight), ("bias", bias)):
            check_companion(argument, parameter, z_name, z)
            check_shape(argument, parameter, (4 if hidden is None else 3, features))
        if weight.dtype != bias.dtype:
            raise TypeError(f"bias must have the dtype of weight, {_name(weight.dtype)}; found {_name(bias.dtype)}")
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor; found {getattr(seed, 'dtype', type(seed).__name__)}")
        check_shape("seed", seed, (1,))
        if seed.device != z.device:
            raise ValueError(f"seed must be on the device of {z_name}, {z.device}; found {seed.device}")


def check_gates(
    z: Tensor,
    c: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden: Tensor | None,
    norm: str,
    seed: Tensor | None,
) -> None:
    """Check the tensors of ``depth_lstm_gates``.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that z does not go with.
        ValueError: a shape or device is not what was wanted.
    """
    check_float_tensor("z", z)
    _check_state("z", z, c, hidden, weight, bias, norm, seed)
    check_shape("z", z, (*c.shape[:-1], (4 if hidden is None else 3) * c.shape[-1]))


def check_cell(
    inputs: tuple[Tensor, ...],
    h: Tensor,
    c: Tensor,
    w: Tensor,
    b: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    hidden: Tensor | None,
    norm: str,
    seed: Tensor | None,
) -> None:
    """Check the tensors of ``depth_lstm_cell``; ``inputs`` are the slices of x. Raises as ``check_gates`` does."""
    check_float_tensor("h", h)
    if h.dim() == 0:
        raise ValueError(f"h must have shape (..., D); found {tuple(h.shape)}")
    if not inputs:
        raise ValueError("x must be a tensor or a tuple of at least one; found an empty tuple")
    for x in inputs:
        check_companion("x", x, "h", h, mixed=False)
        if x.dim() != h.dim() or x.shape[:-1] != h.shape[:-1]:
            raise ValueError(f"x must have shape {(*h.shape[:-1], 'I')}; found {tuple(x.shape)}")
        if x.shape[-1] == 0:
            raise ValueError(f"x must have at least one feature; found {tuple(x.shape)}")
    _check_state("h", h, c, hidden, weight, bias, norm, seed)
    check_shape("c", c, tuple(h.shape))
    rows = (4 if hidden is None else 3) * h.shape[-1]
    check_companion("w", w, "h", h, mixed=False)
    check_shape("w", w, (rows, sum(x.shape[-1] for x in inputs) + h.shape[-1]))
    if b is not None:
        check_companion("b", b, "h", h)
        check_shape("b", b, (rows,))
