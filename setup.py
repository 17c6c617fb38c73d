"""Build depthlstm_fast/_C.abi3.so with the C++ compiler, nvcc if present, and ninja.

The library uses PyTorch's stable ABI only, and torch.ops.load_library loads it. It is not a Python extension module.
One binary therefore serves every Python and every torch from 2.11 on. It contains CUDA's run-time library.
tools/build/ninja_build.py says how each file of csrc/ is compiled. ninja makes rebuilds incremental; the objects stay
in build/.

    python setup.py build_ext --inplace    the library, into depthlstm_fast/
    python setup.py build_internals        tests/_internals.*.so: csrc/testing.cpp, a pybind11 module for the tests only
    python setup.py build_smoke            build/*/smoke: tests/cpp/smoke*.cpp, the kernels without Python and torch

Environment: CXX, MAX_JOBS, CUDA_HOME (else nvcc of PATH, else /usr/local/cuda), and with the prefix DEPTHLSTM_:

    SANITIZE=address,undefined     own build folder, no CUDA
    TESTING=1                      build_ext builds the internals, too
    NO_EXTENSION=1                 install the pure PyTorch part only
    CUDA=0                         no CUDA kernels
    CUDA_ARCHS="80;90;120-ptx"     machine code for GPUs of compute capability 8.0 and 9.0, PTX for 12.0 and later
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools" / "build"))

from ninja_build import NinjaBuild  # noqa: E402
from settings import FAILURE_FILE  # noqa: E402
from toolchain import Nvcc  # noqa: E402


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        builder = NinjaBuild()
        built = builder.library()
        target = Path(self.get_ext_fullpath(ext.name))
        place(built, target)
        FAILURE_FILE.unlink(missing_ok=True)
        if builder.changed:
            if isinstance(builder.nvcc, Nvcc):
                print(
                    f"depthlstm_fast: CUDA C++ kernels for {', '.join(builder.nvcc.archs)} "
                    f"by nvcc {builder.nvcc.version}"
                )
            else:
                print(f"depthlstm_fast: CUDA C++ kernels are not part of this build: {builder.nvcc}")
        if os.environ.get("DEPTHLSTM_TESTING") == "1":
            place_internals(builder)


class BuildInternals(Command):
    description = "build the pybind11 module that the tests use"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None: ...

    def finalize_options(self) -> None: ...

    def run(self) -> None:
        place_internals(NinjaBuild())


class BuildSmoke(BuildInternals):
    description = "build tests/cpp/smoke*.cpp, the kernels without Python and torch"

    def run(self) -> None:
        built = NinjaBuild().smoke()
        if built is not None:
            print(built)


def place(built: Path, target: Path) -> None:
    """Copy by rename: a process that has mapped the old library keeps it intact."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    shutil.copy2(built, partial)
    os.replace(partial, target)


def place_internals(builder: NinjaBuild) -> None:
    built = builder.internals()
    if built is not None:
        place(built, ROOT / "tests" / built.name)


def extensions() -> list[Extension]:
    if os.environ.get("DEPTHLSTM_NO_EXTENSION") == "1":
        return []
    if not sys.platform.startswith("linux"):
        print(
            f"depthlstm_fast: the compiled kernels are built on Linux only; on "
            f"{sys.platform} the reference backend is installed alone"
        )
        return []
    return [Extension("depthlstm_fast._C", sources=[], py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension, "build_internals": BuildInternals, "build_smoke": BuildSmoke},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
