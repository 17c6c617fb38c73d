"""Correct before fast, on the GPU: a row is timed only where its backend, dtype and width are held to the fp64 reference first.

fp64 and eager run on the same GPU. The bound is that of the tests: twice eager's error and one rounding of the largest value, eight in
fp32, where eager's largest error can be luckily small. What the gates allocate holds NaN before they write it, so that an element
that nobody writes is found.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import depthlstm_fast as dl

from ..measure import accuracy
from ..measure.accuracy import Check
from ..measure.compiled import reference_cell, reference_gates
from ..measure.gpu_timing import release
from ..subjects import cell, gates

ROUNDINGS = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}
LAYER_ROUNDINGS = 4.0  # several products deep
NAMES = {"gates": ("z", "c", "weight", "bias"), "cell": ("x", "h", "c", "w", "b", "weight", "bias")}
FREE_BYTES, FREE_SMALL_BYTES, SMALL_BYTES = 1 << 31, 1 << 26, 1 << 20
CPU = torch.device("cpu")
Key = tuple[str, str, torch.dtype, int]  # subject ("gates", "cell", "cell beside", "layer"), backend, dtype, D


def spoil_free_memory(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations on a GPU get: what is allocated over the stable ABI, nobody fills."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        sizes = [FREE_BYTES, *[SMALL_BYTES] * (FREE_SMALL_BYTES // SMALL_BYTES)]  # the allocator keeps small blocks apart
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes]
        del blocks


@contextlib.contextmanager
def poisoned(device: torch.device = CPU) -> Iterator[None]:
    """Fill what torch.empty gives with NaN inside the ``with`` block, and leave NaN in free memory of a GPU before it."""
    spoil_free_memory(device)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Checker:
    """Checks on demand, each made once.

    Args:
        rows: how many rows a check of width D takes.
        heads, tokens: of the layer's check.
        on_check: told of every new check.
    """

    def __init__(
        self,
        device: torch.device,
        rows: Callable[[int], int],
        heads: int = 8,
        tokens: tuple[int, int] = (4, 67),
        on_check: Callable[[Check], None] = lambda check: None,
    ) -> None:
        self.device, self.rows, self.heads, self.tokens, self.on_check = device, rows, heads, tokens, on_check
        self.found: dict[Key, Check] = {}

    def check(self, subject: str, backend: str, dtype: torch.dtype, features: int) -> Check:
        """The check of one backend at one width; one that raises is red."""
        key = (subject, backend, dtype, features)
        if key not in self.found:
            torch.manual_seed(features)
            try:
                made = self._make(*key)
            except Exception as error:  # noqa: BLE001  a backend that raises must not end the run
                lines = str(error).strip().splitlines()
                text = f"raised {type(error).__name__}: {lines[0][:200] if lines else ''};"
                made = Check(subject, gates.name_of(dtype), False, text, 0.0, 0.0, 0.0, backend)
            if made.passed and made.backend != backend:
                made = replace(made, passed=False, tensor=f"ran on {made.backend}, not {backend}:")
            self.found[key] = replace(made, backend=backend, size=made.size or f"D={features}")
            self.on_check(self.found[key])
            release(self.device)
        return self.found[key]

    def failure(self, subject: str, backend: str, dtype: torch.dtype, features: int) -> str | None:
        """Why no number of that may be shown; None where its check is green."""
        made = self.check(subject, backend, dtype, features)
        return None if made.passed else f"{subject} {made.dtype} {made.size} {made.summary}"

    def _make(self, subject: str, backend: str, dtype: torch.dtype, features: int) -> Check:
        rows, roundings = self.rows(features), ROUNDINGS[dtype]
        if subject == "layer":
            with dl.use_backend(backend):
                return accuracy.layer_check(features, self.heads, self.tokens, dtype, self.device, LAYER_ROUNDINGS)
        if subject == "gates":
            inputs = gates.make_inputs(rows, features, dtype, self.device)
            fused = functools.partial(dl.depth_lstm_gates, backend=backend)
            with poisoned(self.device):
                made = accuracy.function_check("gates", reference_gates, fused, inputs, NAMES["gates"], dtype, roundings)
        else:
            inputs = cell.make_inputs(rows, features, dtype, self.device, beside=subject == "cell beside")
            fused = functools.partial(dl.depth_lstm_cell, backend=backend)
            made = accuracy.function_check(subject, reference_cell, fused, inputs, NAMES["cell"], dtype, roundings)
        return replace(made, size=f"N={rows} D={features}")

    def last_rows(self, backend: str, inputs: Sequence[Tensor], count: int = 64) -> str | None:
        """Hold the last rows of a call on ``inputs`` of the gates, as large as they are timed, to fp64; what is wrong, or None."""
        dtype, features = inputs[0].dtype, inputs[1].shape[-1]
        z, c, *affine = inputs
        with torch.no_grad(), poisoned(self.device):
            fused = [tensor[-count:] for tensor in dl.depth_lstm_gates(*inputs, backend=backend)]
            eager = reference_gates(z[-count:], c[-count:], *affine)
            exact = reference_gates(*(tensor.double() for tensor in (z[-count:], c[-count:], *affine)))
        made = accuracy.compare("gates", dtype, ("last h", "last c"), exact, eager, fused, ROUNDINGS[dtype])
        self.on_check(replace(made, size=f"N={z.shape[0]} D={features}", backend=backend))
        return None if made.passed else f"gates {made.dtype} N={z.shape[0]} D={features} {made.summary}"
