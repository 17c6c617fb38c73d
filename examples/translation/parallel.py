"""One training over several processes of torchrun.

The processes have replicas (DDP) or shards (FSDP2), and this file gathers tensors from them.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

KINDS = ("none", "ddp", "fsdp2")


class Processes(NamedTuple):
    """The division of the work: one of ``KINDS``, this process's rank, and the number of processes."""

    kind: str = "none"
    rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        """Wait for the others."""
        if self.size > 1:
            dist.barrier()

    def total(self, *numbers: float, device: str | torch.device = "cpu") -> list[float]:
        """Return the sum of each of ``numbers`` over all processes."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return summed.tolist()

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked; all have one shape."""
        if self.size == 1:
            return tensor[None]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)


@contextmanager
def processes(kind: str, device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that torchrun started; yields the argument for ``Trainer`` and this process's device.

    Raises:
        ValueError: ``kind`` does not match the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if kind == "none" and size > 1:
        raise ValueError(f"parallel must be ddp or fsdp2 under torchrun; found 'none' in one of {size} processes")
    if kind == "none":
        yield Processes(), device
        return
    if "RANK" not in os.environ:
        raise ValueError(f"parallel must be 'none' outside torchrun; found {kind!r}")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(kind, dist.get_rank(), dist.get_world_size()), device
    except BaseException as error:
        forget_frames(error)
        raise
    finally:
        # A replica owns the group, too. A replica that outlives the group ends with the interpreter. There torch 2.13
        # joins gloo's thread under the GIL. That thread may be waiting for the GIL, and the process then hangs.
        gc.collect()
        dist.destroy_process_group()


def forget_frames(error: BaseException) -> None:
    """Drop the references in the frames that ``error`` and its causes came through, the model among them."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__


def divide(model: nn.Module, group: Processes, device: str | torch.device) -> nn.Module:
    """Return the module to call in place of ``model``: itself, or its replica.

    With "fsdp2" the parameters become shards in place.
    """
    if group.kind == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False)
    if group.kind == "fsdp2":
        mesh = dist.init_device_mesh(torch.device(device).type, (group.size,))
        for stack in (model.encoder, model.decoder):
            for layer in stack.layers:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def synchronise_gradients(model: nn.Module, enabled: bool) -> None:
    """Set whether the next backward pass adds up the gradients of all processes.

    Otherwise it keeps them for a later pass.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def reshard(model: nn.Module) -> None:
    """Turn the model's parameters into shards again.

    After a forward pass without a backward pass the outermost parameters are whole.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a whole sharded tensor, on the CPU; every process must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().to("cpu", copy=True)


def like(tensor: Tensor, value: Any) -> Tensor:
    """Return ``value``, a whole tensor, on ``tensor``'s device and divided like it."""
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value
