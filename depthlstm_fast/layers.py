"""The layers of :mod:`depthlstm_fast.reference` with fused cells.

Parameters keep their names, so state_dicts interchange. Three parts are fused:

- Everything in the cell after its matrix product (:func:`depth_lstm_gates`).
- The product itself: x and h' are K-slices, and [x ; h'] is never concatenated (:func:`depth_lstm_cell`).
- With ``merge="add"`` the output projection of the cross-attention, which accumulates onto s.

Some backends can write h beside free columns. The projection before the next cell then writes its output into these
columns, and one product reads both (:mod:`depthlstm_fast.ops.shared_buffer`). A submodule that is not a plain nn.Linear
(LoRA, quantised, hooked, parametrised) is called as a module. The gates after it stay fused.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, reference
from .functional import depth_lstm_cell, depth_lstm_gates
from .modes import autocast_dtype, is_jit_traced, is_traced, is_watched
from .ops import shared_buffer
from .plain import is_plain, is_plain_linear
from .reference.attention import CrossAttention, SelfAttention
from .reference.stacks import CELLS
from .torch_private import is_transformed


def _is_plain_attention(module: nn.Module) -> bool:
    return is_plain(module, SelfAttention) or is_plain(module, CrossAttention)


def _accumulate(base: Tensor, x: Tensor, weight: Tensor, fresh: bool) -> Tensor:
    """Return base + x W^T for matrices; the product accumulates onto base.

    It accumulates in place where ``fresh`` says that no other code holds base. A fresh base must not be a view, because
    autograd would copy it back and forth.
    """
    # autocast does not reach in-place products
    if fresh and not (torch.compiler.is_compiling() or is_watched()) and autocast_dtype(base.device.type) is None:
        return base.addmm_(x, weight.t())
    return torch.addmm(base, x, weight.t())


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def linear_slices(inputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W [inputs] + b without the concatenation.

    Inputs (..., I_j), whose I_j add up to the columns of weight (R, I) -> (..., R).
    """
    if is_jit_traced():  # the ONNX exporter takes the sizes of the view below for constants
        return F.linear(torch.cat(inputs, dim=-1), weight, bias)
    # the backward of one split writes the weight's gradient once; separate slices would each write zeros and add
    first, *rest = weight.split([x.shape[-1] for x in inputs], dim=1)
    total = F.linear(_rows(inputs[0]), first, bias)
    for x, columns in zip(inputs[1:], rest, strict=True):
        total = _accumulate(total, _rows(x), columns, True)
    return total.view(*inputs[0].shape[:-1], weight.shape[0])


def linear_into(buffer: Tensor | None, first: int, linear: Any, x: Tensor, base: Tensor | None = None) -> Tensor:
    """base + linear(x), written into ``buffer`` from column ``first`` on where that can be."""
    if buffer is None or not is_plain_linear(linear):
        return linear(x) if base is None else base + linear(x)
    weight, bias = linear.weight, linear.bias
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not x.dtype == weight.dtype == buffer.dtype:
        return linear(x) if base is None else base + linear(x)
    return shared_buffer.linear_into(buffer, first, x, weight, bias, base)


def attend_into(
    buffer: Tensor | None,
    first: int,
    attention: SelfAttention | CrossAttention,
    arguments: tuple,
    options: dict[str, Any],
) -> Tensor:
    """Return the attention's output, written into ``buffer`` from column ``first`` on where possible."""
    if buffer is None or not _is_plain_attention(attention):
        return attention(*arguments, **options)
    return linear_into(buffer, first, attention.out_proj, attention.context(*arguments, **options))


def add_cross_attention(
    attention: CrossAttention, s: Tensor, options: dict[str, Any], buffer: Tensor | None = None
) -> Tensor:
    """s + attention(s), the output projection accumulating onto s; written into ``buffer`` where there is one."""
    projection = attention.out_proj
    if not is_plain_linear(projection) or not _is_plain_attention(attention) or is_jit_traced():
        return s + attention(s, **options)
    context = attention.context(s, **options)
    if buffer is not None:
        return linear_into(buffer, 0, projection, context, s)
    weight, bias = projection.weight, projection.bias
    # s + b costs what copying s into the product's output would: the product then accumulates in place
    base = _rows(s) if bias is None else _rows(s) + bias.to(s.dtype)  # type: ignore[operator]
    return _accumulate(base, _rows(context), weight, bias is not None).view(s.shape)  # type: ignore[arg-type]


class DepthLSTMCell(reference.DepthLSTMCell):
    __doc__ = reference.DepthLSTMCell.__doc__
    # Width of the next cell's input (see depth_lstm_cell). The layer or stack that holds both cells sets it.
    left = 0

    def forward(
        self, input: Tensor | tuple[Tensor, ...], state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`depthlstm_fast.reference.DepthLSTMCell.forward`."""
        inputs, h, c = self._unpack(input, state)
        hidden = None
        if self.hidden == "ffn":
            if is_plain_linear(self.ffn_in):
                inner = linear_slices((*inputs, h), self.ffn_in.weight, self.ffn_in.bias)  # type: ignore[arg-type]
            else:
                inner = self.ffn_in(torch.cat((*inputs, h), dim=-1))
            hidden = self._ffn_tail(inner)
        if is_plain_linear(self.gates):
            return self._step(inputs, h, c, self.gates.weight, self.gates.bias, hidden)  # type: ignore[arg-type]
        return depth_lstm_gates(self.gates(torch.cat((*inputs, h), dim=-1)), c, **self._options(c, hidden))

    def _step(
        self,
        inputs: tuple[Tensor, ...],
        h: Tensor,
        c: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return depth_lstm_cell(inputs, h, c, weight, bias, left=self.left, **self._options(c, hidden))

    def _folded_step(
        self, inputs: tuple[Tensor, ...], state: tuple[Tensor, Tensor], fold: Fold
    ) -> tuple[Tensor, Tensor]:
        """Run :meth:`forward` with the weights of ``fold``; the last input is the attention's context."""
        inputs, h, c = self._unpack(inputs, state)
        hidden = None
        if fold.ffn_weight is not None:
            hidden = self._ffn_tail(linear_slices((*inputs, h), fold.ffn_weight, fold.ffn_bias))
        return self._step(inputs, h, c, fold.weight, fold.bias, hidden)


class Fold(NamedTuple):
    """A cell's weights with an output projection folded in, and copies of their sources."""

    sources: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    ffn_weight: Tensor | None
    ffn_bias: Tensor | None


def _fold_linear(
    linear: nn.Linear, projection: nn.Linear, first: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Fold ``projection`` into the columns of ``linear`` from ``first`` on.

    The product is computed in fp64 (fp32 for half types) and rounded once.
    """
    exact = (
        torch.float64
        if linear.weight.dtype in (torch.float32, torch.float64) and linear.weight.device.type != "mps"
        else torch.float32
    )
    weight, inner = linear.weight.to(exact, copy=True), projection.weight.to(exact)
    columns = weight[:, first : first + inner.shape[0]].clone()
    weight[:, first : first + inner.shape[0]] = columns @ inner
    bias = None if linear.bias is None else linear.bias.to(exact)
    if projection.bias is not None:
        shift = columns @ projection.bias.to(exact)
        bias = shift if bias is None else bias + shift
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class _FusedLayer(nn.Module):
    """Base of the fused layers.

    Its projections write beside h, and output projections can be folded into the cell for inference.
    """

    d_model: int
    sublayer: bool

    folds_output_projection: bool = False
    _folds: dict[str, Fold] | None = None
    _trusted: set[str] | None = None  # the folds that were compared with their sources inside trusted_folds()

    def fold_output_projection(self, enabled: bool = True) -> None:
        """Use the precomputed product W_x W_o in place of W_o and then W_x.

        Each folded attention saves one D x D product. Results differ by rounding. A fold is used only in eval mode with
        gradients off and outside torch.compile. Encoder layers fold their attention, decoder layers with
        ``merge="cells"`` both attentions, with ``"concat"`` the cross-attention. With ``"add"`` nothing is folded: s is
        needed anyway, and the D x D product would become a 4D x D one. The first call makes the folded weights, and a
        call after any change of a source weight makes them anew. The layer keeps copies of the sources and compares
        them value by value at each call, in ``generate()`` once. A fold therefore keeps twice the numbers of the cell.
        Outside ``generate()`` it pays from some hundred tokens a call on.
        """
        checks.check_flags(enabled=enabled)
        self.folds_output_projection, self._folds = enabled, None

    def train(self, mode: bool = True) -> _FusedLayer:
        self._folds = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._folds = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folds": None, "_trusted": None}

    def _fold(self, name: str, attention: SelfAttention | CrossAttention, cell: nn.Module, first: int) -> Fold | None:
        """Return the weights of ``cell`` folded for ``attention``, or None where folding does not apply.

        The attention's context takes the columns from ``first`` on.
        """
        if (
            not self.folds_output_projection
            or self.training
            or torch.is_grad_enabled()
            or is_traced()
            or is_transformed()
        ):
            return None
        if (
            cell.training
            or attention.training
            or not (_is_plain_attention(attention) and is_plain(cell, DepthLSTMCell))
        ):
            return None
        projection = attention.out_proj
        linears: list[Any] = [cell.gates, cell.ffn_in] if cell.hidden == "ffn" else [cell.gates]
        if not is_plain_linear(projection) or not all(is_plain_linear(linear) for linear in linears):
            return None
        sources = [
            t for module in (projection, *linears) for t in (module.weight, module.bias) if isinstance(t, Tensor)
        ]
        if any(t.is_meta for t in sources):
            return None
        dtype = autocast_dtype(sources[0].device.type) or sources[0].dtype
        if self._folds is None:
            self._folds = {}
        fold = self._folds.get(name)
        if fold is None or fold.weight.dtype != dtype or not self._is_up_to_date(name, fold, sources):
            folded = [_fold_linear(linear, projection, first, dtype) for linear in linears]  # type: ignore[arg-type]
            copies = [t.detach().clone() for t in sources]
            fold = Fold(copies, *folded[0], *(folded[1] if len(folded) == 2 else (None, None)))
            self._folds[name] = fold
        if self._trusted is not None:
            self._trusted.add(name)
        return fold

    def _is_up_to_date(self, name: str, fold: Fold, sources: list[Tensor]) -> bool:
        """Return whether the sources hold the values that ``fold`` was made from.

        Values are compared because fused optimisers, ``parameter.data`` and other processes change weights without a
        version counter.
        """
        if self._trusted is not None and name in self._trusted:
            return True
        if len(fold.sources) != len(sources):
            return False
        return all(
            a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
            for a, b in zip(fold.sources, sources, strict=True)
        )

    def _attend_and_step(
        self,
        attention: SelfAttention | CrossAttention,
        arguments: tuple,
        options: dict[str, Any],
        name: str,
        state: tuple[Tensor, Tensor],
        before: tuple[Tensor, ...] = (),
        buffer: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the attention, then the cell called ``name``.

        ``before`` precedes the attention's output in the cell's input. The output is written into ``buffer``; without
        ``before`` it is written beside the state.
        """
        cell = getattr(self, name)
        width = sum(x.shape[-1] for x in before)
        # a fake tensor or another subclass would leave weights that must not be kept
        fold = self._fold(name, attention, cell, width) if type(state[0]) in (Tensor, nn.Parameter) else None
        if fold is not None:
            return cell._folded_step((*before, attention.context(*arguments, **options)), state, fold)
        if not before:
            buffer = shared_buffer.take(state[0], self.d_model)
        output = attend_into(buffer, width, attention, arguments, options)
        return cell((*before, output) if before else output, state)

    def _feed_forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if not self.sublayer:
            return h, c
        x = linear_into(shared_buffer.take(h, self.d_model), 0, self.linear2, self._inner(h))  # type: ignore[operator]
        return self.ffn_cell(x, (h, c))  # type: ignore[operator]

    def _enter(self, argument: str, outside: Tensor) -> Tensor:
        return shared_buffer.pass_on(outside, super()._enter(argument, outside))  # type: ignore[misc]

    def _leave(self, inside: Tensor, like: Tensor) -> Tensor:
        return shared_buffer.pass_on(inside, super()._leave(inside, like))  # type: ignore[misc]


class DepthLSTMEncoderLayer(_FusedLayer, reference.DepthLSTMEncoderLayer):
    __doc__ = reference.DepthLSTMEncoderLayer.__doc__
    cell_class = DepthLSTMCell

    def _run(self, h: Tensor, c: Tensor, mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
        return self._attend_and_step(self.self_attn, (h, mask, is_causal), {}, "cell", (h, c))


class DepthLSTMDecoderLayer(_FusedLayer, reference.DepthLSTMDecoderLayer):
    __doc__ = reference.DepthLSTMDecoderLayer.__doc__
    cell_class = DepthLSTMCell

    def _run(
        self, h: Tensor, c: Tensor, self_options: dict[str, Any], cross_options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        if self.merge == "cells":
            h, c = self._attend_and_step(self.self_attn, (h,), self_options, "cell", (h, c))
            return self._attend_and_step(self.cross_attn, (h,), cross_options, "cross_cell", (h, c))
        buffer = shared_buffer.take(h, self.cell.input_size)
        if self.merge == "concat":
            s = attend_into(buffer, 0, self.self_attn, (h,), self_options)
            return self._attend_and_step(self.cross_attn, (s,), cross_options, "cell", (h, c), (s,), buffer)
        return self.cell(
            add_cross_attention(self.cross_attn, self.self_attn(h, **self_options), cross_options, buffer), (h, c)
        )


def _connect(layers: Iterable[nn.Module]) -> None:
    """Tell each cell the width of the next cell's input."""
    cells = [
        getattr(layer, name)
        for layer in layers
        for name in CELLS
        if isinstance(getattr(layer, name, None), DepthLSTMCell)
    ]
    for cell, following in itertools.pairwise(cells):
        cell.left = following.input_size


class DepthLSTMEncoder(reference.DepthLSTMEncoder):
    __doc__ = reference.DepthLSTMEncoder.__doc__

    def _connect(self) -> None:
        _connect(self.layers)


class DepthLSTMDecoder(reference.DepthLSTMDecoder):
    __doc__ = reference.DepthLSTMDecoder.__doc__

    def _connect(self) -> None:
        _connect(self.layers)


@contextlib.contextmanager
def trusted_folds(model: nn.Module) -> Iterator[None]:
    """Compare each fold in ``model`` with its sources once instead of at every call.

    Nothing may change the weights inside the block.
    """
    layers = [
        module for module in model.modules() if isinstance(module, _FusedLayer) and module.folds_output_projection
    ]
    for layer in layers:
        layer._trusted = set()
    try:
        yield
    finally:
        for layer in layers:
            layer._trusted = None


def fold_output_projections(model: nn.Module, enabled: bool = True) -> int:
    """Call ``fold_output_projection(enabled)`` on every fused layer in ``model``; return their number.

    Folding is for inference. :meth:`DepthLSTMEncoderLayer.fold_output_projection` says what it does and when.

    Raises:
        TypeError: model is not a module, or enabled no bool.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; found {type(model).__name__}")
    checks.check_flags(enabled=enabled)
    layers = [module for module in model.modules() if isinstance(module, _FusedLayer)]
    for layer in layers:
        layer.fold_output_projection(enabled)
    return len(layers)
