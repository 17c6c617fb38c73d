"""Files of JSON and of tensors: the package's readers, and writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from depthlstm_fast.translate.files import DamagedError, check_values, read_json, read_tensors, safetensors_library

__all__ = ["DamagedError", "check_values", "read_json", "read_tensors", "to_json", "write_tensors"]


def to_json(values: Any, **options: Any) -> str:
    """Return ``values`` as JSON with a line feed at the end.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot express.
    """
    return json.dumps(values, ensure_ascii=False, allow_nan=False, **options) + "\n"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    library = safetensors_library()
    try:
        library.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except library.SafetensorError as error:
        raise OSError(f"{path} could not be written: {' '.join(str(error).split())}") from None
