"""Lines of text, read and written in the same way by every program.

The encoding is UTF-8, and only a line feed ends a line. The package's commands read lines in this way, too.
"""

from __future__ import annotations

import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from depthlstm_fast.translate.lines import BLANK_LETTERS, file_lines, standard_input, visible

__all__ = ["MARK", "read_lines", "same_text", "standard_input", "visible", "write_lines"]

MARK = "\ufeff"  # the byte-order mark at the start of some editors' files
SELECTOR = re.compile("[\u034f\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file."""
    return list(file_lines(path))


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
