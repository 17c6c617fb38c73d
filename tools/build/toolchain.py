"""Tools that the build finds on this machine: torch, the C++ compiler, nvcc, ninja."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from settings import CUDA_ARCHS, NVCC_FLOOR, TORCH_FLOOR, TORCH_INSTALL, fail


def find_torch() -> tuple[Path, str]:
    """Return the folder and version of the installed torch.

    torch is not imported, because an isolated build cannot import it.
    """
    candidates = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        candidates += list(spec.submodule_search_locations)
    # in pip's isolated build these paths still point at the target environment
    candidates += [os.path.join(sysconfig.get_paths()[key], "torch") for key in ("purelib", "platlib")]
    wanted = ("version.py", "include/torch")
    folder = next(
        (folder for folder in map(Path, candidates) if all((folder / name).exists() for name in wanted)), None
    )
    if folder is None:
        fail(f"torch is not installed for {sys.executable}. Run: {TORCH_INSTALL} && pip install --no-build-isolation .")
    found = re.search(r"""__version__ = ['"](.+?)['"]""", (folder / "version.py").read_text(encoding="utf-8"))
    version = found.group(1) if found else "0.0"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_FLOOR:
        fail(f"torch {version} in {folder} is too old, 2.11 or newer is needed. Run: {TORCH_INSTALL}")
    return folder, version


def find_compiler() -> tuple[str, str]:
    """Return the C++ compiler and the first line of its version text; it must support C++20."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "c++", "clang++"]
    compiler = next((name for name in names if shutil.which(name.split()[0])), None)
    if compiler is None:
        fail(
            f"no C++ compiler found (looked for {', '.join(names)}). Install "
            f"one (Debian, Ubuntu: apt-get install g++) or set CXX."
        )
    about = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    identity = about[0] if about else compiler
    probe = (
        "#include <bit>\n#include <concepts>\ntemplate <std::integral T> "
        "T f(T x) { return x; }\nint main() { return f(0); }\n"
    )
    command = [*compiler.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(command, input=probe, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = next((line for line in result.stderr.splitlines() if "error" in line), "no reason given")
        fail(f"{identity} cannot compile C++20 ({reason.strip()}). Install g++ 11 or newer, or set CXX to one.")
    return compiler, identity


class Nvcc(NamedTuple):
    path: str
    version: str
    archs: list[str]
    library_folders: list[str]


def find_nvcc() -> Nvcc | str:
    """Return nvcc and its architectures, or the reason why the library is built without CUDA."""
    if os.environ.get("DEPTHLSTM_CUDA") == "0":
        return "DEPTHLSTM_CUDA=0"
    places = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if os.environ.get("CUDA_HOME"):
        places.insert(0, os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    path = next(filter(None, map(shutil.which, places)), None)
    if path is None:
        return "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"

    def ask(*words: str) -> str:
        # nvcc writes its dry run to the standard error
        return subprocess.run(
            [path, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        ).stdout

    version = re.search(r"release [\d.]+, V([\d.]+)", ask("--version"))
    if version is None:
        return f"{path} --version names no release"
    if tuple(map(int, version.group(1).split(".")))[:2] < NVCC_FLOOR:
        return f"nvcc {version.group(1)} is too old, 12.0 or newer is needed"
    archs = cuda_archs(version.group(1), set((ask("--list-gpu-code") + ask("--list-gpu-arch")).split()))
    # queried, because the nvcc on PATH may be a script that lies elsewhere
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", ask("--dryrun", "-x", "cu", os.devnull, "-o", "unused"), re.M)
    folders = [
        word.removeprefix("-L")
        for word in shlex.split(libraries.group(1) if libraries else "")
        if word.startswith("-L")
    ]
    return Nvcc(path, version.group(1), archs, folders)


def cuda_archs(version: str, known: set[str]) -> list[str]:
    """Return DEPTHLSTM_CUDA_ARCHS, or those of CUDA_ARCHS that this nvcc supports.

    "80" is machine code, "80-ptx" PTX.
    """
    wanted = re.findall(r"[^\s;,]+", os.environ.get("DEPTHLSTM_CUDA_ARCHS", ""))
    unknown = []
    for arch in wanted or CUDA_ARCHS:
        form = re.fullmatch(r"(\d+)(-ptx)?", arch)
        if form is None or int(form.group(1)) < 80:
            fail(
                f"DEPTHLSTM_CUDA_ARCHS must list compute capabilities from 8.0 on, "
                f'without their dot, as in "80;90;120-ptx"; found {arch!r}'
            )
        if ("compute_" if form.group(2) else "sm_") + form.group(1) not in known:
            unknown.append(arch)
    if wanted and unknown:
        fail(
            f"nvcc {version} does not know {', '.join(unknown)} of "
            f"DEPTHLSTM_CUDA_ARCHS; it knows {', '.join(sorted(known))}"
        )
    if unknown:
        print(
            f"depthlstm_fast: nvcc {version} does not know {', '.join(unknown)}, "
            f"which the CUDA kernels are then not compiled for"
        )
    return list(dict.fromkeys(wanted)) or [arch for arch in CUDA_ARCHS if arch not in unknown]


def gencode(archs: list[str]) -> list[str]:
    """Return nvcc's flags for the architectures.

    Machine code of one generation of GPUs comes from a single PTX, that of its oldest GPU. The generations are those
    before 10.0 and those from 10.0 on. Making PTX is half of nvcc's time. Between 8.0 and 9.0 the PTX differs in one
    conversion of bfloat16, and the machine code of the hot kernels is equal. From 10.0 on nvcc 13.0 uses another
    compiler, whose code is better. A library for one GPU has the machine code of a library for all.
    """
    codes: dict[str, list[str]] = {}
    for arch in archs:
        number = arch.removesuffix("-ptx")
        oldest = number if arch.endswith("-ptx") else "80" if int(number) < 100 else "100"
        codes.setdefault(oldest, []).append(f"compute_{number}" if arch.endswith("-ptx") else f"sm_{number}")
    return [
        word
        for oldest, made in codes.items()
        for word in ("-gencode", f"arch=compute_{oldest},code=[{','.join(made)}]")
    ]


def find_ninja() -> str:
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        local = Path(ninja.BIN_DIR) / "ninja"
        if local.is_file():
            return str(local)
    found = shutil.which("ninja") or shutil.which("ninja-build")
    if found is None:
        fail("ninja is not installed. Run: pip install ninja")
    return found
