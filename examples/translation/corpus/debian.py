"""Parallel text from Debian: English documentation and package descriptions with translations.

The translations are German, French or Czech. The texts are under copyleft licences. They are fetched from the mirror
that apt is set up for, and not kept in this repository.
"""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .data import DownloadError, cache_folder
from .debian_archive import LANGUAGES, Archive
from .debian_pairs import clean_rows, document_rows, split_rows
from .debian_text import Row, catalog_rows, description_rows, html_blocks, roff_blocks
from .lines import write_lines

LOCALES = {"de": "de-DE", "fr": "fr-FR", "cs": "cs-CZ"}


class Guide(NamedTuple):
    """HTML pages in two languages: the packages and folders of the English and of the translated pages."""

    name: str
    package: str
    folder: str
    translated_package: str
    translated_folder: str
    languages: tuple[str, ...] = LANGUAGES


GUIDES = (
    Guide(
        "libreoffice-help",
        "libreoffice-help-en-us",
        "usr/share/libreoffice/help/en-US",
        "libreoffice-help-{language}",
        "usr/share/libreoffice/help/{language}",
    ),
    Guide(
        "handbook",
        "debian-handbook",
        "usr/share/doc/debian-handbook/html/en-US",
        "debian-handbook",
        "usr/share/doc/debian-handbook/html/{locale}",
    ),
    Guide(
        "installation-guide",
        "installation-guide-amd64",
        "usr/share/doc/installation-guide-amd64/en",
        "installation-guide-amd64",
        "usr/share/doc/installation-guide-amd64/{language}",
    ),
    Guide(
        "gimp-help",
        "gimp-help-en",
        "usr/share/gimp/2.0/help/en",
        "gimp-help-{language}",
        "usr/share/gimp/2.0/help/{language}",
        ("de", "fr"),
    ),
    Guide(
        "reference",
        "debian-reference-en",
        "usr/share/debian-reference",
        "debian-reference-{language}",
        "usr/share/debian-reference",
        ("de", "fr"),
    ),
    Guide(
        "developers-reference",
        "developers-reference",
        "usr/share/developers-reference",
        "developers-reference-{language}",
        "usr/share/developers-reference/{language}",
        ("de", "fr"),
    ),
    *(
        Guide(
            f"gnucash-{book}",
            "gnucash-docs",
            f"usr/share/doc/gnucash-docs/gnucash-{book}-en",
            "gnucash-docs",
            f"usr/share/doc/gnucash-docs/gnucash-{book}-{{language}}",
            ("de",),
        )
        for book in ("guide", "help")
    ),
)
CATALOGS = "libreoffice-l10n-{language}"
TRANSLATED_MANUALS = {
    "de": ("manpages-de", "manpages-de-dev"),
    "fr": ("manpages-fr", "manpages-fr-dev"),
    "cs": ("manpages-cs",),
}
DEVELOPER_MANUALS = "manpages-dev"
# Packages of the English manual pages, some with their translations. net-tools is left out, because its translations
# are of other versions.
MANUALS = """
    manpages coreutils util-linux bsdutils mount fdisk systemd systemd-container udev procps passwd login e2fsprogs
    findutils tar grep sed gzip man-db less nano cron rsyslog logrotate openssh-client gnupg gpg gpgv xz-utils bzip2
    zip unzip parted dosfstools btrfs-progs xfsprogs quota nfs-common iproute2 iputils-ping debconf adduser dpkg-dev
    apt-utils at acl attr cryptsetup-bin lvm2 mdadm grub-common grub2-common
"""


def guide_rows(archive: Archive, guide: Guide, language: str) -> Iterator[Row]:
    """Yield the blocks of the pages that ``guide`` has in both languages."""
    values = {"language": language, "locale": LOCALES[language]}
    editions = (
        (guide.translated_package.format(**values), guide.translated_folder.format(**values), f".{language}.html"),
        (guide.package, guide.folder, ".en.html"),
    )
    pages = []
    for package, folder, ending in editions:
        files = archive.read(package, (f"{folder}/",), ".html")
        if not files:
            return
        # chapter.en.html and chapter.de.html are the same page
        pages.append(
            {path.removeprefix(f"{folder}/").replace(ending, ".html"): content for path, content in files.items()}
        )
    translated, english = pages
    # a page named like the package holds all the others
    for name in sorted((english.keys() & translated.keys()) - {f"{guide.package}.html"}):
        blocks = (html_blocks(page[name].decode("utf-8", "replace")) for page in (english, translated))
        yield from document_rows(f"{guide.name}/{name}", *blocks)


def unpack(name: str, content: bytes) -> str:
    """Return the text of the gzipped manual page ``name``."""
    try:
        return gzip.decompress(content).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise DownloadError(f"damaged manual page {name}: {error}") from None


def manual_rows(archive: Archive, language: str) -> Iterator[Row]:
    """Yield the blocks of the manual pages that exist in both languages."""
    prefix, translated_prefix = "usr/share/man/man", f"usr/share/man/{language}/man"
    packages = [*MANUALS.split(), *TRANSLATED_MANUALS[language]]
    if f"manpages-{language}-dev" in packages:
        packages.append(DEVELOPER_MANUALS)
    english: dict[str, bytes] = {}
    translated: dict[str, bytes] = {}
    for package in packages:
        for path, content in archive.read(package, (prefix, translated_prefix), ".gz").items():
            pages = english if path.startswith(prefix) else translated
            pages.setdefault(PurePosixPath(path).name.removesuffix(".gz"), content)
    for name in sorted(english.keys() & translated.keys()):
        blocks = (roff_blocks(unpack(name, pages[name])) for pages in (english, translated))
        yield from document_rows(f"man/{name}", *blocks)


def all_rows(archive: Archive, language: str) -> Iterator[Row]:
    """Yield the paragraphs of every document that exists in English and ``language``."""
    english, translated = (archive.read_lists(f"*_Translation-{name}") for name in ("en", language))
    yield from description_rows(archive.sources, english, translated, language)
    for guide in GUIDES:
        if language in guide.languages:
            yield from guide_rows(archive, guide, language)
    for path, content in archive.read(CATALOGS.format(language=language), ("",), ".mo").items():
        yield from catalog_rows(f"libreoffice/{Path(path).stem}", content)
    yield from manual_rows(archive, language)


def build(language: str, folder: Path) -> dict[str, tuple[Path, Path]]:
    """Write aligned sentences of English and ``language`` to ``folder``; return both files of train, dev and test.

    Packages are fetched once, and kept below ``cache_folder()``. Equal packages give equal files.

    Raises:
        ValueError: an unknown ``language``.
        DownloadError: no apt-get, no network, or no Debian.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}; found {language!r}")
    archive = Archive(cache_folder() / "debian")
    rows, reasons = clean_rows(all_rows(archive, language), language)
    print(
        f"debian: dropped {', '.join(f'{count} {reason}' for reason, count in reasons.most_common())}", file=sys.stderr
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, kept in split_rows(rows).items():
        files[part] = (
            write_lines(folder / f"{part}.en", [row.source for row in kept]),
            write_lines(folder / f"{part}.{language}", [row.target for row in kept]),
        )
        write_lines(folder / f"{part}.documents", [row.document for row in kept])
        words = [
            sum(len(text.split()) for text in texts) for texts in zip(*(row[1:] for row in kept), strict=True)
        ] or [0, 0]
        print(f"debian: {part}: {len(kept)} pairs, {words[0]} words en, {words[1]} {language}", file=sys.stderr)
    return files
