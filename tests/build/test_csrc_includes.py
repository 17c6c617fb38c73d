"""The include graph of csrc/.

common/ includes no op, no op includes another, and no file includes itself through any number of steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SUFFIXES = {".h", ".cuh", ".cpp", ".cu"}
FILES = sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*") if path.suffix in SUFFIXES)


def includes(name: str, text: str | None = None) -> Iterator[str]:
    """Yield a file's includes in quotes, below csrc/, in the compiler's order: beside the file, then in csrc/."""
    for wanted in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text or (CSRC / name).read_text(encoding="utf-8"), re.M):
        places = [(CSRC / name).parent / wanted, CSRC / wanted]
        found = next((place for place in places if place.is_file()), None)
        assert found is not None, f'csrc/{name} includes "{wanted}", which is neither beside it nor in csrc/'
        yield str(found.resolve().relative_to(CSRC))


def room(name: str) -> str:
    """Return common, an op, decode, or "" for the files of csrc/ itself, which may include all of them."""
    return name.split("/")[0] if "/" in name else ""


def may_include(includer: str, included: str) -> bool:
    """Return whether an include is allowed: decode/ drives the ops; an op has itself and common/."""
    allowed = {
        "common": {"common"},
        "": {room(name) for name in FILES},
        "decode": {room(name) for name in FILES} - {""},
    }
    return room(included) in allowed.get(room(includer), {room(includer), "common"})


def circle(graph: dict[str, list[str]]) -> list[str]:
    """Return the files of a circle, each including the next; empty if there is none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for other in graph.get(name, ()):
            if found := visit(other, [*path, name]):
                return found
        finished.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in graph)), [])


def test_there_are_files_to_look_at() -> None:
    """Check that there are files, because a moved tree would leave the other tests nothing to find."""
    assert {"common/activations.h", "depth_lstm/cpu_kernel.cpp"} <= set(FILES)
    assert sum(len(list(includes(name))) for name in FILES) > len(FILES) / 2


@pytest.mark.parametrize("name", FILES)
def test_includes_stay_in_their_room(name: str) -> None:
    wrong = [other for other in includes(name) if not may_include(name, other)]
    assert not wrong, (
        f"csrc/{name} includes {', '.join(wrong)}: common/ includes no op, an op includes itself and common/"
    )


def test_no_file_includes_itself() -> None:
    found = circle({name: list(includes(name)) for name in FILES})
    assert not found, " -> ".join(found)


def test_the_rules_find_what_breaks_them() -> None:
    assert not may_include("common/cpu/rows.h", "depth_lstm/call.h")
    assert not may_include("residual/cpu.h", "depth_lstm/call.h")
    assert not may_include("depth_lstm/cpu.h", "decode/step.h")
    assert may_include("decode/step.cpp", "depth_lstm/call.h")
    assert list(includes("depth_lstm/cpu.h", '#include "call.h"\n  # include "common/types.h"\n#include <vector>')) == [
        "depth_lstm/call.h",
        "common/types.h",
    ]
    with pytest.raises(AssertionError, match="neither beside it"):
        list(includes("depth_lstm/cpu.h", '#include "absent.h"'))
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
