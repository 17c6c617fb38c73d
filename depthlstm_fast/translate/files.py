"""Readers of files that a kill, a full disk or a broken copy may have damaged.

A reader returns everything that was written, or raises an error of one line that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class DamagedError(ValueError):
    """A file does not hold what was written to it; the message is one line."""


def safetensors_library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("tensors in files need safetensors: pip install safetensors") from error
    return safetensors


def check_values(path: Path, values: Any, wanted: Mapping[str, type]) -> None:
    """Check that ``values``, found in ``path``, is a dict with a value of the type in ``wanted`` for each name.

    Raises:
        DamagedError: it is not.
    """
    if not isinstance(values, dict):
        raise DamagedError(f"{path} must hold a JSON object; found {type(values).__name__}")
    for name, kind in wanted.items():
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            found = type(value).__name__ if name in values else "none"
            raise DamagedError(f"{path} must hold {name!r} of type {kind.__name__}; found {found}")


def read_json(path: Path, wanted: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Return the JSON object in ``path``, checked by ``check_values``.

    Raises:
        DamagedError: the file is cut, or holds something else.
    """
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{path} must be whole and hold JSON; found {' '.join(str(error).split()) or 'nothing'}"
        ) from None
    check_values(path, values, wanted or {})
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a safetensors file.

    Raises:
        DamagedError: the file is cut, or is not a safetensors file.
    """
    library = safetensors_library()
    if path.is_dir():
        raise DamagedError(f"{path} must be a safetensors file; found a folder")
    try:
        return library.torch.load_file(path)
    except (library.SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(f"{path} must be a whole safetensors file; found {' '.join(str(error).split())}") from None
