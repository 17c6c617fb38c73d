"""Which implementation runs: "auto" takes the fastest that can, a backend asked for by name runs or raises."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, sharding
from .callable_module import make_callable
from .measured import FASTEST
from .modes import is_jit_tracing, is_transformed

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
LIBRARY = Path(__file__).with_name("_C.abi3.so")

logger = logging.getLogger("depthlstm_fast")


class BackendStatus(NamedTuple):
    """Whether a backend can run here, and a line on what it is or why it cannot."""

    available: bool
    detail: str


def _load_library() -> str | None:
    """Load the compiled extension. Returns None, or the reason why there is none: import must never fail."""
    if not LIBRARY.exists():
        install = "pip install --no-build-isolation ., and in a checkout -e ."
        return f"{LIBRARY.name} is not beside the package: the extension was not built in {LIBRARY.parent} ({install})"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} did not load: {error}"
    return None


load_error = _load_library()
TRITON_MAX_FEATURES = 8192  # kernels/gates.py: a row of more does not fit the registers of a multiprocessor
TRITON_FLOOR = (3, 6)
CUDA_FLOOR = (8, 0)  # the compute capability that csrc/cuda is written for
NO_GPU = "there is no GPU that torch can use"


def _built_with(name: str) -> str:
    """An entry of the library's build stamp, which setup.py writes."""
    if load_error is not None:
        return "none"
    ask = ctypes.CDLL(str(LIBRARY)).depthlstm_build_info
    ask.restype = ctypes.c_char_p
    found = re.search(rf";{name}=([^;]*)", ask().decode())
    return found.group(1) if found else "none"


def _find_cuda(architectures: tuple[str, ...]) -> str | None:
    """Why this library and this torch cannot run CUDA kernels on any GPU; None where they can."""
    if load_error is not None:
        return load_error
    if not architectures:
        hint = "build from source where nvcc 12.0 or newer is found"
        return f"{LIBRARY.name} was built without CUDA kernels: {_built_with('nvcc')}; {hint}"
    return None if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"


def _find_triton() -> str | None:
    """Look for Triton without importing it, which takes half a second. Returns None, or the reason why it cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if not isinstance(version, str):
        return None  # a checkout, a renamed wheel, or what an interrupted pip left: its import will tell
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return f"Triton {version} is too old, {TRITON_FLOOR[0]}.{TRITON_FLOOR[1]} or newer is needed" if found < TRITON_FLOOR else None


@functools.cache
def _import_kernels() -> str | None:
    """Import the Triton kernels. Returns None, or the reason why that fails."""
    try:
        from .kernels import gates  # noqa: F401
    except Exception as error:  # noqa: BLE001
        return f"Triton's kernels do not import: {type(error).__name__}: {error}"
    return None


_cuda_architectures = tuple(re.findall(r"\d[^,]*", _built_with("cuda")))
_cuda_error = _find_cuda(_cuda_architectures)
_triton_error = _find_triton()
_triton_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_strict = os.environ.get("DEPTHLSTM_STRICT", "0") not in ("", "0")
_default = os.environ.get("DEPTHLSTM_BACKEND") or "auto"
_last: str | None = None
_logged: set[str] = set()


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with whether it can run here and why not."""
    triton_error, cuda_error = _triton_error, _cuda_error or _gpu_limit(None)
    if triton_error is None and not _triton_interpreted and not torch.cuda.is_available():
        triton_error = NO_GPU
    if triton_error is None:
        triton_error = _import_kernels()
    interpreted = "Triton kernels, interpreted on the CPU (TRITON_INTERPRET=1): slow, for tests"
    return {
        "reference": BackendStatus(True, "plain PyTorch, any device"),
        "cpp": BackendStatus(load_error is None, load_error or "C++ kernels for CPU tensors"),
        "cuda": BackendStatus(cuda_error is None, cuda_error or f"CUDA C++ kernels for {_listed(_cuda_architectures)}"),
        "triton": BackendStatus(triton_error is None, triton_error or (interpreted if _triton_interpreted else "Triton kernels for GPUs")),
    }


def set_backend(name: str) -> None:
    """Set the backend of every call that names none, for the whole process.

    Raises:
        ValueError: ``name`` is not "auto", "reference", "cpp", "cuda" or "triton".
    """
    global _default
    checks.check_name("name", name, BACKENDS)
    _default = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use ``name`` as :func:`set_backend` does, until the end of the ``with`` block."""
    global _default
    before = _default
    set_backend(name)
    try:
        yield
    finally:
        _default = before


def last_backend() -> str | None:
    """The backend that ran last in this process, or None before the first call."""
    return _last


def choose(requested: str | None, tensor: Tensor, features: int) -> str:
    """The backend that runs a call on ``tensor`` with D = ``features``: the requested one, else the default, else the fastest that can.

    Raises:
        ValueError: the requested backend is unknown, or cannot run this call.
        RuntimeError: "auto" would fall back and DEPTHLSTM_STRICT=1 forbids it.
    """
    global _last
    name = _default if requested is None else requested
    if name == "auto":
        name = _fastest(tensor, features)
    elif name != "reference":
        limit = _limit(name, tensor, features)
        if limit is not None:
            # set_backend lets no unknown name in, so an unknown default is the environment's
            checks.check_name("DEPTHLSTM_BACKEND" if requested is None else "backend", name, BACKENDS)
            raise ValueError(f"backend={name!r} cannot run this call: {limit}")
    _last = name
    return name


def _fastest(tensor: Tensor, features: int) -> str:
    """What "auto" takes: the first that can run of the device's backends, the measured winner before the others."""
    candidates = ["cpp"] if tensor.device.type == "cpu" else ["triton", "cuda"]
    if FASTEST and tensor.device.type == "cuda":
        winner = FASTEST.get((_gpu_name(tensor.device.index), features, tensor.dtype))
        candidates.sort(key=lambda name: name != winner)
    limits: list[str] = []
    for name in candidates:
        limit = _limit(name, tensor, features)
        if limit is None:
            return name
        if limit not in limits:
            limits.append(limit)
    # export asks for the decomposition, which is no fallback
    if not is_exporting():
        _report_fallback("; ".join(limits))
    return "reference"


def _limit(name: str, tensor: Tensor, features: int) -> str | None:
    """Why the backend ``name`` cannot run a call on ``tensor``; None where it can."""
    if name == "cpp":
        if load_error is not None:
            return load_error
        if tensor.device.type != "cpu":
            return f"the C++ kernels take CPU tensors; found {tensor.device}"
    elif name == "triton":
        limit = triton_limit(tensor, features)
        if limit is not None:
            return limit
    elif name == "cuda":
        limit = cuda_limit(tensor, features)
        if limit is not None:
            return limit
    else:
        return "there is no such backend"
    if is_exporting():
        return "export takes the decomposition into PyTorch operators"
    if not torch.compiler.is_compiling():
        if is_transformed():
            return "torch.func transforms need the decomposition into PyTorch operators"
        if torch.autograd.forward_ad._current_level >= 0:
            return "forward-mode differentiation needs the decomposition into PyTorch operators"
    return None if type(tensor) is Tensor else sharding.limit(tensor)


def is_exporting() -> bool:
    """Whether torch.export or torch.onnx.export records this call, into PyTorch operators that need no library of ours."""
    # not torch.compiler.is_exporting: under torch.compile torch 2.11 takes that for True
    if getattr(torch.compiler, "_is_exporting_flag", False):
        return True
    return not torch.compiler.is_compiling() and is_jit_tracing() and torch.onnx.is_in_onnx_export()


def cuda_limit(tensor: Tensor, features: int) -> str | None:
    """Why the CUDA C++ kernels cannot take ``tensor``; None where they can. They take any D that the other checks let pass."""
    if _cuda_error is not None:
        return _cuda_error
    if tensor.device.type != "cuda":
        return f"the CUDA kernels take CUDA tensors; found {tensor.device}"
    if tensor.dtype == torch.float64:
        return "the CUDA kernels take float32, bfloat16 and float16; found float64"
    return _gpu_limit(tensor.device.index)


def _constant(function: Any) -> Any:
    """What torch.compiler.assume_constant_result does, without importing torch._dynamo for it: tracers do not look inside."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _gpu_limit(index: int | None) -> str | None:
    """Why this build cannot run on the GPU of that index, or on the current one; None where it can."""
    return _known_gpu_limit(index)


@functools.cache
def _known_gpu_limit(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return NO_GPU
    return architecture_limit(torch.cuda.get_device_capability(index), _cuda_architectures)


@_constant
def _gpu_name(index: int) -> str:
    return _known_gpu_name(index)


_known_gpu_name = functools.cache(torch.cuda.get_device_name)


def architecture_limit(capability: tuple[int, int], architectures: tuple[str, ...]) -> str | None:
    """Why a GPU of this compute capability runs none of ``architectures``, as in ("80", "120-ptx"); None where it runs one.

    Machine code runs on GPUs of the same major number and at least its minor one, PTX on every later GPU, too.
    """
    major, minor = capability
    if capability < CUDA_FLOOR:
        return f"the GPU has compute capability {major}.{minor}; the CUDA kernels need {CUDA_FLOOR[0]}.{CUDA_FLOOR[1]} or newer"
    for architecture in architectures:
        held = divmod(int(architecture.removesuffix("-ptx")), 10)
        if capability >= held and (capability[0] == held[0] or architecture.endswith("-ptx")):
            return None
    rebuild = f"build from source with DEPTHLSTM_CUDA_ARCHS={major}{minor}"
    return f"the GPU has compute capability {major}.{minor}; this build holds {_listed(architectures)}: {rebuild}"


def _listed(architectures: tuple[str, ...]) -> str:
    """("80", "90", "120-ptx") -> "80, 90 and PTX for 120"."""
    names = [f"PTX for {name.removesuffix('-ptx')}" if name.endswith("-ptx") else name for name in architectures]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def triton_limit(tensor: Tensor, features: int) -> str | None:
    """Why the Triton kernels cannot take ``tensor`` with D = ``features``; None where they can."""
    if _triton_error is not None:
        return _triton_error
    if tensor.device.type != "cuda" and not (_triton_interpreted and tensor.device.type == "cpu"):
        return f"the Triton kernels take CUDA tensors, or with TRITON_INTERPRET=1 CPU tensors; found {tensor.device}"
    if tensor.dtype == torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16; found float64"
    if features > TRITON_MAX_FEATURES:
        return f"the Triton kernels take D up to {TRITON_MAX_FEATURES}; found {features}"
    if not torch.compiler.is_compiling():
        error = _import_kernels()
        if error is not None:
            return error
    return None


def _report_fallback(limit: str) -> None:
    if _strict:
        raise RuntimeError(f"DEPTHLSTM_STRICT=1 forbids the fallback to the reference backend: {limit}")
    if not torch.compiler.is_compiling() and limit not in _logged:
        _logged.add(limit)
        logger.warning("falling back to the reference backend: %s", limit)


make_callable(backends)
