"""Settings of the build: folders, versions, flags, instruction sets, architectures."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M).group(1)  # type: ignore[union-attr]
TORCH_FLOOR = (2, 11)
TORCH_TARGET = "0x020b000000000000ULL"  # the stable ABI of 2.11: newer headers then bind no newer symbol
TORCH_INSTALL = "pip install torch==2.13.0"
LIBRARY = "_C.abi3.so"
FAILURE_FILE = ROOT / "depthlstm_fast" / "_C.build_failed.txt"  # read by `python -m depthlstm_fast`

COMMON_FLAGS = [
    *(
        "-std=c++20",
        "-O3",
        "-DNDEBUG",
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-Wall",
        "-Wextra",
    ),
    # errno and trap flags block vectorisation. NaN and infinity keep their meaning, so -ffast-math is not used.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
]
AVX512_FLAGS = [
    # xsimd needs CD beside DQ; gcc 12 warns of its own _mm512_undefined_ps
    *("-mavx512f", "-mavx512cd", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
ISA_FLAGS = {
    "generic": ["-march=x86-64"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"],  # every CPU with BF16 has VNNI
}
CUDA_ARCHS = ["80", "90", "100", "100-ptx"]  # the PTX is for 12.0 and later; PTX of 10.0 costs no second pass
CUDA_DTYPES = ["float", "bfloat16", "float16"]
NVCC_FLOOR = (12, 0)  # the first version with C++20
NVCC_FLAGS = ["-O3", "-std=c++20", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
# the shared run-time library would break the import on a CPU torch
CUDA_LINK = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def fail(message: str) -> NoReturn:
    """End the build with one readable line instead of a traceback, and keep the line for the report command."""
    text = f"depthlstm_fast: {message}"
    FAILURE_FILE.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(f"\nerror: {text}\n")


def isas() -> dict[str, list[str]]:
    # a minute a set; the others differ in vector instructions alone and meet guard pages in tests/cpp/
    if sanitizers():
        return {"generic": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ISA_FLAGS
    return {"generic": []}


def sanitizers() -> str:
    return ",".join(part.strip() for part in os.environ.get("DEPTHLSTM_SANITIZE", "").split(",") if part.strip())
