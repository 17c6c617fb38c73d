"""The backend "cuda": the CUDA C++ kernels of the compiled library."""

from __future__ import annotations

import functools
import re

import torch
from torch import Tensor

from ..torch_private import constant_result
from . import library
from .record import GPU_FLOATS, Backend, BackendStatus

CAPABILITY_FLOOR = (8, 0)  # lowest compute capability that the kernels are written for
NO_GPU = "there is no GPU that torch can use"


def _find_cuda(architectures: tuple[str, ...]) -> str | None:
    """Say why this library and this torch cannot run CUDA kernels on any GPU; None where they can."""
    if library.load_error is not None:
        return library.load_error
    if not architectures:
        hint = "build from source where nvcc 12.0 or newer is found"
        return f"{library.LIBRARY.name} was built without CUDA kernels: {library.built_with('nvcc')}; {hint}"
    return None if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"


_architectures = tuple(re.findall(r"\d[^,]*", library.built_with("cuda")))
_error = _find_cuda(_architectures)


@constant_result
def gpu_limit(index: int | None) -> str | None:
    """Say why this build cannot run on the GPU ``index`` (None: the current one); None where it can."""
    return _known_gpu_limit(index)


@functools.cache
def _known_gpu_limit(index: int | None) -> str | None:
    if not torch.cuda.is_available():
        return NO_GPU
    return architecture_limit(torch.cuda.get_device_capability(index), _architectures)


def architecture_limit(capability: tuple[int, int], architectures: tuple[str, ...]) -> str | None:
    """Say why a GPU of this compute capability runs none of ``architectures``; None where it runs one.

    An architecture is "80" for machine code or "120-ptx" for PTX. Machine code runs on GPUs of the same major number
    and at least its minor number. PTX also runs on every later GPU.
    """
    major, minor = capability
    if capability < CAPABILITY_FLOOR:
        wanted = f"{CAPABILITY_FLOOR[0]}.{CAPABILITY_FLOOR[1]}"
        return f"the GPU has compute capability {major}.{minor}; the CUDA kernels need {wanted} or newer"
    for architecture in architectures:
        held = divmod(int(architecture.removesuffix("-ptx")), 10)
        if capability >= held and (capability[0] == held[0] or architecture.endswith("-ptx")):
            return None
    rebuild = f"build from source with DEPTHLSTM_CUDA_ARCHS={major}{minor}"
    return f"the GPU has compute capability {major}.{minor}; this build holds {_listed(architectures)}: {rebuild}"


def _listed(architectures: tuple[str, ...]) -> str:
    """Format names for a message: ("80", "90", "120-ptx") -> "80, 90 and PTX for 120"."""
    names = [f"PTX for {name.removesuffix('-ptx')}" if name.endswith("-ptx") else name for name in architectures]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _why_not_here() -> str | None:
    return _error


def _why_not_on(tensor: Tensor) -> str | None:
    return gpu_limit(tensor.device.index)


def _status() -> BackendStatus:
    error = _error or gpu_limit(None)
    return BackendStatus(error is None, error or f"CUDA C++ kernels for {_listed(_architectures)}")


CUDA = Backend(
    name="cuda",
    title="CUDA",
    prefix="cuda_",
    automatic_for="cuda",
    devices="CUDA",
    device_types=("cuda",),
    dtypes=GPU_FLOATS,
    widest={"depth_lstm": None},
    status=_status,
    why_not_here=_why_not_here,
    why_not_on=_why_not_on,
    writes_into_buffer=True,
    adds_second_product=True,
)
