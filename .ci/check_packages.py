"""Compare a wheel and an sdist with their source tree: python .ci/check_packages.py dist.

The wheel has every module of the package, the compiled library, the version of pyproject.toml and the licences. It has
nothing outside the package. The wheel in dist/manylinux has the same library and another tag, and the one in dist/pure
has no library. The sdist has every source that a build, the tests, the benchmarks and the examples read, and no build
product.
"""

from __future__ import annotations

import fnmatch
import platform
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "depthlstm_fast"
LINKED = {"kernels": "kernels", "bench": "benchmarks"}  # a link in the package, and its target folder
SDIST = {
    "csrc": ("*",),
    "third_party": ("*",),
    "kernels": ("*.py",),
    "depthlstm_fast": ("*.py", "py.typed"),
    "tools": ("*.py", "*.json"),
    "tests": ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh", "*.txt"),
    "benchmarks": ("*.py", "*.md", "*.json"),
    "examples": ("*.py", "*.md"),
    "docs": ("*.md", "*.json", "*.png", "*.py"),
}
NAMED = ("setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "Makefile")
PRODUCTS = (".so", ".o", ".pyc", ".partial")


def version() -> str:
    """Return the version in pyproject.toml."""
    found = re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert found, "pyproject.toml names no version"
    return found[1]


def below(folder: str, *patterns: str) -> Iterator[str]:
    """Yield the files of ``folder`` that match one of ``patterns``, as paths from the root."""
    for pattern in patterns:
        for path in (ROOT / folder).rglob(pattern):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith(PRODUCTS):
                yield path.relative_to(ROOT).as_posix()


def check_wheel(folder: Path, tag: str, library: tuple[str, ...]) -> None:
    """Raise AssertionError if the single wheel in ``folder`` lacks a file or has an additional one."""
    (wheel,) = folder.glob("*.whl")
    assert fnmatch.fnmatchcase(wheel.name, f"{PACKAGE}-{version()}-{tag}.whl"), wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    wanted = {*library, f"{PACKAGE}/py.typed", *below(PACKAGE, "*.py")}
    for link, source in LINKED.items():
        wanted |= {f"{PACKAGE}/{link}{name.removeprefix(source)}" for name in below(source, "*.py")}
    for name in ("reference/__init__.py", "kernels/__init__.py", "bench/__main__.py"):
        assert f"{PACKAGE}/{name}" in wanted, name
    assert wanted <= code, f"not in the wheel: {sorted(wanted - code)}"
    assert library or not any(name.endswith(".so") for name in code), "a library in the wheel without one"
    assert all(name.startswith(f"{PACKAGE}/") for name in code), f"beside the package: {sorted(code)}"
    for licence in ("LICENSE", "third_party/xsimd/LICENSE"):
        found = [name for name in names if name.endswith(f".dist-info/licenses/{licence}")]
        assert found, f"not in the wheel: the licence {licence}"
    print(f"{wheel.name}: {wheel.stat().st_size} bytes, {len(code)} files")


def check_same_library(folder: Path, name: str) -> None:
    """Raise AssertionError unless the wheel in dist/manylinux holds the library as it was built."""
    built, tagged = (zipfile.ZipFile(next(each.glob("*.whl"))).read(name) for each in (folder, folder / "manylinux"))
    assert built == tagged, f"{name} was changed for the wheel in manylinux"


def check_sdist(folder: Path) -> None:
    """Raise AssertionError if the single sdist in ``folder`` lacks a file or has a build product."""
    (sdist,) = folder.glob("*.tar.gz")
    assert sdist.name == f"{PACKAGE}-{version()}.tar.gz", sdist.name
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert (ROOT / "third_party/xsimd/include/xsimd/xsimd.hpp").is_file()
    wanted = {*NAMED, *(name for source, patterns in SDIST.items() for name in below(source, *patterns))}
    assert wanted <= packed, f"not in the sdist: {sorted(wanted - packed)}"
    products = sorted(name for name in packed if name.endswith(PRODUCTS))
    assert not products, f"in the sdist: {products}"
    print(f"{sdist.name}: {sdist.stat().st_size} bytes, {len(packed)} files")


if __name__ == "__main__":
    dist, library = Path(sys.argv[1]), f"{PACKAGE}/_C.abi3.so"
    check_wheel(dist, f"cp310-abi3-linux_{platform.machine()}", (library,))
    check_wheel(dist / "manylinux", f"cp310-abi3-manylinux_2_*_{platform.machine()}", (library,))
    check_same_library(dist, library)
    check_wheel(dist / "pure", "py3-none-any", ())
    check_sdist(dist)
