"""The build of the CUDA kernels by tools/build: the choice of nvcc and GPUs, and the message if there is none."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELD = ("80", "90", "100", "100-ptx")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return tools/build/toolchain.py, which setup.py imports."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "build"))
    module, settings = importlib.import_module("toolchain"), importlib.import_module("settings")
    monkeypatch.setattr(settings, "FAILURE_FILE", tmp_path / "failed.txt")
    for name in ("DEPTHLSTM_CUDA", "DEPTHLSTM_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Put an nvcc into CUDA_HOME that answers questions and compiles nothing."""

    def make(version: str, *architectures: int) -> Path:
        path = tmp_path / "cuda" / "bin" / "nvcc"
        path.parent.mkdir(parents=True, exist_ok=True)
        codes, ptx = (" ".join(f"{kind}_{number}" for number in architectures) for kind in ("sm", "compute"))
        path.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.76" ;;
--list-gpu-code) echo {codes} ;;
--list-gpu-arch) echo {ptx} ;;
--dryrun) echo '#$ LIBRARIES=  "-L/some where/lib/stubs" "-L/some where/lib"' >&2 ;;
esac
""")
        path.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        return path

    return make


def test_nvcc_is_found_and_asked(build: ModuleType, nvcc: Any) -> None:
    path = nvcc("13.0", 75, 80, 90, 100, 120)
    assert build.find_nvcc() == (str(path), "13.0.76", list(HELD), ["/some where/lib/stubs", "/some where/lib"])


def test_older_nvcc_builds_what_it_knows(build: ModuleType, nvcc: Any, capsys: pytest.CaptureFixture[str]) -> None:
    nvcc("12.4", 50, 80, 90)
    assert build.find_nvcc().archs == ["80", "90"]
    assert "nvcc 12.4.76 does not know 100, 100-ptx" in capsys.readouterr().out


def test_too_old_nvcc_is_refused(build: ModuleType, nvcc: Any) -> None:
    nvcc("11.8", 80, 90)
    assert build.find_nvcc() == "nvcc 11.8.76 is too old, 12.0 or newer is needed"


def test_cuda_can_be_left_out(build: ModuleType, nvcc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc("13.0", 80)
    monkeypatch.setenv("DEPTHLSTM_CUDA", "0")
    assert build.find_nvcc() == "DEPTHLSTM_CUDA=0"
    monkeypatch.delenv("DEPTHLSTM_CUDA")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.find_nvcc() == "nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)"


@pytest.mark.parametrize(
    ("asked", "found"),
    [("80;90", ["80", "90"]), ("86, 120-ptx", ["86", "120-ptx"]), ("90 90", ["90"]), (" ; ", ["80"])],
)
def test_architectures_that_are_asked_for(
    build: ModuleType, nvcc: Any, monkeypatch: pytest.MonkeyPatch, asked: str, found: list[str]
) -> None:
    monkeypatch.setenv("DEPTHLSTM_CUDA_ARCHS", asked)
    assert build.cuda_archs("13.0", {"sm_80", "sm_86", "sm_90", "compute_120"})[: len(found)] == found


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("75", "found '75'"),
        (
            "8.0",
            "DEPTHLSTM_CUDA_ARCHS must list compute capabilities from 8.0 on, "
            "without their dot, as in \"80;90;120-ptx\"; found '8.0'",
        ),
        ("sm_80", "found 'sm_80'"),
        ("90a", "found '90a'"),
        ("80;97", "nvcc 13.0 does not know 97 of DEPTHLSTM_CUDA_ARCHS; it knows compute_120, sm_80"),
        ("80-ptx", "does not know 80-ptx"),
    ],
)
def test_architectures_that_cannot_be(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, text: str
) -> None:
    monkeypatch.setenv("DEPTHLSTM_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit) as caught:
        build.cuda_archs("13.0", {"sm_80", "compute_120"})
    assert text in str(caught.value)
    assert text in sys.modules["settings"].FAILURE_FILE.read_text()


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        (HELD, ["arch=compute_80,code=[sm_80,sm_90]", "arch=compute_100,code=[sm_100,compute_100]"]),
        (["120-ptx", "100"], ["arch=compute_120,code=[compute_120]", "arch=compute_100,code=[sm_100]"]),
        (["90"], ["arch=compute_80,code=[sm_90]"]),
        (["120"], ["arch=compute_100,code=[sm_120]"]),
        (["120-ptx"], ["arch=compute_120,code=[compute_120]"]),
        (["90", "86", "80-ptx"], ["arch=compute_80,code=[sm_90,sm_86,compute_80]"]),
    ],
)
def test_ptx_is_made_once_a_generation(build: ModuleType, archs: Iterable[str], flags: list[str]) -> None:
    """Check that every architecture gets its code, from PTX that is not newer than itself."""
    assert build.gencode(list(archs)) == [word for flag in flags for word in ("-gencode", flag)]
