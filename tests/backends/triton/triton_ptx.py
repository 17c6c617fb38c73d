"""The Triton kernels as compiled for sm_90, on a CPU: every launch of a call goes to the simulator of PTX.

    python triton_ptx.py FOLDER ROWS FEATURES DTYPE SCHEME

This command runs as a separate process. It prints the largest error of each result over that of eager PyTorch, as JSON.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import Types, arguments, cotangents, double, excess, normal, results
from ptx_simulator.build import simulate_ptx
from ptx_simulator.device import load
from torch import Tensor
from triton.backends.compiler import GPUTarget

from depthlstm_fast import reference
from depthlstm_fast.kernels import depth_lstm as gates
from depthlstm_fast.kernels.common import launch as launcher

TARGET = GPUTarget("cuda", 90, 32)
launched: list[str] = []


def simulated_launch(folder: Path) -> Any:
    """Return a stand-in for kernels.launch.launch."""

    def launch(
        kernel: Any, grid: tuple[int, ...], values: tuple[Any, ...], options: dict[str, Any], plan: Any, aligned: bool
    ) -> None:
        types = tuple(launcher.type_of(value) for value in values)
        compiled = launcher.compile_kernel(
            kernel, types, {**options, **plan.constants}, plan.warps, aligned, target=TARGET
        )
        ptx = compiled.asm["ptx"]
        library = load(simulate_ptx(ptx, folder / f"{hashlib.sha256(ptx.encode()).hexdigest()[:16]}.so"))
        passed: list[Any] = []
        for value, kind in zip(values, types, strict=True):
            if isinstance(value, Tensor):
                passed.append(ctypes.c_void_p(value.data_ptr()))
            elif kind is not None:
                passed.append(ctypes.c_float(value) if kind == "fp32" else ctypes.c_int64(value))
        passed += [
            ctypes.c_void_p(),
            ctypes.c_void_p(),
        ]  # Triton's own working memory, which these kernels do not need
        addresses = (ctypes.c_void_p * len(passed))(*(ctypes.addressof(value) for value in passed))
        sizes = (*grid, 1, 1)[:3]
        shared = ctypes.c_size_t(compiled.metadata.shared)
        if library.ptx_launch(kernel.fn.__name__.encode(), *sizes, 32 * plan.warps, 1, 1, shared, addresses):
            raise RuntimeError(library.ptx_error().decode())
        launched.append(kernel.fn.__name__)

    return launch


def main() -> None:
    folder, rows, features, dtype, scheme = sys.argv[1:]
    torch.manual_seed(0)
    gates.launch = simulated_launch(Path(folder))
    if scheme == "wide":
        gates.narrow_plans = lambda *_: []
    z_type = getattr(torch, dtype)
    tensors, _ = arguments(int(rows), int(features), Types(z_type, torch.float32, torch.float32))
    tensors["z_bias"] = normal(4 * int(features), dtype=z_type)
    seed = torch.tensor([99])
    dh, dc = cotangents(tensors)
    z, c, weight, bias, z_bias = (tensors[name] for name in ("z", "c", "weight", "bias", "z_bias"))
    inputs = (z, z_bias, None, c, weight, bias, seed, 0, 0, 1e-6, 0.25)
    h, c_out = gates.gates_forward(*inputs)
    dz, _, dc_in, dweight, dbias, dz_bias = gates.gates_backward(dh, dc, *inputs, True, True)
    found = {"h": h, "c_out": c_out, "dz": dz, "dc": dc_in, "dweight": dweight, "dbias": dbias, "dz_bias": dz_bias}

    def plain(z: Tensor, c: Tensor, z_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return reference.depth_lstm_gates(z + z_bias, c, weight, bias, dropout_p=0.25, training=True, seed=seed)

    eager, exact = results(plain, tensors, (dh, dc)), results(plain, double(tensors), (dh.double(), dc.double()))
    ratios = {}
    for name, value in found.items():
        error, allowed = excess(value, eager[name], exact[name])
        ratios[name] = error / allowed if error == error else float("inf")
    print(json.dumps({"launched": launched, "errors": ratios}))


if __name__ == "__main__":
    main()
