"""The import graph of the benchmarks: no import of an upper floor, no circle, one path to each file."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# A file imports from its own room and from rooms on lower floors; imports inside functions count as well.
FLOORS = (
    ("__init__",),
    ("measure",),
    ("subjects", "report"),
    ("gpu", "processes", "run", "threads"),
    ("__main__", "conftest", "test_rows"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def find_modules(folder: Path) -> dict[str, Path]:
    """Return every module below ``folder`` by its dotted name; a package has the name of its ``__init__``."""
    return {".".join(path.relative_to(folder).with_suffix("").parts): path for path in sorted(folder.rglob("*.py"))}


def imported(tree: ast.AST, module: str, modules: dict[str, Path]) -> Iterator[str]:
    """Return the modules that relative imports in ``tree`` name."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        for alias in node.names:
            parts = [part for part in (*base, alias.name) if part]
            candidates = (parts, [*parts, "__init__"], parts[:-1], [*parts[:-1], "__init__"])
            found = [name for name in map(".".join, candidates) if name in modules]
            assert found, f"{module} imports {'.'.join(parts)}, which is no module"
            if found[0] != module:
                yield found[0]


def graph_of(folder: Path) -> dict[str, set[str]]:
    modules = find_modules(folder)
    return {name: set(imported(ast.parse(path.read_text("utf-8")), name, modules)) for name, path in modules.items()}


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Return imports of another room that is not on a lower floor."""

    def room(module: str) -> str:
        return module.split(".")[0]

    pairs = [(name, other) for name, others in graph.items() for other in others if room(name) != room(other)]
    return [f"{name} imports {other}" for name, other in pairs if FLOOR[room(other)] >= FLOOR[room(name)]]


def absolute(tree: ast.AST) -> list[str]:
    """Return imports of the benchmarks by a name of the package.

    Such an import is a second path to a file that relative imports have loaded.
    """
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return [name for name in names if name.split(".")[0] == "benchmarks" or name.startswith("depthlstm_fast.bench")]


GRAPH = graph_of(FOLDER)


def test_the_graph_is_that_of_the_benchmarks() -> None:
    assert {"measure.problems", "measure.compiled"} <= GRAPH["subjects.gates"]
    assert "subjects.gates" in GRAPH["gpu.checker"]
    assert "__init__" in GRAPH["measure.machine"]
    assert "run" in GRAPH["__main__"]


def test_every_room_has_a_floor_and_is_a_package() -> None:
    assert {name.split(".")[0] for name in GRAPH} == set(FLOOR)
    assert all(f"{name.rpartition('.')[0]}.__init__".removeprefix(".") in GRAPH for name in GRAPH)


def test_nothing_imports_upward() -> None:
    assert upward(GRAPH) == []


def test_no_circle() -> None:
    list(graphlib.TopologicalSorter(GRAPH).static_order())


def test_no_file_has_a_second_path() -> None:
    found = {name: absolute(ast.parse(path.read_text("utf-8"))) for name, path in find_modules(FOLDER).items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_faults_are_found(tmp_path: Path) -> None:
    for room in ("measure", "subjects"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "measure" / "timing.py").write_text("def f():\n    from ..subjects import gates\n", "utf-8")
    (tmp_path / "subjects" / "gates.py").write_text("from ..measure.timing import f\nimport benchmarks.run\n", "utf-8")
    graph = graph_of(tmp_path)
    assert upward(graph) == ["measure.timing imports subjects.gates"]
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph).static_order())
    assert absolute(ast.parse((tmp_path / "subjects" / "gates.py").read_text("utf-8"))) == ["benchmarks.run"]
    (tmp_path / "measure" / "timing.py").write_text("from .nothing import x\n", "utf-8")
    with pytest.raises(AssertionError, match="no module"):
        graph_of(tmp_path)
