"""The cell, forward + backward with every gradient, in units of its three bare GEMMs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import depthlstm_fast as dl

from ..measure import accuracy, matrix_products
from ..measure.calls import Function, Runs, forward_and_backward, name_of
from ..measure.compiled import Compiled
from ..measure.place import Place
from ..measure.problems import Problem, Subject
from ..measure.rows import Row, Target

ROWS, FEATURES = 4096, 512
DTYPES = (torch.float32, torch.bfloat16)
GEMM_UNITS = {torch.float32: 1.06, torch.bfloat16: 1.12}
GPU_GEMM_UNITS = {512: 1.25, 1024: 1.12}  # by width
INPUTS = ("x", "h", "c", "w", "b", "weight", "bias")


def reference_cell(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Call the reference cell by position: x, h, c, w, b, weight, bias."""
    return dl.reference.depth_lstm_cell(*inputs)


def make_inputs(
    rows: int, features: int, dtype: torch.dtype, device: torch.device | str = "cpu", beside: bool = False
) -> list[Tensor]:
    """Return random x, h, c (rows, D), w (4D, 2D), b (4D), weight and bias (4, D), at the scale of the initialisation.

    With ``beside`` x and h are the halves of one matrix, as between the layers of a stack.
    """
    bound = (2 * features) ** -0.5
    tensors = [torch.randn(rows, features, device=device) for _ in range(3)]
    tensors += [torch.empty(4 * features, 2 * features, device=device).uniform_(-bound, bound)]
    tensors += [0.1 * torch.randn(4 * features, device=device)]
    tensors += [1 + 0.1 * torch.randn(4, features, device=device), 0.1 * torch.randn(4, features, device=device)]
    if beside:
        tensors[:2] = torch.cat(tensors[:2], dim=1).to(dtype).split(features, dim=1)
    return [tensor.to(dtype).detach() for tensor in tensors]


def bare_gemms(
    rows: int, features: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Callable[[], object]:
    """Return the products that every cell needs: z = xh W^T, dxh = dz W, dW = dz^T xh.

    Inputs are contiguous, outputs are allocated afresh.
    """
    return matrix_products.training_run(matrix_products.cell(rows, features), dtype, device)


def moved_bytes(rows: int, features: int, dtype: torch.dtype) -> int:
    """Return the bytes of all inputs and outputs of forward + backward.

    These are x, h', c' and their gradients, h, c and theirs, parameters and theirs.
    """
    weights = 8 * features * features + 4 * features + 2 * 4 * features
    return dtype.itemsize * (10 * rows * features + 2 * weights)


def lstm_cell(rows: int, features: int, dtype: torch.dtype) -> Callable[[], object]:
    """Return torch's own cell, forward + backward with every gradient, on as many weights.

    It computes less after the products: no LayerNorm of the gates, and a tanh in place of the GELU. It also computes
    the tanh of c'.
    """
    module = nn.LSTMCell(features, features, dtype=dtype)
    x, h, c = (torch.randn(rows, features).to(dtype).requires_grad_() for _ in range(3))
    cotangents = [torch.randn(rows, features).to(dtype) for _ in range(2)]

    def run() -> object:
        outputs = module(x, (h, c))
        return (*outputs, *torch.autograd.grad(outputs, [x, h, c, *module.parameters()], cotangents))

    return run


def training(
    place: Place, dtype: torch.dtype = torch.float32, rows: int = ROWS, features: int = FEATURES, beside: bool = False
) -> Problem:
    """Make the problem: forward and backward with the gradients of all inputs and weights."""
    leaves = [tensor.requires_grad_() for tensor in make_inputs(rows, features, dtype, place.device, beside)]
    cotangents = [torch.randn(rows, features, device=place.device).to(dtype) for _ in range(2)]

    def step(function: Function) -> object:
        return forward_and_backward(function, leaves, cotangents)

    compiled = place.compiled.get(reference_cell, step)
    runs: Runs = {"eager": lambda: step(reference_cell)}
    if compiled is not None:
        runs["compile"] = lambda: step(compiled)
    runs |= {name: functools.partial(step, call) for name, call in place.functions(dl.depth_lstm_cell).items()}
    runs["against"] = bare_gemms(rows, features, dtype, place.device)
    name = "cell forward + backward" + (", x beside h" if beside else "")
    row = Row("cell", name, name_of(dtype), f"N={rows} I=D={features}", "ms", against="3 bare GEMMs")
    row.missing = place.compiled.missing()
    if not place.gpu:
        runs["lstm_cell"] = lstm_cell(rows, features, dtype)
        row.others = {"lstm_cell": "nn.LSTMCell (no LayerNorm)"}
    units = GPU_GEMM_UNITS.get(features) if place.gpu else GEMM_UNITS[dtype]
    targets = [Target("eager", "speedup"), Target("compile", "speedup"), Target("against", "ratio", units)]
    flops, size = (
        matrix_products.training_flops(matrix_products.cell(rows, features)),
        moved_bytes(rows, features, dtype),
    )
    seconds = 1.0 if place.gpu else 5.0
    return Problem(row, runs, targets, seconds, moved_bytes=size, flops=flops, floor="against", place=place)


def compile_all(compiled: Compiled, dtype: torch.dtype) -> None:
    """Compile the rival by making a problem."""
    training(Place(compiled), dtype)


def check_at(
    dtype: torch.dtype,
    rows: int,
    features: int,
    backend: str = "",
    device: torch.device | str = "cpu",
    roundings: float = 1,
    beside: bool = False,
) -> accuracy.Check:
    """Check forward and every gradient at one size."""
    (fused,) = Place(backends=(backend,)).functions(dl.depth_lstm_cell).values()
    inputs = make_inputs(rows, features, dtype, device, beside)
    return accuracy.function_check(
        "cell beside" if beside else "cell", reference_cell, fused, inputs, INPUTS, dtype, roundings
    )


def check(dtype: torch.dtype) -> Iterator[accuracy.Check]:
    for rows, features in ((64, FEATURES), (17, 65)):
        yield check_at(dtype, rows, features)


SUBJECT = Subject(
    "cell",
    {name_of(dtype): functools.partial(training, dtype=dtype) for dtype in DTYPES},
    check,
    dtypes=DTYPES,
    compile=compile_all,
)
