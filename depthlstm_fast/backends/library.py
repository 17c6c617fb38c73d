"""The compiled library and its CPU backend "cpp"."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

from ..checks import FLOATS
from .record import Backend, BackendStatus

LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"


def _load_library() -> str | None:
    """Load the compiled extension and return None, or the reason why it is missing.

    A missing extension must not make the import fail.
    """
    if not LIBRARY.exists():
        install = "pip install --no-build-isolation ., and in a checkout -e ."
        return f"{LIBRARY.name} is not beside the package: the extension was not built in {LIBRARY.parent} ({install})"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} did not load: {error}"
    return None


load_error = _load_library()


def built_with(name: str) -> str:
    """Return an entry of the library's build stamp, which setup.py writes."""
    if load_error is not None:
        return "none"
    ask = ctypes.CDLL(str(LIBRARY)).depthlstm_build_info
    ask.restype = ctypes.c_char_p
    found = re.search(rf";{name}=([^;]*)", ask().decode())
    return found.group(1) if found else "none"


def _why_not_here() -> str | None:
    return load_error


def _status() -> BackendStatus:
    return BackendStatus(load_error is None, load_error or "C++ kernels for CPU tensors")


CPP = Backend(
    name="cpp",
    title="C++",
    prefix="",
    automatic_for="cpu",
    devices="CPU",
    device_types=("cpu",),
    dtypes=FLOATS,
    widest=dict.fromkeys(
        ("depth_lstm", "depth_gru_gates", "norm_step", "siamese_step", "layer_mix", "layer_attend"), None
    ),
    status=_status,
    why_not_here=_why_not_here,
)
