"""The budget of the CUDA C++ kernels in the built library, tools/cuda_budget.json.

It limits registers, spills, shared memory and widths of loads.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import check_cuda  # noqa: E402


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    if not check_cuda.LIBRARY.is_file():
        pytest.skip("the extension was not built")
    if check_cuda.build_info(check_cuda.LIBRARY).get("cuda", "none") == "none":
        pytest.skip("the extension was built without CUDA kernels")
    try:
        return check_cuda.measure(check_cuda.LIBRARY)
    except check_cuda.ToolError as error:
        pytest.skip(str(error))


@pytest.fixture
def budget() -> dict[str, Any]:
    versions = json.loads(check_cuda.BUDGET.read_text(encoding="utf-8"))
    version = check_cuda.nvcc_version(check_cuda.LIBRARY)
    if version not in versions:
        pytest.skip(f"nvcc {version} has no budget")
    return versions[version]["kernels"]


def test_the_library_keeps_its_budget(measured: dict[str, Any], budget: dict[str, Any]) -> None:
    assert not check_cuda.all_faults(measured, budget)


def test_nothing_spills(measured: dict[str, Any]) -> None:
    """Check for spills, for any nvcc."""
    assert not check_cuda.all_faults(measured, None)


MAIN = "sm_90 forward_warp z=bfloat16 c=float gates=4 vectors=2"


@pytest.mark.parametrize(("key", "change"), [("registers", -1), ("shared", -16)])
def test_a_lower_budget_is_a_fault(key: str, change: int, measured: dict[str, Any], budget: dict[str, Any]) -> None:
    if MAIN not in measured:
        pytest.skip("the library was built for other architectures")
    lower = copy.deepcopy(budget)
    lower[MAIN][key] = measured[MAIN][key] + change
    (fault,) = check_cuda.all_faults(measured, lower)
    assert fault.startswith(f"{MAIN}: {measured[MAIN][key]} ")


def test_narrow_loads_are_a_fault(measured: dict[str, Any]) -> None:
    name = next(name for name in measured if "forward_warp" in name)
    narrow = copy.deepcopy(measured)
    wide = narrow[name]["loads"].pop("128")
    narrow[name]["loads"]["64"] = narrow[name]["loads"].get("64", 0) + 2 * wide
    (fault,) = check_cuda.all_faults(narrow, measured)
    assert "0 loads of 128 bits" in fault


def test_kernels_are_the_same_ones(measured: dict[str, Any]) -> None:
    name = next(iter(measured))
    fewer = {other: figures for other, figures in measured.items() if other != name}
    assert check_cuda.all_faults(fewer, measured) == [f"{name}: in the budget, but not in the library (--update)"]
    assert check_cuda.all_faults(measured, fewer) == [f"{name}: not in the budget (--update)"]
    assert check_cuda.all_faults({}, measured) == ["no kernel was checked"]


def test_a_spill_is_a_fault(tmp_path: Path) -> None:
    """Check the real kernels with a third of the registers that they need."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    source, binary = ROOT / "csrc" / "depth_lstm" / "cuda_backward_kernel.cu", tmp_path / "backward.fatbin"
    options = ["-std=c++20", "-arch=sm_90", "-maxrregcount=80", "-DDEPTHLSTM_Z=float", "-DDEPTHLSTM_Z_FLOAT=1"]
    # __launch_bounds__ takes precedence over the option
    text = source.read_text(encoding="utf-8").replace("__launch_bounds__(narrow_threads)", "")
    copied = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", copied)
    (copied / "depth_lstm" / source.name).write_text(text, encoding="utf-8")
    subprocess.run(
        ["nvcc", *options, "-fatbin", "-o", str(binary), f"-I{copied}", str(copied / "depth_lstm" / source.name)],
        check=True,
    )
    try:
        found = check_cuda.measure(binary)
    except check_cuda.ToolError as error:
        pytest.skip(str(error))
    faults = check_cuda.all_faults(found, None)
    assert [fault for fault in faults if "narrow_backward" in fault and "spills" in fault], faults
