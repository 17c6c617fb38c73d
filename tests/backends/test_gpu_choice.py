"""The machines where "cuda" can run, and the backend that "auto" takes on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import logging
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import simulated
import torch
from helpers import BF16, F16, F32, F64
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.backends import choice, cuda, fastest, library, triton
from depthlstm_fast.ops.registry import OPERATORS

HELD = ("80", "90", "100", "100-ptx")


def tensor_on(device: str, dtype: torch.dtype = F32) -> Any:
    """Return a stand-in with the tensor attributes that the choice of a backend reads."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def choose(requested: str | None, tensor: Any, features: int) -> str:
    return choice.choose(requested, tensor, "depth_lstm", features)


def why_not(tensor: Any, features: int) -> str | None:
    return cuda.CUDA.why_not(tensor, "depth_lstm", features)


# where "cuda" can run


@pytest.mark.parametrize(
    "capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]
)
def test_gpus_that_this_build_runs_on(capability: tuple[int, int]) -> None:
    assert cuda.architecture_limit(capability, HELD) is None


@pytest.mark.parametrize("capability", [(8, 9), (11, 0)])
def test_gpus_that_need_another_build(capability: tuple[int, int]) -> None:
    major, minor = capability
    assert cuda.architecture_limit(capability, ("90", "100", "120-ptx")) == (
        f"the GPU has compute capability {major}.{minor}; this build holds 90, 100 and PTX for 120: "
        f"build from source with DEPTHLSTM_CUDA_ARCHS={major}{minor}"
    )
    assert cuda.architecture_limit(capability, (f"{major}{minor}",)) is None


def test_architectures_of_other_builds() -> None:
    limit = cuda.architecture_limit
    assert limit((8, 0), ("86",)) is not None  # machine code does not run on an older GPU of its family
    assert limit((10, 0), ("90-ptx",)) is None
    assert limit((8, 9), ("90-ptx",)) is not None
    assert "holds 86:" in str(limit((9, 0), ("86",)))
    assert limit((7, 5), ("120-ptx",)) == "the GPU has compute capability 7.5; the CUDA kernels need 8.0 or newer"


def test_libraries_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load_error", None)
    monkeypatch.setattr(library, "built_with", {"nvcc": "DEPTHLSTM_CUDA=0"}.get)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA kernels: DEPTHLSTM_CUDA=0; build from source where nvcc 12.0" in cuda._find_cuda(())
    assert cuda._find_cuda(HELD) == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda._find_cuda(HELD) is None
    monkeypatch.setattr(library, "load_error", "the extension was not built")
    assert cuda._find_cuda(HELD) == "the extension was not built"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Pretend that torch has a GPU of some compute capability, and that the library has CUDA kernels."""

    def make(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(cuda, "_error", None)
        monkeypatch.setattr(cuda, "_architectures", HELD)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        cuda._known_gpu_limit.cache_clear()

    yield make
    cuda._known_gpu_limit.cache_clear()


def test_limits_of_a_call(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    for dtype in (F32, BF16, F16):
        assert why_not(tensor_on("cuda:0", dtype), 65536) is None
    assert why_not(tensor_on("cuda:0", F64), 8) == "the CUDA kernels take float32, bfloat16 and float16; found float64"
    assert why_not(tensor_on("cpu"), 8) == "the CUDA kernels take CUDA tensors; found cpu"
    assert dl.backends()["cuda"] == (True, "CUDA C++ kernels for 80, 90, 100 and PTX for 100")
    with pytest.raises(
        ValueError, match="backend='cuda' cannot run this call: the CUDA kernels take CUDA tensors; found cpu"
    ):
        dl.depth_lstm_gates(torch.randn(2, 8), torch.randn(2, 2), backend="cuda")
    with pytest.raises(ValueError, match="the CUDA kernels take CUDA tensors; found meta"), dl.use_backend("cuda"):
        dl.depth_lstm_gates(torch.randn(2, 8, device="meta"), torch.randn(2, 2, device="meta"))
    gpu((11, 0))
    monkeypatch.setattr(cuda, "_architectures", ("80", "90", "100", "120-ptx"))
    for limit in (why_not(tensor_on("cuda:0"), 8), dl.backends()["cuda"].detail):
        assert limit.startswith("the GPU has compute capability 11.0; this build holds 80, 90, 100 and PTX for 120")
    cuda._known_gpu_limit.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dl.backends()["cuda"] == (False, "there is no GPU that torch can use")


def test_tracers_do_not_look_into_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    # tracers do not follow a subprocess
    monkeypatch.setattr(
        cuda, "_known_gpu_limit", lambda index: subprocess.check_output(["echo", f"GPU {index}"]).decode()
    )

    def function(x: Tensor) -> Tensor:
        return x + 1 if cuda.gpu_limit(3) == "GPU 3\n" else x - 1

    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(())).item() == 1


# the backend that "auto" takes


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Return the limits of both GPU backends, for the test to change."""
    limits: dict[str, str | None] = {"triton": None, "cuda": None}
    for name in limits:
        record = dataclasses.replace(
            simulated.anywhere(choice.RECORDS[name]), why_not_here=functools.partial(limits.get, name)
        )
        monkeypatch.setitem(choice.RECORDS, name, record)
    monkeypatch.setattr(fastest, "gpu_name", lambda index: "Some GPU")
    monkeypatch.setattr(choice, "_strict", False)
    monkeypatch.setattr(choice, "_logged", set())
    monkeypatch.setattr(choice, "_default", "auto")
    return limits


def test_auto_without_measurements(on_a_gpu: dict[str, str | None], caplog: pytest.LogCaptureFixture) -> None:
    assert not fastest.FASTEST, (
        "the rule without measurements is no more: say in its docstring what was measured, and change this test"
    )
    tensor = tensor_on("cuda:0")
    with caplog.at_level(logging.WARNING, "depthlstm_fast"):
        assert choose(None, tensor, 512) == "triton"
        on_a_gpu["triton"] = "the Triton kernels take D up to 8192"
        assert choose(None, tensor, 512) == "cuda"
        assert not caplog.records
        on_a_gpu["cuda"] = "the CUDA kernels are not there"
        for _ in range(2):
            assert choose("auto", tensor, 512) == "reference"
    (record,) = caplog.records
    assert record.getMessage() == (
        "falling back to the reference backend: the Triton kernels take D up to 8192; the CUDA kernels are not there"
    )


def test_auto_beyond_the_longest_row_of_triton(
    on_a_gpu: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(choice.RECORDS, "cuda", simulated.anywhere(choice.RECORDS["cuda"]))
    monkeypatch.setattr(triton, "_error", None)
    monkeypatch.setattr(triton, "_import_kernels", lambda: None)
    longest = triton.TRITON.widest["depth_lstm"]
    assert longest == 8192
    assert choose("auto", tensor_on("cuda:0"), longest) == "triton"
    assert choose("auto", tensor_on("cuda:0"), longest + 1) == "cuda"


def test_auto_follows_measurements(on_a_gpu: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastest.FASTEST, ("depth_lstm", "Some GPU", 512, BF16), "cuda")
    monkeypatch.setitem(fastest.FASTEST, ("depth_lstm", "Some GPU", 1024, BF16), "triton")
    monkeypatch.setitem(fastest.FASTEST, ("depth_lstm", "Other GPU", 256, BF16), "cuda")

    def choice(features: int, dtype: torch.dtype) -> str:
        return choose("auto", tensor_on("cuda:0", dtype), features)

    assert choice(512, BF16) == "cuda"
    assert [choice(512, F16), choice(1024, BF16), choice(256, BF16)] == ["triton"] * 3  # no measurement, no guess
    on_a_gpu["cuda"] = "out of order"
    assert choice(512, BF16) == "triton"
    on_a_gpu.update(cuda=None, triton="out of order")
    assert choice(1024, BF16) == "cuda"
    assert choose("auto", tensor_on("meta"), 512) == "cuda"  # the fixture has removed the limits


def test_what_a_table_may_hold() -> None:
    for (op, name, features, dtype), winner in fastest.FASTEST.items():
        assert op in OPERATORS
        assert isinstance(name, str)
        assert isinstance(features, int)
        assert dtype in (F32, BF16, F16)
        assert winner in ("triton", "cuda")
