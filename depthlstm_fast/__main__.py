"""Report for bug reports: `python -m depthlstm_fast`.

The report explains what is missing and never fails.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "_C.abi3.so"
BUILD_FAILURE = FOLDER / "_C.build_failed.txt"  # written by setup.py
STAMP = re.compile(rb"depthlstm_fast build: ([^\x00]+)\x00")
AVX512_FLAGS = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"}
AVX512_BF16_FLAGS = AVX512_FLAGS | {"avx512_bf16", "avx512_vnni"}
CPU_FLAGS = {"avx2": {"avx2", "fma", "f16c"}, "avx512": AVX512_FLAGS, "avx512_bf16": AVX512_BF16_FLAGS}
VARIABLES = re.compile(r"DEPTHLSTM_|OMP_|MKL_|KMP_|GOMP_|CUDA_VISIBLE_DEVICES$|TRITON_INTERPRET$|LD_PRELOAD$")


def package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent" if importlib.util.find_spec(name) is None else "present, version unknown"


def own_version() -> str:
    import depthlstm_fast

    return f"{depthlstm_fast.__version__} in {FOLDER}"


def torch_version() -> str:
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if getattr(torch.version, "hip", None):
        built_for = f"ROCm {torch.version.hip}"
    return f"{torch.__version__} ({built_for})"


def operating_system() -> str:
    return " ".join([platform.platform(), *filter(None, platform.libc_ver())])


def cpu_info() -> dict[str, str]:
    """Return the first processor's entries in /proc/cpuinfo, or an empty dict without that file."""
    source = Path("/proc/cpuinfo")
    if not source.is_file():
        return {}
    first = source.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def cpu_model() -> str:
    return (
        f"{cpu_info().get('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"
    )


def cpu_isas() -> str:
    flags = set(cpu_info().get("flags", "").split())
    return ", ".join(["generic", *(name for name, needed in CPU_FLAGS.items() if needed <= flags)])


def chosen_isa() -> str:
    if library_problem() is not None:
        return "none, the library is not loaded"
    ask = ctypes.CDLL(str(LIBRARY)).depthlstm_cpu_isa
    ask.restype = ctypes.c_char_p
    chosen = ask().decode()
    return chosen or f"none: DEPTHLSTM_CPU_ISA={os.environ.get('DEPTHLSTM_CPU_ISA')} is not one this CPU has"


def library_problem() -> str | None:
    """Say why the compiled library cannot be used; None when it loads."""
    if not LIBRARY.is_file():
        if BUILD_FAILURE.is_file():
            return "not built. " + BUILD_FAILURE.read_text(encoding="utf-8", errors="replace").strip()
        command = "pip install --no-build-isolation . (in a checkout: python setup.py build_ext --inplace)"
        return f"{LIBRARY.name} is not in {FOLDER}. Build it: {command}"
    try:
        # torch.ops.load_library hides the loader's message behind a second exception.
        ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        command = "pip install --no-build-isolation --force-reinstall --no-deps ."
        return f"does not load: {error}. Rebuild it for torch {torch.__version__}: {command}"
    return None


def library() -> str:
    return library_problem() or f"loaded, {LIBRARY}, {LIBRARY.stat().st_size} bytes"


def build_stamp() -> str:
    """Return the library's build stamp.

    The stamp is read from the file's bytes, so that a library that does not load still says what it was built for.
    """
    if not LIBRARY.is_file():
        return "none"
    found = STAMP.search(LIBRARY.read_bytes())
    return found.group(1).decode("utf-8", errors="replace").replace(";", "; ") if found else "no stamp in the library"


def cuda_kernels() -> str:
    entries = dict(re.findall(r"(\w+)=([^;]*)", build_stamp()))
    if entries.get("cuda", "none") == "none":
        return f"none ({entries.get('nvcc', 'there is no library')})"
    return f"for compute capability {entries['cuda'].replace(',', ', ')}, by nvcc {entries['nvcc']}"


def threads() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"torch uses {torch.get_num_threads()} threads, {usable} cores usable by this process"


def devices() -> str:
    if not torch.cuda.is_available():
        return "cpu (torch sees no CUDA device)"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index} {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory >> 20} MiB"
        )
    return "; ".join(["cpu", *found])


def environment() -> str:
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if VARIABLES.match(name)]
    return " ".join(found) or "none of DEPTHLSTM_*, OMP_*, MKL_* set"


def environment_faults() -> str:
    from depthlstm_fast.backends.choice import environment_faults

    return "; ".join(environment_faults()) or "none"


def backend_lines() -> list[tuple[str, str]]:
    from depthlstm_fast.backends import backends

    found = backends().items()
    return [
        (f"backend {name}", f"{'available' if status.available else 'not available'}: {status.detail}")
        for name, status in found
    ]


SECTIONS: list[tuple[str, Callable[[], str]]] = [
    ("depthlstm_fast", own_version),
    ("python", lambda: f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})"),
    ("torch", torch_version),
    ("triton", lambda: package_version("triton")),
    ("system", operating_system),
    ("cpu", cpu_model),
    ("cpu instruction sets", cpu_isas),
    ("chosen", chosen_isa),
    ("threads", threads),
    ("devices", devices),
    ("library", library),
    ("built with", build_stamp),
    ("cuda kernels", cuda_kernels),
    ("environment", environment),
    ("wrong variables", environment_faults),
]


def guarded(ask: Callable[[], str]) -> str:
    """Return the answer of ``ask``, or its error as text.

    An error becomes its own line, because a report that stopped there would hide the rest.
    """
    try:
        return ask()
    except Exception as error:  # noqa: BLE001
        return f"unknown ({type(error).__name__}: {error})"


def report() -> str:
    """Return the report as text, one `name: value` a line."""
    lines = [(name, guarded(ask)) for name, ask in SECTIONS]
    try:
        lines += backend_lines()
    except Exception as error:  # noqa: BLE001
        lines.append(("backends", f"unknown ({type(error).__name__}: {error})"))
    width = max(len(name) for name, _ in lines) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in lines)


def main(arguments: list[str] | None = None) -> int:
    """Return 0, also where the reader has gone, or 1 if the report cannot be written."""
    from depthlstm_fast.command_line import Parser

    Parser(prog="python -m depthlstm_fast", description="Print a report for bug reports.").parse_args(arguments)
    try:
        print(report(), flush=True)
    except OSError as error:
        # what is left in the buffer would be written, and fail, again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"python -m depthlstm_fast: the report cannot be written: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
