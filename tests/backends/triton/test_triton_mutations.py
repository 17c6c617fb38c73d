"""Deliberately broken Triton kernels: the named test finds each fault."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import needs_triton

import depthlstm_fast as dl

pytestmark = [
    needs_triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU Triton compiles"),
    pytest.mark.slow,
]


TESTS = Path(__file__).resolve().parents[2]


@functools.cache
def file_of(test: str) -> str:
    """Return the file, below tests/, that has this test of the Triton kernels."""
    files = sorted((*Path(__file__).parent.glob("test_triton*.py"), *(TESTS / "conformance").glob("test_*.py")))
    (found,) = (str(file.relative_to(TESTS)) for file in files if f"\ndef {test}(" in file.read_text(encoding="utf-8"))
    return found


class Mutation(NamedTuple):
    """A mutation: in a kernel file the ``place``-th occurrence of ``old`` becomes ``new``.

    ``test`` then fails with ``words``.
    """

    file: str
    old: str
    new: str
    test: str
    words: str
    place: int = 0

    def __str__(self) -> str:
        return f"{self.file}: {self.old!r} ({self.place}) -> {self.new!r}"

    def node(self) -> str:
        return f"{file_of(self.test.split('[')[0])}::{self.test}"


# tests
# D = 7 in tiles of 16 columns, 5 rows in tiles of 16
SMALL = "test_error_bound[depth_lstm-triton-narrow-f32-f32-f32-gate-True-gelu]"
ROW, TILES, WIDE_TILES = (
    f"test_rows[depth_lstm-triton-{case}]" for case in ("narrow-1-33", "narrow-17-33", "wide-5-20")
)
NOT_THERE = "test_columns_and_rows_that_are_not_there[gate-gelu_tanh]"
FAR_NARROW, FAR_WIDE = (
    f"test_rows_more_than_2_to_the_31_elements_apart[{scheme}-gelu]" for scheme in ("narrow", "wide")
)
LONG_NARROW, LONG_WIDE = (
    f"test_outputs_of_more_than_2_to_the_31_elements[{case}]" for case in ("narrow-33", "wide-20")
)
PHILOX, WIDE_PHILOX = "test_dropout_mask[0-narrow]", "test_dropout_mask[0-wide]"
DROPOUT, WIDE_DROPOUT = (f"test_error_bound_with_dropout[{scheme}-gate-True-gelu]" for scheme in ("narrow", "wide"))
# their messages
BOUND, POISON, GUARD, UNEQUAL = (
    r"error [\d.e+-]+, allowed",
    "error nan, allowed",
    "guard: written beside",
    "assert False|Mismatched",
)
# the broken code
INSIDE = "inside = (row < rows) & (column < FEATURES)"
ANY_ROW = "inside = (row >= 0) & (column < FEATURES)"
TILE, TILE32 = "(tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS))", "(tile * ROWS + tl.arange(0, ROWS))"
NUMBER, NUMBER32 = "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"
HALF_UP = "bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))"

MUTATIONS = [
    # masks of loads, of stores, of sums: NaN beside the arguments is read, guards beside the results are written
    Mutation("common/tiles.py", "tl.load(at, mask=inside, other=0.0)", "tl.load(at)", SMALL, POISON),
    Mutation("common/tiles.py", "tl.store(at, value, mask=inside)", "tl.store(at, value)", ROW, GUARD),
    Mutation("depth_lstm.py", "keep_dims=True), mask=column < FEATURES)", "keep_dims=True))", SMALL, GUARD),
    Mutation("depth_lstm.py", "mask=column < width", "mask=column >= 0", SMALL, GUARD),
    Mutation("depth_lstm.py", INSIDE, ANY_ROW, ROW, GUARD),  # forward
    Mutation("depth_lstm.py", INSIDE, ANY_ROW, ROW, POISON, 1),  # narrow
    Mutation("depth_lstm.py", INSIDE, ANY_ROW, WIDE_TILES, POISON, 2),
    Mutation("common/tiles.py", "tile = tl.where(inside, tile, 0.0)", "tile = tile", SMALL, BOUND),  # of the statistics
    Mutation("common/tiles.py", "tile = tl.where(inside, tile, 0.0)", "tile = tile", NOT_THERE, POISON, 1),
    Mutation(
        "depth_lstm.py",
        "tl.minimum(row, rows - 1)",
        "row",
        "test_z_bias[depth_lstm-triton-narrow-f32-f32-f32-gate-True-gelu]",
        POISON,
    ),
    # offsets: of the gates, and beyond 2^31
    Mutation("common/tiles.py", "load(at + k * FEATURES", "load(at + (k + 1) * FEATURES", SMALL, POISON),
    Mutation("depth_lstm.py", "+ column, dz_tiles[k]", "+ column, dz_tiles[0]", SMALL, BOUND),
    Mutation("depth_lstm.py", NUMBER, NUMBER32, FAR_NARROW, BOUND),  # forward
    Mutation("depth_lstm.py", NUMBER, NUMBER32, FAR_WIDE, BOUND, 1),  # row_sums
    Mutation("depth_lstm.py", TILE, TILE32, FAR_NARROW, BOUND),
    Mutation("depth_lstm.py", TILE, TILE32, FAR_WIDE, BOUND, 1),
    Mutation("depth_lstm.py", NUMBER, NUMBER32, LONG_NARROW, UNEQUAL),
    Mutation("depth_lstm.py", NUMBER, NUMBER32, LONG_WIDE, UNEQUAL, 1),
    Mutation("depth_lstm.py", TILE, TILE32, LONG_NARROW, UNEQUAL),
    Mutation("depth_lstm.py", TILE, TILE32, LONG_WIDE, UNEQUAL, 1),
    # loops that end one tile too early, or after the first partial sums
    Mutation(
        "depth_lstm.py", "tl.cdiv(rows, ROWS), tl.num_programs(0)", "rows // ROWS, tl.num_programs(0)", TILES, POISON
    ),
    Mutation(
        "depth_lstm.py",
        "tl.cdiv(rows, ROWS), tl.num_programs(1)",
        "rows // ROWS, tl.num_programs(1)",
        WIDE_TILES,
        POISON,
    ),
    Mutation(
        "depth_lstm.py",
        "tl.range(0, programs, ROWS)",
        "tl.range(0, ROWS, ROWS)",
        "test_more_rows_than_programs[18-273-1]",
        BOUND,
    ),
    # mathematics
    Mutation(
        "common/tiles.py",
        "-rest[k] * ",
        "0.0 * rest[k] * ",
        "test_constant_rows[depth_lstm-triton-narrow-gate-f32-f32-f32-41]",
        BOUND,
    ),
    Mutation("common/tiles.py", " - n[k] * mean_un[k]", "", SMALL, BOUND),
    Mutation("common/tiles.py", "u[k] - mean_u[k]", "u[k]", SMALL, BOUND),
    Mutation(
        "common/tiles.py",
        "rsqrt(variance + eps)",
        "rsqrt(variance + 1e-6)",
        "test_eps[depth_lstm-triton-narrow-gate-0.5-f32-f32-f32]",
        BOUND,
    ),
    Mutation(
        "common/tiles.py",
        'NORM == "joint"',
        'NORM == "neither"',
        "test_error_bound[depth_lstm-triton-narrow-f32-f32-f32-joint-True-gelu]",
        BOUND,
    ),
    Mutation("depth_lstm.py", "(dweight, dbias) if affine", "(dbias, dweight) if affine", SMALL, BOUND),
    Mutation("depth_lstm.py", "sums[GATES + k] + da[k]", "da[k]", "test_more_rows_than_programs[2-18-33]", BOUND),
    # dropout: order of the words, blocks, rows, scale
    Mutation(
        "common/formulas.py", "tl.join(w0, w2), tl.join(w1, w3)", "tl.join(w0, w1), tl.join(w2, w3)", PHILOX, UNEQUAL
    ),
    Mutation(
        "common/formulas.py",
        "(first // 4 + tl.arange(0, BLOCK // 4))",
        "tl.arange(0, BLOCK // 4)",
        WIDE_PHILOX,
        UNEQUAL,
    ),
    Mutation(
        "depth_lstm.py",
        "rows, row, column, first, inside, dh_stride",
        "rows, row, column, 0, inside, dh_stride",
        WIDE_PHILOX,
        UNEQUAL,
        1,
    ),
    Mutation("depth_lstm.py", "key, 1, row, column, first", "key, 1, row, column, 0", WIDE_DROPOUT, BOUND),  # row_sums
    Mutation("common/formulas.py", "(row >> 32)", "(row & 0)", "test_dropout_of_far_rows[5-0-1099511627781]", "assert"),
    Mutation("depth_lstm.py", "g * factor, slope * factor", "g * factor, slope * (factor > 0)", DROPOUT, BOUND),
    # the interpreter's own rounding
    Mutation("common/interpreter.py", HALF_UP, "bits", "test_rounding_to_bf16", UNEQUAL),
    Mutation("common/interpreter.py", HALF_UP, "bits + np.uint32(0x8000)", "test_rounding_to_bf16", UNEQUAL),
]

# One pytest session collects the tests. Each mutation runs its test in a fork of it, which imports the kernels anew and
# replaces the tests' references to the old ones.
SESSION = """
import importlib, json, os, sys, traceback
import pytest, torch

torch.set_num_threads(1)  # before any fork
tests, jobs = json.load(sys.stdin)


def import_kernels_from(folder):
    package = sys.modules["depthlstm_fast.kernels"]
    old = {name: module for name, module in sys.modules.items() if name.startswith("depthlstm_fast.kernels.")}
    for name in old:
        del sys.modules[name]
        vars(package).pop(name.split(".")[-1], None)
    package.__path__ = [folder]
    importlib.import_module("depthlstm_fast.backends.triton").kernels.cache_clear()
    importlib.import_module("depthlstm_fast.kernels.depth_lstm")
    new = {name: importlib.import_module(name) for name in old}
    names = [name for name in sys.modules if name.startswith(("test_triton", "triton_helpers"))]
    for held in [vars(sys.modules[name]) for name in names]:
        for key, value in list(held.items()):
            for name, module in old.items():
                if value is module:
                    held[key] = new[name]
                elif vars(module).get(key) is value:
                    held[key] = vars(new[name])[key]


class Plugin:
    def pytest_runtestloop(self, session):
        running = set()
        for folder, chosen in jobs:
            if len(running) == 2:
                running.remove(os.wait()[0])
            child = os.fork()
            if child == 0:
                self.failures = []
                try:
                    import_kernels_from(folder)
                    for item in session.items:
                        if item.nodeid.partition("tests/")[2] in chosen:
                            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
                            chosen.remove(item.nodeid.partition("tests/")[2])
                except BaseException:
                    self.failures.append(traceback.format_exc())
                with open(os.path.join(folder, "result.json"), "w") as file:
                    json.dump({"missing": chosen, "failures": self.failures}, file)
                os._exit(0)
            running.add(child)
        for child in running:
            os.waitpid(child, 0)
        return True

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self.failures.append(report.longreprtext)


sys.exit(pytest.main(["-q", "-s", "--tb=short", "-p", "no:cacheprovider", *tests], plugins=[Plugin()]))
"""


def mutate(text: str, mutation: Mutation) -> str:
    parts = text.split(mutation.old)
    assert len(parts) > mutation.place + 1, f"what is to be broken is not there: {mutation}"
    head, tail = parts[: mutation.place + 1], parts[mutation.place + 1 :]
    return mutation.old.join(head) + mutation.new + mutation.old.join(tail)


@pytest.mark.slow
def test_mutations_are_caught(tmp_path: Path) -> None:
    """Check that the named test finds every mutation, with the words of its own check.

    Without a mutation all tests pass.
    """
    tests = sorted({mutation.node() for mutation in MUTATIONS})
    jobs: list[tuple[Path, list[str]]] = []
    for number, mutation in enumerate([None, *MUTATIONS]):
        folder = tmp_path / str(number)
        shutil.copytree(Path(dl.__file__).parent / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            file = folder / mutation.file
            file.write_text(mutate(file.read_text(encoding="utf-8"), mutation), encoding="utf-8")
        jobs.append((folder, tests if mutation is None else [mutation.node()]))
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    text = json.dumps(([str(TESTS / test) for test in tests], [(str(folder), chosen) for folder, chosen in jobs]))
    command = [sys.executable, "-c", SESSION]
    run = subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=TESTS.parent, env=environment, timeout=600, check=False
    )
    survivors = []
    for (folder, _), mutation in zip(jobs, [None, *MUTATIONS], strict=True):
        assert (folder / "result.json").exists(), run.stdout + run.stderr
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert not result["missing"], "\n".join([run.stdout + run.stderr, *result["missing"], *result["failures"]])
        if mutation is None:
            assert not result["failures"], "\n".join(result["failures"])
        elif not any(re.search(rf"^E .*{mutation.words}", failure, re.M) for failure in result["failures"]):
            survivors.append(
                "\n".join([f"{mutation}: {mutation.test} does not say {mutation.words!r}", *result["failures"]])
            )
    assert not survivors, "\n\n".join(survivors)
