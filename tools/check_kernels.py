"""Compile every Triton kernel as the launcher would, without a GPU, and check it against tools/kernel_budget.json.

    python tools/check_kernels.py            all cases for sm_80, sm_90, sm_100, gfx942: 5 minutes of CPU time
    python tools/check_kernels.py --quick    the most important cases, nearly all on sm_90: half a minute
    python tools/check_kernels.py --update   rewrites the budget of this Triton, and docs/triton_budget.md

Each fault is printed on its own line, and the exit status is then 1. A fault is any spill, more registers or shared
memory than the budget, or narrower loads and stores. Every version of Triton brings its own assembler, so each has its
own budget. A version without a budget is checked for spills only. Plans are those by rule, not by timing.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
if importlib.util.find_spec("triton") is None:
    sys.exit("check_kernels.py: Triton is not installed (pip install triton)")

import triton  # noqa: E402
from kernel_cases import SIZES, Compilation, compilations  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from depthlstm_fast.kernels.common import launch  # noqa: E402

BUDGET = ROOT / "tools" / "kernel_budget.json"
PAGE = ROOT / "docs" / "triton_budget.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
Figures = dict[str, Any]  # registers, stack, spills, shared, loads and stores by width in bits, instructions, warps
Budget = dict[str, Figures]


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [getattr(triton.knobs.nvidia, name).path, *arguments], check=True, capture_output=True, text=True
    ).stdout


def _width(modifiers: list[str]) -> str:
    """Return the bits a thread moves with an instruction such as LDG.E.128.

    No number means 32; U16 and the signed forms name theirs.
    """
    return next((word.lstrip("US") for word in modifiers if re.fullmatch(r"[US]?(8|16|64|128|256)", word)), "32")


def nvidia_figures(cubin: bytes) -> Figures:
    """Return the figures of a kernel from cuobjdump and nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", file.name))
        listing = _tool("nvdisasm", "-c", file.name)
    assert usage is not None
    loads, stores = collections.Counter[str](), collections.Counter[str]()
    spills = instructions = 0
    for text in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.M):
        operation, *modifiers = text.split(".")
        instructions += operation != "NOP"
        spills += operation in ("LDL", "STL")
        if operation in ("LDG", "LDGSTS"):
            loads[_width(modifiers)] += 1
        elif operation == "STG":
            stores[_width(modifiers)] += 1
    by_width = ({width: counts[width] for width in sorted(counts, key=int, reverse=True)} for counts in (loads, stores))
    figures = dict(zip(("loads", "stores"), by_width, strict=True))
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "spills": spills,
        **figures,
        "instructions": instructions,
    }


def amd_figures(assembly: str) -> Figures:
    """Return the figures from the metadata of AMD's assembly, without the widths."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loads": {},
        "stores": {},
        "instructions": len(re.findall(r"^\t(?:s|v|ds|global|buffer|flat|scratch)_\w+", assembly, re.M)),
    }


def measure(asked: Compilation) -> Figures:
    """Compile one kernel, and read its figures."""
    compiled = launch.compile_kernel(
        getattr(importlib.import_module(asked.module), asked.kernel),
        asked.types,
        dict(asked.constants),
        asked.warps,
        asked.aligned,
        target=TARGETS[asked.target],
    )
    found = nvidia_figures(compiled.asm["cubin"]) if "cubin" in compiled.asm else amd_figures(compiled.asm["amdgcn"])
    return {"warps": asked.warps, "shared": compiled.metadata.shared, **found}


def widest(counts: dict[str, int]) -> int:
    return max(map(int, counts), default=0)


def faults(found: Figures, budget: Figures | None) -> list[str]:
    """List a kernel's errors and figures worse than its budget; without a budget only spills count."""
    lines = []
    if found["stack"] or found["spills"]:
        lines.append(f"spills: {found['spills']} instructions, {found['stack']} bytes a thread")
    if budget is None:
        return lines
    for name, unit in (("registers", "registers a thread"), ("shared", "bytes of shared memory")):
        if found[name] > budget[name]:
            lines.append(f"{found[name]} {unit}, its budget is {budget[name]}")
    for name in ("loads", "stores"):
        width = widest(budget[name])
        if widest(found[name]) < width:
            lines.append(f"the widest of its {name} has {widest(found[name])} bits, its budget is {width}")
            continue
        # fewer wide ones alone may be an improvement: a load is gone
        wide, wanted = found[name].get(str(width), 0), budget[name].get(str(width), 0)
        if wide < wanted and sum(found[name].values()) - wide > sum(budget[name].values()) - wanted:
            lines.append(f"{wide} {name} of {width} bits and more narrow ones, its budget is {wanted}")
    return lines


def all_faults(found: Budget, budget: Budget | None, names: set[str]) -> list[str]:
    """List the faults of all kernels, and mismatches between the budget and the cases' ``names``."""
    lines = [f"{name}: {fault}" for name in found for fault in faults(found[name], budget and budget.get(name))]
    if budget is not None:
        lines += [f"{name}: not in the budget (--update)" for name in found if name not in budget]
        lines += [f"{name}: in the budget, but no case needs it (--update)" for name in budget if name not in names]
    return lines if found else ["no case was checked"]


def widths(counts: dict[str, int]) -> str:
    """Format "9x128 1x64"; "-" if nothing was counted."""
    return " ".join(f"{count}x{width}" for width, count in counts.items()) or "-"


HEADINGS = ("kernel", "warps", "registers", "stack", "spills", "shared", "loads", "stores", "instructions")
FORMAT = "{:<52}{:>6}{:>10}{:>6}{:>7}{:>7}  {:<22}{:<22}{:>12}"


def cells(name: str, figures: Figures) -> tuple[str, ...]:
    numbers = [str(figures[heading]) for heading in HEADINGS[1:6]]
    return name, *numbers, widths(figures["loads"]), widths(figures["stores"]), str(figures["instructions"])


def version() -> str:
    """Return Triton's minor version, such as "3.6"."""
    return ".".join(triton.__version__.split(".")[:2])


def assemblers() -> str:
    return f"ptxas {triton.knobs.nvidia.ptxas.version}, for sm_100 {triton.knobs.nvidia.ptxas_blackwell.version}"


PAGE_HEAD = """# What the Triton kernels compile to

Written by `python tools/check_kernels.py --update`, which compiles every kernel as the launcher would run it and needs no GPU: figures
of compiled code, not timings. `python tools/check_kernels.py` holds the kernels to them (`tools/kernel_budget.json`).

Registers are those of a thread; stack (bytes) and spills (instructions) are 0, or the check fails; shared memory is bytes a program;
loads and stores are those of global memory in the code, as number x bits a thread. On gfx942 registers are VGPRs, and widths are not read.
"""  # noqa: E501
SUMMARY = (
    "All cases by target and kernel: their largest figure, and the narrowest of their widest loads and stores in bits:"
)


def markdown(budgets: dict[str, Any]) -> str:
    """Return docs/triton_budget.md."""
    versions = sorted(budgets, key=lambda text: [int(part) for part in text.split(".")])
    lines = PAGE_HEAD.splitlines()
    for name in versions:
        table: Budget = budgets[name]["kernels"]
        main = [
            key for key in table if re.fullmatch(rf"sm_90 \w+( D=({'|'.join(map(str, SIZES))}))? bf16( z_bias)?", key)
        ]
        lines += ["", f"## Triton {name}", "", f"Triton {budgets[name]['triton']} with {budgets[name]['assemblers']}."]
        lines += [
            "",
            "sm_90, z and c in bf16, an fp32 affine; with z_bias, which the cell's bias is, also its gradient:",
            "",
        ]
        lines += ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
        lines += ["| " + " | ".join(cells(key.removeprefix("sm_90 "), table[key])) + " |" for key in main]
        lines += ["", SUMMARY, ""]
        lines += [
            "| target | kernel | cases | D | registers | stack | spills | shared | loads | stores |",
            "|---|---|" + "---:|" * 8,
        ]
        groups: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        for key in table:
            target, kernel = key.split()[:2]
            groups[target, kernel].append(key)
        for (target, kernel), keys in groups.items():
            sizes = [int(size) for key in keys for size in re.findall(r" D=(\d+)", key)]
            span = f"{min(sizes)} to {max(sizes)}" if sizes else "any"
            most = [
                str(max(table[key][figure] for key in keys)) for figure in ("registers", "stack", "spills", "shared")
            ]
            least = [str(min(widest(table[key][figure]) for key in keys) or "-") for figure in ("loads", "stores")]
            lines.append("| " + " | ".join((target, kernel, str(len(keys)), span, *most, *least)) + " |")
    return "\n".join(lines) + "\n"


def dump(budgets: dict[str, Any]) -> str:
    """Return the budget as JSON with one line a kernel, so that a diff is easy to read."""
    parts = []
    for name, budget in sorted(budgets.items()):
        head = "".join(f"  {json.dumps(key)}: {json.dumps(budget[key])},\n" for key in ("triton", "assemblers"))
        rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(figures)}" for key, figures in budget["kernels"].items())
        parts.append(f' {json.dumps(name)}: {{\n{head}  "kernels": {{\n{rows}\n  }}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def measure_all(wanted: Iterable[Compilation], jobs: int) -> Iterator[tuple[str, Figures]]:
    """Yield (name, figures) of each compilation, in the given order."""
    wanted = list(wanted)
    with multiprocessing.get_context("fork").Pool(max(1, min(jobs, len(wanted)))) as pool:
        yield from zip((asked.name for asked in wanted), pool.imap(measure, wanted), strict=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels without a GPU and hold them to their budget."
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches, such as 'sm_90 forward D=512 bf16$'")
    parser.add_argument("--update", action="store_true", help="rewrite this Triton's budget and docs/triton_budget.md")
    parser.add_argument("--budget", type=Path, default=BUDGET, help="another file to hold the kernels to")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    if options.update and (options.quick or options.only or options.budget != BUDGET):
        parser.error("--update takes all cases, and writes the committed budget")
    started = time.perf_counter()
    budgets = json.loads(options.budget.read_text(encoding="utf-8")) if options.budget.exists() else {}
    known = budgets.get(version()) if not options.update else None
    everything = compilations()
    wanted = [
        asked
        for asked in everything
        if (asked.quick or not options.quick) and re.search(options.only or "", asked.name)
    ]
    print(FORMAT.format(*HEADINGS))
    found: Budget = {}
    for name, figures in measure_all(wanted, options.jobs):
        found[name] = figures
        print(FORMAT.format(*cells(name, figures)), flush=True)
    wrong = all_faults(found, known and known["kernels"], {asked.name for asked in everything})
    if options.update:
        budgets[version()] = {"triton": triton.__version__, "assemblers": assemblers(), "kernels": found}
        BUDGET.write_text(dump(budgets), encoding="utf-8")
        PAGE.write_text(markdown(budgets), encoding="utf-8")
    elif known is None:
        print(f"Triton {version()} has no budget in {options.budget.name}: spills alone were looked for")
    elif known["assemblers"] != assemblers():
        print(f"the budget was made with {known['assemblers']}")
    for line in wrong:
        print(f"FAULT {line}")
    seconds = time.perf_counter() - started
    print(f"{len(found)} kernels, {len(wrong)} faults, Triton {triton.__version__}, {assemblers()}, {seconds:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
