"""docs/other_tools.md and docs/scale.md name a test for each statement, and each of these tests exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PAGES = HERE.parents[1] / "docs"


@pytest.mark.skipif(not PAGES.is_dir(), reason="no checkout")
@pytest.mark.parametrize(("page", "least"), [("other_tools", 15), ("scale", 10)])
def test_named_tests_exist(page: str, least: int) -> None:
    missing, checked, text = [], 0, (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for named in re.findall(r"\[((?:tests/)?test_[^\]]+)\](?!\()", text):
        for part in named.split(";"):
            file, _, functions = part.strip().partition(": ")
            path = HERE.parents[1] / file if file.startswith("tests/") else HERE / f"{file}.py"
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            if file == "test_two_processes":
                text += "".join(path.read_text(encoding="utf-8") for path in sorted(HERE.glob("two_processes*.py")))
            for name in filter(None, (function.strip() for function in functions.split(","))):
                checked += 1
                if not re.search(rf"^def (?:check_)?{name}\(", text, re.MULTILINE):
                    missing.append(f"{file}: {name}")
            if not text:
                missing.append(file)
    assert checked > least
    assert not missing
