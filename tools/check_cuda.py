"""Read the CUDA C++ kernels from the built library, without a GPU, and check them against tools/cuda_budget.json.

    python tools/check_cuda.py             every kernel and architecture in depthlstm_fast/_C.abi3.so
    python tools/check_cuda.py --update    rewrites the budget of this nvcc, and docs/cuda_budget.md

Each fault is printed on its own line, and the exit status is then 1. A fault is any spill or stack, more registers or
shared memory than the budget, or fewer 128-bit loads and stores and more narrow ones. Each minor version of nvcc has
its own assembler. A version without a budget is checked for spills only. cuobjdump comes with the CUDA toolkit or, if
that lacks it, with Triton's wheel. It must not be older than nvcc.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "depthlstm_fast" / "_C.abi3.so"
BUDGET = ROOT / "tools" / "cuda_budget.json"
PAGE = ROOT / "docs" / "cuda_budget.md"
Figures = dict[str, Any]  # registers, stack, spills, shared, loads and stores by width in bits, instructions
Budget = dict[str, Figures]  # by names such as "sm_90 forward_warp z=bfloat16 c=float gates=4 vectors=2"

# the template parameters of each kernel after the type of c, by name
PARAMETERS = {
    "forward_warp": ("gates", "vectors"),
    "forward_block": ("gates", "vectors"),
    "forward_any": ("gates",),
    "narrow_backward": ("gates", "z_bias_gradient"),
    "row_statistics": ("gates",),
    "wide_backward": ("gates",),
}
TYPES = {"__nv_bfloat16": "bfloat16", "__half": "float16", "float": "float"}


class ToolError(Exception):
    """The binary cannot be read here; the text says why."""


def cuobjdump() -> str:
    """Return the disassembler: the toolkit's, else the one in Triton's wheel."""
    places = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    for place in places:
        if place is not None and Path(place).is_file():
            return place
    raise ToolError("cuobjdump is not installed (it comes with the CUDA toolkit, and in Triton's wheel)")


def build_info(library: Path) -> dict[str, str]:
    """Return the library's build stamp as a dict."""
    found = re.search(rb"depthlstm_fast build: ([^\0]+)", library.read_bytes())  # loading the library would need torch
    text = found[1].decode() if found else ""
    return dict(part.split("=", 1) for part in text.split(";") if "=" in part)


def nvcc_version(library: Path) -> str:
    """Return the minor version of the nvcc that built the library, such as "13.0"."""
    return ".".join(re.findall(r"\d+", build_info(library).get("nvcc", ""))[:2]) or "unknown"


def run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode or "not supported yet" in done.stderr:
        raise ToolError(f"{Path(command[0]).name} cannot read it: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


def name_of(demangled: str) -> str:
    """Return 'forward_warp z=bfloat16 c=float gates=4 vectors=2' for a demangled kernel."""
    found = re.search(r"(?:z_(\w+)::)?\(anonymous namespace\)::(\w+)(?:<(.*)>)?\(", demangled)
    if found is None:
        raise ToolError(f"unknown kernel {demangled}")
    z, kernel, arguments = found.groups()
    if arguments is None:
        return kernel
    c, *rest = (re.sub(r"^\(\w+\)", "", argument.strip()) for argument in arguments.split(","))
    options = [f"{name}={value}" for name, value in zip(PARAMETERS[kernel], rest, strict=True)]
    return " ".join([kernel, f"z={z}", f"c={TYPES[c]}", *options])


def instructions_of(sass: str) -> Figures:
    """Count spills, widths and instructions of one kernel."""
    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    spills = count = 0
    for line in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.M):
        opcode = re.sub(r"^@!?\w+\s+", "", line).split()[0]
        count += opcode != "NOP"
        parts = opcode.split(".")
        spills += parts[0] in ("LDL", "STL")
        if parts[0] in ("LDG", "STG"):
            width = next((int(part) for part in parts if part in ("64", "128", "256")), 32)
            width = next((int(part[1:]) for part in parts if part in ("U8", "S8", "U16", "S16")), width)
            (loads if parts[0] == "LDG" else stores)[width] += 1

    def by_width(counts: collections.Counter[int]) -> dict[str, int]:
        return {str(width): counts[width] for width in sorted(counts, reverse=True)}

    return {"spills": spills, "loads": by_width(loads), "stores": by_width(stores), "instructions": count}


def measure(library: Path) -> Budget:
    """Return the figures of every kernel in the library."""
    tool = cuobjdump()
    usage, sass = run([tool, "-res-usage", str(library)]), run([tool, "-sass", str(library)])
    resources: dict[tuple[str, str], Figures] = {}
    architecture = ""
    for line in usage.splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
        if found := re.match(r"\s*Function (\w+):", line):
            function = found[1]
        if found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            numbers = [int(number) for number in found.groups()]
            resources[architecture, function] = dict(zip(("registers", "stack", "shared"), numbers, strict=True))
    bodies: dict[tuple[str, str], str] = {}
    for section in re.split(r"^\s*code for (?=sm_)", sass, flags=re.M)[1:]:
        architecture = section.split()[0]
        for body in re.split(r"^\s*Function : ", section, flags=re.M)[1:]:
            bodies[architecture, body.split()[0]] = body
    if not resources or set(resources) != set(bodies):
        raise ToolError(f"{library.name} holds no CUDA kernels that cuobjdump can read")
    names = run(["c++filt"], "\n".join(function for _, function in resources)).splitlines()
    found_budget = {
        f"{key[0]} {name_of(name)}": {**figures, **instructions_of(bodies[key])}
        for (key, figures), name in zip(resources.items(), names, strict=True)
    }
    return dict(sorted(found_budget.items()))


def faults(found: Figures, budget: Figures | None) -> list[str]:
    """List a kernel's errors and figures worse than its budget; without a budget only spills count."""
    lines = []
    if found["stack"] or found["spills"]:
        lines.append(f"spills: {found['spills']} instructions, {found['stack']} bytes of stack a thread")
    if budget is None:
        return lines
    for name, unit in (("registers", "registers a thread"), ("shared", "bytes of shared memory")):
        if found[name] > budget[name]:
            lines.append(f"{found[name]} {unit}, its budget is {budget[name]}")
    for name in ("loads", "stores"):
        wide, wanted = found[name].get("128", 0), budget[name].get("128", 0)
        narrow, allowed = sum(found[name].values()) - wide, sum(budget[name].values()) - wanted
        if wide < wanted and narrow > allowed:
            lines.append(f"{wide} {name} of 128 bits and {narrow} narrow ones, its budget is {wanted} and {allowed}")
    return lines


def all_faults(found: Budget, budget: Budget | None) -> list[str]:
    """List the faults of all kernels, and kernels that only the library or only the budget has."""
    lines = [f"{name}: {fault}" for name in found for fault in faults(found[name], budget and budget.get(name))]
    if budget is not None:
        architectures = {name.split()[0] for name in found}
        lines += [f"{name}: not in the budget (--update)" for name in found if name not in budget]
        missing = [name for name in budget if name not in found and name.split()[0] in architectures]
        lines += [f"{name}: in the budget, but not in the library (--update)" for name in missing]
    return lines if found else ["no kernel was checked"]


HEADINGS = ("kernel", "registers", "stack", "spills", "shared", "loads", "stores", "instructions")


def cells(name: str, figures: Figures) -> list[str]:
    def widths(counts: dict[str, int]) -> str:
        return " ".join(f"{count}x{width}" for width, count in counts.items()) or "-"

    numbers = [str(figures[heading]) for heading in HEADINGS[1:5]]
    return [name, *numbers, widths(figures["loads"]), widths(figures["stores"]), str(figures["instructions"])]


PAGE_HEAD = """# What the CUDA C++ kernels compile to

Written by `python tools/check_cuda.py --update`, which reads the built library and needs no GPU: figures of compiled code, not timings.
`python tools/check_cuda.py` holds the library to them (`tools/cuda_budget.json`).

Registers are those of a thread; stack (bytes) and spills (instructions) are 0, or the check fails; shared memory is bytes a block; loads
and stores are those of global memory in the code, as number x bits a thread. `c` is the type of the cell state, `gates` 4 or, with
`hidden`, 3, `vectors` how many 16-byte vectors of each gate a thread holds. Where a parameter may be fp32 or 16-bit the code has both
loads, one of which runs.
"""  # noqa: E501


def markdown(budgets: dict[str, Any]) -> str:
    """Return docs/cuda_budget.md: a table for each architecture, of z in bfloat16, and the worst of all."""
    lines = PAGE_HEAD.splitlines()
    for version, budget in sorted(budgets.items()):
        table: Budget = budget["kernels"]
        lines += ["", f"## nvcc {version}"]
        for architecture in sorted({name.split()[0] for name in table}, key=lambda text: int(re.sub(r"\D", "", text))):
            mine = {
                name.split(" ", 1)[1]: figures for name, figures in table.items() if name.startswith(architecture + " ")
            }
            most = {
                key: max(figures[key] for figures in mine.values())
                for key in ("registers", "stack", "spills", "shared")
            }
            lines += [
                "",
                f"{architecture}: {len(mine)} kernels, at most {most['registers']} "
                f"registers, {most['stack']} bytes of stack,",
            ]
            lines += [f"{most['spills']} spills, {most['shared']} bytes of shared memory."]
            if architecture == "sm_90":
                lines += [
                    "With z in bfloat16:",
                    "",
                    "| " + " | ".join(HEADINGS) + " |",
                    "|---|" + "---:|" * (len(HEADINGS) - 1),
                ]
                main = [name for name in mine if "z=bfloat16" in name or "z=" not in name]
                lines += ["| " + " | ".join(cells(name.replace(" z=bfloat16", ""), mine[name])) + " |" for name in main]
    return "\n".join(lines) + "\n"


def dump(budgets: dict[str, Any]) -> str:
    """Return the budget as JSON with one line a kernel, so that a diff is easy to read."""
    parts = []
    for version, budget in sorted(budgets.items()):
        rows = ",\n".join(
            f"   {json.dumps(name)}: {json.dumps(figures)}" for name, figures in budget["kernels"].items()
        )
        parts.append(f' {json.dumps(version)}: {{\n  "kernels": {{\n{rows}\n  }}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Hold the CUDA C++ kernels of the built library to their budget.")
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY, help="the library to read")
    parser.add_argument("--update", action="store_true", help="rewrite this nvcc's budget and docs/cuda_budget.md")
    parser.add_argument("--budget", type=Path, default=BUDGET, help="another file to hold the kernels to")
    options = parser.parse_args(arguments)
    if options.update and options.budget != BUDGET:
        parser.error("--update writes the committed budget")
    if not options.library.is_file():
        parser.error(f"there is no {options.library}: build it first (make build)")
    try:
        version = nvcc_version(options.library)
        found = measure(options.library)
    except (ToolError, OSError) as error:
        print(f"check_cuda.py: {error}", file=sys.stderr)
        return 2
    budgets = json.loads(options.budget.read_text(encoding="utf-8")) if options.budget.exists() else {}
    known = budgets.get(version) if not options.update else None
    wrong = all_faults(found, known and known["kernels"])
    if options.update:
        budgets[version] = {"kernels": found}
        BUDGET.write_text(dump(budgets), encoding="utf-8")
        PAGE.write_text(markdown(budgets), encoding="utf-8")
    elif known is None:
        print(f"nvcc {version} has no budget in {options.budget.name}: spills alone were looked for")
    for line in wrong:
        print(f"FAULT {line}")
    print(f"{len(found)} kernels, {len(wrong)} faults, nvcc {version}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
