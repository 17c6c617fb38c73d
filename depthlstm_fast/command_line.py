"""What the commands share: errors in one line, and a terminal that cannot stop a command.

A command under ``program`` ends with status 0, or with 2 and one line on stderr, or with 130 after an interrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

INTERRUPTED = 130
TOO_LARGE = re.compile("allocate memory|out of memory|Storage size calculation overflowed|[Oo]verflow")


class Parser(argparse.ArgumentParser):
    """argparse's parser, without the usage before an error; --help prints it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def path(text: str) -> Path:
    """Return the path that an option names; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path; found ''")
    return Path(text)


def make_folder(folder: Path) -> str | None:
    """Make ``folder`` and write into it; return the reason if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"output must be a folder that can be written; found {folder}: {error.strerror}"


class Terminal(io.TextIOBase):
    """A text stream for messages.

    Characters that it cannot show are escaped. It prints nothing more once its reader is gone.

    Args:
        stream: standard output or standard error; None if that is closed.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation
        return self.stream.fileno()

    def write(self, text: str) -> int:
        if self.stream is not None:
            try:
                self.stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except OSError:
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            try:
                self.stream.flush()
            except OSError:
                self._give_up()

    def _give_up(self) -> None:
        """Discard the rest of the stream's buffer, which Python would write at the end."""
        stream, self.stream = self.stream, None
        discard(stream)


def discard(stream: TextIO | None) -> None:
    """Discard everything that is still to be written to ``stream``."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def results() -> TextIO:
    """Return standard output for a program's results.

    It is UTF-8 in every locale, and raises OSError if it cannot be written.

    Raises:
        ValueError: standard output is closed.
    """
    stream = sys.stdout.stream if isinstance(sys.stdout, Terminal) else sys.stdout
    if stream is None:
        raise ValueError("standard output must be open; found it closed")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    return stream


def occupy_closed_streams() -> None:
    """Open closed standard streams on nothing.

    Otherwise the next opened file would take the place of one of them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


@contextlib.contextmanager
def terminal_streams() -> Iterator[None]:
    """Print to ``Terminal`` inside the ``with`` block."""
    with contextlib.redirect_stdout(Terminal(sys.stdout)), contextlib.redirect_stderr(Terminal(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def fail(program: str, error: BaseException) -> NoReturn:
    """Print ``error`` in one line, from the first of torchrun's processes only, and end with status 2."""
    text = str(error)
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        text = f"{error.filename} must be a folder; found something else of that name"
    if os.environ.get("RANK", "0") == "0":
        print(f"{program}: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    raise SystemExit(2)


def program(name: str, *errors: type[Exception]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Turn a function of the command line's arguments, which returns the exit status, into a program's ``main``.

    Args:
        name: of the program; an error's line begins with it.
        errors: exceptions that end in one line besides ImportError, OSError and ValueError.
    """

    caught: tuple[type[Exception], ...] = (
        ImportError,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
        *errors,
    )

    def wrap(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def main(arguments: list[str] | None = None) -> int:
            occupy_closed_streams()
            with terminal_streams():
                try:
                    return function(arguments)
                except caught as error:
                    fail(name, error)
                except RuntimeError as error:  # torch's, for sizes that no machine has
                    if not TOO_LARGE.search(str(error)):
                        raise
                    fail(name, error)
                except KeyboardInterrupt:
                    raise SystemExit(INTERRUPTED) from None

        return main

    return wrap
