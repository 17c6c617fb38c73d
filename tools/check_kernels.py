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
import importlib.util
import itertools
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
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("triton") is None:
    sys.exit("check_kernels.py: Triton is not installed (pip install triton)")

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from depthlstm_fast.checks import ACTIVATIONS, NORMS  # noqa: E402
from depthlstm_fast.kernels import depth_lstm as gates  # noqa: E402
from depthlstm_fast.kernels.common import launch, tune  # noqa: E402

BUDGET = ROOT / "tools" / "kernel_budget.json"
PAGE = ROOT / "docs" / "triton_budget.md"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = (256, 512, 768, 1024, 2048, 4096, 8192)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# z, z_bias, c and the affine; h and the incoming gradients have the types of z and c
TYPES = {
    "bf16": (BF16, BF16, BF16, FP32),
    "fp16": (FP16, FP16, FP16, FP32),
    "fp32": (FP32, FP32, FP32, FP32),
    "autocast": (BF16, FP32, FP32, FP32),
    "all bf16": (BF16, BF16, BF16, BF16),
}
Figures = dict[str, Any]  # registers, stack, spills, shared, loads and stores by width in bits, instructions, warps
Budget = dict[str, Figures]


class Case(NamedTuple):
    """One forward and backward call of the gates."""

    target: str
    features: int
    types: str
    options: tuple[str, ...] = ()  # norm, activation, and the words that `record` knows
    quick: bool = False

    @property
    def label(self) -> str:
        return " ".join((self.types, *self.options))


class Compilation(NamedTuple):
    """The arguments of launch.compile_kernel, with the compilation's name in the budget."""

    name: str
    quick: bool
    target: str
    kernel: str
    types: tuple[str | None, ...]
    constants: tuple[tuple[str, launch.Constant], ...]
    warps: int
    aligned: bool


def cases() -> Iterator[Case]:
    """Yield every checked call; of calls with the same kernel the first gives the name."""
    for features in SIZES:
        yield Case("sm_90", features, "bf16", quick=True)
        yield Case("sm_90", features, "bf16", ("z_bias",), quick=features == 512)
    for types, features in itertools.product(("fp32", "fp16", "autocast"), SIZES):
        yield Case("sm_90", features, types, quick=types != "fp16" and features == 512)
    for types in ("autocast", "all bf16"):
        yield Case("sm_90", 512, types, ("z_bias",))
    words = (*NORMS[1:], *ACTIVATIONS[1:], "hidden", "dropout", "frozen affine", "no affine", "no dh", "no dc")
    for options in (*((word,) for word in words), ("joint", "hidden"), ("hidden", "dropout"), ("none", "hidden")):
        yield Case("sm_90", 512, "bf16", options)
    for features, types in ((2048, "bf16"), (4096, "bf16"), (2048, "fp32"), (2048, "autocast")):
        for word in ("joint", "none", "hidden", "dropout"):
            yield Case("sm_90", features, types, (word,), quick=word == "dropout" and features == 4096)
    # tiles of several rows, masked columns, and rows that are not aligned
    odd = {
        1: ("fp32",),
        33: ("bf16", "fp16"),
        64: ("bf16", "fp32"),
        128: ("bf16",),
        1000: ("fp32", "bf16"),
        1023: ("bf16",),
    }
    odd |= {1600: ("autocast",), 2047: ("bf16", "fp32"), 3000: ("bf16",), 4099: ("fp32",), 5120: ("bf16",)}
    for features, names in odd.items():
        for types in names:
            yield Case("sm_90", features, types, quick=(features, types) == (1000, "bf16"))
    for target, features in itertools.product(("sm_80", "sm_100", "gfx942"), SIZES):
        yield Case(target, features, "bf16", quick=target != "sm_100" and features == 1024)
        yield Case(target, features, "bf16", ("z_bias",))


def record(case: Case) -> Iterator[Compilation]:
    """Yield the kernels that a call launches.

    The launcher runs on small CPU tensors up to the launch itself.
    """
    z_type, z_bias_type, c_type, affine_type = TYPES[case.types]
    gate_count = 3 if "hidden" in case.options else 4
    width = gate_count * case.features

    def tensor(*shape: int, dtype: torch.dtype = z_type, wanted: bool = True) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype) if wanted else None

    affine = "none" not in case.options and "no affine" not in case.options
    weight, bias = (tensor(gate_count, case.features, dtype=affine_type, wanted=affine) for _ in range(2))
    z, c = tensor(2, width), tensor(2, case.features, dtype=c_type)
    z_bias = tensor(width, dtype=z_bias_type, wanted="z_bias" in case.options)
    hidden = tensor(2, case.features, wanted="hidden" in case.options)
    seed = tensor(1, dtype=torch.int64, wanted="dropout" in case.options)
    norm = max(code for code, name in enumerate(NORMS) if code == 0 or name in case.options)
    activation = max(code for code, name in enumerate(ACTIVATIONS) if code == 0 or name in case.options)
    inputs = (z, z_bias, hidden, c, weight, bias, seed, norm, activation, 1e-6, 0.1)
    dh = tensor(2, case.features, wanted="no dh" not in case.options)
    dc = tensor(2, case.features, dtype=c_type, wanted="no dc" not in case.options)

    launches: list[tuple[Any, ...]] = []
    with (
        mock.patch.object(gates, "launch", lambda *arguments: launches.append(arguments)),
        mock.patch.object(tune, "ENABLED", False),
    ):
        gates.gates_forward(*inputs)  # type: ignore[arg-type]
        gates.gates_backward(dh, dc, *inputs, "frozen affine" not in case.options, z_bias is not None)  # type: ignore[arg-type]
    for kernel, _, arguments, constants, plan, aligned in launches:
        short = kernel.__name__.removesuffix("_kernel")
        size = f" D={case.features}" if "FEATURES" in constants else ""
        types = tuple(launch.type_of(argument) for argument in arguments)
        yield Compilation(
            f"{case.target} {short}{size} {case.label}", case.quick,
            case.target, kernel.__name__, types, tuple({**constants, **plan.constants}.items()), plan.warps, aligned,
        )  # fmt: skip


def compilations() -> list[Compilation]:
    """Return the compilations of all cases, each different kernel once."""
    different: dict[tuple[Any, ...], Compilation] = {}
    for compilation in itertools.chain.from_iterable(map(record, cases())):
        different.setdefault(compilation[2:], compilation)
    names = collections.Counter(compilation.name for compilation in different.values())
    assert names.total() == len(names), f"two kernels of one name: {names.most_common(1)}"
    return list(different.values())


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
        getattr(gates, asked.kernel),
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
