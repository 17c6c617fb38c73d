"""Builds of shared libraries whose CUDA kernels run on the CPU."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .translate import translate

HERE = Path(__file__).resolve().parent
RUNTIME = HERE / "runtime"
COMPILER = os.environ.get("CXX", "g++")
STANDARD = "-std=c++20"
# sanitizers name the lines of a .cu file in their reports; the simulator names them without debug information
MODES = {"plain": (), "asan": ("-g1", "-fsanitize=address"), "tsan": ("-g1", "-fsanitize=thread")}
# IEEE arithmetic; a register's bits are read as any type; hidden symbols keep out other CUDA runtimes of the process
FLAGS = (STANDARD, "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
LIBRARY = ("-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs")
UNCHECKED = ("fiber.cpp", "scheduler.cpp", "launch.cpp")  # compiled without sanitizers, the same in all modes
CHECKED = ("copy.cpp",)
CUDA_RUNTIME = "cuda_runtime.cpp"
ERROR_LINES = 25
# shared by all folders, processes and test runs; `make clean` removes it
CACHE = HERE.parents[1] / "build" / "ptx_simulator"
KEPT_DAYS = 14


def available() -> str | None:
    """Say why nothing can be built here, or None."""
    if platform.system() != "Linux":
        return "the simulator runs on Linux"
    return next((f"there is no {program}" for program in ("nvcc", COMPILER) if shutil.which(program) is None), None)


def run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr + result.stdout).strip().splitlines()
        raise RuntimeError("\n".join((" ".join(words), *lines[:ERROR_LINES])))
    return result.stdout


def digest(*parts: str | bytes | Path) -> str:
    """Return the digest of strings, and of the contents of files."""
    result = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        result.update(hashlib.sha256(data).digest())
    return result.hexdigest()


@functools.cache
def version(program: str) -> str:
    return run(program, "--version")


def own_files() -> list[Path]:
    own = [path for path in HERE.glob("*.py") if not path.name.startswith(("test_", "ptx_"))]
    return sorted((*own, *RUNTIME.glob("*.h"), *RUNTIME.glob("*.cpp")))


class Step:
    """A file that a command makes; it is made again only after a change of its dependencies."""

    def __init__(self, output: Path, *key: str | Path) -> None:
        self.output = output
        self.key = key
        self.stamp = output.with_name(output.name + ".stamp")

    def is_done(self) -> bool:
        """Return whether the key and the files read the last time are unchanged."""
        if not self.output.exists() or not self.stamp.exists():
            return False
        recorded, *files = self.stamp.read_text(encoding="utf-8").splitlines()
        paths = [Path(file) for file in files]
        return all(path.exists() for path in paths) and recorded == digest(*self.key, *paths)

    def done(self, files: Iterable[Path] = ()) -> None:
        paths = list(files)
        self.stamp.write_text("\n".join((digest(*self.key, *paths), *map(str, paths))) + "\n", encoding="utf-8")


class Lock:
    """A lock that allows one build at a time in a folder, over all processes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "lock").open("w")

    def __enter__(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def cached(key: Sequence[str | Path], outputs: Sequence[Path], make: Callable[[], object]) -> bool:
    """Make ``outputs``, or copy earlier ones of the same key; return whether they were made."""
    entry = CACHE / digest(*key)[:32]
    done, kept = entry / "done", [entry / str(number) for number in range(len(outputs))]
    with Lock(entry):
        if done.exists():
            done.touch()
            for file, output in zip(kept, outputs, strict=True):
                shutil.copyfile(file, output)
            return False
        make()
        for file, output in zip(kept, outputs, strict=True):
            shutil.copyfile(output, file)
        done.touch()
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for other in CACHE.glob("*/done"):
        if other.stat().st_mtime < oldest:
            shutil.rmtree(other.parent, ignore_errors=True)
    return True


def headers(source: Path, flags: Sequence[str]) -> list[Path]:
    """Return the headers beside the source and below the folders of its -I flags.

    The compiler's version stands for its own headers.
    """
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    found = [*source.parent.glob("*.h"), *source.parent.glob("*.cuh")]
    found += [path for folder in folders for suffix in ("h", "cuh") for path in folder.rglob(f"*.{suffix}")]
    return sorted(found)


def dependencies(makefile: Path) -> list[Path]:
    """Return the files that a compiler wrote into a makefile's rule."""
    text = makefile.read_text(encoding="utf-8").replace("\\\n", " ")
    names = re.split(r"(?<!\\)\s+", text.partition(":")[2].strip())
    return [Path(name.replace("\\ ", " ")) for name in names if name]


def compile_cpp(source: Path, output: Path, *flags: str) -> Path:
    command = (COMPILER, *FLAGS, *flags, f"-I{RUNTIME}", "-c", source, "-o", output)
    step = Step(output, version(COMPILER), *map(str, command), source, *sorted(RUNTIME.glob("*.h")))
    if not step.is_done():
        key = (version(COMPILER), *FLAGS, *flags, source.name, source, *sorted(RUNTIME.glob("*.h")))
        cached(key, [output], lambda: run(*command))
        step.done()
    return output


def compile_cuda(source: Path, stem: Path, flags: Sequence[str]) -> tuple[Path, Path]:
    """Return the object of a source's host code, and the PTX of its kernels.

    One call of nvcc makes both and assembles nothing.
    """
    host, rule, kept = stem.with_suffix(".host.o"), stem.with_suffix(".host.o.d"), stem.with_suffix(".kept")
    ptx = kept / f"{source.stem}.ptx"
    command = (
        "nvcc",
        STANDARD,
        *flags,
        "-lineinfo",
        "-Xcompiler",
        "-fPIC",
        "--keep",
        "--keep-dir",
        kept,
        "-c",
        source,
        "-o",
        host,
    )
    step = Step(host, version("nvcc"), *map(str, command))
    if not step.is_done() or not ptx.exists():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        # without the names of folders, so that a copy of the sources elsewhere makes the same code
        named = (STANDARD, *(flag for flag in flags if not flag.startswith("-I")), source.name)
        if cached(
            (version("nvcc"), *named, source, *headers(source, flags)),
            [host, ptx],
            lambda: run(*command, "-MD", "-MF", rule),
        ):
            step.done(dependencies(rule))
        for other in kept.iterdir():
            if other != ptx:
                other.unlink()
    return host, ptx


def compile_ptx(ptx: Path, mode: str) -> Path:
    """Return the object of the kernels in a PTX file."""
    cpp = ptx.with_suffix(".kernels.cpp")
    step = Step(cpp, ptx, *own_files())
    if not step.is_done():
        text = ptx.read_text(encoding="utf-8")
        cached(
            (ptx.name, ptx, *own_files()), [cpp], lambda: cpp.write_text(translate(text, ptx.name), encoding="utf-8")
        )
        step.done()
    # -O0 compiles the longest kernels in 12 s and -Og in 24 s; 863 tests of such kernels take 14 s and 12 s
    return compile_cpp(cpp, ptx.with_suffix(".kernels.o"), "-O0", *MODES[mode])


def runtime_objects(folder: Path, mode: str, sources: Iterable[str]) -> list[Path]:
    objects = []
    with Lock(folder):
        for name in sources:
            checked = name in CHECKED
            flags = MODES[mode] if checked else ()
            objects.append(
                compile_cpp(
                    RUNTIME / name, folder / f"{Path(name).stem}{'.' + mode if checked else ''}.o", "-O2", *flags
                )
            )
    return objects


def link(output: Path, mode: str, objects: Sequence[Path]) -> Path:
    command = (COMPILER, *LIBRARY, *MODES[mode], *objects, "-o", output)
    step = Step(output, *map(str, command), *objects)
    step.stamp = work_folder(output) / "link.stamp"
    if not step.is_done():
        output.unlink(missing_ok=True)  # a process that has loaded the old library keeps it
        run(*command)
        step.done()
    return output


def work_folder(output: Path) -> Path:
    return output.with_name(output.name + ".build")


def runtime_folder(output: Path) -> Path:
    """Return the folder that all libraries of a folder share."""
    return output.with_name("ptx_simulator_runtime")


def build(
    sources: Sequence[Path],
    output: Path,
    mode: str = "plain",
    defines: Sequence[str] = (),
    include: Sequence[Path] = (),
    extra_objects: Sequence[Path] = (),
    architecture: str = "sm_90",
    units: Sequence[tuple[Path, Sequence[str]]] | None = None,
) -> Path:
    """Return a shared library of .cu files, with host code by nvcc and kernels by the simulator.

    Only changed parts are built. ``mode`` is plain, asan or tsan; ``defines`` are macros such as "NAME=1". ``units``,
    (source, flags of nvcc) each, replace ``sources`` if a file is compiled several times. The library also has
    ptx_launch, ptx_error and the other functions of runtime/launch.cpp. A RuntimeError has the first lines of a
    compiler's messages.
    """
    if mode not in MODES:
        raise ValueError(f"mode is one of {', '.join(MODES)}, not {mode}")
    output, folder = output.absolute(), work_folder(output.absolute())
    compiled = units if units is not None else [(source, ()) for source in sources]
    with Lock(folder):
        objects = runtime_objects(runtime_folder(output), mode, (*UNCHECKED, *CHECKED, CUDA_RUNTIME))
        virtual = architecture.replace("sm_", "compute_")
        common = (
            f"-gencode=arch={virtual},code={virtual}",
            *(f"-D{define}" for define in defines),
            *(f"-I{path}" for path in include),
        )

        def compile_unit(number: int) -> tuple[Path, Path]:
            source, flags = compiled[number]
            host, ptx = compile_cuda(
                Path(source).absolute(), folder / f"{number}_{Path(source).stem}", (*common, *flags)
            )
            return host, compile_ptx(ptx, mode)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for pair in pool.map(compile_unit, range(len(compiled))):
                objects += pair
        return link(output, mode, [*objects, *extra_objects])


def simulate_ptx(ptx_text: str, output: Path, mode: str = "plain") -> Path:
    """Return a shared library of the kernels in PTX, without host code; needs no nvcc."""
    output, folder = output.absolute(), work_folder(output.absolute())
    with Lock(folder):
        objects = runtime_objects(runtime_folder(output), mode, (*UNCHECKED, *CHECKED))
        ptx = folder / f"{output.stem}.ptx"
        if not ptx.exists() or ptx.read_text(encoding="utf-8") != ptx_text:
            ptx.write_text(ptx_text, encoding="utf-8")
        return link(output, mode, [*objects, compile_ptx(ptx, mode)])
