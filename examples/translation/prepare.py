"""Make the folder that train.py reads: splits, a joint vocabulary and encoded ids.

Usage:

    python examples/translation/prepare.py --data django --language de FOLDER
    python examples/translation/prepare.py --source text.en --target text.de FOLDER
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import command
from corpus import debian
from corpus.data import DATASETS, DownloadError, read_named
from corpus.placeholders import hide_pair
from corpus.prepared import SPLITS, save_corpus
from corpus.splits import read_split_files, split
from corpus.tokenizer import train_tokenizer

VOCABULARY = 1000


def prepare(
    folder: Path,
    data: str = "auto",
    language: str = "de",
    files: dict[str, tuple[Path, Path]] | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
) -> dict:
    """Write a prepared folder (``corpus.prepared.save_corpus``) and return its meta data.

    Args:
        data: "auto", "django", "builtin" (see ``corpus.data.read_named``) or "debian"; ``files`` takes precedence.
        language: of the translations; the sources are English. With ``files`` it is a name only.
        files: source and target file of "train" and, if the user has them, of "dev" and "test".
        vocab_size: exact number of subwords of both languages together; None for 1000, or fewer if the text has fewer.
        seed: of the split.

    Raises:
        ValueError: the text is empty or not aligned, or too small for ``vocab_size``.
        DownloadError, OSError: a file cannot be fetched or read.
    """
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1; found {vocab_size}")
    if files:
        name, texts = " + ".join(path.name for path in files["train"]), read_split_files(files, seed)
    elif data == "debian":
        with tempfile.TemporaryDirectory() as scratch:
            name, texts = (
                f"catalogs of Debian, en-{language}",
                read_split_files(debian.build(language, Path(scratch)), seed),
            )
    else:
        name, pairs = read_named(data, language)
        texts = split(pairs, seed)
    tokenizer = train_tokenizer(
        (text for pair in map(hide_pair, texts["train"]) for text in pair),
        VOCABULARY if vocab_size is None else vocab_size,
    )
    if vocab_size is not None and len(tokenizer) != vocab_size:
        raise ValueError(f"vocab_size must be at most {len(tokenizer)} for this text; found {vocab_size}")
    meta = {"dataset": name, "source_language": "en", "target_language": language, "seed": seed}
    return save_corpus(folder, texts, tokenizer, meta)


def command_line() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = command.Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument(
        "--data",
        default="auto",
        choices=(*DATASETS, "debian"),
        help="auto is django, and builtin without a network; default: %(default)s",
    )
    parser.add_argument("--language", default="de", help="of the translations: de, fr, cs, ...; default: %(default)s")
    for name in SPLITS:
        prefix = "" if name == "train" else f"{name}-"
        use = "train on" if name == "train" else "hold out"
        parser.add_argument(f"--{prefix}source", type=Path, help=f"text file, one sentence a line, to {use}")
        parser.add_argument(f"--{prefix}target", type=Path, help="its translation, line by line")
    parser.add_argument(
        "--vocab-size",
        type=int,
        help=f"subwords of both languages together; default: {VOCABULARY}, or as many as there are",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split; default: %(default)s")
    return parser


def given_files(options: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """Return the files of each split that the command line names.

    Raises:
        ValueError: one of two aligned files is missing, or dev or test are given without train.
    """
    files = {}
    for name in SPLITS:
        prefix = "" if name == "train" else f"{name}_"
        source, target = getattr(options, prefix + "source"), getattr(options, prefix + "target")
        if (source is None) != (target is None):
            raise ValueError(
                f"{prefix}source and {prefix}target must be given together; found source={source}, target={target}"
            )
        if source is not None:
            files[name] = (source, target)
    if files and "train" not in files:
        raise ValueError(f"source and target must be given with files for {', '.join(files)}; found neither")
    return files


@command.program("prepare.py", DownloadError)
def main(arguments: list[str] | None = None) -> int:
    """Read the command line, write the folder, and return the exit status."""
    options = command_line().parse_args(arguments)
    meta = prepare(
        options.folder, options.data, options.language, given_files(options), options.vocab_size, options.seed
    )
    sizes = ", ".join(f"{count} {name}" for name, count in meta["pairs"].items())
    print(f"{meta['dataset']}: {sizes} pairs, {meta['vocabulary']} subwords, in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
