"""Checks against the fp64 reference on the GPU, before any timing.

A row is timed only if a check has passed its backend, dtype and width. fp64 and eager run on the same GPU. The bound is
that of the tests: twice eager's error and one rounding of the largest value. In fp32 it is eight roundings, because
eager's largest error can be luckily small. The gates' outputs hold NaN before the kernels write them, so that an
unwritten element is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..measure.accuracy import GPU_ROUNDINGS, Check
from ..measure.calls import name_of
from ..measure.gpu_timing import release
from ..measure.poison import poisoned
from ..subjects import cell, gates, layer
from .steps import CALLS

LAYER_ROUNDINGS = 4.0  # several products deep
Key = tuple[str, str, torch.dtype, int]  # subject ("gates", "cell", "layer" or of CALLS), backend, dtype, D


class Checker:
    """Checks on demand, each made once.

    Args:
        rows: function from the width D to the number of rows of a check.
        heads, tokens: sizes of the layer's check.
        on_check: called with every new check.
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
        """Return the check of one backend at one width; a check that raises is red."""
        key = (subject, backend, dtype, features)
        if key not in self.found:
            torch.manual_seed(features)
            try:
                made = self._make(*key)
            except Exception as error:  # noqa: BLE001  a backend that raises must not end the run
                lines = str(error).strip().splitlines()
                text = f"raised {type(error).__name__}: {lines[0][:200] if lines else ''};"
                made = Check(subject, name_of(dtype), False, text, 0.0, 0.0, 0.0, backend)
            if made.passed and made.backend != backend:
                made = replace(made, passed=False, tensor=f"ran on {made.backend}, not {backend}:")
            self.found[key] = replace(made, backend=backend, size=made.size or f"D={features}")
            self.on_check(self.found[key])
            release(self.device)
        return self.found[key]

    def failure(self, subject: str, backend: str, dtype: torch.dtype, features: int) -> str | None:
        """Say why no number of this key may be shown; None if its check is green."""
        made = self.check(subject, backend, dtype, features)
        return None if made.passed else f"{subject} {made.dtype} {made.size} {made.summary}"

    def _make(self, subject: str, backend: str, dtype: torch.dtype, features: int) -> Check:
        rows, roundings = self.rows(features), GPU_ROUNDINGS[dtype]
        if subject == "layer":
            return layer.check_at(dtype, features, self.heads, self.tokens, backend, self.device, LAYER_ROUNDINGS)
        if subject in CALLS:
            with poisoned(self.device):
                made = CALLS[subject].check(dtype, rows, features, backend, self.device, roundings)
        elif subject == "gates":
            with poisoned(self.device):
                made = gates.check_at(dtype, rows, features, backend, self.device, roundings)
        else:
            beside = subject == "cell beside"
            made = cell.check_at(dtype, rows, features, backend, self.device, roundings, beside)
        return replace(made, size=f"N={rows} D={features}")
