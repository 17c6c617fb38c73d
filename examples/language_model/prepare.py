"""Make the folder that train.py reads, from text files or from the docstrings of Python and torch.

Usage:

    python examples/language_model/prepare.py FOLDER
    python examples/language_model/prepare.py FOLDER --text book.txt notes/
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch
from frame import Parser, program
from text import read_docstrings, read_files, save_corpus


@program("prepare.py")
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, write the folder, and return the exit status."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        help="UTF-8 files, or folders of .txt and .md; default: docstrings of Python's standard library and of torch",
    )
    parser.add_argument("--vocab-size", type=int, default=2000, help="subwords; default: %(default)s")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.text:
        source, documents = ", ".join(path.name for path in options.text), list(read_files(options.text))
    else:
        source = f"docstrings of Python {platform.python_version()} and torch {torch.__version__}"
        documents = list(read_docstrings())
    meta = save_corpus(options.folder, documents, options.vocab_size, source)
    for name in ("train", "dev"):
        sizes = meta[name]
        print(f"{name}: {sizes['documents']:,} documents, {sizes['bytes']:,} bytes, {sizes['tokens']:,} tokens")
    print(f"{source}: {meta['vocabulary']} subwords, in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
