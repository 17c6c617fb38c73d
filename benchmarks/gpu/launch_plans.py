"""Launch plans of the Triton kernels, timed against each other.

The rules in kernels/depth_lstm.py are tuned from these times. A candidate replaces the rule of one kernel. Its results
are compared with the default's before it is timed. All candidates of a kernel and a width take turns, together with a
copy of the same bytes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..measure.timing import interleave, spread
from ..subjects import gates
from .bench import BF16, Bench

MODULE, LAUNCHER = "depthlstm_fast.kernels.depth_lstm", "depthlstm_fast.kernels.common.launch"
KINDS = ("forward", "narrow", "wide", "row sums")
FULL = (
    *(("forward", features) for features in (512, 1024, 2048)),
    *(("narrow", features) for features in (512, 1024, 2048)),
    *(("wide", features) for features in (1024, 2048, 4096)),
    ("row sums", 4096),
)
TINY = (("forward", 128), ("narrow", 128))
ROWS = {128: 3, 512: 65536, 1024: 65536, 2048: 32768, 4096: 16384}
WARPS = (1, 2, 4, 8, 16)
TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float32: 1e-4}  # share of the largest value: only the order of sums differs


@dataclass(frozen=True)
class Candidate:
    """A plan in place of one rule.

    Attributes:
        patches: the replaced names in kernels/depth_lstm.py, with their new values.
        resident: the number of resident warps that the persistent kernels assume; 0 if it plays no part.
    """

    kind: str
    features: int
    warps: int
    constants: dict[str, int]
    resident: int
    default: bool
    patches: dict[str, Any] = field(compare=False)


def power_of_two(number: int) -> int:
    return 1 << max(4, (number - 1).bit_length())


def _tiles(features: int, elements: Sequence[int], rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (warps, rows, block) of tiles with the given numbers of elements a thread."""
    block = power_of_two(features)
    found = {
        (block * count // (32 * each), count, block)
        for each in elements
        for count in rows
        if block * count % (32 * each) == 0
    }
    yield from sorted(tile for tile in found if tile[0] in WARPS)


def by_rule(rule: Callable[..., list[Any]], features: int) -> list[Any]:
    """Return the rule's plans for bf16, with gradients of the affine and without that of z_bias."""
    known = {"features": features, "sums": 2, "itemsize": BF16.itemsize}
    return rule(**{name: known[name] for name in inspect.signature(rule).parameters})


def candidates(module: Any, kind: str, features: int) -> list[Candidate]:
    """Return the default plan of one kernel first, then the others."""
    launch = module.Launch
    found: list[Candidate] = []

    def add(warps: int, constants: dict[str, int], resident: int, default: bool, patches: dict[str, Any]) -> None:
        one = Candidate(kind, features, warps, constants, resident, default, patches)
        if not any((other.warps, other.constants, other.resident) == (warps, constants, resident) for other in found):
            found.append(one)

    def patched(name: str, plan: Any, resident: int) -> dict[str, Any]:
        """Return the patches for one plan of a kernel, which also exclude the other schemes of backward."""
        patches: dict[str, Any] = {"WARPS": resident} if resident else {}
        if name == "WIDE_PLANS":
            return patches | {name: [plan], "narrow_plans": lambda *_: []}
        return patches | {name: (lambda *_: [plan])}

    if kind == "forward":
        default = by_rule(module.forward_plans, features)[0]
        add(default.warps, dict(default.constants), 0, True, {})
        for warps, rows, block in _tiles(features, (4, 8, 16, 32), (1, 2, 4)):
            constants = {**default.constants, "ROWS": rows, "BLOCK": block}
            add(warps, constants, 0, False, patched("forward_plans", launch(warps, constants), 0))
    elif kind == "narrow":
        default = by_rule(module.narrow_plans, features)[0]
        add(default.warps, dict(default.constants), module.WARPS, True, {})
        for (warps, rows, block), stages, resident in itertools.product(
            _tiles(features, (4, 8, 16), (1, 2)), (1, 2, 3), (8, 12, 16)
        ):
            constants = {**default.constants, "ROWS": rows, "BLOCK": block, "STAGES": stages}
            add(warps, constants, resident, False, patched("narrow_plans", launch(warps, constants), resident))
    elif kind == "wide":
        default = module.WIDE_PLANS[0]
        # a width that takes the narrow scheme by rule has no default for the wide one
        add(
            default.warps,
            dict(default.constants),
            module.WARPS,
            not by_rule(module.narrow_plans, features),
            {"narrow_plans": lambda *_: []},
        )
        for block, each, stages, resident in itertools.product((256, 512, 1024), (4, 8), (1, 2), (8, 12, 16)):
            constants = {**default.constants, "ROWS": 1, "BLOCK": block, "STAGES": stages}
            warps = block // (32 * each)
            add(warps, constants, resident, False, patched("WIDE_PLANS", launch(warps, constants), resident))
    else:
        default = module.ROW_SUMS_PLAN
        add(default.warps, dict(default.constants), 0, True, {"narrow_plans": lambda *_: []})
        for warps, block in itertools.product((2, 4, 8), (512, 1024, 2048)):
            constants = {**default.constants, "BLOCK": block}
            patches = {"ROW_SUMS_PLAN": launch(warps, constants), "narrow_plans": lambda *_: []}
            add(warps, constants, 0, False, patches)
    return found


class Patches:
    """Sets names of kernels/depth_lstm.py, and resets names that another candidate had changed."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.original: dict[str, Any] = {}

    def apply(self, patches: dict[str, Any]) -> None:
        for name in patches:
            self.original.setdefault(name, getattr(self.module, name))
        for name, value in {**self.original, **patches}.items():
            setattr(self.module, name, value)


class KernelCall:
    """One kernel at one width: the tensors, and the call that runs the kernel."""

    def __init__(self, kind: str, features: int, device: torch.device, rows: int | None = None) -> None:
        self.module = importlib.import_module(MODULE)
        self.kind, self.features, self.rows = kind, features, rows or ROWS[features]
        self.z, self.c, self.weight, self.bias = gates.make_inputs(self.rows, features, BF16, device)
        self.dh, self.dc = (torch.randn_like(self.c) for _ in range(2))
        self.elements = gates.FORWARD_ELEMENTS if kind == "forward" else gates.BACKWARD_ELEMENTS
        self.source = torch.randn(self.rows * features * self.elements // 2, device=device).to(BF16)

    def call(self) -> tuple[Tensor, ...]:
        z, c, weight, bias = self.z, self.c, self.weight, self.bias
        if self.kind == "forward":
            return self.module.gates_forward(z, None, None, c, weight, bias, None, 0, 0, 1e-6, 0.0)
        return self.module.gates_backward(
            self.dh, self.dc, z, None, None, c, weight, bias, None, 0, 0, 1e-6, 0.0, True, False
        )

    def call_with(self, patches: Patches, values: dict[str, Any]) -> tuple[Tensor, ...]:
        patches.apply(values)
        return self.call()

    def copy(self) -> Callable[[], object]:
        return gates.copy_once(self.source, self.source.numel())


def resources(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], dict[str, int | None]]:
    """Return the results of ``run``, and the most registers, spills and shared memory of the kernels it loads.

    A number is None if Triton does not report it.
    """
    compiled = getattr(importlib.import_module(LAUNCHER), "_compiled", None)
    known = dict(compiled) if isinstance(compiled, dict) else {}
    if isinstance(compiled, dict):
        compiled.clear()
    try:
        outputs = run()
    finally:
        new = list(compiled.values()) if isinstance(compiled, dict) else []
        if isinstance(compiled, dict):
            compiled.update(known)
    sources = {
        "registers": lambda kernel: getattr(kernel, "n_regs", None),
        "spills": lambda kernel: getattr(kernel, "n_spills", None),
        "shared": lambda kernel: getattr(getattr(kernel, "metadata", None), "shared", None),
    }
    found = {name: [value for kernel in new if (value := get(kernel)) is not None] for name, get in sources.items()}
    return outputs, {name: max(values) if values else None for name, values in found.items()}


def mismatch(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str | None:
    """Say how results differ from those of the default plan; None if they do not.

    Differences that the order of sums explains do not count.
    """
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if other.numel():
            error = float((one.double() - other.double()).abs().max())
            if not error <= TOLERANCE[other.dtype] * float(other.abs().max()):
                return f"check red: output {index} differs by {error:.2e}"
    return None


def explore(
    bench: Bench, kind: str, features: int, seconds: float = 2.0, most: int | None = None
) -> list[dict[str, Any]]:
    """Return one entry for each candidate: its plan, its time or the reason for none, its resources."""
    bench.reset()
    kernel = KernelCall(kind, features, bench.device)
    patches = Patches(kernel.module)
    entries: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], object]] = {}
    known: dict[str, dict[str, int | None]] = {}
    ones = candidates(kernel.module, kind, features)[:most]
    try:
        patches.apply(ones[0].patches)
        wanted = kernel.call()
        for index, one in enumerate(ones):
            entry: dict[str, Any] = {"kind": kind, "features": features, "rows": kernel.rows, "warps": one.warps}
            entry |= {
                "constants": one.constants,
                "resident": one.resident,
                "default": one.default,
                "failure": None,
                "ms": 0.0,
            }
            entries.append(entry)
            patches.apply(one.patches)
            try:
                name = f"{one.warps} {one.constants}"
                if name in known:  # the same kernels with another number of programs
                    found = kernel.call()
                else:
                    found, known[name] = resources(kernel.call)
                entry |= known[name]
                failure = mismatch(found, wanted)
            except Exception as error:  # noqa: BLE001  a plan that asks for too much is a result, too
                entry |= {"registers": None, "spills": None, "shared": None}
                failure = f"{type(error).__name__}: {str(error).strip()[:150]}"
            entry["failure"] = failure
            if failure is None:
                runs[str(index)] = functools.partial(kernel.call_with, patches, one.patches)
        if runs:
            runs["copy"] = kernel.copy()
            minimum = bench.settings.minimum
            samples = interleave(
                runs,
                seconds=seconds * bench.settings.seconds,
                minimum=minimum,
                maximum=100,
                stopwatch=bench.watch("work"),
            )
            floor = spread(samples["copy"], 1e3).median
            for index, entry in enumerate(entries):
                if str(index) in samples:
                    found_times = spread(samples[str(index)], 1e3)
                    entry |= {
                        "ms": found_times.median,
                        "p10": found_times.p10,
                        "p90": found_times.p90,
                        "share": floor / found_times.median,
                    }
    finally:
        patches.apply({})
    return entries


def compile_share(index: int, count: int, device: torch.device) -> None:
    """Compile every ``count``-th candidate, from ``index`` on, into Triton's cache on disk.

    A plan that does not compile is skipped.
    """
    module = importlib.import_module(MODULE)
    patches = Patches(module)
    number = 0
    for kind, features in FULL:
        kernel, seen = None, set()
        for one in candidates(module, kind, features):
            name = f"{one.warps} {one.constants}"
            if name in seen:
                continue
            seen.add(name)
            number += 1
            if number % count != index:
                continue
            kernel = kernel or KernelCall(kind, features, device, rows=64)
            patches.apply(one.patches)
            try:
                kernel.call()
            except Exception as error:  # noqa: BLE001
                print(f"{one}: {type(error).__name__}")
            finally:
                patches.apply({})
