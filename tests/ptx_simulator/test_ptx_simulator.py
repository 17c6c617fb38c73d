"""The simulator of CUDA kernels: right kernels pass under every sanitizer, and planted faults are found."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx_kernels import build_folder

from ptx_simulator import build as builder
from ptx_simulator import samples
from ptx_simulator.build import MODES, available, build
from ptx_simulator.device import copy, empty, load, pointer, run_sanitized

pytestmark = pytest.mark.skipif(available() is not None, reason=f"{available()}")

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "kernels" / "samples.cu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_folder(tmp_path_factory)


def library(folder: Path, mode: str) -> Path:
    return build([SOURCE], folder / f"samples_{mode}.so", mode)


def run_sample(path: Path, mode: str, kernel: str, fault: str, seeds: int = 1) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(HERE.parent)!r}); from ptx_simulator import samples; samples.main()"
    return run_sanitized(mode, "-c", code, str(path), kernel, fault, str(seeds))


@pytest.mark.parametrize("kernel", samples.KERNELS)
def test_the_order_of_threads_makes_no_difference(kernel: str, folder: Path) -> None:
    assert len(samples.results(library(folder, "plain"), kernel, "none", seeds=4)) == 1


@pytest.mark.parametrize("kernel", samples.KERNELS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "plain"])
def test_right_kernels_are_not_reported(mode: str, kernel: str, folder: Path) -> None:
    result = run_sample(library(folder, mode), mode, kernel, "none", seeds=2)
    assert (result.returncode, result.stdout.strip(), result.stderr.strip()) == (0, "1", "")


FAULTS = [
    ("sum_rows", "no_syncthreads", "plain", r"wrong sums"),
    ("sum_rows", "no_syncthreads", "tsan", r"WARNING: ThreadSanitizer: data race[\s\S]*samples\.cu:\d+"),
    ("sum_rows", "no_syncwarp", "tsan", r"WARNING: ThreadSanitizer: data race[\s\S]*samples\.cu:\d+"),
    ("sum_rows", "blocks_add_without_atomics", "tsan", r"WARNING: ThreadSanitizer: data race[\s\S]*samples\.cu:\d+"),
    ("sum_rows", "beyond_global", "asan", r"AddressSanitizer: heap-buffer-overflow[\s\S]*samples\.cu:\d+"),
    ("sum_rows", "beyond_shared", "asan", r"AddressSanitizer: use-after-poison[\s\S]*samples\.cu:\d+"),
    ("copy_rows", "misaligned", "plain", r"thread \(\d+,\d,0\): samples\.cu:\d+: misaligned access of 16 bytes"),
    (
        "sum_rows",
        "divergent_barrier",
        "plain",
        r"samples\.cu:\d+: __syncthreads here, while other threads .* at samples\.cu:\d+",
    ),
    (
        "sum_rows",
        "lonely_barrier",
        "plain",
        r"deadlock: 96 threads have ended; 32 wait at samples\.cu:\d+ in barrier 0",
    ),
    ("sum_rows", "absent_lane", "plain", r"deadlock: .* wait at \S+:\d+ in shfl\.sync\.\w+ with mask 0xffffffff"),
]


@pytest.mark.parametrize(
    ("kernel", "fault", "mode", "report"), FAULTS, ids=[f"{fault}-{mode}" for _, fault, mode, _ in FAULTS]
)
def test_planted_faults_are_found(kernel: str, fault: str, mode: str, report: str, folder: Path) -> None:
    result = run_sample(library(folder, mode), mode, kernel, fault, seeds=4)
    assert result.returncode != 0
    assert re.search(report, result.stderr), result.stdout + result.stderr


def test_a_kernel_runs_again_after_a_fault(folder: Path) -> None:
    loaded = load(library(folder, "plain"))
    right = samples.sum_rows(loaded, "none")
    for fault in ("lonely_barrier", "absent_lane", "divergent_barrier"):
        with pytest.raises(RuntimeError, match=r"samples\.cu"):
            samples.sum_rows(loaded, fault)
        assert samples.sum_rows(loaded, "none") == right


# ---- building

SCALE = """
#include "factor.h"
namespace NAME {
#ifdef TWICE
constexpr float factor = 2 * FACTOR;
#else
constexpr float factor = FACTOR;
#endif
__global__ void scale(float* x) { x[threadIdx.x] *= factor; }
}
#define TEXT_(a, b) a##b
#define TEXT(a, b) TEXT_(a, b)
extern "C" int TEXT(scale_, NAME)(float* x) {
    NAME::scale<<<1, 32>>>(x);
    return cudaGetLastError();
}
"""


def scaled(output: Path) -> list[float]:
    """Return the results of the two kernels on 1."""
    library = load(output)
    values = [copy(np.ones(32, np.float32)) for _ in range(2)]
    for name, value in zip(("first", "second"), values, strict=True):
        assert library[f"scale_{name}"](pointer(value)) == 0
    return [float(value[31]) for value in values]


def test_only_what_has_changed_is_built_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "CACHE", tmp_path / "cache")  # a cache of another run would have the files at once
    source, header, output = tmp_path / "scale.cu", tmp_path / "include" / "factor.h", folder / "scale.so"
    units = [(source, ["-DNAME=first"]), (source, ["-DNAME=second", "-DTWICE"])]
    header.parent.mkdir()
    source.write_text(SCALE, encoding="utf-8")

    def build_with(factor: int) -> float:
        """Return the seconds of the build."""
        header.write_text(f"#define FACTOR {factor}\n", encoding="utf-8")
        started = time.perf_counter()
        build([], output, include=[header.parent], units=units)
        return time.perf_counter() - started

    seconds = build_with(2)
    made = output.stat()
    assert build_with(2) < seconds / 2
    assert output.stat() == made
    shutil.copy(output, folder / "scale_2.so")
    build_with(3)
    assert [scaled(folder / "scale_2.so"), scaled(output)] == [[2, 4], [3, 6]]


def test_what_another_folder_has_made_is_not_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that a copy of the same sources is reused, and that another header, macro or source is built."""
    monkeypatch.setattr(builder, "CACHE", tmp_path / "cache")
    commands: list[str] = []
    run = builder.run

    def counted(*command: str | Path) -> str:
        commands.extend(str(word) for word in command if str(word).endswith((".cu", ".cpp")))
        return run(*command)

    monkeypatch.setattr(builder, "run", counted)

    def made(name: str, source: str = SCALE, factor: int = 2, defines: tuple[str, ...] = ("NAME=first",)) -> list[str]:
        here = tmp_path / name
        here.mkdir()
        (here / "scale.cu").write_text(source, encoding="utf-8")
        (here / "factor.h").write_text(f"#define FACTOR {factor}\n", encoding="utf-8")
        commands.clear()
        build([here / "scale.cu"], folder / f"scale_{name}.so", defines=defines, include=[here])
        return [Path(command).name for command in commands if "scale" in command]

    both = ["scale.cu", "scale.kernels.cpp"]
    assert made("first") == both
    assert made("copy") == []
    assert made("header", factor=3) == both
    assert made("macro", defines=("NAME=first", "TWICE")) == both
    assert made("source", source=SCALE.replace("*= factor", "+= factor")) == both
    value = copy(np.ones(32, np.float32))
    assert load(folder / "scale_copy.so").scale_first(pointer(value)) == 0
    assert value[31] == 2


def test_what_the_compiler_says_is_raised(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void kernel() { undeclared(); }\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r'wrong\.cu\(1\): error: identifier "undeclared" is undefined'):
        build([source], folder / "wrong.so")


def test_modes_have_names(folder: Path) -> None:
    with pytest.raises(ValueError, match="mode is one of plain, asan, tsan, not fast"):
        build([SOURCE], folder / "library.so", "fast")


# ---- nvcc's output for common CUDA


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).double().numpy()


def fused(x: np.ndarray) -> np.ndarray:
    """Return x x + x and 1 + 1 in bf16, added."""
    x = rounded(x, torch.bfloat16)
    return rounded((x * x + x).astype(np.float32), torch.bfloat16) + 2


def truncated_to_half(x: np.ndarray) -> np.ndarray:
    unit = 2.0 ** (np.maximum(np.frexp(x)[1] - 1, -14) - 10)
    return np.trunc(x / unit) * unit


FUNCTIONS: list[tuple[str, Callable[[np.ndarray], np.ndarray], float]] = [
    ("expf", lambda x: np.exp(x.astype(np.float64)), 4e-7),
    ("__expf", lambda x: np.exp(x.astype(np.float64)), 2e-6),
    ("tanhf", lambda x: np.tanh(x.astype(np.float64)), 4e-7),
    ("logf", lambda x: np.log(np.abs(x).astype(np.float64)), 4e-7),
    ("rsqrtf", lambda x: np.abs(x).astype(np.float64) ** -0.5, 4e-7),
    ("sqrtf", lambda x: np.sqrt(np.abs(x)), 0),
    ("erff", lambda x: torch.erf(torch.from_numpy(x).double()).numpy(), 4e-7),
    ("division", lambda x: np.float32(1) / x, 0),
    ("__fdividef", lambda x: 1 / x.astype(np.float64), 4e-7),
    ("exp2f", lambda x: np.exp2(x.astype(np.float64)), 4e-7),
    ("sinf", lambda x: np.sin((np.float32(100) * x).astype(np.float64)), 4e-6),
    ("powf", lambda x: np.abs(x).astype(np.float64) ** 1.5, 1e-6),
    ("fmodf", lambda x: np.fmod(x, np.float32(0.75)), 0),
    ("exp of double", lambda x: np.exp(x.astype(np.float64)), 2e-7),
    ("bf16", lambda x: rounded(x, torch.bfloat16), 0),
    ("half toward zero", truncated_to_half, 0),
    ("bf16 fma", fused, 0),
    ("nearest integer", np.rint, 0),
]


@pytest.fixture(scope="module")
def features(folder: Path) -> ctypes.CDLL:
    return load(build([SOURCE.with_name("features.cu")], folder / "features.so"))


def test_functions_of_cuda(features: ctypes.CDLL) -> None:
    values = np.random.default_rng(0).standard_normal(300).astype(np.float32) * 3
    for which, (name, function, tolerance) in enumerate(FUNCTIONS):
        source, output = copy(values), empty(len(values), np.float32)
        assert features.run_functions(which, pointer(source), pointer(output), len(values), None) == 0, (
            features.ptx_error()
        )
        expected = function(values)
        assert np.allclose(output, expected, rtol=tolerance, atol=tolerance * 0.1), (
            name,
            np.abs(output / expected - 1).max(),
        )


def test_kinds_of_memory(features: ctypes.CDLL) -> None:
    count, block = 256, 64
    values = np.random.default_rng(0).integers(-8, 8, count).astype(np.float32)
    source, output = copy(values), empty(count, np.float32)
    positive, total = empty(count // block, np.int32), empty(1, np.int32)
    pointers = [pointer(array) for array in (source, output, positive, total)]
    assert features.run_memories(*pointers, count, None) == 0, features.ptx_error()
    blocks = values.reshape(-1, block)
    sums = sum(weight * np.roll(blocks, n, axis=1) for n, weight in enumerate((1, -2, 0.5, 4)))
    assert np.array_equal(output, sums.ravel() + np.arange(count) % 8)
    assert positive.tolist() == (blocks > 0).sum(1).tolist()
    assert total[0] == (values > 0).sum()


# ---- launches that CUDA refuses

LIMITS = """
#include <cuda_runtime.h>
extern __shared__ float memory[];
__global__ void __launch_bounds__(64) kernel(float* out) { memory[threadIdx.x] = 1; *out = memory[threadIdx.x]; }
extern "C" int launch_kernel(int threads, int shared, int allowed, float* out) {
    if (allowed) {
        const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed);
        if (error) return error;
    }
    kernel<<<1, threads, shared>>>(out);
    return cudaGetLastError();
}
extern "C" int limits(int* found) {
    cudaGetDeviceCount(&found[0]);
    cudaDeviceGetAttribute(&found[1], cudaDevAttrMultiProcessorCount, 0);
    cudaDeviceGetAttribute(&found[2], cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    cudaDeviceGetAttribute(&found[3], cudaDevAttrComputeCapabilityMajor, 0);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found[4], kernel, 64, 0);
    cudaDeviceGetAttribute(&found[6], cudaDevAttrMultiProcessorCount, 1);
    if (cudaSetDevice(2) == cudaSuccess || cudaGetLastError() == cudaSuccess) return -1;
    cudaSetDevice(1);
    cudaGetDevice(&found[7]);
    return cudaSetDevice(0) | cudaGetDevice(&found[5]) | cudaDeviceSynchronize() | cudaStreamSynchronize(nullptr) |
           cudaPeekAtLastError();
}
extern "C" int round_trip(float value, float* out) {
    float* memory;
    if (cudaMalloc(&memory, 4) || cudaMemsetAsync(memory, 0, 4, nullptr)) return 1;
    if (cudaMemcpy(memory, &value, 4, cudaMemcpyHostToDevice)) return 2;
    return cudaMemcpy(out, memory, 4, cudaMemcpyDeviceToHost) | cudaFree(memory);
}
extern "C" const char* name_of(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
extern "C" const char* text_of(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
"""


def test_the_cuda_runtime(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "limits.cu"
    source.write_text(LIMITS, encoding="utf-8")
    loaded = load(build([source], folder / "limits.so"))
    loaded.name_of.restype = loaded.text_of.restype = ctypes.c_char_p
    out = empty(1, np.float32)
    address = pointer(out)
    kilobyte = 1024
    expected = {
        (64, 48 * kilobyte, 0): b"cudaSuccess",
        (64, 48 * kilobyte + 16, 0): b"cudaErrorInvalidValue",  # more must be requested
        (64, 100 * kilobyte, 100 * kilobyte): b"cudaSuccess",
        (64, 0, 228 * kilobyte): b"cudaErrorInvalidValue",  # and no block gets that much
        (65, 256, 0): b"cudaErrorInvalidConfiguration",  # beyond __launch_bounds__
        (0, 256, 0): b"cudaErrorInvalidConfiguration",
    }
    assert {call: loaded.name_of(loaded.launch_kernel(*call, address)) for call in expected} == expected
    assert b"__launch_bounds__" in loaded.text_of(loaded.launch_kernel(65, 256, 0, address))
    found = (ctypes.c_int * 8)()
    assert loaded.limits(found) == 0
    assert list(found) == [2, 2, 232448, 9, 2, 0, 132, 1]
    assert loaded.round_trip(ctypes.c_float(2.5), address) == 0
    assert out[0] == 2.5


BLOCKS = """
#include <cuda_runtime.h>
__global__ void numbers(uint2* out, unsigned first) { out[blockIdx.x + blockIdx.y - first] = {blockIdx.x, blockIdx.y}; }
extern "C" int launch_numbers(int x, int y, uint2* out, unsigned first) {
    if (const int error = cudaSetDevice(1)) return error;
    numbers<<<dim3(x, y), 1>>>(out, first);
    return cudaSetDevice(0) | cudaGetLastError();
}
"""


def test_the_last_blocks_of_a_grid(folder: Path, tmp_path: Path) -> None:
    """Check blocks numbered from a given start, along the last axis that has several.

    The launched kernels and their device can be queried.
    """
    source = tmp_path / "blocks.cu"
    source.write_text(BLOCKS, encoding="utf-8")
    loaded = load(build([source], folder / "blocks.so"))
    first = 2**31
    for grid, seen in (((3, 1), [[first, 0], [first + 1, 0], [first + 2, 0]]), ((1, 2), [[0, first], [0, first + 1]])):
        out = empty((len(seen), 2), np.uint32)
        loaded.ptx_first_block(first)
        assert loaded.launch_numbers(*grid, pointer(out), ctypes.c_uint(first)) == 0, loaded.ptx_error()
        assert out.tolist() == seen
        assert re.fullmatch(r"\w*numbers\w*\n", loaded.ptx_launched().decode())
        assert not loaded.ptx_launched()
        assert loaded.ptx_devices() == 16


PRINTS = """
#include <cstdio>
#include <cuda_runtime.h>
__global__ void kernel(float* out, bool say) {
    if (say) printf("%f", *out);
    *out = 1;
}
extern "C" int run_kernel(float* out, bool say) {
    kernel<<<1, 1>>>(out, say);
    return cudaGetLastError();
}
"""


def test_calls_are_not_supported(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "prints.cu"
    source.write_text(PRINTS, encoding="utf-8")
    loaded = load(build([source], folder / "prints.so"))
    out = empty(1, np.float32)
    assert loaded.run_kernel(pointer(out), False) == 0
    assert out[0] == 1
    assert loaded.run_kernel(pointer(out), True) == 719
    assert re.search(r"prints\.cu:5: the simulator does not support: .*param", loaded.ptx_error().decode())
