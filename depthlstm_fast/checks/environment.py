"""Environment variables: read at import, and a wrong value is an error of the first call.

An import that failed would take the report of `python -m depthlstm_fast` with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

STRICT, AUTOTUNE, POOL_BYTES = "DEPTHLSTM_STRICT", "DEPTHLSTM_AUTOTUNE", "DEPTHLSTM_POOL_BYTES"


def is_on(variable: str) -> bool:
    """Return whether ``variable`` is "1"."""
    return os.environ.get(variable) == "1"


def check_switch(variable: str) -> None:
    """Raise ValueError unless ``variable`` is "1", "0" or "", or not set."""
    found = os.environ.get(variable, "")
    if found not in ("", "0", "1"):
        raise ValueError(f"{variable} must be '0' or '1'; found {found!r}")


def check_pool_bytes() -> None:
    """Raise ValueError for a DEPTHLSTM_POOL_BYTES that is no number of bytes."""
    found = os.environ.get(POOL_BYTES, "")
    if found and not (found.isascii() and found.isdigit() and int(found) < 2**63):
        raise ValueError(f"{POOL_BYTES} must be a number of bytes; found {found!r}")


def message_of(check: Callable[..., None], *arguments: object) -> str | None:
    """Return the message of the ValueError that ``check(*arguments)`` raises, or None."""
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return None


def find_faults() -> list[str]:
    """Return a message for each of these variables that holds something else than it may."""
    found = [message_of(check_switch, STRICT), message_of(check_switch, AUTOTUNE), message_of(check_pool_bytes)]
    return [message for message in found if message is not None]
