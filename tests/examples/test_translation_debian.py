"""Parallel text from Debian, offline: documents, lists and packages written by the tests."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

polib = pytest.importorskip("polib", reason="the translation example needs polib: pip install polib")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "translation"
sys.path.insert(0, str(FOLDER))

from corpus import debian  # noqa: E402
from corpus import debian_pairs as dp  # noqa: E402
from corpus import debian_text as dt  # noqa: E402
from corpus.data import DownloadError, Pair  # noqa: E402
from corpus.debian_archive import Archive  # noqa: E402

sys.path.remove(str(FOLDER))

PAGE = """<html><head><title>{0}</title><style>p {{}}</style></head><body><nav>Home</nav>
<h1 id="hd_1">{1}</h1><p class="note">{2}<br>{3}</p><pre>ls -l</pre><ul><li>{4}</li></ul>{5}</body></html>"""
ENGLISH_PAGE = PAGE.format(
    "Help", "Moving &amp; copying", "Select the <b>object</b>.", "Drag it.", "The last soft\u00adware¶", ""
)
GERMAN_PAGE = PAGE.format(
    "Hilfe", "Verschieben", "Wählen Sie das <b>Objekt</b>.", "Ziehen Sie es.", "Die letzte Software", ""
)

ENGLISH_MANUAL = r""".\" a comment
.TH LS 1
.SH "SEE ALSO"
The
.BR stat (1)
page\(cqs text \- in \fIbold\fR\&. \" not this
.PP
.nf
code
.fi
.TP
.BI \-f\  file
don\*(Aqt sort
"""
GERMAN_MANUAL = r""".TH LS 1
.SH "SIEHE AUCH"
Der Text von
.BR stat (1)
f\(:ur \[:a]lteres
.PP
.TP
.BI \-f\  Datei
nicht sortieren
"""


def test_sentences_end_before_capitals_and_digits() -> None:
    text = 'It works, e.g. Debian does. See No. 5! "Really?" Yes… 2 files. and on'
    assert dt.normalize(" a\u00a0 b\u00ad\n") == "a b"
    assert dp.split_sentences(text) == [
        "It works, e.g. Debian does.",
        "See No. 5!",
        '"Really?"',
        "Yes…",
        "2 files. and on",
    ]
    assert dp.split_sentences("1. Öffnen. 2. Ändern.") == ["1. Öffnen.", "2. Ändern."]
    assert dp.split_sentences(" ") == []


def test_gale_church_finds_merged_and_missing_sentences() -> None:
    source = ["a" * 60 + ".", "b" * 20 + ".", "c" * 30 + ".", "d" * 90 + "."]
    target = ["A" * 62 + ".", "B" * 52 + ".", "D" * 88 + "."]
    expected = [(source[0], target[0]), (f"{source[1]} {source[2]}", target[1]), (source[3], target[2])]
    assert dp.align_sentences(source, target) == expected
    assert dp.align_sentences([source[0], source[3]], [target[0], "X" * 200, target[2]])[0] == (source[0], target[0])
    assert dp.align_sentences([], ["x"]) == []
    assert dp.length_cost(50, 50) == 0 < dp.length_cost(50, 60) < dp.length_cost(50, 100)


def test_paragraphs_of_one_sentence_stay_whole_and_endless_ones_are_dropped() -> None:
    assert dp.sentence_pairs("One. Two.", "Eins und zwei.") == [("One. Two.", "Eins und zwei.")]
    assert dp.sentence_pairs("One is here. Two is there.", "Eins ist da. Zwei ist dort.") == [
        ("One is here.", "Eins ist da."),
        ("Two is there.", "Zwei ist dort."),
    ]
    assert dp.sentence_pairs("So it is. " * 41, "So ist es. " * 41) == []


def test_html_pair() -> None:
    blocks = dt.html_blocks(ENGLISH_PAGE)
    assert [block.text for block in blocks] == [
        "Help",
        "Moving & copying",
        "Select the object. Drag it.",
        "The last software",
    ]
    assert [block.signature for block in blocks] == ["title.", "h1#hd_1", "p.note", "li."]
    pairs = dp.align_blocks(blocks, dt.html_blocks(GERMAN_PAGE))
    assert pairs[2:] == [
        ("Select the object. Drag it.", "Wählen Sie das Objekt. Ziehen Sie es."),
        ("The last software", "Die letzte Software"),
    ]


def test_manual_pair() -> None:
    english, german = dt.roff_blocks(ENGLISH_MANUAL), dt.roff_blocks(GERMAN_MANUAL)
    assert dp.align_blocks(english, german) == [
        ("SEE ALSO", "SIEHE AUCH"),
        ("The stat(1) page’s text - in bold.", "Der Text von stat(1) für älteres"),
        ("-f file", "-f Datei"),
        ("don't sort", "nicht sortieren"),
    ]
    assert dt.roff_blocks(".Dd May 1\n.Nm ls\n") == []


def test_blocks_of_different_documents_pair_in_long_runs_of_like_lengths_only() -> None:
    def blocks(signatures: str, *texts: str) -> list[dt.Block]:
        return [dt.Block(*block) for block in zip(signatures.split(), texts, strict=True)]

    run = ("a first paragraph", "a second paragraph", "a third paragraph")
    assert dp.align_blocks(blocks("p p li h", *run, "rest"), blocks("p p li dd dd", *run, "other", "end")) == list(
        zip(run, run, strict=True)
    )
    assert dp.align_blocks(blocks("p p h", *run), blocks("p p dd", *run)) == []
    assert dp.align_blocks(blocks("p#1 h", *run[:2]), blocks("p#1 dd", *run[:2])) == [(run[0], run[0])]
    unlike = ("x" * 200, "x", "x" * 300)
    assert dp.align_blocks(blocks("p p li h", *run, "rest"), blocks("p p li dd", *unlike, "rest")) == []


def test_catalog(tmp_path: Path) -> None:
    catalog = polib.MOFile()
    catalog.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    for context, source, target in (
        ("about|title", "~About <b>%1</b>", "Ü_ber %1"),
        ("about|ok", "O_K", "_OK"),
        ("x|y", "Empty", ""),
    ):
        catalog.append(polib.POEntry(msgctxt=context, msgid=source, msgstr=target))
    catalog.save(str(tmp_path / "sw.mo"))
    rows = list(dt.catalog_rows("sw", (tmp_path / "sw.mo").read_bytes()))
    assert sorted(rows) == [("sw/about", "About %1", "Über %1"), ("sw/about", "OK", "OK")]


def stanza(package: str, language: str, text: str) -> str:
    return f"Package: {package}\nDescription-md5: {package}5\nDescription-{language}: {text}\n\n"


def test_debian_stanzas_keep_what_is_inside_a_line() -> None:
    text = "Package: a\nDescription-en: first\rsecond\u2028third\x0c\n more\n .\n\tend\n\n\nPackage: b\nno field\n x\n"
    assert list(dt.read_stanzas(text)) == [
        {"Package": "a", "Description-en": "first\rsecond\u2028third\n more\n .\n\tend"},
        {"Package": "b\n x"},
    ]


def test_descriptions_pair_paragraphs_and_items() -> None:
    english = stanza("tool-dev", "en", "a tool\n The first\n paragraph.\n .\n Items:\n  * one\n    thing\n  * two")
    german = stanza("tool-dev", "de", "ein Werkzeug\n Der erste Absatz.\n .\n Dinge:\n  * eins\n  * zwei")
    english += stanza("unequal", "en", "name\n text")
    german += stanza("unequal", "de", "Name\n Text\n .\n mehr")
    rows = list(dt.description_rows({"tool-dev": "tool"}, [english, english], [german, german], "de"))
    assert {row.document for row in rows} == {"descriptions/tool"}
    assert [row[1:] for row in rows[:2]] == [("a tool", "ein Werkzeug"), ("The first paragraph.", "Der erste Absatz.")]
    assert [row[1:] for row in rows[2:]] == [("Items:", "Dinge:"), ("one thing", "eins"), ("two", "zwei")]
    assert [block.text for block in dt.description_paragraphs("s\n text\n  code\n  code")] == [
        "s",
        "text",
        "code",
        "code",
    ]


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("Save the file now.", "Die Datei jetzt speichern.", None),
        ("Save the file", "Save the file", "identical"),
        ("Save", "Speichern", "length"),
        ("word " * 81, "Wort " * 81, "length"),
        ("Save the file that was opened first of all", "Datei speichern", "ratio"),
        ("a 12:34 - 56 +", "b 12:34 - 56 +", "signs"),
        ("Printed %d lines today", "Heute %d Zeilen gedruckt", "markup"),
        ("See https://debian.org for the rest", "Den Rest gibt es bei Debian zu lesen", "markup"),
        (
            "Words of the text that nobody has translated yet",
            "Words of the text that nobody has rewritten yet",
            "untranslated",
        ),
        ("It was seen in 1999 and in 2001", "Das war 1998 und 2001 zu sehen", "numbers"),
    ],
)
def test_filters(source: str, target: str, reason: str | None) -> None:
    assert dp.rejection(source, target, "de") == reason


def test_repeated_sentences_are_kept_once() -> None:
    rows = [
        dt.Row("a", "Open the file 1.", "Die Datei 1 öffnen."),
        dt.Row("b", "Open the file (2)", "Die Datei (2) öffnen"),
    ]
    kept, reasons = dp.clean_rows(rows, "de")
    assert kept == rows[:1]
    assert reasons == {"repeated": 1}


def words(number: int) -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))


def test_split_shares_no_document_and_no_sentence() -> None:
    rows = [
        dt.Row(f"document{i % 500}", f"the sentence called {words(i)}", f"der Satz namens {words(i)}")
        for i in range(2000)
    ]
    rows += [
        dt.Row(f"document{i}", "one sentence of every document", f"Satz von vielen namens {words(i)}")
        for i in range(500)
    ]
    rows += [dt.Row("long", f"a longer sentence called {words(i)}", f"der längere Satz {words(i)}") for i in range(100)]
    parts = dp.split_rows(rows)
    assert all(parts.values())
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not {row.document for row in parts[one]} & {row.document for row in parts[other]}
        for side in (1, 2):
            assert not {dp.letters_key(row[side]) for row in parts[one]} & {
                dp.letters_key(row[side]) for row in parts[other]
            }
    assert sum(row.source.startswith("one") for part in parts.values() for row in part) == sum(
        row.source.startswith("one") for row in parts["test"]
    )
    assert dp.split_rows(rows) == parts
    held_out = next(f"d{i}" for i in range(1000) if dp.part_of(f"d{i}") == "test")
    long = [dt.Row(held_out, f"a sentence of four words {words(i)}", "x") for i in range(100)]
    assert len(dp.split_rows([*long, dt.Row(held_out, "a b", "c d")])["test"]) <= 60


def make_package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Build a .deb of ``files`` in ``folder``."""
    tree = folder / name
    for path, content in {
        **files,
        "DEBIAN/control": f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: n\nDescription: d\n".encode(),
    }.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", tree, folder / f"{name}_1_all.deb"],
        check=True,
        capture_output=True,
    )
    shutil.rmtree(tree)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, holding apt's lists with one described package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "depthlstm_fast" / "debian"
    (root / "lists").mkdir(parents=True)
    (root / "packages").mkdir()
    (root / "lists" / "x_Packages").write_text("Package: tool-dev\nSource: tool (1)\n\nPackage: grep\n\n")
    for language, text in (
        ("en", "a tool for work\n It does the work."),
        ("de", "ein Werkzeug zur Arbeit\n Es macht die Arbeit."),
    ):
        (root / "lists" / f"x_Translation-{language}").write_text(stanza("tool-dev", language, text))
    return root


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, of Debian")
def test_build_reads_kept_packages(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    help_folder = "usr/share/libreoffice/help"
    make_package(
        cache / "packages",
        "libreoffice-help-en-us",
        {f"{help_folder}/en-US/a.html": ENGLISH_PAGE.encode(), f"{help_folder}/en-US/b.html": b"x"},
    )
    make_package(cache / "packages", "libreoffice-help-de", {f"{help_folder}/de/a.html": GERMAN_PAGE.encode()})
    manuals = {"man1/ls.1.gz": ENGLISH_MANUAL, "de/man1/ls.1.gz": GERMAN_MANUAL}
    make_package(
        cache / "packages",
        "grep",
        {f"usr/share/man/{path}": gzip.compress(text.encode()) for path, text in manuals.items()},
    )
    files = debian.build("de", tmp_path / "out")
    pairs = [
        Pair(*pair)
        for source, target in files.values()
        for pair in zip(source.read_text("utf-8").splitlines(), target.read_text("utf-8").splitlines(), strict=True)
    ]
    assert list(files) == ["train", "dev", "test"]
    assert Pair("It does the work.", "Es macht die Arbeit.") in pairs
    assert Pair("Select the object.", "Wählen Sie das Objekt.") in pairs
    assert Pair("don't sort", "nicht sortieren") in pairs
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(written) == sorted(f"{part}.{ending}" for part in files for ending in ("en", "de", "documents"))
    assert "debian: no package gimp-help-de, passed over" in capsys.readouterr().err
    debian.build("de", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == written


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, of Debian")
def test_a_damaged_package_is_named(cache: Path) -> None:
    (cache / "packages" / "grep_1_all.deb").write_bytes(b"no package")
    with pytest.raises(DownloadError, match=r"damaged package.*grep_1_all\.deb$"):
        Archive(cache).read("grep", ("usr/",), ".gz")


def fake_apt(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script in the place of apt-get."""
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_packages_are_fetched_once_and_only_those_in_the_lists(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_apt(tmp_path / "bin", f'echo "$@" >> {tmp_path}/calls; : > grep_1_all.deb', monkeypatch)
    archive = Archive(cache)
    assert archive.fetch("absent") is None
    assert archive.fetch("grep") == archive.fetch("grep") == (cache / "packages" / "grep_1_all.deb").resolve()
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert sorted(path.name for path in cache.iterdir()) == ["lists", "packages"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('echo "E: Failed to fetch it" >&2; exit 100', "apt-get download grep: E: Failed to fetch it"),
        ("exit 7", "apt-get download grep: exit status 7"),
        ("exit 0", "apt-get download grep: 0 files in place of one"),
    ],
)
def test_a_failed_download_is_an_error(
    script: str, message: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_apt(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(DownloadError) as error:
        Archive(cache).fetch("grep")
    assert str(error.value) == message
    assert not any((cache / "packages").iterdir())


def test_no_network_and_no_apt_are_errors_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(tmp_path / "bin", 'echo "W: Failed to fetch http://debian" >&2', monkeypatch)
    with pytest.raises(
        DownloadError, match=r"^apt-get update: no package descriptions for 'en': W: Failed to fetch http://debian$"
    ):
        Archive(tmp_path / "archive")
    assert not (tmp_path / "archive" / "lists").exists()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(DownloadError, match=r"^apt-get update: needs apt-get, on Debian or Ubuntu$"):
        Archive(tmp_path / "archive")


def test_unknown_language() -> None:
    with pytest.raises(ValueError, match="language must be one of de, fr, cs; found 'it'"):
        debian.build("it", Path("nowhere"))


def test_damaged_pages_and_catalogs_are_named(cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"damaged manual page ls\.1: "):
        debian.unpack("ls.1", gzip.compress(b"text" * 100)[:20])
    for content in (b"", b"no catalog", b"\xde\x12\x04\x95" + b"\xff" * 40):
        with pytest.raises(ValueError, match=r"catalog sw must be a whole \.mo file"):
            list(dt.catalog_rows("sw", content))
    (cache / "lists" / "x_Translation-de").write_bytes(b"Package: tool-dev\nDescription-de: \xff\n")
    with pytest.raises(ValueError, match=r"x_Translation-de must be UTF-8; found byte 0xff in line 2"):
        debian.build("de", cache)
