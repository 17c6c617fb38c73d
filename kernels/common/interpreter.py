"""Patches that make Triton's interpreter (TRITON_INTERPRET=1) compute what a GPU computes.

They work and are needed with Triton 3.6 to 3.9 (tests/backends/triton/test_triton_interpreter.py):

- fp32 -> bf16: the interpreter truncates. Hardware rounds to nearest, ties to even.
- bf16 -> fp32: the interpreter makes subnormal numbers zero. Hardware keeps them.
- Loop bounds: Triton 3.6 keeps scalars in one-element arrays, and numpy 2.4 refuses to convert these to a Python int.
- Reductions of tuples: the interpreter goes element by element in Python (9 s for 17 rows of 300). The patch reduces by
  halves of whole arrays, as hardware does.
- Language: the interpreter replaces it at every call of a device function, which is half of the time. The patch
  replaces it once a launch.

Three differences from a GPU remain:

- Scalars and loop variables are Python ints, which never overflow.
- Programs run one after the other, so no race and no missing barrier can show.
- Arithmetic in bf16 is wrong, so the kernels convert to fp32 right after loading.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton


def enabled() -> bool:
    """Return whether Triton interprets kernels in this process."""
    return bool(triton.knobs.runtime.interpret)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Convert fp32 to the bits of bf16 as cvt.rn.bf16.f32 does: to nearest, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def reduce_by_halves(self: Any, values: tuple[Any, ...]) -> list[Any]:
    """Replace Triton's ReduceOps.generic_reduce along one axis, whose size is a power of two."""
    arrays = [value.handle.data for value in values]
    while arrays[0].shape[self.axis] > 1:
        halves = [np.split(array, 2, axis=self.axis) for array in arrays]
        low, high = (
            [self.to_tensor(pair[side], value.dtype) for pair, value in zip(halves, values, strict=True)]
            for side in (0, 1)
        )
        arrays = [value.handle.data for value in self.combine_fn.fn(*low, *high)]
    if not self.keep_dims:
        arrays = [array.squeeze(self.axis) for array in arrays]
    return [self.to_tensor(array, value.dtype) for array, value in zip(arrays, values, strict=True)]


_lock = threading.RLock()


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Interpret one launch inside the ``with`` block as the file's header says.

    Only one thread may do so at a time, because the interpreter works by globals.
    """
    from triton.runtime import interpreter as module

    _lock.acquire()
    builder, reduction = module.InterpreterBuilder, module.ReduceOps
    cast, reduce, patch_tensor = builder.cast_impl, reduction.generic_reduce, module._patch_lang_tensor
    patch_language, languages, done = module._patch_lang, (module.tl, module.tl.core), set()

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == triton.language.float32 and target.scalar == triton.language.bfloat16:
            return module.TensorHandle(round_to_bf16(source.data), target.scalar)
        if source.dtype.scalar == triton.language.bfloat16 and target.scalar == triton.language.float32:
            return module.TensorHandle((source.data.astype(np.uint32) << np.uint32(16)).view(np.float32), target.scalar)
        return cast(self, source, target)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    @functools.cache
    def languages_of(function: Any) -> tuple[bool, ...]:
        return tuple(any(value is language for value in function.__globals__.values()) for language in languages)

    def patch_language_once(function: Any) -> Any:
        found = languages_of(function)  # which languages the function's module has
        if found in done:
            return None  # the result for a device function is not used
        done.add(found)
        return patch_language(function)

    builder.cast_impl, reduction.generic_reduce = cast_impl, reduce_by_halves
    module._patch_lang_tensor, module._patch_lang = patch_lang_tensor, patch_language_once
    try:
        yield
    finally:
        builder.cast_impl, reduction.generic_reduce = cast, reduce
        module._patch_lang_tensor, module._patch_lang = patch_tensor, patch_language
        _lock.release()
