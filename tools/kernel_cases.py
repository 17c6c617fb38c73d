"""The calls whose Triton kernels tools/check_kernels.py compiles: of the depth-wise LSTM's gates, and of the newer ops.

The launcher runs on small CPU tensors up to the launch itself, which is written down.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from depthlstm_fast.checks import ACTIVATIONS, NORMS
from depthlstm_fast.kernels import depth_lstm as gates
from depthlstm_fast.kernels.common import launch, tune

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
    module: str  # of the kernel
    kernel: str
    types: tuple[Any, ...]
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

    with recorded(gates) as launches:
        gates.gates_forward(*inputs)  # type: ignore[arg-type]
        gates.gates_backward(dh, dc, *inputs, "frozen affine" not in case.options, z_bias is not None)  # type: ignore[arg-type]
    yield from as_compilations(launches, case.target, "", "D", case.label, case.quick)


@contextlib.contextmanager
def recorded(module: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Give the arguments of every launch of an op's module, of which none is made."""
    launches: list[tuple[Any, ...]] = []
    with (
        mock.patch.object(module, "launch", lambda *arguments: launches.append(arguments)),
        mock.patch.object(tune, "ENABLED", False),
    ):
        yield launches


def as_compilations(
    launches: list[tuple[Any, ...]], target: str, op: str, letter: str, label: str, quick: bool
) -> Iterator[Compilation]:
    """Yield the compilations behind launches; ``letter`` is that of the number of features."""
    for kernel, _, arguments, constants, plan, aligned in launches:
        short = op + kernel.__name__.removesuffix("_kernel")
        size = f" {letter}={constants['FEATURES']}" if "FEATURES" in constants else ""
        types = tuple(launch.type_of(argument) for argument in arguments)
        yield Compilation(
            f"{target} {short}{size} {label}", quick, target, kernel.fn.__module__, kernel.__name__, types,
            tuple({**constants, **plan.constants}.items()), plan.warps, aligned,
        )  # fmt: skip


class Call(NamedTuple):
    """One forward and backward call of a newer op; ``make`` runs both on CPU tensors of 2 rows."""

    target: str
    op: str
    features: int
    types: str
    label: str
    make: Callable[[Any, int, torch.dtype, torch.dtype], None]
    quick: bool = False


CALL_TYPES = {"bf16": (BF16, BF16), "fp32": (FP32, FP32), "autocast": (BF16, FP32)}  # of branches, of streams


def norm_step_call(norms: str, scale: str = "", a: float = 1.0) -> Callable[..., None]:
    """Make a call with the norms of these numbers; ``scale`` is a learned b, "one" or "features"."""

    def make(module: Any, features: int, y_type: torch.dtype, x_type: torch.dtype) -> None:
        x, y = torch.empty(2, features, dtype=x_type), torch.empty(2, features, dtype=y_type)
        affine = [torch.empty(features) if number in norms else None for number in "112233"]
        b = None if not scale else torch.empty(() if scale == "one" else (features,))
        numbers = (a, 1.0, 0, 1e-6)
        module.norm_step_forward(x, y, b, *affine, *numbers)
        first = "1" in norms
        kept = (x if first else None, y if first or "3" in norms or scale else None, None if first else x)
        module.norm_step_backward(x, y if "2" in norms else None, *kept, b, *affine, *numbers, True)

    return make


def siamese_call(normed: bool = True, norm: int = 0) -> Callable[..., None]:
    def make(module: Any, features: int, o_type: torch.dtype, type_: torch.dtype) -> None:
        x, o, one = torch.empty(2, features, dtype=type_), torch.empty(2, features, dtype=o_type), torch.empty(features)
        bias = None if norm else one
        affine = (one, bias, one, bias, *((one, bias) if normed else (None, None)))
        module.siamese_step_forward(x, x, o, *affine, 2.0, norm, 1e-6)
        module.siamese_step_backward(x, x, o, x, x, o, *affine, 2.0, norm, 1e-6, True)

    return make


def gru_call(normed: bool = True) -> Callable[..., None]:
    def make(module: Any, features: int, z_type: torch.dtype, h_type: torch.dtype) -> None:
        z, h = torch.empty(2, 4 * features, dtype=z_type), torch.empty(2, features, dtype=h_type)
        affine = (torch.empty(4, features), torch.empty(4, features)) if normed else (None, None)
        module.depth_gru_gates_forward(z, h, *affine, 1e-6)
        module.depth_gru_gates_backward(h, z, h, *affine, 1e-6, True)

    return make


def mix_call(sources: int, outputs: int) -> Callable[..., None]:
    def make(module: Any, features: int, type_: torch.dtype, _: torch.dtype) -> None:
        x = [torch.empty(2, features, dtype=type_) for _ in range(sources)]
        weights = torch.empty(outputs, sources)
        module.layer_mix_forward(x, weights)
        module.layer_mix_backward([x[0]] * outputs, x, weights, True, True)

    return make


def attend_call(sources: int, normed: bool = True, backward: bool = True) -> Callable[..., None]:
    def make(module: Any, features: int, type_: torch.dtype, _: torch.dtype) -> None:
        x, one = [torch.empty(2, features, dtype=type_) for _ in range(sources)], torch.empty(features)
        parameters = (one, one, *((one, one) if normed else (None, None)))
        module.layer_attend_forward(x, *parameters, 0, 1e-6)
        if backward:
            module.layer_attend_backward(x[0], x, *parameters, 0, 1e-6, True, True, True)

    return make


def calls() -> Iterator[Call]:
    """Yield every checked call of the newer ops: the usual one in each size, then the others.

    What is left out spills, as docs/kernels.md says: siamese_step's backward pass from C = 4096 on, norm_step's at
    8192, layer_attend's of 12 sources from 1024 on and outside sm_90, and the GRU's forward pass in fp32 at 8192.
    """
    sizes_of = (512, 1024, 2048, 4096, 8192)
    usual = [
        ("norm_step", "pre-norm", norm_step_call("2"), sizes_of[:4]),
        ("siamese_step", "usual", siamese_call(), sizes_of[:3]),
        ("depth_gru_gates", "normed", gru_call(), sizes_of),
    ]
    for op, label, make, sizes in usual:
        for features in sizes:
            yield Call("sm_90", op, features, "bf16", label, make, quick=features == 512)
        for types in ("fp32", "autocast"):
            yield Call("sm_90", op, 512, types, label, make)
        for target in ("sm_80", "sm_100", "gfx942"):
            yield Call(target, op, 1024, "bf16", label, make)
    yield Call("sm_90", "layer_attend", 512, "bf16", "12 sources", attend_call(12))
    for features in (1024, 2048, 4096, 8192):
        yield Call("sm_90", "layer_attend", features, "bf16", "12 sources", attend_call(12, backward=False))
    placements = {
        "post-norm": norm_step_call("1"),
        "sandwich": norm_step_call("23"),
        "keel": norm_step_call("12", a=12.0),
        "rezero": norm_step_call("2", "one"),
        "layerscale": norm_step_call("2", "features"),
        "every norm": norm_step_call("123", "features", 2.0),
    }
    for label, make in placements.items():
        yield Call("sm_90", "norm_step", 512, "bf16", label, make)
    yield Call("sm_90", "siamese_step", 512, "bf16", "rms", siamese_call(norm=1))
    yield Call("sm_90", "depth_gru_gates", 512, "bf16", "no norm", gru_call(False))
    for sources, outputs in ((12, 1), (12, 6), (40, 1)):
        label, make = f"{outputs} of {sources} sources", mix_call(sources, outputs)
        yield Call("sm_90", "layer_mix", 512, "bf16", label, make, quick=outputs == 6)
    yield Call("sm_90", "layer_mix", 512, "fp32", "1 of 12 sources", mix_call(12, 1))
    for target in ("sm_80", "sm_100", "gfx942"):
        yield Call(target, "layer_mix", 512, "bf16", "1 of 12 sources", mix_call(12, 1))


def record_call(call: Call) -> Iterator[Compilation]:
    """Yield the kernels that a call of a newer op launches."""
    module = importlib.import_module(f"depthlstm_fast.kernels.{call.op}")
    with recorded(module) as launches:
        call.make(module, call.features, *CALL_TYPES[call.types])
    yield from as_compilations(launches, call.target, f"{call.op}.", "C", f"{call.types} {call.label}", call.quick)


def compilations() -> list[Compilation]:
    """Return the compilations of all calls, each different kernel once."""
    different: dict[tuple[Any, ...], Compilation] = {}
    numbers = collections.Counter[str]()
    for compilation in itertools.chain(*map(record, cases()), *map(record_call, calls())):
        if compilation[2:] not in different:
            numbers[compilation.name] += 1
            number = numbers[compilation.name]  # of the launches of a call of many sources, which differ
            name = compilation.name if number == 1 else f"{compilation.name} ({number})"
            different[compilation[2:]] = compilation._replace(name=name)
    return list(different.values())
