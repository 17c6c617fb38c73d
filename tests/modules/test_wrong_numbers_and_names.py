"""Numbers, names, devices and types that constructors, functions and tools refuse by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import depthlstm_fast as dl

C = 8
connections = dl.connections
Z, STATE = torch.randn(2, 4 * C), torch.randn(2, C)
ARRAY = numpy.array(["gate", "x"])


def translator() -> dl.Transformer:
    return dl.Transformer(20, 20, C, 2, 2, 2, connection="pre-norm")


IDS = torch.randint(3, 20, (64, 12))


def linearise(**options: Any) -> Any:
    return dl.linearise(**{"model": translator(), "batches": [(IDS, IDS)], "layer": 0, "stack": "encoder", **options})


def gates(**options: Any) -> Any:
    return dl.depth_lstm_gates(Z, STATE, **options)


def deep(*shape: int) -> torch.Tensor:
    return torch.randn(*[1] * 64, *shape)


REFUSALS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # names
    (lambda: gates(norm=ARRAY), ValueError, "norm must be one of 'gate', 'joint', 'none'; found array"),
    (lambda: gates(activation=ARRAY), ValueError, "activation must be one of .* found array"),
    (lambda: gates(backend=ARRAY), ValueError, "backend must be one of .* found array"),
    (lambda: gates(backend=["cpp"]), ValueError, r"backend must be one of .* found \['cpp'\]"),
    (lambda: gates(backend={}), ValueError, "backend must be one of .* found {}"),
    (lambda: dl.Encoder(C, 2, 1, activation=numpy.ones(2)), ValueError, "activation must be one of"),
    (lambda: dl.Decoder(C, 2, 2, context="x"), ValueError, "context must be one of 'gate', 'scalar'; found 'x'"),
    (lambda: dl.Transformer(9, 9, C, 2, fusion="x"), ValueError, "fusion must be one of 'gate', 'scalar'; found 'x'"),
    # devices and types
    *((lambda make=make, device=device: make(device), ValueError,
       f"device must be one that torch can use here; found {device!r}: ")
      for device in ("foo", "", -1)
      for make in (lambda device: dl.DepthLSTMCell(4, 4, device=device),
                   lambda device: dl.Encoder(C, 2, 1, device=device),
                   lambda device: dl.reference.CrossAttention(C, 2, device=device),
                   lambda device: dl.DepthLSTMDecoderLayer(C, 2, device=device))),
    *((lambda make=make, dtype=dtype: make(dtype), TypeError,
       f"dtype must be float32, float64, bfloat16 or float16; found {dtype}")
      for dtype in (torch.int64, torch.complex64, "float32")
      for make in (lambda dtype: dl.DepthLSTMCell(4, 4, dtype=dtype),
                   lambda dtype: dl.Encoder(C, 2, 1, dtype=dtype),
                   lambda dtype: dl.reference.SelfAttention(C, 2, dtype=dtype),
                   lambda dtype: dl.DepthLSTMTransformer(9, 9, C, 2, dtype=dtype))),
    (lambda: gates(weight=nn.UninitializedParameter(), bias=torch.zeros(4, C)), ValueError,
     "weight must have a shape; found UninitializedParameter"),
    # dimensions
    (lambda: dl.depth_lstm_gates(deep(4 * C), deep(C)), ValueError, "c must have at most 64 dimensions; found 65"),
    (lambda: dl.depth_lstm_cell(deep(C), deep(C), deep(C), torch.ones(4 * C, 2 * C)), ValueError,
     "c must have at most 64 dimensions; found 65"),
    (lambda: dl.norm_step(deep(C), deep(C)), ValueError, "y must have at most 64 dimensions; found 65"),
    (lambda: dl.siamese_step(*[deep(C)] * 3, torch.ones(C), None, torch.ones(C), None, c=1.0), ValueError,
     "o must have at most 64 dimensions; found 65"),
    (lambda: dl.depth_gru_gates(deep(4 * C), deep(C)), ValueError, "h must have at most 64 dimensions; found 65"),
    (lambda: dl.layer_mix([deep(C)], torch.ones(1, 1)), ValueError, r"sources\[0\] must have at most 64 dimensions"),
    (lambda: dl.layer_attend([deep(C)], torch.ones(C)), ValueError, r"sources\[0\] must have at most 64 dimensions"),
    # numbers
    (lambda: connections.LayerScale(C, 2, init_value=1e300), ValueError,
     r"init_value must be at most 3.4e\+38 in size; found 1e\+300"),
    (lambda: connections.DepthGRU(C, 2, update_bias=-1e300), ValueError,
     r"update_bias must be at most 3.4e\+38 in size; found -1e\+300"),
    (lambda: connections.DeepNorm(C, 2, alpha=1e300), ValueError, r"alpha must be at most 3.4e\+38 in size"),
    (lambda: connections.DepthLSTM(C, 2, forget_bias=10**400), ValueError, "forget_bias must be finite"),
    (lambda: dl.norm_step(STATE, STATE, a=1e300), ValueError, r"a must be at most 3.4e\+38 in size; found 1e\+300"),
    (lambda: dl.norm_step(STATE, STATE, b=-1e39), ValueError, r"b must be at most 3.4e\+38 in size; found -1e\+39"),
    (lambda: connections.PreNorm(C, 2).bytes_moved("ab"), TypeError, "rows must be an int; found str"),
    (lambda: connections.PreNorm(C, 2).bytes_moved(1.5), TypeError, "rows must be an int; found float"),
    (lambda: connections.PreNorm(C, 2).bytes_moved(-1), ValueError, "rows must be at least 0; found -1"),
    (lambda: connections.PreNorm(C, 2).bytes_moved(1, 0), ValueError, "itemsize must be at least 1; found 0"),
    (lambda: dl.param_groups(translator(), 10**400), ValueError, "weight_decay must be finite and not negative"),
    # the argument that is meant
    (lambda: dl.DepthLSTMEncoderLayer(C, 2, layer_norm_eps=-1), ValueError, "layer_norm_eps must be finite"),
    (lambda: dl.DepthLSTMTransformer(9, 9, C, 2, layer_norm_eps="x"), TypeError,
     "layer_norm_eps must be a float; found str"),
    (lambda: dl.depth_gru_gates(Z, STATE, reset_weight=0.5), TypeError,
     r"reset_weight must be a torch\.Tensor; found float"),
    # tools
    (lambda: dl.probe_gradients(None, (IDS, IDS)), TypeError, r"model must be a torch\.nn\.Module; found NoneType"),
    *((lambda batch=batch: dl.probe_gradients(translator(), batch), ValueError,
       f"batch must be a pair .src, tgt. for a translation model; found {len(batch)} parts")
      for batch in ((), (IDS,), (IDS, IDS, IDS))),
    (lambda: linearise(held_out=[]), ValueError, "held_out must hold tokens; found none"),
    (lambda: linearise(held_out=[(torch.zeros_like(IDS), IDS)]), ValueError, "held_out must hold tokens; found none"),
    (lambda: linearise(held_out=5), TypeError, "held_out must hold tuples of the model's arguments; found int"),
    (lambda: linearise(batches=None), TypeError, "batches must hold tuples of the model's arguments; found NoneType"),
    (lambda: dl.swap(translator(), {1: 2}), TypeError, "rules must hold classes or predicates, and functions"),
    (lambda: dl.swap(translator(), {nn.Linear: 5}), TypeError, "rules must hold classes or predicates, and functions"),
    (lambda: dl.swap_rnmt_cell(None), TypeError, r"module must be a torch\.nn\.Module; found NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), REFUSALS)
def test_refusals(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_right_values() -> None:
    wide = torch.randn(2, C, dtype=torch.float64)
    assert dl.norm_step(wide, wide, a=1e200)[0].isfinite().all()
    assert torch.equal(connections.LayerScale(C, 2, init_value=3e38).gamma, torch.full((2, C), 3e38))
    assert connections.PreNorm(C, 2).bytes_moved(0) == 0
    assert dl.layer_mix([torch.randn(*[1] * 63, C)], torch.ones(1, 1))[0].dim() == 64
    assert dl.DepthLSTMCell(4, 4, device="meta", dtype=torch.bfloat16).gates.weight.is_meta
    assert dl.Encoder(C, 2, 1, device=torch.device("cpu"), dtype=torch.float16).layers[0].self_attn is not None
    assert set(linearise(held_out=[(IDS, IDS)]).r2) == {"layer"}
