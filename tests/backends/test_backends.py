"""The choice of a backend: by name, by default, by environment, with the compiled extension or without it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import DEVICE, HAS_CPP, HAS_TRITON, needs_cpp, needs_triton

import depthlstm_fast as dl
from depthlstm_fast.backends import triton

backends: ModuleType = sys.modules["depthlstm_fast.backends.choice"]  # dl.backends is the function
CALL = "dl.depth_lstm_gates(torch.randn(2, 8), torch.randn(2, 2))"


def call(backend: str | None = None, device: str = "cpu") -> None:
    dl.depth_lstm_gates(torch.randn(2, 8, device=device), torch.randn(2, 2, device=device), backend=backend)


def python(
    script: str, tmp_path: Path, root: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter that sees the package of this checkout, or the one in ``root``, and these variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEPTHLSTM_")}
    clean["PYTHONPATH"] = os.pathsep.join(
        [str(root or Path(dl.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-c", f"import torch, depthlstm_fast as dl\n{script}"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**clean, **environment}, timeout=120, check=False
    )


@pytest.fixture(autouse=True)
def as_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the settings of tests and environment: no strict mode, "auto" by default, nothing logged before."""
    monkeypatch.setattr(backends, "_strict", False)
    monkeypatch.setattr(backends, "_default", "auto")
    monkeypatch.setattr(backends, "_logged", set())


def test_every_backend_has_a_status() -> None:
    status = dl.backends()
    assert tuple(status) == backends.BACKENDS[1:]
    assert status["reference"].available
    assert all(entry.detail for entry in status.values())


def test_by_name() -> None:
    call("reference")
    assert dl.last_backend() == "reference"
    if HAS_CPP:
        call("cpp")
        assert dl.last_backend() == "cpp"
        call("auto")
        assert dl.last_backend() == "cpp"
    if HAS_TRITON:
        call("triton", DEVICE)
        assert dl.last_backend() == "triton"


@needs_cpp
def test_default() -> None:
    for name in ("reference", "cpp", "auto"):
        dl.set_backend(name)
        call()
        assert dl.last_backend() == ("cpp" if name == "auto" else name)
    dl.set_backend("reference")
    call("cpp")  # the call's own choice comes first
    assert dl.last_backend() == "cpp"


@needs_cpp
def test_use_backend_restores() -> None:
    with dl.use_backend("reference"):
        call()
        assert dl.last_backend() == "reference"
        with dl.use_backend("cpp"):
            call()
            assert dl.last_backend() == "cpp"
        call()
        assert dl.last_backend() == "reference"
    call()
    assert dl.last_backend() == "cpp"
    with pytest.raises(KeyError), dl.use_backend("reference"):
        raise KeyError
    call()
    assert dl.last_backend() == "cpp"


def in_a_thread(function: Callable[[], None]) -> str | None:
    """Return the backend that ran last in ``function``, called in a separate thread."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: (function(), found.append(dl.last_backend())))
    thread.start()
    thread.join()
    return found[0]


@needs_cpp
def test_use_backend_holds_for_its_thread_alone() -> None:
    with dl.use_backend("reference"):
        assert in_a_thread(call) == "cpp"
        call()
        assert dl.last_backend() == "reference"
    dl.set_backend("reference")
    with dl.use_backend("cpp"):
        assert in_a_thread(call) == "reference"  # the setting of the whole process
        dl.set_backend("auto")
        call()
        assert dl.last_backend() == "cpp"


@needs_cpp
def test_use_backend_holds_for_its_task_alone() -> None:
    async def task(name: str | None, ready: asyncio.Event, go: asyncio.Event) -> str | None:
        with dl.use_backend(name) if name else contextlib.nullcontext():
            ready.set()
            await go.wait()
            call()
            return dl.last_backend()

    async def both() -> list[str | None]:
        events = [asyncio.Event() for _ in range(2)]
        tasks = [task("reference", events[0], events[1]), task(None, events[1], events[0])]
        return await asyncio.gather(*tasks)

    assert asyncio.run(both()) == ["reference", "cpp"]


@needs_cpp
def test_compiled_functions_follow_use_backend() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, c: dl.depth_lstm_gates(z, c), backend="eager", fullgraph=True)
    found = []
    for name in ("cpp", "reference", "cpp"):
        with dl.use_backend(name):
            compiled(torch.randn(2, 8), torch.randn(2, 2))
            found.append(dl.last_backend())
    assert found[:2] == ["cpp", "reference"]
    with dl.use_backend("reference"), pytest.raises(ValueError, match="one of 'auto'"):
        dl.set_backend("fast")


def test_unknown_names() -> None:
    for function in (dl.set_backend, lambda name: dl.use_backend(name).__enter__()):
        with pytest.raises(
            ValueError, match="must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton'; found 'fast'"
        ):
            function("fast")
    call("reference")  # the default is unchanged


def test_backends_that_cannot_run_name_their_limit() -> None:
    for name, status in dl.backends().items():
        if not status.available:
            with pytest.raises(ValueError, match=f"backend='{name}' cannot run this call: "):
                call(name)
    if HAS_CPP:
        with pytest.raises(
            ValueError, match="backend='cpp' cannot run this call: the C\\+\\+ kernels take CPU tensors; found meta"
        ):
            call("cpp", "meta")
        with pytest.raises(ValueError, match="found meta"), dl.use_backend("cpp"):
            call(device="meta")


def test_fallback_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "depthlstm_fast"):
        for _ in range(3):
            call(device="meta")
    assert dl.last_backend() == "reference"
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("falling back to the reference backend: ")


def test_a_choice_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "depthlstm_fast"):
        call("reference")
        if HAS_CPP:
            call()
    assert not caplog.records


def test_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_strict", True)
    with pytest.raises(RuntimeError, match="DEPTHLSTM_STRICT=1 forbids the fallback to the reference backend: "):
        call(device="meta")
    call("reference", "meta")  # a backend named by the call is no fallback


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_strict_by_environment(value: str, tmp_path: Path) -> None:
    run = python(
        'dl.depth_lstm_gates(*(torch.empty(2, n, device="meta") for n in (8, 2)))', tmp_path, DEPTHLSTM_STRICT=value
    )
    if value == "1":
        assert run.returncode == 1
        assert "DEPTHLSTM_STRICT=1 forbids the fallback" in run.stderr
    else:
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["reference", "", "auto", "cpp", "triton"])
def test_backend_by_environment(name: str, tmp_path: Path) -> None:
    wanted = name if name in ("reference", "triton") else "cpp"
    if not {"reference": True, "triton": HAS_TRITON, "cpp": HAS_CPP}[wanted]:
        pytest.skip(f"no {wanted} backend")
    run = python(f"{CALL}; print(dl.last_backend())", tmp_path, DEPTHLSTM_BACKEND=name, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == wanted


@needs_triton
def test_triton_takes_cpu_tensors_only_where_it_is_interpreted(tmp_path: Path) -> None:
    run = python(f'dl.set_backend("triton"); {CALL}', tmp_path, TRITON_INTERPRET="0")
    assert run.returncode == 1
    limit = "the Triton kernels take CUDA tensors, or with TRITON_INTERPRET=1 CPU tensors; found cpu"
    assert f"ValueError: backend='triton' cannot run this call: {limit}" in run.stderr
    run = python(
        'print(*dl.backends()["triton"], "triton" in __import__("sys").modules)', tmp_path, TRITON_INTERPRET="0"
    )
    wanted = (
        "True Triton kernels for GPUs False" if DEVICE == "cuda" else "False there is no GPU that torch can use False"
    )
    assert run.stdout.strip() == wanted, run.stderr  # Triton, whose import takes half a second, is not imported


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_error", "Triton is not installed")
    assert dl.backends()["triton"] == (False, "Triton is not installed")
    with pytest.raises(ValueError, match="backend='triton' cannot run this call: Triton is not installed"):
        call("triton")


def test_unknown_backend_in_the_environment(tmp_path: Path) -> None:
    """Check an unknown backend in the environment.

    The import works, the first call names the wrong variable, and a name set later replaces it.
    """
    run = python(f'print("imported")\n{CALL}', tmp_path, DEPTHLSTM_BACKEND="fast")
    assert run.returncode == 1
    assert run.stdout.strip() == "imported"
    assert "DEPTHLSTM_BACKEND must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton'; found 'fast'" in run.stderr
    run = python(f'dl.set_backend("reference"); {CALL}; print(dl.last_backend())', tmp_path, DEPTHLSTM_BACKEND="fast")
    assert run.stdout.strip() == "reference", run.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DEPTHLSTM_STRICT", "false", "DEPTHLSTM_STRICT must be '0' or '1'; found 'false'"),
        ("DEPTHLSTM_AUTOTUNE", "on", "DEPTHLSTM_AUTOTUNE must be '0' or '1'; found 'on'"),
        ("DEPTHLSTM_POOL_BYTES", "abc", "DEPTHLSTM_POOL_BYTES must be a number of bytes; found 'abc'"),
    ],
)
def test_wrong_variable_is_an_error_of_the_first_call(variable: str, value: str, message: str, tmp_path: Path) -> None:
    """Check that the import works, that a small call finds the wrong value, and that the report shows it."""
    run = python(f'print("imported")\n{CALL}', tmp_path, **{variable: value})
    assert (run.returncode, run.stdout.strip()) == (1, "imported")
    assert run.stderr.rstrip().endswith(f"ValueError: {message}")
    run = python("from depthlstm_fast.__main__ import report; print(report())", tmp_path, **{variable: value})
    assert f"{message}\n" in run.stdout


@needs_cpp
def test_instruction_set_that_is_not_there(tmp_path: Path) -> None:
    """Check that the status says no, and that the call's error is the package's own, without a place in C++."""
    message = "DEPTHLSTM_CPU_ISA must be generic, avx2, avx512 or avx512_bf16, as far as this build and CPU have them"
    run = python(f'print(*dl.backends()["cpp"])\n{CALL}', tmp_path, DEPTHLSTM_CPU_ISA="sse")
    assert run.stdout.strip() == f"False {message}; found sse"
    assert run.stderr.rstrip().endswith(f"ValueError: {message}; found sse")


def test_wrong_backend_is_in_the_report(tmp_path: Path) -> None:
    run = python("from depthlstm_fast.__main__ import report; print(report())", tmp_path, DEPTHLSTM_BACKEND="fast")
    assert "DEPTHLSTM_BACKEND must be one of 'auto', 'reference', 'cpp', 'cuda', 'triton'; found 'fast'" in run.stdout
    run = python("from depthlstm_fast.__main__ import report; print(report())", tmp_path, DEPTHLSTM_BACKEND="cpp")
    assert "wrong variables:" in run.stdout
    assert "must be" not in run.stdout


def test_nothing_ran_yet(tmp_path: Path) -> None:
    assert python("print(dl.last_backend())", tmp_path).stdout.strip() == "None"


@pytest.fixture
def without_extension(tmp_path: Path) -> Path:
    """A copy of the package with the compiled library left out."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.txt")
    shutil.copytree(Path(dl.__file__).parent, tmp_path / "copy" / "depthlstm_fast", ignore=ignore)
    return tmp_path / "copy"


def test_without_the_extension(without_extension: Path, tmp_path: Path) -> None:
    script = """
assert "copy" in dl.__file__
assert not dl.backends()["cpp"].available and "was not built" in dl.backends()["cpp"].detail
layer = dl.DepthLSTMEncoderLayer(16, 2, dropout=0.1)
h, c = layer(torch.randn(5, 3, 16))
(h.square().sum() + c.square().sum()).backward()
print(dl.last_backend())
"""
    run = python(script, tmp_path, without_extension)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "reference"
    assert run.stderr.count("falling back to the reference backend: _C.abi3.so is not beside the package") == 1


def test_without_the_extension_by_name_and_strict(without_extension: Path, tmp_path: Path) -> None:
    run = python('dl.set_backend("cpp"); ' + CALL, tmp_path, without_extension)
    assert "ValueError: backend='cpp' cannot run this call: _C.abi3.so is not beside the package" in run.stderr
    run = python(CALL, tmp_path, without_extension, DEPTHLSTM_STRICT="1")
    assert "RuntimeError: DEPTHLSTM_STRICT=1 forbids the fallback" in run.stderr


def test_library_that_does_not_load(without_extension: Path, tmp_path: Path) -> None:
    (without_extension / "depthlstm_fast" / "_C.abi3.so").write_bytes(b"no library")
    run = python(f'{CALL}; print(dl.last_backend(), dl.backends()["cpp"].detail)', tmp_path, without_extension)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("reference _C.abi3.so did not load: ")
