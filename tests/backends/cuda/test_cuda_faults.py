"""The CUDA C++ kernels under sanitizers, and faults that the tests plant.

Sanitizers or a comparison of values must find each planted fault. The kernels are simulated from their PTX, with the
threads between two barriers in random order. The faults go into a copy of csrc/. It has only the kernels that a few
calls in fp32 need, so it compiles in seconds.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import cuda_calls
import numpy as np
import pytest
import torch
from ptx_simulator.build import available, build
from ptx_simulator.device import run_sanitized

from depthlstm_fast import reference

pytestmark = pytest.mark.skipif(available() is not None, reason=f"{available()}")

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"


def replace(path: Path, old: str, new: str, pattern: bool = False) -> None:
    """Replace a text in a file, and fail if it is absent: the fault would not be planted."""
    text = path.read_text(encoding="utf-8")
    changed = re.sub(old, new, text) if pattern else text.replace(old, new)
    assert changed != text, f"{path.name} has no {old!r}"
    path.write_text(changed, encoding="utf-8")


def sources(folder: Path) -> Path:
    """Return a copy of csrc/ with only the kernels that cuda_calls.CALLS need."""
    copied = folder / "csrc"
    shutil.copytree(CSRC, copied)
    launch, forward, backward = (
        copied / "depth_lstm" / f"cuda_{name}.cu" for name in ("launch", "forward_kernel", "backward_kernel")
    )
    replace(launch, r"\n *case DType::b?float16: return \w+ward_\w+\(.*", "", pattern=True)
    for path in (forward, backward):
        replace(path, r"(DEPTHLSTM_Z_NAMESPACE::\w+)<(float|DEPTHLSTM_Z), 3>", r"\1<float, 4>", pattern=True)
    replace(forward, r"\n.* return launch_rows<forward_(warp<C, K, 4>|block<C, K, [24]>)>.*", "", pattern=True)
    replace(backward, "narrow_backward<C, K, false>", "narrow_backward<C, K, true>")
    return copied


def library(csrc: Path, mode: str) -> Path:
    z = ["-DDEPTHLSTM_Z=float", "-DDEPTHLSTM_Z_FLOAT=1"]
    sources = {"launch": [], "forward_kernel": z, "backward_kernel": z}
    units = [(csrc / "depth_lstm" / f"cuda_{name}.cu", [*flags, f"-I{csrc}"]) for name, flags in sources.items()]
    return build([], csrc.parent / f"{mode}.so", mode, units=units)


def run(path: Path, mode: str, folder: Path, seed: int = 0) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return run_sanitized(mode, str(HERE / "cuda_calls.py"), str(path), str(folder), str(seed))


def wrong_values(folder: Path) -> list[str]:
    """List the results, with their calls, that differ from the reference in fp64."""
    wrong = []
    for number, (rows, features) in enumerate(cuda_calls.CALLS):
        read = {name: torch.from_numpy(np.array(array)) for name, array in cuda_calls.arrays(rows, features).items()}
        z, c, z_bias, weight, bias = leaves = [
            read[name].double().requires_grad_() for name in ("z", "c", "z_bias", "weight", "bias")
        ]
        outputs = reference.depth_lstm_gates(
            z + z_bias,
            c,
            weight,
            bias,
            activation="sigmoid",
            dropout_p=cuda_calls.DROPOUT,
            training=True,
            seed=read["seed"],
        )
        gradients = torch.autograd.grad(outputs, leaves, (read["dh"].double(), read["dc"].double()))
        names = ("h", "c_out", "dz", "dc_in", "dz_bias", "dweight", "dbias")
        found = np.load(folder / f"{number}.npz")
        for name, exact in zip(names, (*outputs, *gradients), strict=True):
            error = (torch.from_numpy(found[name]) - exact).abs().max() / exact.abs().max()
            if not error < 1e-5:
                wrong.append(f"{name} of {rows} rows of {features}: {error:.2g}")
    return wrong


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the kernels unchanged."""
    return sources(tmp_path_factory.mktemp("right"))


def test_values_in_any_order_of_threads(right: Path) -> None:
    path = library(right, "plain")
    folders = [right.parent / f"seed_{seed}" for seed in range(4)]
    for seed, folder in enumerate(folders):
        done = run(path, "plain", folder, seed)
        assert done.returncode == 0, done.stderr
    assert not wrong_values(folders[0])
    for folder, number in itertools.product(folders[1:], range(len(cuda_calls.CALLS))):
        first, again = np.load(folders[0] / f"{number}.npz"), np.load(folder / f"{number}.npz")
        assert all(first[name].tobytes() == again[name].tobytes() for name in first)


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_sanitizers_find_nothing(mode: str, right: Path) -> None:
    folder = right.parent / mode
    done = run(library(right, mode), mode, folder)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert not wrong_values(folder)


def plant(folder: Path, file: str, old: str, new: str) -> Path:
    copied = sources(folder)
    replace(copied / file, old, new)
    return copied


def test_missing_barrier(tmp_path: Path) -> None:
    csrc = plant(tmp_path, "common/cuda/reduce.cuh", "    __syncthreads();\n", "")
    done = run(library(csrc, "tsan"), "tsan", tmp_path / "tsan")
    assert done.returncode != 0
    assert re.search(r"ThreadSanitizer: data race[\s\S]*reduce\.cuh:\d+", done.stderr), done.stderr


def test_write_out_of_bounds(tmp_path: Path) -> None:
    """Plant a write to a row that does not exist."""
    csrc = plant(
        tmp_path,
        "depth_lstm/cuda_backward_kernel.cu",
        "for (int64_t row = blockIdx.x; row < call.rows;",
        "for (int64_t row = blockIdx.x; row <= call.rows;",
    )
    done = run(library(csrc, "asan"), "asan", tmp_path / "asan")
    assert done.returncode != 0
    assert re.search(r"AddressSanitizer: heap-buffer-overflow[\s\S]*\.cuh?:\d+", done.stderr), done.stderr


def test_wrong_mask(tmp_path: Path) -> None:
    """Let absent vectors take part in the variance."""
    loop = (
        "#pragma unroll\n        for (int k = 0; k < K; ++k) {\n#pragma unroll\n "
        "           for (int j = v * W; j < (v + 1) * W; ++j) {\n"
    )
    masked = f"        if (!inside[v]) continue;\n{loop}                z[k][j] -= mean[k];"
    csrc = plant(tmp_path, "depth_lstm/cuda_gates.cuh", masked, masked.partition("\n")[2])
    done = run(library(csrc, "plain"), "plain", tmp_path / "plain")
    assert done.returncode == 0, done.stderr
    wrong = wrong_values(tmp_path / "plain")
    assert any(line.startswith("h of 9 rows of 136") for line in wrong)
    assert not any(line.endswith("of 33") for line in wrong)  # forward_any and wide backward have no such mask
