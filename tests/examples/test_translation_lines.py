"""Lines of text in the translation example.

The tests cover line ends, the byte-order mark, and lines without a visible character.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from translation_helpers import (
    FOLDER,
    SMALL,
    checkpoint,
    compare,
    corpus,
    data,
    inference,
    lines,
    one_line,
    options,
    prepare,
    splits,
    tokenizer,
    train,
)

MARK = "\ufeff"
INSIDE = ["a\rb", "c\x0bd\x0ce\x1cf\x1dg\x1eh", "i\x85j\u2028k\u2029l", "m\0n", "", " o ", "p" + MARK]
INVISIBLE = [
    "\u200b",
    MARK,
    "\u200e",
    "\x01",
    " \u200b ",
    "",
    "\u0301\u0308",
    "\0",
    "\x85",
    "\u00ad",
    "\u3164",
    "\u2800",
    "\u2028",
    "\ufe0f",
    "\t",
]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
ZAHLEN = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines")
    prepare.prepare(path / "corpus", "builtin", vocab_size=120)
    arguments = [
        str(path / "corpus"),
        "--output",
        str(path / "run"),
        *options(SMALL),
        "--steps",
        "1",
        "--beam-size",
        "1",
    ]
    assert train.main(arguments) == 0
    return path / "run"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"\n\n", ["", ""]),
        (b"a", ["a"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r", ["a"]),
        (b"a\r\r\n", ["a\r"]),
        (b"a\rb\n\rc\n", ["a\rb", "\rc"]),
        (MARK.encode(), []),
        (MARK.encode() + b"\n", [""]),
        (MARK.encode() + b"a\n" + MARK.encode() + b"b\n", ["a", MARK + "b"]),
        (MARK.encode() * 2 + b"a\n", [MARK + "a"]),
        ("".join(line + "\n" for line in INSIDE).encode(), INSIDE),
    ],
)
def test_a_line_ends_at_a_line_feed_alone(
    content: bytes, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_bytes(content)
    assert lines.read_lines(tmp_path / "text") == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert list(lines.standard_input()) == wanted


@pytest.mark.parametrize(
    "written",
    [[], [""], INSIDE, [MARK, MARK], [MARK + "a", "b"], ["a\r", "\r", "b\r\r"], [MARK + "\r"], ["no\u2028end", ""]],
)
def test_lines_read_back_as_they_were_written(written: list[str], tmp_path: Path) -> None:
    path = lines.write_lines(tmp_path / "text", written)
    assert lines.read_lines(path) == written
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"a line of .*text must be one line; found a line feed in line 2"):
        lines.write_lines(path, ["one", "two\nthree"])
    assert lines.read_lines(path) == written
    assert list(tmp_path.iterdir()) == [path]


def test_a_corpus_reads_back_as_it_was_given(tmp_path: Path) -> None:
    odd = [data.Pair(MARK + "the\rdog", "der\x0bHund\r"), data.Pair("a\u2028cat\r", "eine\x85Katze")]
    texts = {"train": [data.Pair(*pair) for pair in data.PAIRS], "dev": odd, "test": odd[::-1]}
    subwords = tokenizer.train_tokenizer((text for pair in data.PAIRS for text in pair), 120)
    corpus.save_corpus(tmp_path, texts, subwords, {"dataset": "odd"})
    assert corpus.load_corpus(tmp_path).texts == {"dev": odd, "test": odd[::-1]}


def numbered(side: list[str], words: str, **changed: str) -> list[str]:
    """Return a sentence for each of 8 numbers, some of them ``changed``."""
    return [changed.get(number, words.format(number)) for number in side]


def aligned(folder: Path, english: list[str], german: list[str], name: str = "text", first: str = "") -> list[str]:
    """Write two files; return their paths."""
    paths = [folder / f"{name}.en", folder / f"{name}.de"]
    for path, side in zip(paths, (english, german), strict=True):
        path.write_bytes((first + "".join(line + "\n" for line in side)).encode())
    return list(map(str, paths))


@pytest.mark.parametrize("inner", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_pairs_stay_together_whatever_is_inside_a_line(inner: str, tmp_path: Path) -> None:
    english = numbered(NUMBERS, "The number {} dog reads a book.", three=f"The number three dog{inner}reads a book.")
    german = numbered(ZAHLEN, "Der Hund {} liest ein Buch.", sechs=f"Der Hund sechs{inner}liest ein Buch.")
    files = aligned(tmp_path, english, german)
    heldout = aligned(tmp_path, [english[2]], [german[2]], "dev")
    arguments = ["--source", files[0], "--target", files[1], "--dev-source", heldout[0], "--dev-target", heldout[1]]
    assert prepare.main([*arguments, str(tmp_path / "out")]) == 0
    found = []
    for name in corpus.SPLITS:
        found += data.read_aligned(tmp_path / "out" / f"{name}.source.txt", tmp_path / "out" / f"{name}.target.txt")
    assert sorted(NUMBERS.index(pair.source.split()[2]) for pair in found) == list(range(8))
    for pair in found:
        assert ZAHLEN[NUMBERS.index(pair.source.split()[2])] in pair.target.split()
    dataset = data.load_dataset(source=Path(files[0]), target=Path(files[1]))
    assert len(dataset.train) + len(dataset.heldout) == 8


@pytest.mark.parametrize("marked", ["train", "dev", "test", "all"])
def test_a_byte_order_mark_is_no_part_of_the_first_sentence(marked: str, tmp_path: Path) -> None:
    english, german = (
        numbered(NUMBERS, "The number {} dog reads a book."),
        numbered(ZAHLEN, "Der Hund {} liest ein Buch."),
    )
    arguments = []
    for name, chosen in (("train", slice(None)), ("dev", slice(0, 1)), ("test", slice(4, 6))):
        paths = aligned(tmp_path, english[chosen], german[chosen], name, MARK if marked in (name, "all") else "")
        prefix = "" if name == "train" else f"{name}-"
        arguments += [f"--{prefix}source", paths[0], f"--{prefix}target", paths[1]]
    assert prepare.main([*arguments, str(tmp_path / "out")]) == 0
    texts = {name: (tmp_path / "out" / f"{name}.source.txt").read_text(encoding="utf-8") for name in corpus.SPLITS}
    assert MARK not in "".join(texts.values())
    assert texts["dev"] == english[0] + "\n"
    assert sorted(texts["train"].splitlines()) == sorted(english[1:4] + english[6:])


@pytest.mark.parametrize(
    "same",
    [
        "The  number one dog reads a book.",
        "the NUMBER one dog reads a book.",
        "The number\u00a0one dog reads a b\u200book.",
    ],
)
def test_a_held_out_sentence_that_looks_alike_is_not_trained_on(same: str, tmp_path: Path) -> None:
    english, german = (
        numbered(NUMBERS, "The number {} dog reads a book."),
        numbered(ZAHLEN, "Der Hund {} liest ein Buch."),
    )
    source, target = aligned(tmp_path, english, german)
    dev = aligned(tmp_path, [same], [german[0]], "dev")
    files = {"train": (Path(source), Path(target)), "dev": (Path(dev[0]), Path(dev[1]))}
    texts = splits.read_split_files(files, 0)
    assert texts["dev"] == [(same, german[0])]
    assert sorted(pair.source for name in ("train", "test") for pair in texts[name]) == sorted(english[1:])
    assert len(data.clean([data.Pair(english[0], german[0]), data.Pair(same, german[0])])) == 1


def test_text_that_is_no_utf_8_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, latin, wide = tmp_path / "good.en", tmp_path / "latin.de", tmp_path / "wide.de"
    good.write_text("one dog\ntwo dogs\nthree dogs\n", encoding="utf-8")
    latin.write_bytes("ein Hund\nzwei H\u00fcnde\ndrei Hunde\n".encode("latin-1"))
    wide.write_text("ein Hund\nzwei Hunde\ndrei Hunde\n", encoding="utf-16")
    message = one_line(prepare, ["--source", good, "--target", latin, tmp_path / "out"], capsys)
    assert message == f"prepare.py: {latin} must be UTF-8; found byte 0xfc in line 2\n"
    assert one_line(compare, ["--source", good, "--target", latin], capsys).endswith("found byte 0xfc in line 2\n")
    own = ["--source", good, "--target", good, "--test-source", good, "--test-target", wide]
    assert (
        one_line(prepare, [*own, tmp_path / "out"], capsys)
        == f"prepare.py: {wide} must be UTF-8; found byte 0xff in line 1\n"
    )


@pytest.mark.parametrize("blank", INVISIBLE)
def test_a_pair_with_a_side_that_is_not_seen_is_none(blank: str, tmp_path: Path) -> None:
    assert not lines.visible(blank)
    assert (
        data.clean([data.Pair(blank, "Der Hund"), data.Pair("the dog", blank), data.Pair(blank * 3, blank * 3)]) == []
    )
    english, german = (
        numbered(NUMBERS, "The number {} dog reads a book."),
        numbered(ZAHLEN, "Der Hund {} liest ein Buch."),
    )
    source, target = aligned(tmp_path, english, german)
    dev = aligned(tmp_path, [blank, "the cat", "a mouse"], ["Der Hund", "die Katze", blank], "dev")
    files = {"train": (Path(source), Path(target)), "dev": (Path(dev[0]), Path(dev[1]))}
    assert splits.read_split_files(files, 0)["dev"] == [("the cat", "die Katze")]


def test_what_is_seen() -> None:
    for text in ("a", "1", "?", "%s", "e\u0301", "\u200ba", "好", "🙂", "\ufffd", "\u0e33"):
        assert lines.visible(text), text


def test_pairs_without_subwords_are_no_examples(run: Path) -> None:
    _, subwords = checkpoint.load_model(run)
    pair = data.Pair("The dog", "Der Hund")
    assert len(tokenizer.encode_pairs([pair, data.Pair("\u200b", "Hund"), data.Pair("dog", "\u200b")], subwords)) == 1


def test_invisible_lines_stay_blank_and_every_line_has_one(run: Path) -> None:
    model, subwords = checkpoint.load_model(run)
    given = ["The dog.", *INVISIBLE, "The\rdog\x0creads.", "last"]
    translated = inference.translate(model, subwords, given, max_length=4)
    assert translated[1 : 1 + len(INVISIBLE)] == [""] * len(INVISIBLE)
    assert inference.translate(model, subwords, INVISIBLE) == [""] * len(INVISIBLE)
    command: list[Any] = [
        sys.executable,
        FOLDER / "translate.py",
        run,
        "--max-length",
        "4",
        "--beam-size",
        "1",
        "--batch-size",
        "4",
    ]
    source = (MARK + "\n".join(given)).encode()  # without a line feed at the end
    done = subprocess.run(
        command, input=source, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    output = done.stdout.decode().split("\n")
    assert output[1 : 1 + len(INVISIBLE)] == [""] * len(INVISIBLE)
    assert len(output) == len(given) + 1
    assert output[0] == translated[0]
    for content, count in ((b"", 0), (MARK.encode(), 0), (b"\n", 1)):
        assert subprocess.run(command, input=content, capture_output=True, check=True).stdout == b"\n" * count


@pytest.mark.parametrize(
    "mark",
    ["\u034f", "\ufe0f", "\u180b", "\x01", "\x7f", "\0", "\u3164", "\u2800", "\U000e0080", "\u200b", "\xad"],
    ids=ascii,
)
def test_a_text_with_something_invisible_is_the_same_text(mark: str) -> None:
    assert lines.same_text(f"The {mark}Word here{mark}") == lines.same_text("The word here")


def test_texts_that_look_different_are_not_the_same() -> None:
    different = ["a b", "ab", "\u0915", "\u0915\u093f", "e", "e\u0301", "e\u0308", "a\tc"]
    assert len({lines.same_text(text) for text in different}) == len(different)
    assert lines.same_text("a\x0bb") == lines.same_text("a b")
