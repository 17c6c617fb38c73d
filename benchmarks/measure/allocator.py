"""glibc's memory kept between calls, for rows that are measured under both settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import depthlstm_fast as dl

KEPT = ", memory kept"  # in the names of rows under dl.keep_memory()


@contextmanager
def keeping(enabled: bool) -> Iterator[None]:
    """Let glibc keep freed memory inside the ``with`` block; afterwards it gives what is free back to the system."""
    if not enabled:
        yield
        return
    dl.keep_memory()
    try:
        yield
    finally:
        dl.keep_memory(False)
