"""Build the library for this machine's GPU, as `make gpu` needs it.

The library has the CPU's kernels, and the CUDA kernels for that GPU alone. The build has a time limit.

    python -m depthlstm_fast.bench.gpu.build_library

The exit status is 0 if the library exists and is up to date. A run can go on without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from . import programs

LIMIT_SECONDS = 120.0
NVCC_PLACES = ("nvcc", "/usr/local/cuda/bin/nvcc")


def architecture() -> str | None:
    """Return the GPU's compute capability in the form of DEPTHLSTM_CUDA_ARCHS, such as "90"; None without a GPU."""
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else None


def has_nvcc() -> bool:
    home = os.environ.get("CUDA_HOME")
    return any(map(shutil.which, (*NVCC_PLACES, *([os.path.join(home, "bin", "nvcc")] if home else []))))


def runs_here() -> bool:
    """Return whether the present library has CUDA kernels for this GPU."""
    import depthlstm_fast as dl

    return dl.backends()["cuda"].available


def build(found: str | None, limit: float = LIMIT_SECONDS) -> str | None:
    """Build for the architecture ``found``, unless DEPTHLSTM_CUDA_ARCHS names others.

    Returns why there is no new library, or None.
    """
    variables = {"DEPTHLSTM_CUDA_ARCHS": os.environ.get("DEPTHLSTM_CUDA_ARCHS") or found} if found else {}
    process = programs.start([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], None, variables)
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return f"the build was stopped after {limit:.0f} s"
    finally:
        programs.stop(process)
    return f"the build ended with status {code}" if code else None


def main() -> int:
    found = architecture()
    if found and not has_nvcc() and runs_here():
        print("make gpu: there is no nvcc; the library stays as it is, with CUDA kernels for this GPU")
        return 0
    reason = build(found)
    if reason is not None:
        print(f"make gpu: {reason}; going on without what it would have brought")
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main())
