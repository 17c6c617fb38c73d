"""Text into tokens: documents from files or docstrings, a subword vocabulary, and a prepared folder."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAD, BOS, EOS, UNKNOWN = range(4)
TOKENIZER, IDS, META = "tokenizer.model", "ids.pt", "meta.json"
SHORTEST = 200  # characters of a docstring that is worth a document
LEFT_OUT = ("test", "tests", "site-packages", "idlelib", "lib2to3")


def read_files(paths: Iterable[Path]) -> Iterator[str]:
    """The text of each file, and of each ``*.txt`` and ``*.md`` below a folder, in the order of their names.

    Raises:
        ValueError: a path is not there, a folder has no such file, or a file is not UTF-8.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"text must name files or folders; found no {path}")
        files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in (".txt", ".md"))
        if not files:
            raise ValueError(f"text must name folders with .txt or .md files; found none in {path}")
        for each in files:
            try:
                yield each.read_bytes().decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"text must be UTF-8; found byte {error.start} of {each} to be none") from None


def read_docstrings() -> Iterator[str]:
    """The long docstrings of Python's standard library and of torch: English that every user has already."""
    seen = set()
    for folder in (Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            if any(part in LEFT_OUT for part in path.relative_to(folder).parts):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in other people's strings
                try:
                    tree = ast.parse(path.read_bytes())
                except (SyntaxError, ValueError):
                    continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = ast.get_docstring(node) or ""
                    if len(text) >= SHORTEST and text not in seen:
                        seen.add(text)
                        yield text


def cut(documents: Iterable[str], longest: int = 20000) -> Iterator[str]:
    """Documents of at most ``longest`` characters where they have paragraphs, without the empty ones."""
    for document in documents:
        part = ""
        for paragraph in document.split("\n\n"):
            if part and len(part) + len(paragraph) > longest:
                yield part
                part = ""
            part += ("\n\n" if part else "") + paragraph
        if part.strip():
            yield part


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("the language model example needs SentencePiece: pip install sentencepiece") from error
    return sentencepiece


def train_tokenizer(documents: list[str], vocab_size: int) -> Any:
    """Byte-pair encoding that gives every text back: spaces and line feeds are pieces, unknown characters are bytes.

    Raises:
        ValueError: the text is too small for ``vocab_size`` pieces, or that is too few for bytes and characters.
    """
    model = io.BytesIO()
    lines = [line for document in documents for line in document.split("\n") if 0 < len(line.encode()) <= 4192]
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.9995, byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            split_digits=True, pad_id=PAD, bos_id=BOS, eos_id=EOS, unk_id=UNKNOWN, user_defined_symbols=["\n"],
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"vocab_size must suit the text; found {vocab_size}: {reason}") from None
    return load_tokenizer(model.getvalue())


def load_tokenizer(model: bytes) -> Any:
    """Raises ValueError where ``model`` is not what :func:`train_tokenizer` made."""
    try:
        return _sentencepiece().SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise ValueError(f"{TOKENIZER} must be a SentencePiece model; found {len(model)} other bytes") from None


def piece_bytes(tokenizer: Any) -> Tensor:
    """Bytes of text that each piece stands for; the end of a document counts as one."""
    sizes = []
    for token in range(len(tokenizer)):
        piece = tokenizer.id_to_piece(token)
        is_text = not (tokenizer.is_control(token) or tokenizer.is_byte(token) or tokenizer.is_unknown(token))
        sizes.append(len(piece.replace("▁", " ").encode()) if is_text else int(token not in (PAD, BOS)))
    return torch.tensor(sizes)


def encode(documents: Iterable[str], tokenizer: Any) -> Tensor:
    """One row of ids: each document from BOS to EOS."""
    return torch.tensor([token for text in documents for token in (BOS, *tokenizer.encode(text), EOS)])


@dataclass(frozen=True)
class Corpus:
    """A prepared folder: ids of train and dev, (tokens,) int64, the tokenizer, and a SHA-256 of the ids."""

    train: Tensor
    dev: Tensor
    tokenizer: Any
    digest: str
    meta: dict[str, Any]


def save_corpus(folder: Path, documents: list[str], vocab_size: int, source: str, held_out: float = 0.05) -> dict:
    """Write a prepared folder and return its description; ``meta.json`` comes last, so that with it all is there.

    A document's own hash says whether it is held out.

    Raises:
        ValueError: there are too few documents, or the text does not suit ``vocab_size``.
    """
    documents = list(cut(documents))
    parts: dict[str, list[str]] = {"train": [], "dev": []}
    for text in documents:
        is_held = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < held_out * 2**32
        parts["dev" if is_held else "train"].append(text)
    if not parts["train"] or not parts["dev"]:
        raise ValueError(f"text must have enough documents to hold some out; found {len(documents)}")
    tokenizer = train_tokenizer(parts["train"], vocab_size)
    ids = {name: encode(texts, tokenizer).to(torch.int32) for name, texts in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    (folder / TOKENIZER).write_bytes(tokenizer.serialized_model_proto())
    torch.save(ids, folder / IDS)
    meta: dict[str, Any] = {"source": source, "vocabulary": len(tokenizer)}
    for name, texts in parts.items():
        size = sum(len(text.encode()) for text in texts)
        meta[name] = {"documents": len(texts), "bytes": size, "tokens": len(ids[name])}
    write_whole(folder / META, (json.dumps(meta, indent=1) + "\n").encode())
    return meta


def load_corpus(folder: Path) -> Corpus:
    """Raises ValueError where ``folder`` is not one that prepare.py wrote, or a file of it is damaged."""
    missing = [name for name in (META, TOKENIZER, IDS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"data must be a folder that prepare.py wrote; found no {', '.join(missing)} in {folder}")
    tokenizer = load_tokenizer((folder / TOKENIZER).read_bytes())
    content = (folder / IDS).read_bytes()
    try:
        ids, meta = torch.load(io.BytesIO(content), weights_only=True), json.loads((folder / META).read_bytes())
        train, dev = ids["train"].long(), ids["dev"].long()
    except Exception as error:  # noqa: BLE001 - torch raises a dozen kinds for a damaged file
        raise ValueError(
            f"data must be a whole folder of prepare.py; found {type(error).__name__} in {folder}"
        ) from None
    if max(int(train.max()), int(dev.max())) >= len(tokenizer):
        raise ValueError(f"data must hold ids below {len(tokenizer)}; found others: {IDS} is another folder's")
    return Corpus(train, dev, tokenizer, hashlib.sha256(content).hexdigest(), meta)


def write_whole(path: Path, content: bytes) -> None:
    """Write ``path`` so that it holds all of ``content`` or what it held before, also after a kill."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def windows(ids: Tensor, length: int) -> Tensor:
    """Rows of ``length`` tokens, one after the other, (rows, length); what is left over at the end is left out.

    Raises:
        ValueError: there are not enough tokens for a row.
    """
    if len(ids) < length:
        raise ValueError(f"length must be at most {len(ids)}, the tokens there are; found {length}")
    return ids[: len(ids) // length * length].view(-1, length)


def documents_of(rows: Tensor) -> Tensor:
    """The number of each token's document in its row."""
    return (rows == BOS).cumsum(1)


class Bigram:
    """Next tokens by the one before alone: absolute discounting (0.75), the rest by unigrams with one added."""

    def __init__(self, ids: Tensor, vocabulary: int, discount: float = 0.75) -> None:
        first, second = ids[:-1], ids[1:]
        counted = second != BOS  # a document's first token is given
        self.vocabulary = vocabulary
        keys, counts = (first * vocabulary + second)[counted].unique(return_counts=True)
        self.keys, counts = keys, counts.double()
        before = torch.zeros(vocabulary, dtype=torch.float64).index_add(0, keys // vocabulary, counts)
        kinds = torch.bincount(keys // vocabulary, minlength=vocabulary).double()
        unigrams = torch.bincount(second[counted], minlength=vocabulary).double() + 1
        self.unigrams = unigrams / unigrams.sum()
        self.shares = (counts - discount) / before[keys // vocabulary]
        self.rest = torch.where(before > 0, discount * kinds / before.clamp(min=1), 1.0)

    def nats(self, rows: Tensor) -> float:
        """The mean cross entropy of the tokens of rows that are predicted by a :class:`LanguageModel`, too."""
        first, second = rows[:, :-1].flatten(), rows[:, 1:].flatten()
        first, second = first[second != BOS], second[second != BOS]
        keys = first * self.vocabulary + second
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        seen = torch.where(self.keys[place] == keys, self.shares[place], 0.0)
        return float(-(seen + self.rest[first] * self.unigrams[second]).log().mean())
