"""The compiled library and its CPU backend "cpp"."""

from __future__ import annotations

import ctypes
import os
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


def _find_isa_error() -> str | None:
    """Say that DEPTHLSTM_CPU_ISA names what the library or the CPU lacks; None where it does not."""
    ask = None if load_error is not None else getattr(ctypes.CDLL(str(LIBRARY)), "depthlstm_cpu_isa", None)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    if ask():
        return None
    # the operators' own words
    return (
        "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have them; "
        f"found {os.environ.get('DEPTHLSTM_CPU_ISA')}"
    )


isa_error = _find_isa_error()


def _why_not_here() -> str | None:
    return load_error or isa_error


def _status() -> BackendStatus:
    reason = _why_not_here()
    return BackendStatus(reason is None, reason or "C++ kernels for CPU tensors")


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
