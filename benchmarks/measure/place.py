"""The place of a measurement: the device, the backends under test, the compiler of the rival."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .calls import Runs, on_backend
from .compiled import Compiled

CPU = torch.device("cpu")
IN_USE = ""  # the backend that dl.use_backend names
FUSED = "fused"  # its contestant's name


@dataclass(frozen=True)
class Place:
    """Arguments of a problem's maker.

    Attributes:
        compiled: makes the contestant "compile".
        device: holds all tensors.
        backends: the fused backends under test, one row each; ``IN_USE`` alone on the command line and in pytest.
        gpu: floors, targets and seconds are those of a GPU; a rehearsal has them on the CPU.
    """

    compiled: Compiled = field(default_factory=lambda: Compiled(enabled=False))
    device: torch.device = CPU
    backends: tuple[str, ...] = (IN_USE,)
    gpu: bool = False

    def functions(self, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """Return ``function`` for each backend under test, by the contestant's name.

        ``function`` has a parameter ``backend``.
        """
        return {
            name or FUSED: functools.partial(function, backend=name) if name else function for name in self.backends
        }

    def fused(self, run: Callable[[], object]) -> Runs:
        """Return ``run`` on each backend under test, by the contestant's name.

        It is for modules, which use the default backend.
        """
        return {name or FUSED: on_backend(name, run) if name else run for name in self.backends}
