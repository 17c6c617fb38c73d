"""The frame of every program: an error is one line on stderr and status 2, an interrupt status 130."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, which end a program in one line and without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def program(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Turn a function of the command line's arguments, which returns the exit status, into a program's ``main``."""

    def wrap(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def main(arguments: list[str] | None = None) -> int:
            try:
                return function(arguments)
            except (ImportError, OSError, ValueError, OverflowError, MemoryError) as error:
                print(f"{name}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                return 130

        return main

    return wrap
