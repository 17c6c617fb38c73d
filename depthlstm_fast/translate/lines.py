"""Lines of text as the commands read them.

The encoding is UTF-8, and only a line feed ends a line.
"""

from __future__ import annotations

import codecs
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs in Unicode that look like empty space


def decode_lines(chunks: Iterable[bytes], name: str, errors: str = "strict") -> Iterator[str]:
    """Yield the lines of a binary stream without their ends.

    A carriage return right before the line feed belongs to the end, others stay.

    Args:
        chunks: the stream's iterator: bytes up to and with each line feed.
        name: of the stream, for messages.
        errors: "replace" reads bytes that are not UTF-8 as U+FFFD.

    Raises:
        ValueError: a line is not UTF-8.
    """
    for number, chunk in enumerate(chunks, 1):
        if number == 1 and not (chunk := chunk.removeprefix(codecs.BOM_UTF8)):
            return  # a mark and nothing else
        try:
            yield chunk.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} must be UTF-8; found byte 0x{chunk[error.start]:02x} in line {number}") from None


def file_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file, as ``decode_lines`` does."""
    with open(path, "rb") as file:
        yield from decode_lines(file, str(path))


def standard_input() -> Iterator[str]:
    """Yield the lines of standard input as they come, in every locale.

    Bytes that are not UTF-8 are read as U+FFFD.

    Raises:
        ValueError: standard input is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input must be open; found it closed")
    chunks = getattr(sys.stdin, "buffer", None) or (line.encode("utf-8", "replace") for line in sys.stdin)
    return decode_lines(chunks, "standard input", "replace")


def visible(text: str) -> bool:
    """Return whether ``text`` has a character that is visible by itself.

    Blanks, control and format characters and combining marks are not.
    """
    return any(unicodedata.category(character)[0] not in "CMZ" and character not in BLANK_LETTERS for character in text)
