"""What the package's commands share: a wrong option ends in one line on stderr and status 2."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser, without the usage before an error; --help prints it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def make_folder(folder: Path) -> str | None:
    """Make ``folder`` and write into it; return the reason if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"output must be a folder that can be written; found {folder}: {error.strerror}"
