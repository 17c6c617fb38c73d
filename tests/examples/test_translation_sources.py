"""The translation example without its sentences: no home folder, no cache, a damaged wheel, overlong lines."""

from __future__ import annotations

import errno
import pwd
import zipfile
from pathlib import Path
from typing import Any

import pytest
from translation_helpers import data, one_line, prepare


def test_no_home_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert prepare.main(["--data", "auto", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().err
    assert "no home folder" in printed
    assert "built-in sentence pairs" in printed
    assert printed.count("\n") == 1
    for name in ("django", "debian"):
        assert "no home folder" in one_line(prepare, ["--data", name, tmp_path / "out"], capsys)


def refuse(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("call", ["mkdir", "exists", "open"])
def test_a_cache_folder_that_may_not_be_used(
    call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if call == "open":
        wheel = tmp_path / "depthlstm_fast" / f"django-{data.DJANGO_VERSION}-py3-none-any.whl"
        wheel.parent.mkdir()
        wheel.touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse)
        assert "built-in" in data.read_named("auto")[0]
        printed = capsys.readouterr().err
        assert "Permission denied" in printed
        assert printed.count("\n") == 1
        with pytest.raises(data.DownloadError, match="Permission denied"):
            data.read_named("django")


def test_a_damaged_member_of_the_wheel_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = tmp_path / "depthlstm_fast" / f"django-{data.DJANGO_VERSION}-py3-none-any.whl"
    wheel.parent.mkdir()
    for content in (b"msgid broken\n", b"\xff\xff"):
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("django/conf/locale/de/LC_MESSAGES/django.po", content * 50)
        assert "found a damaged file, remove it" in one_line(prepare, ["--data", "django", tmp_path / "out"], capsys)
    wheel.write_bytes(wheel.read_bytes().replace(b"\xfb\xff", b"\x00\x00", 1))
    assert "found a damaged file, remove it" in one_line(prepare, ["--data", "django", tmp_path / "out"], capsys)


def test_only_lines_too_long_for_a_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side, words in (("en", "and a few more words"), ("de", "und noch ein paar Worte")):
        text = "".join(f"Line {n} {side} " + f"{words} " * 250 + "\n" for n in range(12))
        (tmp_path / f"a.{side}").write_text(text, encoding="utf-8")
    files = ["--source", tmp_path / "a.en", "--target", tmp_path / "a.de", tmp_path / "out"]
    assert "texts must hold a line of at most 4192 bytes" in one_line(prepare, files, capsys)
