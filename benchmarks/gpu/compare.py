"""Comparison of Triton and CUDA C++ from a run's rows.

The winners are the entries of depthlstm_fast/backends/fastest.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .jobs import Run

TORCH_NAMES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
DECISIVE = "gates forward + backward"  # the measurement that decides the winner in backends/fastest.py
FASTEST_FILE = "fastest.txt"


class Pair(NamedTuple):
    """Two rows of one measurement, whose contestants took turns.

    ``winner`` is None if they differ by no more than their spread.
    """

    triton: dict[str, Any]
    cuda: dict[str, Any]

    @property
    def ratio(self) -> float:
        """Return how many times faster CUDA C++ is than Triton, by the medians."""
        return self.triton["values"]["fused"]["median"] / self.cuda["values"]["fused"]["median"]

    @property
    def winner(self) -> str | None:
        triton, cuda = (row["values"]["fused"] for row in self)
        if triton["p90"] < cuda["p10"]:
            return "triton"
        return "cuda" if cuda["p90"] < triton["p10"] else None


def pairs(run: Run) -> list[Pair]:
    """Return the measurements that both backends have, in the order of the run.

    Rows of a single backend, and red rows, are left out.
    """
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in run["rows"]:
        if row["failure"] is None and row["unit"] in ("ms", "us") and "fused" in row["values"]:
            key = tuple(row[name] for name in ("subject", "name", "dtype", "size"))
            found.setdefault(key, {})[row["backend"]] = row
    return [Pair(rows["triton"], rows["cuda"]) for rows in found.values() if {"triton", "cuda"} <= rows.keys()]


def pair_lines(run: Run) -> list[list[str]]:
    """Return a table, headings first: the measurement, both medians, their ratio, the faster backend."""
    table = [["Triton and CUDA C++ (medians)", "Triton", "CUDA C++", "CUDA over Triton", "faster"]]
    for pair in pairs(run):
        row = pair.cuda
        texts = [f"{side['values']['fused']['median']:.4g} {side['unit']}" for side in pair]
        winner = {"triton": "Triton", "cuda": "CUDA C++", None: "within the spread"}[pair.winner]
        table.append(
            [", ".join(filter(None, (row["name"], row["dtype"], row["size"]))), *texts, f"{pair.ratio:.2f}x", winner]
        )
    return table if len(table) > 1 else []


def red(run: Run, dtype: str, features: int) -> bool:
    """Return whether a check of the gates of that dtype and width is red, for either backend."""
    sizes = [
        (check, check["size"].split())
        for check in run["checks"]
        if check["subject"] == "gates" and check["dtype"] == dtype
    ]
    return any(not check["passed"] and f"D={features}" in words for check, words in sizes)


def fastest_entries(run: Run) -> list[str]:
    """Return lines for the table FASTEST, of a run on a GPU.

    A line is a problem with a clear winner and green checks.
    """
    gpu, place = run["machine"].get("gpu"), run["machine"].get("name")
    lines = []
    for pair in pairs(run) if gpu and not run.get("rehearsal") else []:
        row, winner = pair.cuda, pair.winner
        if row["name"] != DECISIVE or winner is None:
            continue
        features = next(int(word.removeprefix("D=")) for word in row["size"].split() if word.startswith("D="))
        if not red(run, row["dtype"], features):
            times = " and ".join(
                f"{name} {side['values']['fused']['median']:.4g} ms"
                for name, side in zip(("triton", "cuda"), pair, strict=True)
            )
            key = f'("depth_lstm", "{gpu}", {features}, {TORCH_NAMES[row["dtype"]]})'
            lines += [f"    # benchmarks/results/{place}: {times}", f'    {key}: "{winner}",']
    return lines


def fastest_text(run: Run) -> str:
    """Return the text of ``fastest.txt``: lines for depthlstm_fast/backends/fastest.py, and the run they come from."""
    machine = run["machine"]
    commit = (machine.get("commit") or "an unknown commit")[:14] + (" with changes" if machine.get("dirty") else "")
    lines = ["# For FASTEST in depthlstm_fast/backends/fastest.py."]
    lines += [f"# {machine.get('gpu') or 'no GPU'}, {run['date']}, depthlstm_fast at {commit}."]
    if run.get("rehearsal"):
        return "\n".join(lines) + "\n# A rehearsal on the CPU measures nothing: there is no entry.\n"
    lines += ["# Gates forward + backward; left out: red checks, and times whose p10 to p90 overlap."]
    return "\n".join([*lines, *(fastest_entries(run) or ["# No entry."])]) + "\n"
