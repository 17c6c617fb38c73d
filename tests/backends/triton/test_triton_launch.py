"""The launcher's calls to Triton, without a GPU.

A stand-in for Triton's driver takes the compiled kernels and records their launches.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]

# Only the last step is replaced: kernels are compiled for sm_90, and loaded and launched by Triton's CompiledKernel.
LAUNCHES = """
import json, types
import torch
import triton
from triton.backends.compiler import GPUTarget

launches = []

class Driver:
    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
        load_binary = staticmethod(lambda name, binary, shared, device: ("module", name, 255, 0, 1024))
        unload_module = staticmethod(lambda module: None)

    @staticmethod
    def launcher_cls(source, metadata):
        def run(x, y, z, stream, function, packed, metadata_of_launch, enter, leave, *arguments):
            for index, (name, kind) in enumerate(source.signature.items()):
                value = arguments[index]
                if kind == "constexpr":
                    assert source.constants[(index,)] == value, name
                else:
                    assert kind.startswith("*") == isinstance(value, torch.Tensor), name
                    assert (kind == "fp32") == isinstance(value, float), name
            assert len(arguments) == len(source.fn.arg_names), function
            launches.append([function, [x, y, z], stream, metadata.num_warps])
        return run

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 12345)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())
torch.cuda.current_device = lambda: 0

from depthlstm_fast.kernels import depth_lstm as gates
from depthlstm_fast.kernels.common import launch

assert not launch.INTERPRETED
launch.multiprocessors = gates.multiprocessors = lambda device: 132
compiled = launch.compile_kernel
count = []
launch.compile_kernel = lambda *given, **named: count.append(1) or compiled(*given, **named)

def call(rows, features, z_bias=None, left=0):
    z = torch.randn(rows, 4 * features, dtype=torch.bfloat16)
    c = torch.randn(rows, left + features, dtype=torch.bfloat16)[:, left:]
    weight, bias = torch.ones(4, features), torch.zeros(4, features)
    gates.gates_forward(z, z_bias, None, c, weight, bias, None, 0, 0, 1e-6, 0.0)
    gates.gates_backward(c, None, z, z_bias, None, c, weight, bias, None, 0, 0, 1e-6, 0.0, True, z_bias is not None)

call(1000, 64)
first = len(count)
for rows in range(1, 11):  # another N, another stride: nothing is compiled again
    call(rows, 64, left=64 * (rows % 2))
again = len(count) - first
call(7, 64, left=3)  # rows that are not aligned: each kernel once more
unaligned = len(count) - first - again
call(5, 4096, torch.zeros(4 * 4096, dtype=torch.bfloat16))  # the wide scheme
print(json.dumps({"launches": launches, "first": first, "again": again, "unaligned": unaligned}))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", LAUNCHES], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_launches(recorded: dict[str, Any]) -> None:
    """Check the grids against the kernels' headers.

    A program takes a tile of rows forward, resident programs run backward, and the wide scheme takes tiles of columns.
    """
    names = [name for name, *_ in recorded["launches"]]
    assert names[:3] == ["forward_kernel", "narrow_backward_kernel", "sums_kernel"]
    assert names[-4:] == ["forward_kernel", "row_sums_kernel", "wide_backward_kernel", "sums_kernel"]
    grids = [grid for _, grid, *_ in recorded["launches"]]
    # D=64: 8 rows a tile forward, 2 backward; two sums of (4, 64) are 4 blocks of 128 columns
    assert grids[:3] == [[125, 1, 1], [500, 1, 1], [4, 1, 1]]
    # D=4096: a row a program; 8 blocks of 512 columns times the rows; three sums of (4, 4096) are 384 blocks
    assert grids[-4:] == [[5, 1, 1], [5, 1, 1], [8, 5, 1], [384, 1, 1]]
    assert {stream for _, _, stream, _ in recorded["launches"]} == {12345}  # the current stream


def test_one_compilation_for_all_row_counts_and_strides(recorded: dict[str, Any]) -> None:
    assert (recorded["first"], recorded["again"]) == (3, 0)
    assert recorded["unaligned"] <= 3


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    import triton

    from depthlstm_fast.kernels.common import tune

    monkeypatch.setattr(tune, "cache_file", lambda: tmp_path / "cache" / "plans.json")
    monkeypatch.setattr(tune, "_found", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: run())
    return tune


def test_tuning_keeps_the_fastest(tune: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from depthlstm_fast.kernels.common.launch import Launch

    plans = [Launch(1, {"ROWS": 1}), Launch(2, {"ROWS": 2}), Launch(4, {"ROWS": 3})]
    timed = []

    def run(plan: Launch) -> float:
        timed.append(plan)
        if plan.warps == 4:
            raise OutOfResources(1, 0, "registers")
        return 3.0 - plan.warps

    assert tune.fastest("forward", (64, "*bf16"), plans, run) == plans[1]
    assert timed == plans
    assert tune.fastest("forward", (64, "*bf16"), plans, run) == plans[1]
    assert len(timed) == 3
    monkeypatch.setattr(tune, "_found", {})  # simulates another process
    assert tune.fastest("forward", (64, "*bf16"), plans, run) == plans[1]
    assert len(timed) == 3
    tune.fastest("forward", (128, "*bf16"), plans, run)
    assert len(timed) == 6
    assert len(json.loads(tune.cache_file().read_text())) == 2


def test_tuning_survives_a_file_of_rubbish_and_leaves_captures_alone(
    tune: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from depthlstm_fast.kernels.common.launch import Launch

    plans = [Launch(1, {"ROWS": 1}), Launch(2, {"ROWS": 2})]
    for rubbish in ("", "[1, 2]", '{"a": 3}', "\0"):
        tune.cache_file().parent.mkdir(exist_ok=True)
        tune.cache_file().write_text(rubbish)
        monkeypatch.setattr(tune, "_found", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert tune.fastest("forward", (64,), plans, lambda plan: -plan.warps) == plans[0]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert tune.fastest("forward", (64,), plans, lambda plan: -plan.warps) == plans[1]
