"""Checks of the ops that depth connections are made of, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    check_companion,
    check_dimensions,
    check_eps,
    check_finite,
    check_float_tensor,
    check_name,
    check_shape,
    dtype_name,
)

NORMALISATIONS = ("layer", "rms")
LARGEST_FACTOR = torch.finfo(torch.float32).max


def _check_rows(argument: str, found: Any) -> None:
    check_float_tensor(argument, found)
    if found.dim() == 0 or found.shape[-1] == 0:
        raise ValueError(f"{argument} must have shape (..., C) with C >= 1; found {tuple(found.shape)}")
    check_dimensions(argument, found)


def _check_factor(argument: str, found: float, y: Tensor) -> None:
    if abs(found) > LARGEST_FACTOR and y.dtype != torch.float64:  # the others are computed in float32
        raise ValueError(f"{argument} must be at most {LARGEST_FACTOR:.3g} in size; found {found}")


def _check_affine(suffix: str, weight: Tensor | None, bias: Tensor | None, norm: str, beside: str, x: Tensor) -> None:
    if weight is None and bias is not None:
        raise ValueError(f"weight{suffix} must be given with bias{suffix}; found weight{suffix}=None")
    if bias is not None and norm == "rms":
        raise ValueError(f'bias{suffix} must be None with norm="rms"; found a tensor')
    for argument, parameter in ((f"weight{suffix}", weight), (f"bias{suffix}", bias)):
        if parameter is not None:
            check_companion(argument, parameter, beside, x)
            check_shape(argument, parameter, tuple(x.shape[-1:]))


def check_norm_step(
    x: Tensor,
    y: Tensor,
    a: float,
    b: float | Tensor,
    affines: Sequence[tuple[str, Tensor | None, Tensor | None]],
    norm: str,
    eps: float,
) -> None:
    """Check the arguments of ``norm_step``; ``affines`` holds (suffix, weight, bias). Raises TypeError, ValueError."""
    check_name("norm", norm, NORMALISATIONS)
    check_eps("eps", eps)
    check_finite("a", a)
    _check_rows("y", y)
    _check_factor("a", a, y)
    check_companion("x", x, "y", y)
    check_shape("x", x, tuple(y.shape))
    if isinstance(b, Tensor):
        check_companion("b", b, "y", y)
        check_shape("b", b, () if b.dim() == 0 else tuple(y.shape[-1:]))
    else:
        check_finite("b", b)
        _check_factor("b", b, y)
    for suffix, weight, bias in affines:
        _check_affine(suffix, weight, bias, norm, "y", y)


def check_siamese_step(
    x: Tensor,
    y: Tensor,
    o: Tensor,
    c: float,
    affines: Sequence[tuple[str, Tensor | None, Tensor | None]],
    norm: str,
    eps: float,
) -> None:
    """Check the arguments of ``siamese_step``; raises TypeError, ValueError."""
    check_name("norm", norm, NORMALISATIONS)
    check_eps("eps", eps)
    check_finite("c", c)
    if c <= 0:
        raise ValueError(f"c must be above 0; found {c}")
    _check_rows("o", o)
    for argument, stream in (("x", x), ("y", y)):
        check_companion(argument, stream, "o", o)
        check_shape(argument, stream, tuple(o.shape))
    for suffix, weight, bias in affines:
        _check_affine(suffix, weight, bias, norm, "o", o)


def check_depth_gru_gates(
    z: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, reset_weight: Tensor | None, eps: float
) -> None:
    """Check the arguments of ``depth_gru_gates``; raises TypeError, ValueError."""
    check_eps("eps", eps)
    check_float_tensor("z", z)
    if reset_weight is not None:
        check_float_tensor("reset_weight", reset_weight)
    check_companion("h", h, "z", z)
    _check_rows("h", h)
    features, gates = h.shape[-1], 4 if reset_weight is None else 3
    check_shape("z", z, (*h.shape[:-1], gates * features))
    if (weight is None) != (bias is None):
        missing, given = ("weight", "bias") if weight is None else ("bias", "weight")
        raise ValueError(f"{missing} must be given with {given}, or both be None; found {missing}=None")
    for argument, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_companion(argument, parameter, "z", z)
            check_shape(argument, parameter, (gates, features))
    if reset_weight is not None:
        check_companion("reset_weight", reset_weight, "z", z)
        check_shape("reset_weight", reset_weight, (features, features))


def check_sources(sources: Sequence[Tensor]) -> None:
    """Check a list of sources: at least one, all of one shape and on one device. Raises TypeError, ValueError."""
    if not isinstance(sources, (list, tuple)):
        raise TypeError(f"sources must be a list or tuple of tensors; found {type(sources).__name__}")
    if not sources:
        raise ValueError("sources must hold at least one tensor; found none")
    for index, source in enumerate(sources):
        _check_rows(f"sources[{index}]", source)
        check_shape(f"sources[{index}]", source, tuple(sources[0].shape))
        if source.device != sources[0].device:
            raise ValueError(
                f"sources[{index}] must be on the device of sources[0], {sources[0].device}; found {source.device}"
            )


def _check_parameter(argument: str, found: Any, shape: tuple[int, ...], like: Tensor) -> None:
    check_float_tensor(argument, found)
    check_shape(argument, found, shape)
    if found.device != like.device:
        raise ValueError(f"{argument} must be on the device of sources, {like.device}; found {found.device}")


def check_layer_mix(sources: Sequence[Tensor], weights: Tensor) -> None:
    """Check the arguments of ``layer_mix``; raises TypeError, ValueError."""
    check_sources(sources)
    check_float_tensor("weights", weights)
    if weights.dim() != 2 or weights.shape[1] != len(sources):
        raise ValueError(f"weights must have shape (V, {len(sources)}); found {tuple(weights.shape)}")
    _check_parameter("weights", weights, tuple(weights.shape), sources[0])


def check_output_gradients(argument: str, found: Sequence[Tensor | None], like: Tensor, dtype: torch.dtype) -> None:
    """Check gradients of outputs (..., C) of ``dtype``; None stands for zeros. Raises TypeError, ValueError."""
    for index, gradient in enumerate(found):
        if gradient is None:
            continue
        name = f"{argument}[{index}]"
        check_float_tensor(name, gradient)
        check_shape(name, gradient, tuple(like.shape))
        if gradient.dtype != dtype or gradient.device != like.device:
            wanted = f"{dtype_name(dtype)} on {like.device}"
            raise TypeError(f"{name} must be {wanted}; found {dtype_name(gradient.dtype)} on {gradient.device}")


def check_layer_attend(
    sources: Sequence[Tensor],
    query: Tensor,
    key_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> None:
    """Check the arguments of ``layer_attend``; raises TypeError, ValueError."""
    check_name("norm", norm, NORMALISATIONS)
    check_eps("eps", eps)
    check_sources(sources)
    features = tuple(sources[0].shape[-1:])
    if weight is None and bias is not None:
        raise ValueError("weight must be given with bias; found weight=None")
    if bias is not None and norm == "rms":
        raise ValueError('bias must be None with norm="rms"; found a tensor')
    parameters = (("query", query), ("key_weight", key_weight), ("weight", weight), ("bias", bias))
    for argument, parameter in parameters:
        if argument == "query" or parameter is not None:
            _check_parameter(argument, parameter, features, sources[0])
