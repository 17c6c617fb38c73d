"""FSDP2 in one process: which modules may be sharded, models from the meta device, and decoding with a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from client_helpers import assert_equal_dicts, batch, cotangent, fill_with_nan, gradients, model

import depthlstm_fast as dl

dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def shard(trained: Any, mesh: DeviceMesh, norms: bool = False) -> Any:
    """Shard one unit a layer, and one for the rest.

    With ``norms`` each cell's normalisation is also a unit. Each shared cell is a unit.
    """
    layers = (*trained.encoder.layers, *trained.decoder.layers)
    if norms:
        for module in trained.modules():
            if isinstance(module, dl.reference.GateNorm):
                fully_shard(module, mesh=mesh)
    for stack in (trained.encoder, trained.decoder):
        if stack.share_cell:
            fully_shard(stack.layers[0].cell, mesh=mesh)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    register_fsdp_forward_method(trained, "generate")
    return trained


def full(gradients: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in gradients.items()}


@pytest.mark.parametrize("norms", [False, True], ids=["layers", "norms"])
@pytest.mark.parametrize("options", [{}, {"share_cell": True}, {"hidden": "ffn", "merge": "cells"}], ids=str)
def test_trains(options: dict[str, Any], norms: bool, mesh: DeviceMesh) -> None:
    plain, sharded = model(**options), model(**options)
    sharded.load_state_dict(plain.state_dict())
    wanted = gradients(plain)
    shard(sharded, mesh, norms)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert_equal_dicts(full(gradients(sharded)), wanted)


@pytest.mark.parametrize("beams", [1, 3])
def test_generates(beams: int, mesh: DeviceMesh) -> None:
    source, plain = batch()[0], model().eval()
    wanted = plain.generate(source, max_length=8, beam_size=beams)
    sharded = shard(plain, mesh)
    for cache in (True, False):
        torch.testing.assert_close(sharded.generate(source, max_length=8, beam_size=beams, use_cache=cache), wanted)


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "tie_output": False}], ids=str)
def test_from_the_meta_device(options: dict[str, Any], mesh: DeviceMesh) -> None:
    plain = model(**options)
    with torch.device("meta"):
        sharded = model(**options)
    shard(sharded, mesh).to_empty(device="cpu")
    fill_with_nan(sharded)
    sharded.reset_parameters()
    assert (sharded.output.weight is sharded.tgt_embedding.weight) == options.get("tie_output", True)
    for name, parameter in sharded.named_parameters():
        drawn, wanted = parameter.full_tensor(), plain.get_parameter(name)
        bound = wanted.abs().max()  # uniform in the same range, or constant
        assert 0 <= drawn.abs().max() <= 1.1 * bound + 1e-6, name
        assert (drawn.std() > 0) == (wanted.std() > 0) if drawn.numel() > 1 else True, name
    sharded(*batch()).backward(cotangent())
    assert all(p.grad.full_tensor().isfinite().all() for p in sharded.parameters() if p.grad is not None)
    set_model_state_dict(sharded, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    assert_equal_dicts(full(gradients(sharded)), gradients(plain))


def test_from_the_meta_device_without_reset(mesh: DeviceMesh) -> None:
    """Check loading of every parameter without drawing.

    The tables of sines, which are in no state_dict, must be there all the same.
    """
    plain = model().eval()
    with torch.device("meta"):
        sharded = model().eval()
    shard(sharded, mesh).to_empty(device="cpu")
    fill_with_nan(sharded)
    set_model_state_dict(sharded, plain.state_dict(), options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(sharded(*batch()), plain(*batch()))


def test_offloaded_activations_and_checkpointing(mesh: DeviceMesh) -> None:
    plain = model()
    wanted = gradients(plain)
    for stack in (plain.encoder, plain.decoder):
        stack.gradient_checkpointing = True
    assert_equal_dicts(full(gradients(shard(plain, mesh))), wanted)
