"""The Triton kernels as compiled for sm_90, run on a CPU by the simulator of PTX.

The interpreter never sees the compiler's output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import needs_triton
from ptx_simulator.build import COMPILER, available

HERE = Path(__file__).resolve().parent
NARROW, WIDE = ["narrow_backward_kernel"], ["row_sums_kernel", "wide_backward_kernel"]

pytestmark = [needs_triton, pytest.mark.skipif(available() not in (None, "there is no nvcc"), reason=f"no {COMPILER}")]


# whole tiles and several rows in one; masked columns and no alignment; rows in several warps, whose sums need barriers
@pytest.mark.parametrize(
    ("rows", "features", "dtype", "scheme"),
    [
        (5, 64, "float32", "narrow"),
        (7, 100, "bfloat16", "narrow"),
        (3, 512, "bfloat16", "narrow"),
        (3, 600, "bfloat16", "wide"),
    ],
)
def test_compiled_kernels_on_a_cpu(rows: int, features: int, dtype: str, scheme: str, tmp_path: Path) -> None:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "DEPTHLSTM_AUTOTUNE")
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(HERE.parents[2]), str(HERE.parents[1]), environment.get("PYTHONPATH")))
    )
    command = [sys.executable, str(HERE / "triton_ptx.py"), str(tmp_path), str(rows), str(features), dtype, scheme]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["launched"] == ["forward_kernel", *(NARROW if scheme == "narrow" else WIDE), "sums_kernel"]
    assert all(ratio <= 1 for ratio in found["errors"].values()), found["errors"]
