"""torch.compile of an eager reference, or the reason for its absence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Functions made by one factory share one code object. torch compiles that eight times, and then runs it uncompiled with
# no more than a warning: a ratio over such a rival would be one over eager.
LIMITS: dict[str, Any] = {
    "recompile_limit": 256,
    "accumulated_recompile_limit": 1024,
    "fail_on_recompile_limit_hit": True,
}


class Compiled:
    """The compiled reference, or the reason for its absence.

    Attributes:
        reason: why torch.compile cannot be used; None as long as it can.
        mode: torch.compile's; None for its default.
    """

    def __init__(self, enabled: bool = True, mode: str | None = None) -> None:
        self.reason: str | None = None if enabled else "left out"
        self.mode = mode
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def missing(self) -> dict[str, str]:
        """Return a row's note about an absent compiled contestant."""
        return {} if self.reason is None else {"compile": self.reason}

    def get(
        self, function: Callable[..., Any], first_call: Callable[[Callable[..., Any]], object]
    ) -> Callable[..., Any] | None:
        """Return ``function`` compiled; ``first_call`` is made on it, so that nothing is left to compile.

        The result is None if that fails.
        """
        if self.reason is not None:
            return None
        try:
            compiled = self._functions.setdefault(function, torch.compile(function, dynamic=False, mode=self.mode))
            with torch._dynamo.config.patch(**LIMITS):
                first_call(compiled)
        except Exception as error:  # noqa: BLE001  a rival's error must not end the run
            self.reason = (
                f"torch.compile failed: {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0][:120] if str(error) else ''}"
            )
            return None
        return compiled
