"""The checks of ``dl.LanguageModel`` in two gloo processes, which two_processes.py runs with its own."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from client_helpers import HEADS, LAYERS, TARGET, D, assert_equal_dicts
from process_helpers import CLOSE, full
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import depthlstm_fast as dl

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
ROWS, LENGTH, STEPS, MICROBATCHES = 4, 9, 3, 2


def language_model(connection: str = "depth-lstm", **options: Any) -> dl.LanguageModel:
    """Return the same model on both processes, independent of earlier draws."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"kv_heads": 1, "dropout": 0.0, "max_len": 24, **options}
    return dl.LanguageModel(TARGET, D, HEADS, LAYERS, connection=connection, **sizes)


def batch() -> Tensor:
    return torch.randint(3, TARGET, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    # an eps far above the rounding of two halves' sum: Adam would make whole steps of it
    return torch.optim.AdamW(dl.param_groups(model), 1e-2, eps=1e-3)


def train(model: nn.Module, rows: slice = slice(None)) -> list[float]:
    """Train for some steps on ``rows`` of the batch; return the losses."""
    optimiser, losses, ids = optimiser_of(model), [], batch()[rows]
    for _ in range(STEPS):
        loss = model(ids, labels=ids)[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): full(p).detach() for name, p in model.named_parameters()}


def assert_same_run(trained: nn.Module, plain: nn.Module, mesh: DeviceMesh) -> None:
    """Check the losses of both halves and what is learnt against a run of one process."""
    wanted = torch.tensor(train(plain))
    rank = mesh.get_local_rank()
    found = torch.tensor(train(trained, slice(2 * rank, 2 * rank + 2)))
    dist.all_reduce(found)
    torch.testing.assert_close(found / 2, wanted, **CLOSE)
    assert wanted[-1] < wanted[0]
    assert_equal_dicts(parameters_of(trained), parameters_of(plain), **CLOSE)


def shard(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    register_fsdp_forward_method(model, "generate")
    return model


def check_ddp_language_model(mesh: DeviceMesh, folder: Path) -> None:
    for connection in ("depth-lstm", "pre-norm"):
        trained = nn.parallel.DistributedDataParallel(language_model(connection), gradient_as_bucket_view=True)
        assert_same_run(trained, language_model(connection), mesh)


def check_fsdp2_language_model(mesh: DeviceMesh, folder: Path) -> None:
    """Check gradients of the loss, each process with its half of the rows, the run, and tokens of ``generate``."""
    ids = batch()
    for connection in ("depth-lstm", "pre-norm"):
        plain = language_model(connection)
        sharded = shard(copy.deepcopy(plain), mesh)
        plain(ids, labels=ids)[0].backward()
        half = ids[2 * mesh.get_local_rank() :][:2]
        sharded(half, labels=half)[0].backward()
        wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        found = {name: full(p.grad) for name, p in sharded.named_parameters() if p.grad is not None}
        assert_equal_dicts(found, wanted, **CLOSE)
        assert torch.equal(sharded.generate(ids, 6), plain.generate(ids, 6))
        assert_same_run(sharded, plain, mesh)


def check_fsdp2_checkpointing_language_model(mesh: DeviceMesh, folder: Path) -> None:
    """Check a run that recomputes each layer, and one that keeps what the backward pass needs in the host's memory."""
    for connection in ("depth-lstm", "pre-norm"):
        calls: list[int] = []
        sharded = shard(language_model(connection), mesh)
        sharded.decoder.gradient_checkpointing = True
        sharded.decoder.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert_same_run(sharded, language_model(connection), mesh)
        assert len(calls) == 2 * STEPS
        with torch.autograd.graph.save_on_cpu():
            assert_same_run(shard(language_model(connection), mesh), language_model(connection), mesh)


def check_fsdp2_offload_language_model(mesh: DeviceMesh, folder: Path) -> None:
    """Check shards, gradients and optimiser states that lie in the host's memory."""
    sharded = shard(language_model(), mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    assert_same_run(sharded, language_model(), mesh)
    sharded.decoder.gradient_checkpointing = True
    assert_same_run(sharded, whole_of(sharded), mesh)
    assert all(p.to_local().device.type == "cpu" for p in sharded.parameters())


def whole_of(sharded: nn.Module) -> dl.LanguageModel:
    plain = language_model()
    plain.load_state_dict({name: full(tensor) for name, tensor in sharded.state_dict().items()})
    return plain


def names_of_page() -> dict[str, Any]:
    """Return what the code of the page's section on pipelines defines: ``Stage`` and ``next_token_loss``."""
    names: dict[str, Any] = {}
    section = PAGE.read_text(encoding="utf-8").partition("## Pipelines")[2]
    exec(compile(re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)[0], str(PAGE), "exec"), names)
    return names


class CountingStage(PipelineStage):
    """A stage that adds up the bytes of the tensors that it sends."""

    sent = 0

    def _count(self, operations: Any) -> Any:
        self.sent += sum(each.tensor.nbytes for each in operations)
        return operations

    def get_fwd_send_ops(self, *arguments: Any) -> Any:
        return self._count(super().get_fwd_send_ops(*arguments))

    def get_bwd_send_ops(self, *arguments: Any) -> Any:
        return self._count(super().get_bwd_send_ops(*arguments))


def check_pipeline_language_model(mesh: DeviceMesh, folder: Path) -> None:
    """Check the page's stages: losses and what is learnt are those of one process, and h and c alone are passed."""
    rank, names = mesh.get_local_rank(), names_of_page()
    for options in ({"tie_output": False}, {"positions": "none", "feed_forward": True, "tie_output": True}):
        plain = language_model(**options)
        stage = names["Stage"](copy.deepcopy(plain), rank, rank + 1)
        assert sum(p.numel() for p in stage.parameters()) < 0.7 * sum(p.numel() for p in plain.parameters())
        sender = CountingStage(stage, rank, 2, torch.device("cpu"))
        schedule = ScheduleGPipe(sender, MICROBATCHES, loss_fn=names["next_token_loss"])
        optimiser, ids, found = optimiser_of(stage), batch(), []
        for _ in range(STEPS):
            losses: list[Tensor] = []
            optimiser.zero_grad()
            if rank == 0:
                schedule.step(ids)
            else:
                schedule.step(target=ids, losses=losses)
            if options["tie_output"]:
                names["add_tied_gradients"](stage)
            optimiser.step()
            found.append(sum(loss.item() for loss in losses) / MICROBATCHES)
        assert sender.sent == STEPS * ROWS * LENGTH * 2 * D * 4  # h and c, and backward their gradients
        wanted, kept = train(plain), parameters_of(plain)
        if rank == 1:
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), **CLOSE)
        learnt = {name.removeprefix("model."): p.detach() for name, p in stage.named_parameters()}
        for name, tensor in learnt.items():
            whole = kept["embedding.weight" if name == "output.weight" and options["tie_output"] else name]
            torch.testing.assert_close(tensor, whole, **CLOSE)
