"""Compile and launch the Triton kernels, once for each (kernel, D, dtypes, flags).

A dictionary lookup finds the compiled kernel. triton.jit would specialise on the alignment of every single argument and
spend more time on a call. Here the caller says whether everything is aligned. N and the strides are never specialised
on. The compile gate (tools/check_kernels.py) compiles with the same function that the launcher uses. With
TRITON_INTERPRET=1 the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from . import interpreter

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
ALIGNMENT = 16  # bytes: the widest load of a thread
INTERPRETED = interpreter.enabled()
Single = Tensor | int | float | None
Argument = Single | tuple[Single, ...]  # a tuple is one argument of the kernel, with a type for each of its parts
Constant = int | str | bool


class Launch(NamedTuple):
    """Launch plan of a kernel: the warps of a program and the constants of its tile."""

    warps: int
    constants: dict[str, int]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def type_of(argument: Argument) -> Any:
    """Return Triton's name for the type of a run-time argument.

    It is None for an absent one, and a tuple of names for a tuple.
    """
    if argument is None:
        return None
    if isinstance(argument, tuple):
        return tuple(type_of(part) for part in argument)
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i64"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of the GPU; 1 for the interpreter."""
    return 1 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, unless it already is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def row_stride(tensor: Tensor) -> int | None:
    """Return the distance between rows in elements; None where there is no single one.

    Rows are all but the last dimension, flattened.
    """
    if tensor.is_contiguous():
        return tensor.shape[-1]
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    stride, expected = None, 0
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return tensor.shape[-1] if stride is None else stride


def as_rows(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """Return the tensor with its row stride; it is copied only where no single stride exists."""
    if tensor is None:
        return None, 0
    tensor = tensor.resolve_neg()  # resolves a lazy minus sign, as the imaginary part of a conjugate has
    stride = row_stride(tensor)
    return (tensor.contiguous(), tensor.shape[-1]) if stride is None else (tensor, stride)


def is_aligned(tensors: Sequence[Tensor | None], strides: Sequence[int]) -> bool:
    """Return whether each tensor and each of its rows starts at a multiple of ALIGNMENT bytes.

    ``strides`` are those of the rows, in elements.
    """
    for tensor, stride in zip(tensors, strides, strict=True):
        if tensor is not None and (tensor.data_ptr() % ALIGNMENT or stride * tensor.itemsize % ALIGNMENT):
            return False
    return True


def _promise(kind: str, pointer: str) -> list[Any]:
    """Return the attribute of a tuple's part: a pointer, or the stride of the rows of ``pointer``."""
    return [["tt.divisibility", ALIGNMENT if kind.startswith("*") else ALIGNMENT // (4 if pointer == "*fp32" else 2)]]


def compile_kernel(
    kernel: Any,
    types: Sequence[Any],
    constants: dict[str, Constant],
    warps: int,
    aligned: bool,
    target: Any = None,
) -> Any:
    """Compile ``kernel`` for run-time arguments of ``types`` (None: absent), for ``target`` or else the current GPU.

    ``aligned`` promises what :func:`is_aligned` checks: for all pointers, and through an argument x_stride for the rows
    of x.
    """
    names = kernel.arg_names
    by_name = dict(zip(names, types, strict=False))
    signature = {name: by_name.get(name) or "constexpr" for name in names}
    # Beside fp32 rows a 16-bit row is promised only 4 elements, the vector of an fp32 store. With two layouts Triton
    # 3.6 computed a row's statistics twice, once for each (bf16 z and fp32 c, backward, sm_90: 2451 instructions, with
    # one layout 1752).
    vector = ALIGNMENT // (4 if "*fp32" in (by_name.get("z"), by_name.get("c")) else 2)
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(names):
        kind = by_name.get(name)
        if kind is None:
            values[(index,)] = constants.get(name)
        elif isinstance(kind, tuple):
            if aligned:
                pointers = by_name.get(name.removesuffix("_stride"), kind)
                attributes |= {(index, part): _promise(kind[part], pointers[part]) for part in range(len(kind))}
        elif aligned and kind.startswith("*") and kind != "*i64":
            attributes[(index,)] = [["tt.divisibility", ALIGNMENT if kind == "*fp32" else 2 * vector]]
        elif aligned and name.endswith("_stride"):
            pointer = by_name[name.removesuffix("_stride")] or "*fp32"
            attributes[(index,)] = [["tt.divisibility", 4 if pointer == "*fp32" else vector]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton 3.9 warns of enable_fp_fusion's future default even if it is given
        source = ASTSource(kernel, signature, values, attributes)
        return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def key_of(arguments: Sequence[Argument], constants: dict[str, Constant], aligned: bool) -> tuple[object, ...]:
    """Return the key of a kernel's machine code, apart from its plan.

    The key holds which tensors are present, their dtypes, and the constants.
    """

    def kind(argument: Argument) -> object:
        if isinstance(argument, tuple):
            return tuple(kind(part) for part in argument)
        return argument.dtype if isinstance(argument, Tensor) else argument is None

    return (*[kind(argument) for argument in arguments], *constants.values(), aligned)


_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Argument],
    constants: dict[str, Constant],
    plan: Launch,
    aligned: bool,
) -> None:
    """Run ``kernel`` on the current stream of the current device.

    Its parameters are ``arguments``, then ``constants`` and the plan's constants.
    """
    if INTERPRETED:
        with interpreter.patched():
            kernel[grid](*arguments, **constants, **plan.constants)
        return
    sizes = tuple(plan.constants.values())
    key = (kernel, torch.cuda.current_device(), *key_of(arguments, constants, aligned), *sizes, plan.warps)
    compiled = _compiled.get(key)
    if compiled is None:
        types = [type_of(argument) for argument in arguments]
        compiled = _compiled[key] = compile_kernel(kernel, types, {**constants, **plan.constants}, plan.warps, aligned)
    compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values(), *sizes)
