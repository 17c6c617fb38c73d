"""Checks of the depth-wise LSTM's tensors and options, shared by all backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from .arguments import (
    MAX_DIMENSIONS,
    check_companion,
    check_dimensions,
    check_eps,
    check_flags,
    check_float_tensor,
    check_name,
    check_probability,
    check_shape,
    dtype_name,
)

NORMS = ("gate", "joint", "none")  # a norm's place is its code in the operators
MAX_FEATURES = 65536  # the CPU kernels keep a few fp32 rows of 4D on each thread: 16 MiB at this width


def check_options(norm: str, activation: str, eps: float, dropout_p: float, training: bool) -> None:
    """Check the options that are not tensors; raises ValueError or TypeError."""
    check_name("norm", norm, NORMS)
    check_name("activation", activation, ACTIVATIONS)
    # the common values without a call each: 0.5 us of a gates call's 20 us
    if type(eps) is not float or not 0.0 <= eps <= 1.0:
        check_eps("eps", eps)
    if type(dropout_p) is not float or not 0.0 <= dropout_p < 1.0:
        check_probability("dropout_p", dropout_p)
    if training is not True and training is not False:
        check_flags(training=training)


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
    shape = c.shape
    features = shape[-1] if shape else 0
    if features == 0:
        raise ValueError(f"c must have shape (..., D) with D >= 1; found {tuple(shape)}")
    if len(shape) > MAX_DIMENSIONS:
        check_dimensions("c", c)
    if features > MAX_FEATURES:
        raise ValueError(f"c must have at most {MAX_FEATURES} features; found {features}")
    if hidden is not None:
        check_companion("hidden", hidden, z_name, z, mixed=False)
        check_shape("hidden", hidden, shape)
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
            raise TypeError(
                f"bias must have the dtype of weight, {dtype_name(weight.dtype)}; found {dtype_name(bias.dtype)}"
            )
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
        TypeError: an argument is not a tensor, or its dtype does not match z.
        ValueError: a shape or device is wrong.
    """
    check_float_tensor("z", z)
    _check_state("z", z, c, hidden, weight, bias, norm, seed)
    *leading, features = c.shape
    check_shape("z", z, (*leading, (4 if hidden is None else 3) * features))


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
    check_shape("c", c, h.shape)
    rows = (4 if hidden is None else 3) * h.shape[-1]
    check_companion("w", w, "h", h, mixed=False)
    check_shape("w", w, (rows, sum(x.shape[-1] for x in inputs) + h.shape[-1]))
    if b is not None:
        check_companion("b", b, "h", h)
        check_shape("b", b, (rows,))
