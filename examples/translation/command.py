"""The frame of every program of the example: the one of the package's commands, and interrupts during its import."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def _leave(*_: Any) -> NoReturn:
    os._exit(130)


# The import of torch takes seconds. During it torch and NumPy take a KeyboardInterrupt for a missing module, and go on.
if (
    Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _leave)

from depthlstm_fast import command_line  # noqa: E402


class Parser(command_line.Parser):
    """A parser whose errors are ValueErrors, which end a ``program`` in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", Path, command_line.path)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def program(name: str, *errors: type[Exception]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Do what ``command_line.program`` does, and let an interrupt raise KeyboardInterrupt again."""

    def wrap(function: Callable[..., int]) -> Callable[..., int]:
        framed = command_line.program(name, *errors)(function)

        @functools.wraps(function)
        def main(arguments: list[str] | None = None) -> int:
            if signal.getsignal(signal.SIGINT) is _leave:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            return framed(arguments)

        return main

    return wrap
