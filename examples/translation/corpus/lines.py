"""Lines of text, read and written in the same way by every program.

The encoding is UTF-8, and only a line feed ends a line.
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

MARK = "\ufeff"  # the byte-order mark at the start of some editors' files
SELECTOR = re.compile("[\u034f\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
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


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, as ``decode_lines`` does."""
    with open(path, "rb") as file:
        return list(decode_lines(file, str(path)))


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


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """Write ``lines`` to ``path`` at once, and return ``path``.

    No reader finds half a file, and ``read_lines`` returns the same lines.

    Raises:
        ValueError: a line holds a line feed.
    """
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            for number, line in enumerate(lines, 1):
                if "\n" in line:
                    raise ValueError(f"a line of {path} must be one line; found a line feed in line {number}")
                # characters that a reader removes are written twice
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
    """Return whether ``text`` has a character that is visible by itself.

    Blanks, control and format characters and combining marks are not.
    """
    return any(unicodedata.category(character)[0] not in "CMZ" and character not in BLANK_LETTERS for character in text)


def _leaves_no_trace(character: str) -> bool:
    """Return whether a text looks the same without ``character``, which is not a blank."""
    if character.isspace():
        return False
    # variation selectors and the grapheme joiner are invisible marks; other marks show on the letter before them
    return (
        unicodedata.category(character)[0] == "C" or character in BLANK_LETTERS or SELECTOR.match(character) is not None
    )


def same_text(text: str) -> str:
    """Return a key that is equal for texts that look alike.

    Compatible characters, case, blanks and invisible characters make no difference.
    """
    shown = "".join(character for character in unicodedata.normalize("NFKC", text) if not _leaves_no_trace(character))
    return " ".join(shown.split()).casefold()
