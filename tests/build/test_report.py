"""`python -m depthlstm_fast` reports what is available, gives reasons for what is missing, and never fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import depthlstm_fast
from depthlstm_fast import __main__ as command


def test_every_line_is_answered() -> None:
    lines = dict(line.split(":", 1) for line in command.report().splitlines())
    for name in (
        "depthlstm_fast",
        "python",
        "torch",
        "triton",
        "system",
        "cpu",
        "threads",
        "devices",
        "library",
        "built with",
        "cuda kernels",
    ):
        assert lines[name].strip(), name
        assert "unknown (" not in lines[name], lines[name]
    assert depthlstm_fast.__version__ in lines["depthlstm_fast"]
    assert "generic" in lines["cpu instruction sets"]


def test_runs_as_a_module(tmp_path: Path) -> None:
    root = str(Path(depthlstm_fast.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "depthlstm_fast"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("depthlstm_fast:")


def run_in_a_shell(line: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(depthlstm_fast.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    line = line.replace("REPORT", f"'{sys.executable}' -m depthlstm_fast")
    return subprocess.run(
        ["bash", "-c", line], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_reader_that_goes_is_no_error() -> None:
    result = run_in_a_shell("REPORT | true; exit ${PIPESTATUS[0]}")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_report_that_cannot_be_written_is_one_line() -> None:
    result = run_in_a_shell("REPORT > /dev/full")
    assert result.returncode == 1
    assert result.stderr == "python -m depthlstm_fast: the report cannot be written: No space left on device\n"


def test_options_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--nosuch"])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "python -m depthlstm_fast: unrecognized arguments: --nosuch\n")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m depthlstm_fast")


def test_every_backend_is_listed() -> None:
    text = command.report()
    for name in ("reference", "cpp", "cuda", "triton"):
        assert re.search(rf"^backend {name}:\s+\S", text, re.M), text


def test_missing_library_shows_the_first_compiler_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = tmp_path / "_C.build_failed.txt"
    failure.write_text(
        "depthlstm_fast: the C++ build failed. First error: gates.h:1: error: unknown type\n", encoding="utf-8"
    )
    monkeypatch.setattr(command, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(command, "BUILD_FAILURE", failure)
    text = command.report()
    assert "gates.h:1: error: unknown type" in text
    assert re.search(r"^built with:\s+none$", text, re.M)


def test_missing_library_without_a_failed_build_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(command, "BUILD_FAILURE", tmp_path / "absent.txt")
    assert "pip install --no-build-isolation" in command.library()
    assert command.chosen_isa().startswith("none")


def test_library_that_does_not_load_shows_the_loaders_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"no library\x00depthlstm_fast build: version=9.9;compiler=none\x00")
    monkeypatch.setattr(command, "LIBRARY", broken)
    assert "does not load" in command.library()
    assert "version=9.9" in command.build_stamp()


@pytest.mark.parametrize(
    ("stamp", "line"),
    [
        ("isa=generic;cuda=80,90,120-ptx;nvcc=13.0.88", "for compute capability 80, 90, 120-ptx, by nvcc 13.0.88"),
        ("isa=generic;cuda=none;nvcc=DEPTHLSTM_CUDA=0", "none (DEPTHLSTM_CUDA=0)"),
        (
            "isa=generic;cuda=none;nvcc=nvcc 11.8.89 is too old, 12.0 or newer is needed",
            "none (nvcc 11.8.89 is too old, 12.0 or newer is needed)",
        ),
    ],
)
def test_cuda_kernels_and_why_there_are_none(
    stamp: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "_C.abi3.so"
    monkeypatch.setattr(command, "LIBRARY", library)
    assert command.cuda_kernels() == "none (there is no library)"
    library.write_bytes(f"depthlstm_fast build: version=0.1.0;{stamp}\0".encode())
    assert command.cuda_kernels() == line


def test_a_surprise_becomes_a_line() -> None:
    def surprise() -> str:
        raise RuntimeError("boom")

    assert command.guarded(surprise) == "unknown (RuntimeError: boom)"
