"""Checks of single arguments.

Each error names the argument, what was wanted and what was found.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

MAX_DIMENSIONS = 64  # of csrc/common/torch/tensors.h
_STRIDED = torch.strided
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_name(argument: str, found: Any, wanted: tuple[str, ...]) -> None:
    """Raise ValueError unless ``found`` is one of the names ``wanted``."""
    if not isinstance(found, str) or found not in wanted:  # an array answers "in" with no bool
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, wanted))}; found {found!r}")


def check_dense(argument: str, found: Tensor) -> None:
    """Raise ValueError where a tensor is sparse or nested."""
    if found.layout != torch.strided or found.is_nested:
        raise ValueError(
            f"{argument} must be a dense tensor; found {'a nested one' if found.is_nested else found.layout}"
        )


def check_float_tensor(argument: str, found: Any) -> None:
    """Raise TypeError or ValueError unless ``found`` is a dense float32, float64, bfloat16 or float16 tensor."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; found {type(found).__name__}")
    if found.dtype not in FLOATS:
        raise TypeError(f"{argument} must be float32, float64, bfloat16 or float16; found {found.dtype}")
    if found.layout is not _STRIDED or found.is_nested:
        check_dense(argument, found)


def check_probability(argument: str, found: Any) -> None:
    """Raise TypeError or ValueError unless ``found`` is a number in [0, 1)."""
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{argument} must be a float; found {type(found).__name__}")
    if not 0.0 <= found < 1.0:
        raise ValueError(f"{argument} must be in [0, 1); found {found}")


def check_flags(**found: Any) -> None:
    """Raise TypeError unless each keyword argument is True or False: a word would count as True."""
    for argument, value in found.items():
        if value is not True and value is not False:
            raise TypeError(f"{argument} must be a bool; found {type(value).__name__}")


def check_finite(argument: str, found: Any, least: float = -sys.float_info.max) -> None:
    """Raise TypeError or ValueError unless ``found`` is a finite number of at least ``least``."""
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError(f"{argument} must be a float; found {type(found).__name__}")
    if not least <= found <= sys.float_info.max:
        shown = found if isinstance(found, float) or abs(found) < 2**64 else "an integer too large for a float"
        raise ValueError(f"{argument} must be finite{' and not negative' if least == 0 else ''}; found {shown}")


def check_initial(argument: str, found: Any, dtype: torch.dtype | None = None) -> None:
    """Raise TypeError or ValueError unless ``found`` is a number that a parameter of ``dtype`` can start at."""
    check_finite(argument, found)
    most = torch.finfo(dtype or torch.get_default_dtype()).max
    if abs(found) > most:
        raise ValueError(f"{argument} must be at most {most:.3g} in size; found {found}")


def check_eps(argument: str, found: Any) -> None:
    """Raise TypeError or ValueError unless ``found`` is a finite number that is not negative."""
    check_finite(argument, found, 0.0)


def check_shape(argument: str, found: Tensor, wanted: tuple[int, ...]) -> None:
    """Raise ValueError unless ``found`` has the shape ``wanted``."""
    try:
        fits = found.shape == wanted
    except RuntimeError:  # of a lazy module's parameter
        raise ValueError(f"{argument} must have a shape; found {type(found).__name__}") from None
    if not fits:
        raise ValueError(f"{argument} must have shape {tuple(wanted)}; found {tuple(found.shape)}")


def check_dimensions(argument: str, found: Tensor) -> None:
    """Raise ValueError where a tensor has more dimensions than the kernels take."""
    if found.dim() > MAX_DIMENSIONS:
        raise ValueError(f"{argument} must have at most {MAX_DIMENSIONS} dimensions; found {found.dim()}")


def check_size(argument: str, found: Any, least: int = 1) -> None:
    """Raise TypeError or ValueError unless ``found`` is an integer of at least ``least``."""
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{argument} must be an int; found {type(found).__name__}")
    if found < least:
        raise ValueError(f"{argument} must be at least {least}; found {found}")


def check_placement(device: Any, dtype: Any) -> None:
    """Raise TypeError or ValueError unless parameters can be made on ``device`` and of ``dtype``."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOATS):
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16; found {dtype}")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:  # an AssertionError of a torch without CUDA
            reason = str(error).partition("\n")[0]
            raise ValueError(f"device must be one that torch can use here; found {device!r}: {reason}") from error


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
