"""Every page is readable in an editor, its links work, and the files and tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITH_PAGES = ("docs", "examples", "benchmarks")
FOLDERS = (*WITH_PAGES, "csrc", "kernels", "depthlstm_fast", "tests", "tools", "third_party", ".ci", ".github")
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for found in (ROOT.glob("*.md"), *((ROOT / folder).rglob("*.md") for folder in WITH_PAGES))
    for path in found
    if "results" not in path.parts
)
LONGEST = 200

pytestmark = pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="no checkout")


def prose(page: str) -> list[str]:
    """Return the lines of ``page`` without code and without a run's table, which the benchmarks write."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for code in (r"^```.*?^```", r"^<!-- benchmarks:begin -->.*?^<!-- benchmarks:end -->"):
        text = re.sub(code, "", text, flags=re.M | re.S)
    return [line for line in text.splitlines() if not line.startswith("    ")]


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page: str) -> None:
    without_targets = [re.sub(r"\]\([^)]*\)", "]", line) for line in prose(page) if not line.startswith("|")]
    assert not [line for line in without_targets if len(line) > LONGEST]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page)))
    files = [target.partition("#")[0] for target in targets if not re.match(r"https?:|#", target)]
    assert not [target for target in files if not ((ROOT / page).parent / target).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    quoted = re.findall(r"`([\w./-]+)`", "\n".join(prose(page)))
    named = [name for name in quoted if name.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_tests_that_support_names_exist() -> None:
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = {name for group in re.findall(r"\[((?:test|check)_[^\]]+)\]", text) for name in group.split(", ")}
    assert len(named) > 30
    assert not sorted(name for name in named if not re.search(rf"^def {name}\(", sources, re.M))
