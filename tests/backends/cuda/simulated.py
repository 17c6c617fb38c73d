"""The operators of the CUDA backend on CPU tensors, with other kernels.

They are csrc/depth_lstm/cuda_op.cpp, unchanged, in a separate namespace.

``load`` puts the simulated CUDA kernels (ptx_simulator) below them. ``stand_in`` puts the CPU kernels
(cpp/cuda_stand_in.cpp) below them, for tests of the binding alone, which need no nvcc. ``use`` makes either of them the
"cuda" backend for CPU tensors during a test.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ptx_simulator.build import Lock, available, build

from depthlstm_fast.backends.choice import RECORDS
from depthlstm_fast.backends.record import Backend
from depthlstm_fast.ops.depth_lstm import OP
from depthlstm_fast.ops.registry import OPERATORS, Operators, add_backend

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
HEADERS = sorted((*CSRC.glob("common/**/*.h"), *CSRC.glob("depth_lstm/*.h")))
BUILD = ROOT / "build" / "simulated"
OBJECTS = [ROOT / "build" / "ninja" / name for name in ("depth_lstm/cpu_kernel.generic.o", "common/isa.o")]
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", f"-I{CSRC}"]


def _built(name: str, sources: list[Path], flags: list[str], headers: list[Path]) -> Path:
    """Return a shared library of ``sources``, compiled again after a change of them, the headers or the flags."""
    if shutil.which(COMPILER.split()[0]) is None:
        pytest.skip(f"no C++ compiler: {COMPILER}")
    command = [*COMPILER.split(), *FLAGS, *map(str, sources), *flags]
    digest = hashlib.sha256("\0".join([torch.__version__, *command]).encode())
    for path in [*sources, *headers]:
        digest.update(path.read_bytes())
    target = BUILD / f"{name}-{digest.hexdigest()[:16]}.so"
    with Lock(BUILD / name):  # another process may be making the same
        if not target.is_file():
            for old in BUILD.glob(f"{name}-*.so"):
                old.unlink(missing_ok=True)
            partial = target.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.replace(target)
    return target


def _operators(namespace: str, kernels: Path) -> Operators:
    """Return the operators on top of a library that has the functions of csrc/depth_lstm/cuda.h."""
    torch_folder = Path(torch.__file__).parent
    flags = [
        *(
            f"-DDEPTHLSTM_SIMULATED={namespace}",
            '-DDEPTHLSTM_CUDA_ARCHS="a simulated GPU"',
            "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
        ),
        *(
            "-isystem",
            str(torch_folder / "include"),
            str(kernels),
            f"-Wl,-rpath,{kernels.parent}",
            "-Wl,--no-undefined",
        ),
        *(f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath-link,{torch_folder / 'lib'}"),
    ]
    torch.ops.load_library(
        str(
            _built(
                namespace, [CSRC / "depth_lstm" / "cuda_op.cpp", CSRC / "common" / "cpu" / "pool.cpp"], flags, HEADERS
            )
        )
    )
    found = add_backend(OP, RECORDS["cuda"], namespace)
    assert found is not None
    return found


@functools.cache
def kernels() -> Path:
    """Return the CUDA kernels, compiled for the simulator.

    As in setup.py a source named *_kernel.cu is compiled once for each dtype of z.
    """
    reason = available()
    if reason is not None:
        pytest.skip(f"no simulated CUDA kernels: {reason}")
    units: list[tuple[Path, list[str]]] = []
    for source in sorted(CSRC.glob("depth_lstm/cuda_*.cu")):
        dtypes = ("float", "bfloat16", "float16") if source.stem.endswith("_kernel") else ()
        include = f"-I{CSRC}"
        units += [(source, [include, f"-DDEPTHLSTM_Z={z}", f"-DDEPTHLSTM_Z_{z.upper()}=1"]) for z in dtypes] or [
            (source, [include])
        ]
    BUILD.mkdir(parents=True, exist_ok=True)
    return build([], BUILD / "libdepthlstm_cuda_simulated.so", units=units)


@functools.cache
def load() -> Operators:
    """Return the operators on the simulated CUDA kernels; skip the test, with a reason, if that is impossible."""
    return _operators("depthlstm_fast_simulated", kernels())


@functools.cache
def _stand_in_library() -> Path:
    if not all(path.is_file() for path in OBJECTS):
        pytest.skip("the CPU kernels were not built in this tree (python setup.py build_ext --inplace)")
    return _built("cuda_stand_in", [ROOT / "tests" / "cpp" / "cuda_stand_in.cpp", *OBJECTS], [], HEADERS)


@functools.cache
def stand_in() -> Operators:
    """Return the operators on the CPU kernels; skips as :func:`load` does."""
    return _operators("depthlstm_fast_stand_in", _stand_in_library())


def fail_once(error: int) -> None:
    """Make the next call of the stand-in return ``error``; a negative error fails its next workspace query."""
    ctypes.CDLL(str(_stand_in_library())).stand_in_fails(error)


def anywhere(record: Backend) -> Backend:
    """Return the backend as available on this machine, for tensors of every device."""
    return dataclasses.replace(
        record, device_types=("cpu", "cuda", "meta"), why_not_here=lambda: None, why_not_on=lambda tensor: None
    )


def use(monkeypatch: pytest.MonkeyPatch, operators: Operators) -> None:
    """Make ``operators`` the "cuda" backend, for CPU tensors, until the end of the test."""
    monkeypatch.setitem(OPERATORS["depth_lstm"], "cuda", operators)
    monkeypatch.setitem(RECORDS, "cuda", anywhere(RECORDS["cuda"]))
