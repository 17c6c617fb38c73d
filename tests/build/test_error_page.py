"""docs/errors.md quotes the messages that the source raises, and has every message of the package.

On the page ``…`` stands for the variable parts of a message. In the source these are the fields of an f-string, or in
C++ arguments that are not literals.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import depthlstm_fast

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "errors.md"
OPEN = "…"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="no checkout")


def spoken(node: ast.AST) -> Iterator[str]:
    """Yield the possible texts of an expression, with fields as ``…``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(value.value if isinstance(value, ast.Constant) else OPEN for value in node.values)
    elif isinstance(node, ast.BinOp):
        left, right = next(spoken(node.left), OPEN), next(spoken(node.right), OPEN)
        yield left + right
    else:
        for child in ast.iter_child_nodes(node):
            yield from spoken(child)


def python_texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            yield from spoken(node)


def raised(path: Path) -> Iterator[str]:
    """Yield the texts of ``raise`` and of the logger's warnings, as far as they are literal."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(called, ast.Call):
            continue
        warns = isinstance(called.func, ast.Attribute) and called.func.attr in ("warning", "warn")
        if (isinstance(node, ast.Raise) or warns) and called.args:
            yield from spoken(called.args[0])


def cpp_texts(path: Path) -> Iterator[str]:
    for statement in re.findall(r"CHECK\((.*?)\);", path.read_text(encoding="utf-8"), re.DOTALL):
        parts = re.split(r'"((?:[^"\\]|\\.)*)"', statement)
        text = "".join(part if index % 2 else OPEN * bool(part.strip()) for index, part in enumerate(parts))
        yield text


def rows() -> list[tuple[str, str]]:
    """Return (section, message) of every row of the page's tables."""
    found, section = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        section = line[3:] if line.startswith("## ") else section
        quoted = re.match(r"\| `([^`]+)` \|", line)
        if quoted:
            found.append((section, quoted.group(1)))
    return found


def same(quoted: str, text: str) -> bool:
    """Return whether the pieces between the quotation's gaps stand in ``text``, in their order."""
    pieces = [piece for piece in quoted.split(OPEN) if piece.strip(" ;:,.()")]
    return bool(pieces) and re.search(".*".join(map(re.escape, pieces)), text, re.DOTALL) is not None


def package_files() -> list[Path]:
    folder = Path(depthlstm_fast.__file__).parent
    return [path for path in folder.rglob("*.py") if "bench" not in path.relative_to(folder).parts] + list(
        (ROOT / "kernels").rglob("*.py")
    )


def test_every_quoted_message_is_in_the_source() -> None:
    files = [
        *package_files(),
        ROOT / "setup.py",
        *(ROOT / "tools" / "build").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
    ]
    sources = {path: list(python_texts(path)) for path in files}
    texts = [text for found in sources.values() for text in found]
    texts += [text for path in (ROOT / "csrc").rglob("*.[ch]*") for text in cpp_texts(path)]
    others = inspect.getsource(torch.nn.modules.module)
    try:
        import safetensors.torch

        others += inspect.getsource(safetensors.torch)
    except ImportError:
        others += "Some tensors share memory"
    assert len(rows()) > 100
    lost = []
    for section, quoted in rows():
        where = [others] if section == "Loading checkpoints" else [text.replace("%s", OPEN) for text in texts]
        if not any(same(quoted, text) for text in where):
            lost.append(quoted)
    assert not lost


def test_every_message_of_the_package_is_quoted() -> None:
    quoted = [message for section, message in rows() if section != "Loading checkpoints"]
    texts = [text for path in package_files() for text in raised(path)]
    assert len(texts) > 50
    assert not [text for text in texts if not any(same(message, text.replace("%s", OPEN)) for message in quoted)]
