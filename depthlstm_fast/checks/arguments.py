"""Checks of single arguments.

Each error names the argument, what was wanted and what was found.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        raise ValueError(
            f"{argument} must be a dense tensor; found {'a nested one' if found.is_nested else found.layout}"
        )


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
    if found.shape != wanted:
        raise ValueError(f"{argument} must have shape {tuple(wanted)}; found {tuple(found.shape)}")


def check_size(argument: str, found: Any, least: int = 1) -> None:
    """Raise TypeError or ValueError unless ``found`` is an integer of at least ``least``."""
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{argument} must be an int; found {type(found).__name__}")
    if found < least:
        raise ValueError(f"{argument} must be at least {least}; found {found}")


def check_companion(argument: str, found: Any, beside: str, other: Tensor, mixed: bool = True) -> None:
    """Raise TypeError or ValueError unless ``found`` has the device of ``other`` and a matching dtype.

    With ``mixed``, float32 also matches a bfloat16 or float16 ``other``: eager autocast produces this mix.
    """
    check_float_tensor(argument, found)
    if found.dtype != other.dtype and not (
        mixed and found.dtype == torch.float32 and other.dtype in (torch.bfloat16, torch.float16)
    ):
        wanted = dtype_name(other.dtype)
        if mixed and other.dtype in (torch.bfloat16, torch.float16):
            wanted += " or float32"
        raise TypeError(
            f"{argument} must be {wanted} beside a {dtype_name(other.dtype)} {beside}; found {dtype_name(found.dtype)}"
        )
    if found.device != other.device:
        raise ValueError(f"{argument} must be on the device of {beside}, {other.device}; found {found.device}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
