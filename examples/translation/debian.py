"""Parallel text from Debian: English documentation with its German, French or Czech translations.

It includes package descriptions and manual pages. The texts are under copyleft licences. They are fetched from the
mirror that apt is set up for, and not kept in this repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import command
from corpus.data import DownloadError
from corpus.debian import LANGUAGES, build


@command.program("debian.py", DownloadError)
def main(arguments: list[str] | None = None) -> int:
    """Build the pairs of one language from the command line, and return the exit status."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("language", choices=LANGUAGES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    build(options.language, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
