"""Readers of documents and their translations.

They read HTML and manual pages, gettext catalogs, and the package descriptions in apt's lists.
"""

from __future__ import annotations

import re
import struct
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from typing import NamedTuple


class Block(NamedTuple):
    """A paragraph, heading or table cell; blocks of two languages match by their signatures."""

    signature: str
    text: str


class Row(NamedTuple):
    """A paragraph or a sentence, its translation, and the name of its document."""

    document: str
    source: str
    target: str


def normalize(text: str) -> str:
    """Return ``text`` in one line with single spaces, without soft hyphens and the marks of links to headings."""
    return " ".join(text.replace("\u00ad", "").replace("¶", "").split())


def word_set(text: str) -> frozenset[str]:
    """Return the words of ``text``."""
    return frozenset(text.split())


# Documents


class BlockParser(HTMLParser):
    """Collects the blocks of an HTML page in ``blocks``; code, navigation and scripts are left out."""

    BLOCKS = word_set(
        "p h1 h2 h3 h4 h5 h6 li td th dt dd title caption div section ul "
        "ol dl table tr article main body blockquote figcaption"
    )
    SKIPPED = word_set("script style pre nav footer header textarea")
    STABLE_ID = re.compile(r"par_|hd_|bm_|tit")  # LibreOffice's help names its paragraphs alike in every language

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.signature = "body"
        self.text: list[str] = []
        self.skipping = 0

    def close(self) -> None:
        super().close()
        self.end_block()

    def end_block(self) -> None:
        text = normalize("".join(self.text))
        self.text = []
        if text:
            self.blocks.append(Block(self.signature, text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self.end_block()
            self.skipping += 1
        elif tag in self.BLOCKS:
            self.end_block()
            values = dict(attrs)
            name, style = values.get("id") or "", (values.get("class") or "").split(" ")[0]
            self.signature = f"{tag}#{name}" if self.STABLE_ID.match(name) else f"{tag}.{style}"
        elif tag == "br":
            self.text.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED:
            self.end_block()
            self.skipping = max(0, self.skipping - 1)
        elif tag in self.BLOCKS:
            self.end_block()
            self.signature = f"after {tag}"

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.text.append(data)


def html_blocks(text: str) -> list[Block]:
    """Return the blocks of an HTML page."""
    parser = BlockParser()
    parser.feed(text)
    parser.close()
    return parser.blocks


ROFF_ESCAPE = re.compile(
    r"""\\(?: [fmn] (?: \(.. | \[[^]]*\] | . )            # font, colour, number
            | s [-+]?\d+ | [hvw]'[^']*'                  # size, motion
            | \*?\( (?P<two>..) | \*?\[ (?P<long>[^]]+) \]  # character or string
            | (?P<one>.) )""",
    re.VERBOSE,
)
ROFF_CHARACTERS = {
    name: character
    for names, characters in (
        ("- ~ e ' ( .", "-\u00a0\\'(."),
        ("aq Aq dq lq rq oq cq Bq bq Fo Fc", "''\"“”‘’„‚«»"),
        ("en em hy co ti ha at ss oe rs", "–—-©~^@ßœ\\"),
        ('L" R"', '""'),
    )
    for name, character in zip(names.split(), characters, strict=True)
} | {" ": " "}
ROFF_ACCENTS = dict(zip(":'`^,~v", "\u0308\u0301\u0300\u0302\u0327\u0303\u030c", strict=True))
ROFF_FONTS = word_set("B I BR RB IR RI BI IB SM SB")
ROFF_VERBATIM = {"nf": "fi", "EX": "EE", "TS": "TE", "de": ".", "ig": "."}


def roff_character(escape: re.Match[str]) -> str:
    """Return the character that an escape stands for, or nothing."""
    name = escape["two"] or escape["long"] or escape["one"] or ""
    if len(name) == 2 and name not in ROFF_CHARACTERS and name[0] in ROFF_ACCENTS:
        return unicodedata.normalize("NFC", name[1] + ROFF_ACCENTS[name[0]])
    return ROFF_CHARACTERS.get(name, "")


def roff_text(text: str) -> str:
    """Return ``text`` with its escapes replaced, in one line."""
    return normalize(ROFF_ESCAPE.sub(roff_character, text))


def roff_blocks(text: str) -> list[Block]:
    """Return the paragraphs of a man page, signed with the macro that begins each.

    An mdoc page, whose macros are words, gives none.
    """
    if re.search(r"^\.Dd\b", text, re.MULTILINE):
        return []
    blocks: list[Block] = []
    lines: list[str] = []
    signature, verbatim_until, tag_follows = "", "", False

    def end_block() -> None:
        joined = roff_text(" ".join(lines))
        lines.clear()
        if joined:
            blocks.append(Block(signature, joined))

    for line in (line.split('\\"')[0] for line in text.split("\n")):
        macro = re.match(r"\.\s*(\S+)\s*(.*)", line)
        name, arguments = macro.groups() if macro else ("", "")
        if verbatim_until:
            verbatim_until = "" if name == verbatim_until else verbatim_until
        elif name in ROFF_VERBATIM:
            end_block()
            verbatim_until = ROFF_VERBATIM[name]
        elif line in (".", "'", ".\\}"):
            continue  # a comment or the end of a condition
        elif macro and name not in ROFF_FONTS:
            end_block()
            signature, tag_follows = name, name in ("TP", "TQ")
            if name in ("SH", "SS"):
                lines.append(arguments.strip('"'))
                end_block()
        elif not line.strip():
            end_block()
            signature = "blank"
        else:
            words = [word.strip('"') for word in re.findall(r'"[^"]*"|(?:\\.|\S)+', arguments)]
            alternating = len(name) == 2 and name not in ("SM", "SB")
            lines.append(("" if alternating else " ").join(words) if macro else line)
            if tag_follows:
                end_block()
                signature, tag_follows = "after tag", False
    end_block()
    return blocks


# Catalogs and descriptions


def catalog_rows(name: str, content: bytes) -> Iterator[Row]:
    """Yield the messages of a .mo catalog, without mark-up and marks of shortcut keys.

    A document is a dialog, by the message's context.
    """
    import polib  # type: ignore[import-untyped]

    with tempfile.NamedTemporaryFile(suffix=".mo") as file:  # polib reads .mo files only by their names
        file.write(content)
        file.flush()
        try:
            entries = list(polib.mofile(file.name))
        except (OSError, ValueError, IndexError, struct.error) as error:
            raise ValueError(f"catalog {name} must be a whole .mo file; found {error}") from None
    for entry in entries:
        source, target = (
            normalize(re.sub(r"<[^>]+>|~|_(?=\w)", "", text.replace("\\n", " ")))
            for text in (entry.msgid, entry.msgstr)
        )
        if source and target:
            yield Row(f"{name}/{(entry.msgctxt or '').split('|')[0]}", source, target)


def read_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the fields of every stanza of one of apt's lists; the lines of a long field keep their first blank."""
    for stanza in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.strip("\n").split("\n"):
            if line[:1] in (" ", "\t"):
                if name:
                    fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if fields:
            yield fields


def description_paragraphs(description: str) -> list[Block]:
    """Return the summary, the paragraphs and the items of the lists in a package's description."""
    summary, *lines = description.split("\n")
    blocks = [Block("summary", normalize(summary))]
    buffer: list[str] = []
    in_item = False
    for line in [*lines, " ."]:
        item = re.match(r"\s+[-*+o•] ", line)
        verbatim = line.startswith("  ") and not in_item  # inside a list such a line continues the item
        if line.strip() == "." or item or verbatim:
            blocks.append(Block("paragraph", normalize(" ".join(buffer))))
            buffer, in_item = [], item is not None
        if line.strip() != ".":
            buffer.append(line[item.end() :] if item else line)
    return [block for block in blocks if block.text]


def description_rows(
    sources: Mapping[str, str], english: Iterable[str], translated: Iterable[str], language: str
) -> Iterator[Row]:
    """Yield the paragraphs of the descriptions in apt's ``Translation`` lists, given as texts.

    ``sources`` gives each binary package's source package. A source package is one document, because its binary
    packages share most of their text.
    """
    descriptions = {
        stanza["Description-md5"]: stanza["Description-en"]
        for text in english
        for stanza in read_stanzas(text)
        if {"Description-md5", "Description-en"} <= stanza.keys()
    }
    seen = set()
    for stanza in (stanza for text in translated for stanza in read_stanzas(text)):
        key, target = stanza.get("Description-md5", ""), stanza.get(f"Description-{language}")
        if target is None or key not in descriptions or key in seen or "Package" not in stanza:
            continue
        seen.add(key)
        left, right = description_paragraphs(descriptions[key]), description_paragraphs(target)
        if len(left) == len(right):
            document = f"descriptions/{sources.get(stanza['Package'], stanza['Package'])}"
            yield from (Row(document, a.text, b.text) for a, b in zip(left, right, strict=True))
