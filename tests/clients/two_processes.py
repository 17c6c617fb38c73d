"""Checks that test_two_processes.py starts as two or three gloo processes; each process writes down the outcomes.

All processes run the same checks in the same order. A check that fails in only one leaves them out of step, so it is
the last.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import two_processes_language_model
from client_helpers import HEADS, LAYERS, SOURCE, TARGET, D, assert_equal_dicts, batch, cotangent, gradients, model
from process_helpers import CLOSE, full
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import depthlstm_fast as dl


def same_model(**options: Any) -> Any:
    """Return the same model on both processes, independent of earlier draws."""
    torch.manual_seed(0)
    return model(**options)


def same_connected(connection: str) -> Any:
    torch.manual_seed(0)
    return dl.Transformer(SOURCE, TARGET, D, HEADS, LAYERS, LAYERS, dropout=0.0, connection=connection)


def shard(trained: Any, mesh: DeviceMesh) -> Any:
    for stack in (trained.encoder, trained.decoder):
        if getattr(stack, "share_cell", False):
            fully_shard(stack.layers[0].cell, mesh=mesh)
        for layer in stack.layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(trained, mesh=mesh)
    register_fsdp_forward_method(trained, "generate")
    return trained


def halved(trained: Any, mesh: DeviceMesh) -> dict[str, Tensor]:
    """Return the gradients of the whole batch; each process computes those of its half.

    FSDP2 and DDP give the mean.
    """
    rank = mesh.get_local_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    source, target = batch()
    trained.zero_grad()
    trained(source[rows], target[rows]).backward(2 * cotangent()[rows])
    return {name.removeprefix("module."): full(p.grad) for name, p in trained.named_parameters() if p.grad is not None}


def check_ddp(mesh: DeviceMesh, folder: Path) -> None:
    wanted = gradients(same_model())
    assert_equal_dicts(
        halved(nn.parallel.DistributedDataParallel(same_model(), gradient_as_bucket_view=True), mesh), wanted, **CLOSE
    )


def check_fsdp2(mesh: DeviceMesh, folder: Path) -> None:
    for options in ({}, {"share_cell": True}, {"hidden": "ffn", "sublayer": True, "positions": "learned"}):
        wanted = gradients(same_model(**options))
        assert_equal_dicts(halved(shard(same_model(**options), mesh), mesh), wanted, **CLOSE)


def check_fsdp2_connections(mesh: DeviceMesh, folder: Path) -> None:
    """Check connections with parameters of their own, two streams, or all earlier outputs as state."""
    for connection in ("pre-norm", "siamese", "depth-lstm", "depth-gru", "dlcl", "attention-residuals"):
        wanted = gradients(same_connected(connection))
        assert_equal_dicts(halved(shard(same_connected(connection), mesh), mesh), wanted, **CLOSE)


def check_fsdp2_mixed_precision(mesh: DeviceMesh, folder: Path) -> None:
    """Check that an fp32 c stays fp32 in bf16 layers, unless FSDP2 is left to cast what goes in."""
    x, cells = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(7)), []
    for casts in (False, True):
        torch.manual_seed(0)
        layers = [dl.DepthLSTMEncoderLayer(D, HEADS, dropout=0.0, batch_first=True) for _ in range(3)]
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=casts)
        h, c = x.bfloat16(), torch.zeros_like(x)
        for layer in layers:
            h, c = fully_shard(layer, mesh=mesh, mp_policy=policy)(h, c)
        assert h.dtype == torch.bfloat16
        assert c.dtype == (torch.bfloat16 if casts else torch.float32)
        cells.append(c)
    assert not torch.equal(cells[0].bfloat16().float(), cells[0])  # c holds more than bf16 could


def check_fsdp2_generate(mesh: DeviceMesh, folder: Path) -> None:
    plain = same_model().eval()
    sharded = shard(copy.deepcopy(plain), mesh)
    for beams in (1, 3):
        wanted = plain.generate(batch()[0], max_length=6, beam_size=beams)
        for cache in (True, False):
            torch.testing.assert_close(
                sharded.generate(batch()[0], max_length=6, beam_size=beams, use_cache=cache), wanted
            )


def check_fsdp2_meta(mesh: DeviceMesh, folder: Path) -> None:
    with torch.device("meta"):
        empty = model()
    shard(empty, mesh).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*empty.parameters(), *empty.buffers()):
            tensor.fill_(float("nan"))
    torch.manual_seed(0)
    empty.reset_parameters()
    assert empty.output.weight is empty.tgt_embedding.weight
    plain = model().eval()
    plain.load_state_dict({name: full(tensor) for name, tensor in empty.state_dict().items()})
    torch.testing.assert_close(full(empty.eval()(*batch())), plain(*batch()))


def check_fsdp2_meta_draws(mesh: DeviceMesh, folder: Path) -> None:
    """Check that shards are parts of one process's draw, and that a forget bias reaches its own shard."""
    variants: list[dict[str, Any]] = [
        {"forget_bias": 2.0},
        {"forget_bias": 2.0, "norm": "none"},
        {"tie_output": False, "positions": "learned"},
    ]
    for options in variants:
        with torch.device("meta"):
            sharded = shard(model(**options), mesh)
        sharded.to_empty(device="cpu")
        whole = model(**options)
        for each in (sharded, whole):
            torch.manual_seed(3)
            each.reset_parameters()
        for (name, found), wanted in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(full(found), wanted), (options, name)


def check_dtensor_dropout(mesh: DeviceMesh, folder: Path) -> None:
    """Check that all processes use the mask of the first one's generator, for every layout of the rows."""
    torch.manual_seed(0)
    cell, x = dl.DepthLSTMCell(D, D, dropout=0.5), torch.randn(6, D)
    for backend in ("auto", "reference"):
        with dl.use_backend(backend):
            torch.manual_seed(5)
            wanted = cell(x)[0].detach()
            torch.manual_seed(5 + mesh.get_local_rank())
            spread = distribute_module(copy.deepcopy(cell), mesh)
            for place in (Replicate(), Shard(0)):
                torch.manual_seed(5 + mesh.get_local_rank())
                h = spread(distribute_tensor(x, mesh, [place]))[0]
                torch.testing.assert_close(full(h).detach(), wanted, **CLOSE)
                h.square().sum().backward()


def check_checkpoint(mesh: DeviceMesh, folder: Path) -> None:
    """Save a checkpoint from two processes; test_two_processes.py loads it in one."""
    sharded = shard(same_model(), mesh)
    optimizer = torch.optim.AdamW(dl.param_groups(sharded), 1e-2)
    halved(sharded, mesh)
    optimizer.step()
    states = get_state_dict(sharded, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / "checkpoint")
    halved(sharded, mesh)
    optimizer.step()
    after = {name: full(p).detach() for name, p in sharded.named_parameters()}
    if mesh.get_local_rank() == 0:
        torch.save(after, folder / "after.pt")


def check_loading(mesh: DeviceMesh, folder: Path) -> None:
    """Load a checkpoint that one process has saved, and write down what all processes hold together."""
    sharded = shard(same_model(), mesh)
    optimizer = torch.optim.AdamW(dl.param_groups(sharded), 1e-2)
    states = get_state_dict(sharded, optimizer)
    state = {"model": states[0], "optimizer": states[1]}
    dcp.load(state, checkpoint_id=folder / "one")
    set_state_dict(sharded, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    found = {name: (full(p).detach(), full(optimizer.state[p]["exp_avg_sq"])) for name, p in sharded.named_parameters()}
    if mesh.get_local_rank() == 0:
        torch.save(found, folder / "loaded.pt")


def gradients_of(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    h, c = layer(x)
    h, c = full(h), full(c)
    weights = torch.randn(2, *h.shape, generator=torch.Generator().manual_seed(7))
    ((h * weights[0]).sum() + (c * weights[1]).sum()).backward()
    return h.detach(), {name: full(p.grad) for name, p in layer.named_parameters()}


def check_tensor_parallel(mesh: DeviceMesh, folder: Path) -> None:
    whole = {"output_layouts": Replicate()}
    plans = {
        "gates by columns": {"cell.gates": ColwiseParallel(**whole)},
        "gates by rows": {"cell.gates": RowwiseParallel(input_layouts=Replicate())},
        "projections": {
            "self_attn.in_proj": ColwiseParallel(**whole),
            "self_attn.out_proj": RowwiseParallel(input_layouts=Replicate()),
        },
        "feed-forward network": {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()},
    }
    for name, plan in plans.items():
        torch.manual_seed(0)
        plain = dl.DepthLSTMEncoderLayer(D, HEADS, dropout=0.0, batch_first=True, sublayer=True)
        parallel = parallelize_module(copy.deepcopy(plain), mesh, plan)
        x = torch.randn(2, 5, D)
        (found, of_found), (wanted, of_wanted) = gradients_of(parallel, x), gradients_of(plain, x)
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
        assert_equal_dicts(of_found, of_wanted, **CLOSE)


def check_tensor_parallel_needs_whole_outputs(mesh: DeviceMesh, folder: Path) -> None:
    """Check that sharded rows, packed by gate and by q, k and v, are not taken for a share of the features.

    A local output must raise an error.
    """
    for name, message in (("cell.gates", "z must have shape"), ("self_attn.in_proj", "don't multiply up")):
        layer = dl.DepthLSTMEncoderLayer(D, HEADS, dropout=0.0, batch_first=True)
        parallel = parallelize_module(layer, mesh, {name: ColwiseParallel()})
        found = "a shard was taken for the whole"
        try:
            parallel(torch.randn(2, 5, D))
        except (RuntimeError, ValueError) as error:
            found = str(error)
        assert message in found, f"{name}: {found}"


def check_vocabulary_parallel(mesh: DeviceMesh, folder: Path) -> None:
    plain = same_model(tie_output=False)
    wanted = gradients(plain)
    plan = {
        "output": ColwiseParallel(output_layouts=Replicate()),
        "tgt_embedding": RowwiseParallel(input_layouts=Replicate()),
    }
    parallel = parallelize_module(same_model(tie_output=False), mesh, plan)
    found = {name: full(gradient) for name, gradient in gradients(parallel).items()}
    assert_equal_dicts(found, wanted, **CLOSE)


def check_dtensor_cell(mesh: DeviceMesh, folder: Path) -> None:
    torch.manual_seed(0)
    plain = dl.DepthLSTMCell(D, D)
    inputs = torch.randn(3, 4, D)
    weights = torch.randn(2, 4, D)
    (wanted_h, wanted_c), cell = plain(inputs[0], (inputs[1], inputs[2])), copy.deepcopy(plain)
    ((wanted_h * weights[0]).sum() + (wanted_c * weights[1]).sum()).backward()
    distribute_module(cell, mesh)
    for placement in (Replicate(), Shard(0)):
        x, h, c = (distribute_tensor(tensor, mesh, [placement]) for tensor in inputs)
        found_h, found_c = cell(x, (h, c))
        torch.testing.assert_close(found_h.full_tensor(), wanted_h, **CLOSE)
        torch.testing.assert_close(found_c.full_tensor(), wanted_c, **CLOSE)
        cell.zero_grad()
        ((found_h.full_tensor() * weights[0]).sum() + (found_c.full_tensor() * weights[1]).sum()).backward()
        assert_equal_dicts(
            {name: full(p.grad) for name, p in cell.named_parameters()},
            {n: p.grad for n, p in plain.named_parameters()},
            **CLOSE,
        )


def check_pipeline(mesh: DeviceMesh, folder: Path) -> None:
    """Check a layer as a stage: it passes both states, h and c, to the next process."""
    rank, generator = mesh.get_local_rank(), torch.Generator().manual_seed(8)
    torch.manual_seed(0)
    layers = [dl.DepthLSTMEncoderLayer(D, HEADS, dropout=0.0, batch_first=True) for _ in range(2)]
    x, wanted = torch.randn(4, 5, D, generator=generator), torch.randn(2, 4, 5, D, generator=generator)

    def loss(states: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        targets = targets.transpose(0, 1)
        return ((states[0] - targets[0]).square() + (states[1] - targets[1]).square()).sum()

    loss(layers[1](*layers[0](x)), wanted.transpose(0, 1)).backward()
    expected = [{name: p.grad.clone() for name, p in layer.named_parameters()} for layer in layers]
    layers[rank].zero_grad()
    stage = PipelineStage(layers[rank], rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss, scale_grads=False)
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=wanted.transpose(0, 1))
    assert_equal_dicts({name: p.grad for name, p in layers[rank].named_parameters()}, expected[rank], **CLOSE)


CHECKS: dict[str, Callable[[DeviceMesh, Path], None]] = {
    name.removeprefix("check_"): value
    for name, value in {**vars(two_processes_language_model), **globals()}.items()
    if name.startswith("check_")
}


def main(folder: Path, world: int, rank: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    mesh, results = init_device_mesh("cpu", (world,)), {}
    for name in names:
        try:
            CHECKS[name](mesh, folder)
            results[name] = "ok"
        except Exception:  # noqa: BLE001
            results[name] = traceback.format_exc()
        (folder / f"results{rank}.json").write_text(json.dumps(results))
        failures = torch.tensor(float(results[name] != "ok"))
        dist.all_reduce(failures)
        if 0 < failures < world:
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
