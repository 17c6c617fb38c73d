"""The packages and lists of the Debian archive that the system's apt is set up for, fetched once and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .data import DownloadError
from .debian_text import read_stanzas
from .lines import read_lines

LANGUAGES = ("de", "fr", "cs")
APT_SETTINGS = """
#clear APT::Update;
#clear Acquire::Languages;
Acquire::Languages {{ "en"; {languages} }};
Acquire::GzipIndexes "false";
Acquire::Retries "1";
Acquire::http::Timeout "30";
APT::Sandbox::User "root";
Dir::State "{work}/state";
Dir::State::lists "{lists}/";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "{work}/cache";
Dir::Cache::archives "archives/";
Dir::Cache::pkgcache "pkgcache.bin";
"""


def tool_output(command: list[str], folder: Path, timeout: float = 900.0) -> str:
    """Run ``command`` in ``folder`` and return its output on stderr.

    Raises:
        DownloadError: the command is not installed, failed, or took longer than ``timeout`` seconds.
    """
    shown = " ".join(word for word in command if not word.startswith(("-", "/")))
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        raise DownloadError(f"{shown}: needs {command[0]}, on Debian or Ubuntu") from None
    except subprocess.TimeoutExpired:
        raise DownloadError(f"{shown}: no answer within {timeout:.0f} s") from None
    if done.returncode != 0:
        raise DownloadError(f"{shown}: {first_error(done.stderr) or f'exit status {done.returncode}'}")
    return done.stderr


def first_error(text: str) -> str:
    """Return apt's first line of error or warning in ``text``."""
    return next((line for line in text.splitlines() if line.startswith(("E:", "W:", "Err:"))), "")


class Archive:
    """The Debian archive that the system's apt is set up for.

    Apt's lists and the packages fetched so far lie below ``root``. apt runs with its own lists and cache. The system's
    lists and cache are neither read nor written, and the system's hooks do not run.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()  # apt runs in other folders
        self.lists = self.root / "lists"
        self.packages = self.root / "packages"
        try:
            self.packages.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DownloadError(f"no folder for the packages: {error}") from error
        if not self.lists.is_dir():
            self.fetch_lists()
        self.sources = {
            stanza["Package"]: stanza.get("Source", stanza["Package"]).split(" ")[0]
            for text in self.read_lists("*_Packages")
            for stanza in read_stanzas(text)
            if "Package" in stanza
        }

    def apt_get(self, lists: Path, folder: Path, *arguments: str) -> str:
        """Run apt-get in ``folder`` with the lists in ``lists``; return its output on stderr."""
        with tempfile.TemporaryDirectory(dir=self.root) as work:
            for name in ("state", "cache/archives/partial"):
                Path(work, name).mkdir(parents=True)
            settings = Path(work, "apt.conf")
            languages = " ".join(f'"{language}";' for language in LANGUAGES)
            settings.write_text(APT_SETTINGS.format(work=work, lists=lists, languages=languages), encoding="utf-8")
            return tool_output(["apt-get", "-qq", f"--config-file={settings}", *arguments], folder)

    def fetch_lists(self) -> None:
        """Fetch apt's lists with the translated descriptions of all languages."""
        print("debian: apt's lists", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            lists = Path(folder, "lists")
            (lists / "partial").mkdir(parents=True)
            warnings = self.apt_get(lists, Path(folder), "update")
            for language in ("en", *LANGUAGES):  # apt-get update only warns of files that it could not fetch
                if not any(lists.glob(f"*_Translation-{language}")):
                    reason = first_error(warnings) or "is this Debian?"
                    raise DownloadError(f"apt-get update: no package descriptions for {language!r}: {reason}")
            os.replace(lists, self.lists)

    def read_lists(self, pattern: str) -> list[str]:
        """Return the texts of apt's lists with these names."""
        return ["\n".join(read_lines(path)) for path in sorted(self.lists.glob(pattern))]

    def fetch(self, name: str) -> Path | None:
        """Return the path of a package, which apt has checked against the signed lists.

        If Debian lacks the package, the result is None, with a line on stderr.

        Raises:
            DownloadError: the package is in apt's lists, and could not be fetched.
        """
        kept = sorted(self.packages.glob(f"{name}_*.deb"))
        if kept:
            return kept[-1]
        if name not in self.sources:
            print(f"debian: no package {name}, passed over", file=sys.stderr)
            return None
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            self.apt_get(self.lists, Path(folder), "download", name)
            found = sorted(Path(folder).glob("*.deb"))
            if len(found) != 1:
                raise DownloadError(f"apt-get download {name}: {len(found)} files in place of one")
            print(f"debian: {name}, {found[0].stat().st_size / 1e6:.1f} MB", file=sys.stderr)
            package = self.packages / found[0].name
            os.replace(found[0], package)
        return package

    def read(self, name: str, prefixes: tuple[str, ...], suffix: str) -> dict[str, bytes]:
        """Return the files of a package whose paths have the prefix and suffix, sorted by path.

        The result is empty if the package does not exist.
        """
        package = self.fetch(name)
        return dict(sorted(read_package(package, prefixes, suffix))) if package else {}


def read_package(package: Path, prefixes: tuple[str, ...], suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the files in a .deb whose paths have the prefix and suffix; links are left out.

    Raises:
        DownloadError: dpkg-deb is missing, or the package is damaged.
    """
    if shutil.which("dpkg-deb") is None:
        raise DownloadError("reading packages needs dpkg-deb, on Debian or Ubuntu")
    damaged = DownloadError(f"damaged package, remove it and try again: {package}")
    with subprocess.Popen(
        ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = member.name.removeprefix("./")
                    content = (
                        archive.extractfile(member)
                        if member.isreg() and path.startswith(prefixes) and path.endswith(suffix)
                        else None
                    )
                    if content is not None:
                        yield path, content.read()
        except tarfile.TarError:
            raise damaged from None
        process.stdout.read()  # padding: dpkg-deb fails unless it is read
    if process.returncode != 0:
        raise damaged
