"""Compatibility of the shipped library with old torch versions, other Pythons and old CPUs."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "depthlstm_fast" / "_C.abi3.so"
OBJECTS = ROOT / "build" / "ninja"
STABLE_SYMBOLS = Path(__file__).with_name("torch-2.11-stable-symbols.txt")
# Versioned symbols come from these system libraries. All others must be torch's.
SYSTEM_VERSIONS = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC)_")
# The run-time library's own hooks, weak by design and defined nowhere in particular.
HOOKS = {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
LIBRARIES = re.compile(
    r"^(libtorch|libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt|ld-linux-[\w-]+)\.so"
)

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("readelf") is None, reason="nm and readelf (binutils) are not installed"
)
needs_library = pytest.mark.skipif(not LIBRARY.is_file(), reason="depthlstm_fast/_C.abi3.so is not built in this tree")


def output(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def isa_objects() -> dict[str, list[Path]]:
    """Return the object files of sources compiled once per instruction set, by instruction set."""
    found: dict[str, list[Path]] = {}
    for path in sorted(OBJECTS.glob("*/cpu_kernel.*.o")):
        found.setdefault(path.name.split(".")[1], []).append(path)
    return found


def symbols(path: Path, kinds: str) -> set[str]:
    """Return names in an object file whose nm letter is among kinds."""
    rows = [line.split() for line in output("nm", path).splitlines()]
    return {row[-1] for row in rows if len(row) >= 2 and row[-2] in kinds}


@needs_binutils
@needs_library
def test_undefined_symbols_exist_in_the_oldest_supported_torch() -> None:
    allowed = set(STABLE_SYMBOLS.read_text(encoding="utf-8").split())
    assert len(allowed) > 300
    names = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", LIBRARY).splitlines()]
    foreign = {name for name in names if not SYSTEM_VERSIONS.search(name)} - HOOKS
    assert foreign, "a library that uses nothing of torch is not ours"
    assert not foreign - allowed


@needs_binutils
@needs_library
def test_needed_libraries() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "-d", LIBRARY))
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    assert not [name for name in needed if not LIBRARIES.match(name)]
    assert "RUNPATH" not in output("readelf", "-d", LIBRARY), (
        "torch loads its own libraries; a path of the build machine must not be kept"
    )


@needs_binutils
@needs_library
def test_library_is_no_python_extension_and_exports_little() -> None:
    defined = {line.split()[-1] for line in output("nm", "-D", "--defined-only", LIBRARY).splitlines()}
    assert not [name for name in defined if name.startswith("PyInit")]
    assert not [name for name in defined if "xsimd" in name]
    # CUDA's run-time library is inside and must not meet torch's, or one would answer the other's calls
    assert not [name for name in defined if "cuda" in name.lower()]


@needs_binutils
def test_objects_of_one_instruction_set_leak_no_weak_symbol() -> None:
    """Check for weak symbols.

    The linker keeps the first copy of a weak function. An AVX-512 copy would then run on every CPU.
    """
    objects = isa_objects()
    if not objects:
        pytest.skip("no object files in build/ninja: the library was not built from this tree")
    assert "generic" in objects
    for paths in objects.values():
        for path in paths:
            # DW.ref.* are pointers to the exception personality routine: data, the same in every object.
            weak = {name for name in symbols(path, "WVu") if not name.startswith("DW.ref.")}
            assert not weak, path.name


@needs_binutils
def test_objects_of_different_instruction_sets_define_different_symbols() -> None:
    objects = isa_objects()
    if len(objects) < 2:
        pytest.skip("one instruction set only in build/ninja")
    seen: dict[str, str] = {}
    for isa, paths in objects.items():
        for name in set().union(*(symbols(path, "TDBRWVu") for path in paths)):
            if not name.startswith("DW.ref."):
                assert seen.setdefault(name, isa) == isa, name


@needs_binutils
def test_generic_object_has_no_wide_registers() -> None:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    paths = [path for path in [*isa_objects().get("generic", []), OBJECTS / "common" / "isa.o"] if path.is_file()]
    if not paths or "x86-64" not in output("objdump", "-f", paths[0]):
        pytest.skip("no x86-64 object files in build/ninja")
    for path in paths:
        assert not re.search(r"%[yz]mm\d", output("objdump", "-d", "--no-show-raw-insn", path)), path.name


@needs_library
def test_library_carries_a_build_stamp() -> None:
    pattern = (
        rb"depthlstm_fast build: "
        rb"version=([\d.]+);compiler=[^;]+;torch=[^;]+;isa=[\w,]*generic[\w,]*;sanitize=\w+;cuda=[^;]+;nvcc=[^;\0]+\0"
    )
    found = re.search(pattern, LIBRARY.read_bytes())
    assert found
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{found.group(1).decode()}"' in project


def fat_binaries(data: bytes) -> list[list[str]]:
    """Return the architectures of each CUDA fat binary in a library, as tools/build/settings.py names them.

    A fat binary has a header (magic, version, its size, the entries' size), then entries. An entry has a header (kind 1
    PTX or 2 machine code, its size, the code's size, at 28 the architecture) and the code.
    """
    found = []
    for match in re.finditer(re.escape(struct.pack("<I", 0xBA55ED50)), data):
        _, _, header, size = struct.unpack_from("<IHHQ", data, match.start())
        place, archs = match.start() + header, []
        end = place + size
        while place < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, place)
            (number,) = struct.unpack_from("<I", data, place + 28)
            archs.append(f"{number}-ptx" if kind == 1 else str(number))
            place += header + size
        found.append(archs)
    return found


@needs_library
def test_every_cuda_object_holds_every_architecture() -> None:
    data = LIBRARY.read_bytes()
    stamp = re.search(rb";cuda=([^;]+);", data)
    assert stamp
    wanted = [] if stamp.group(1) == b"none" else sorted(stamp.group(1).decode().split(","))
    sources = list((ROOT / "csrc").glob("*/cuda_*.cu")) if wanted else []
    objects = sum(3 if source.stem.endswith("_kernel") else 1 for source in sources)
    found = [sorted(set(archs)) for archs in fat_binaries(data)]
    assert found == [wanted] * objects
