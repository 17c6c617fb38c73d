"""NaN in the memory of the next allocations, so that an unwritten element is found."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

FREE_BYTES, FREE_SMALL_BYTES, SMALL_BYTES = 1 << 31, 1 << 26, 1 << 20
CPU = torch.device("cpu")


def spoil_free_memory(device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations on a GPU get.

    Torch does not fill memory that is allocated over the stable ABI.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # the allocator keeps small blocks apart
        sizes = [FREE_BYTES, *[SMALL_BYTES] * (FREE_SMALL_BYTES // SMALL_BYTES)]
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=device) for size in sizes]
        del blocks


@contextlib.contextmanager
def poisoned(device: torch.device = CPU) -> Iterator[None]:
    """Fill the results of torch.empty with NaN inside the ``with`` block.

    Free memory of a GPU holds NaN before the block.
    """
    spoil_free_memory(device)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
