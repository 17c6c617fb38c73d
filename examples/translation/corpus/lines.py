"""Lines of text, read and written in one way by every program: UTF-8, and a line ends at a line feed and nowhere
else.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "\ufeff"  # the byte-order mark that some editors begin a file with
SELECTOR = re.compile("[\u034f\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs to Unicode, and empty space to the reader


def decode_lines(chunks: Iterable[bytes], name: str, errors: str = "strict") -> Iterator[str]:
    """Yield the lines of a binary stream without their ends; a carriage return before the end goes with it, others
    stay.

    Args:
        chunks: what iterating over the stream gives: bytes up to and with each line feed.
        name: of the stream, for messages.
        errors: "replace" reads what is no UTF-8 as U+FFFD.

    Raises:
        ValueError: a line is no UTF-8.
    """
    for number, chunk in enumerate(chunks, 1):
        if number == 1 and not (chunk := chunk.removeprefix(codecs.BOM_UTF8)):
            return  # a mark and nothing else
        try:
            yield chunk.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} must be UTF-8; found byte 0x{chunk[error.start]:02x} in line {number}") from None


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, as ``decode_lines`` does."""
    with open(path, "rb") as file:
        return list(decode_lines(file, str(path)))


def standard_input() -> Iterator[str]:
    """Yield the lines of standard input as they come, whatever the locale; what is no UTF-8 is read as U+FFFD.

    Raises:
        ValueError: it is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input must be open; found it closed")
    chunks = getattr(sys.stdin, "buffer", None) or (line.encode("utf-8", "replace") for line in sys.stdin)
    return decode_lines(chunks, "standard input", "replace")


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """Write ``lines`` to ``path`` at once, so that no reader finds half a file and ``read_lines`` gives them back;
    return ``path``.

    Raises:
        ValueError: a line holds a line feed.
    """
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            for number, line in enumerate(lines, 1):
                if "\n" in line:
                    raise ValueError(f"a line of {path} must be one line; found a line feed in line {number}")
                # what a reader takes away is written once more
                mark, end = (
                    MARK if number == 1 and line.startswith(MARK) else "",
                    "\r\n" if line.endswith("\r") else "\n",
                )
                file.write((mark + line + end).encode())
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def visible(text: str) -> bool:
    """Return whether ``text`` has a character that is seen by itself: no blank, control or format character, nor a
    combining mark.
    """
    return any(unicodedata.category(character)[0] not in "CMZ" and character not in BLANK_LETTERS for character in text)


def _leaves_no_trace(character: str) -> bool:
    """Whether a text looks the same without ``character``, which is no blank."""
    if character.isspace():
        return False
    # variation selectors and the grapheme joiner are marks, other marks are seen on the letter before them
    return (
        unicodedata.category(character)[0] == "C" or character in BLANK_LETTERS or SELECTOR.match(character) is not None
    )


def same_text(text: str) -> str:
    """Return what texts have in common that look alike: compatible characters, case, blanks and invisible characters do
    not count.
    """
    shown = "".join(character for character in unicodedata.normalize("NFKC", text) if not _leaves_no_trace(character))
    return " ".join(shown.split()).casefold()
