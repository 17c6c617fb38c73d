"""The decode engine's threads: the command that measures them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import needs_cpp

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from depthlstm_fast.bench import threads  # noqa: E402
from depthlstm_fast.bench.subjects import decode_engine  # noqa: E402

sys.path.remove(str(ROOT))


def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for wrong, text in (
        (["--rounds", "0", "--output", str(tmp_path)], "rounds must be at least 1; found 0"),
        (["--output", "/proc/none"], "output must be a folder that can be written; found /proc/none"),
    ):
        with pytest.raises(SystemExit) as found:
            threads.main(wrong)
        assert found.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m depthlstm_fast.bench.threads: ")
        assert text in error
        assert error.count("\n") == 1


@needs_cpp
def test_a_small_model_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(decode_engine.SIZES, "d=256", (32, 4, 100))
    monkeypatch.setattr(threads, "BUSY", (0, 1))
    before = torch.get_num_threads()
    try:
        assert threads.main(["--rounds", "2", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    rows: list[dict[str, Any]] = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == 3 * 3 * 2
    assert [row["busy_programs"] for row in rows] == [0, 1] * 9
    for row in rows:
        speeds = [row[f"tokens_per_second_{count}"] for count in (1, 2)]
        assert all(0 < each["p10"] <= each["median"] <= each["p90"] for each in (*speeds, row["two_over_one"]))
