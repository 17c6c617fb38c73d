"""The gate that compiles the Triton kernels without a GPU.

The kernels keep their budget, and the gate finds a worsened kernel or budget.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
BUDGETS = json.loads((ROOT / "tools" / "kernel_budget.json").read_text(encoding="utf-8"))
KERNEL = "sm_90 narrow_backward D=512 bf16"


def run_gate(*options: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "DEPTHLSTM_AUTOTUNE")
    }
    command = [sys.executable, str(root / "tools" / "check_kernels.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def only(name: str) -> tuple[str, str]:
    return "--only", f"^{re.escape(name)}$"


def table(output: str) -> dict[str, list[int]]:
    """Return (warps, registers, stack, spills, shared) of every kernel in the gate's output."""
    rows = re.findall(r"^((?:sm_|gfx)\S+ [a-z].*?) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)  ", output, re.M)
    return {name: [int(number) for number in numbers] for name, *numbers in rows}


@pytest.fixture(scope="module")
def gate() -> types.ModuleType:
    """tools/check_kernels.py as a module."""
    spec = importlib.util.spec_from_file_location("check_kernels", ROOT / "tools" / "check_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its NamedTuples are looked up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def budget(gate: types.ModuleType) -> dict[str, Any]:
    """Return a copy of the kernels' budget for this Triton."""
    if gate.version() not in BUDGETS:
        pytest.skip(f"there is no budget for Triton {gate.version()}")
    return json.loads(json.dumps(BUDGETS[gate.version()]["kernels"]))


@pytest.mark.slow
def test_kernels_keep_their_budget() -> None:
    run = run_gate("--quick")
    assert run.returncode == 0, run.stdout + run.stderr
    rows = table(run.stdout)
    assert len(rows) >= 30
    assert {name.split()[0] for name in rows} == {"sm_80", "sm_90", "gfx942"}
    own = {"forward", "narrow_backward", "row_sums", "wide_backward", "sums"}
    others = {
        *(f"{op}.{kernel}" for op in ("norm_step", "siamese_step") for kernel in ("forward", "backward", "sums")),
        *(f"depth_gru_gates.{kernel}" for kernel in ("forward", "narrow_backward", "sums")),
        *(f"layer_mix.{kernel}" for kernel in ("forward", "backward")),
    }
    assert {name.split()[1] for name in rows} == own | others
    for name, (warps, registers, stack, spills, _) in rows.items():
        assert (stack, spills) == (0, 0), name
        assert warps * 32 * registers <= 65536, f"{name}: more than the registers of a multiprocessor"
    assert f"{len(rows)} kernels, 0 faults" in run.stdout


def test_the_committed_budget_is_free_of_spills_and_complete(gate: types.ModuleType) -> None:
    names = [asked.name for asked in gate.compilations()]
    assert {"3.6", "3.9"} <= BUDGETS.keys()
    for version, committed in BUDGETS.items():
        assert list(committed["kernels"]) == names, version
        for name, figures in committed["kernels"].items():
            assert (figures["stack"], figures["spills"]) == (0, 0), (version, name)


def test_the_page_shows_the_committed_budget(gate: types.ModuleType) -> None:
    assert (ROOT / "docs" / "triton_budget.md").read_text(encoding="utf-8") == gate.markdown(BUDGETS)
    assert gate.dump(BUDGETS) == (ROOT / "tools" / "kernel_budget.json").read_text(encoding="utf-8")


def test_what_is_a_fault(gate: types.ModuleType) -> None:
    good = {
        "registers": 100,
        "stack": 0,
        "spills": 0,
        "shared": 64,
        "loads": {"128": 10, "32": 2},
        "stores": {"128": 4},
    }
    better = {"registers": 90, "shared": 0, "loads": {"128": 8, "32": 2}, "stores": {"128": 6}}
    for change in ({}, *({name: value} for name, value in better.items())):
        assert gate.faults({**good, **change}, good) == []
    worse = {
        "registers": (101, "101 registers a thread, its budget is 100"),
        "shared": (65, "65 bytes of shared memory, its budget is 64"),
        "stack": (8, "spills: 0 instructions, 8 bytes a thread"),
        "spills": (2, "spills: 2 instructions, 0 bytes a thread"),
        "loads": ({"64": 20, "32": 2}, "the widest of its loads has 64 bits, its budget is 128"),
        "stores": ({"128": 2, "64": 4}, "2 stores of 128 bits and more narrow ones, its budget is 4"),
    }
    for name, (value, line) in worse.items():
        assert gate.faults({**good, name: value}, good) == [line]
    assert gate.faults({**good, "registers": 255}, None) == []
    assert gate.faults({**good, "spills": 2}, None) == ["spills: 2 instructions, 0 bytes a thread"]
    assert gate.faults({**good, "spills": 2}, {**good, "spills": 2}) != [], "a budget cannot allow a spill"
    assert gate.all_faults({}, {}, set()) == ["no case was checked"]


@pytest.mark.slow
def test_a_lowered_budget_fails(gate: types.ModuleType, budget: dict[str, Any], tmp_path: Path) -> None:
    figures = budget[KERNEL]
    figures["registers"] -= 1
    figures["shared"] -= 1
    figures["loads"] = {"256": 1, **figures["loads"]}
    removed = budget.pop("sm_90 forward D=512 bf16")
    budget["sm_90 forward D=511 bf16"] = removed
    path = tmp_path / "budget.json"
    path.write_text(
        json.dumps({gate.version(): {"assemblers": gate.assemblers(), "kernels": budget}}), encoding="utf-8"
    )
    run = run_gate("--only", "^sm_90 (forward|narrow_backward) D=512 bf16$", "--budget", str(path))
    assert run.returncode == 1, run.stdout + run.stderr
    found = [line.removeprefix("FAULT ") for line in run.stdout.splitlines() if line.startswith("FAULT ")]
    assert found == [
        f"{KERNEL}: {figures['registers'] + 1} registers a thread, its budget is {figures['registers']}",
        f"{KERNEL}: {figures['shared'] + 1} bytes of shared memory, its budget is {figures['shared']}",
        f"{KERNEL}: the widest of its loads has 128 bits, its budget is 256",
        "sm_90 forward D=512 bf16: not in the budget (--update)",
        "sm_90 forward D=511 bf16: in the budget, but no case needs it (--update)",
    ]


# Appended to kernels/depth_lstm.py of a copy of the package, so that the launcher compiles bad plans.
REPLACE_PLAN = """
rule = narrow_plans
def narrow_plans(*arguments):
    return [{} for plan in rule(*arguments)]
"""
BROKEN = {
    "spills": (
        REPLACE_PLAN.format("plan._replace(warps=max(1, plan.warps // 2))"),
        r"spills: [1-9]\d* instructions, [1-9]\d* bytes a thread",
    ),
    "unaligned": (
        "\ndef is_aligned(*_):\n    return False\n",
        r"the widest of its loads has (16|32) bits, its budget is 128",
    ),
    "more stages": (
        REPLACE_PLAN.format("plan._replace(constants={**plan.constants, 'STAGES': 4})"),
        r"\d+ bytes of shared memory, its budget is \d+",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_kernel_made_worse_fails(name: str, budget: dict[str, Any], tmp_path: Path) -> None:
    code, fault = BROKEN[name]
    shutil.copytree(
        ROOT / "depthlstm_fast", tmp_path / "depthlstm_fast", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "depthlstm_fast" / "kernels" / "depth_lstm.py").open("a", encoding="utf-8") as file:
        file.write(code)
    run = run_gate(*only(KERNEL), root=tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert re.search(rf"^FAULT {re.escape(KERNEL)}: {fault}$", run.stdout, re.M), run.stdout


def test_bad_options() -> None:
    run = run_gate("--quick", "--update")
    assert run.returncode == 2
    assert "--update takes all cases" in run.stderr


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels that the launcher compiles in this test.

    Nothing is really compiled or launched.
    """
    from depthlstm_fast.kernels.common import launch, tune

    asked = []

    def compile_kernel(kernel: Any, *_: Any) -> Any:
        asked.append(kernel.__name__.removesuffix("_kernel"))
        return collections.defaultdict(lambda: lambda *_: None)  # kernel[grid](...)

    monkeypatch.setattr(launch, "compile_kernel", compile_kernel)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(tune, "ENABLED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return asked


def launch_all(
    rows: int, features: int = 64, dtype: torch.dtype = torch.bfloat16, left: int = 0, norm: int = 0,
    seed: int | None = None,
    eps: float = 1e-6, dropout_p: float = 0.1, expanded: bool = False,
) -> None:  # fmt: skip
    """Run forward and backward, with ``left`` columns before each row of z, c and h.

    With ``expanded`` every row of c and dc is the same.
    """
    from depthlstm_fast.kernels import depth_lstm as gates

    def tensor(width: int) -> torch.Tensor:
        return torch.zeros(rows, left + width, dtype=dtype)[:, left:]

    z, c, h = tensor(4 * features), tensor(features), tensor(features)
    if expanded:
        c = c[:1].expand(rows, features)
    weight, bias = torch.ones(4, features), torch.zeros(4, features)
    key = None if seed is None else torch.tensor([seed])
    options = (norm, 0, eps, dropout_p)
    gates.gates_forward(z, None, None, c, weight, bias, key, *options, h)
    gates.gates_backward(h, c, z, None, None, c, weight, bias, key, *options, True, False)


NARROW, WIDE = ["forward", "narrow_backward", "sums"], ["forward", "row_sums", "wide_backward", "sums"]


@pytest.mark.parametrize(("features", "kernels"), [(64, NARROW), (4096, WIDE)])
def test_neither_rows_nor_strides_compile_anything_anew(features: int, kernels: list[str], compiled: list[str]) -> None:
    for rows in (1, 2, 3, 4, 7, 16, 17, 31, 64, 100):
        for left in (0, 8, 64):
            launch_all(rows, features, left=left)
        launch_all(rows, features, expanded=True, eps=rows / 100)
    assert compiled == kernels


def test_dropout_compiles_once_whatever_its_seed_and_probability(compiled: list[str]) -> None:
    for seed, probability in ((0, 0.1), (1, 0.5), (2**62, 0.999), (-1, 0.0)):
        launch_all(3, seed=seed, dropout_p=probability)
    assert compiled == NARROW


def test_what_the_code_depends_on_compiles_anew(compiled: list[str]) -> None:
    launch_all(3)
    changes: list[dict[str, Any]] = [{"features": 128}, {"dtype": torch.float16}, {"norm": 1}, {"seed": 1}, {"left": 1}]
    for change in changes:
        del compiled[:]
        for rows in (1, 2, 50):
            launch_all(rows, **change)
        # the sum of the partial sums depends on its rows through their alignment only
        assert compiled == (NARROW if "left" in change else NARROW[:2]), change
