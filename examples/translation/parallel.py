"""One training over several processes of torchrun: replicas (DDP) or shards (FSDP2), and tensors gathered from them."""

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
    """How the work is divided: one of ``KINDS``, and which of how many processes this is."""

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
    """Join the processes that torchrun started; yields what to hand to ``Trainer`` and this process's device.

    Raises:
        ValueError: ``kind`` and the number of processes do not go together.
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
        # A replica owns the group, too. One that outlives it ends with the interpreter, where torch 2.13 joins gloo's
        # thread under the GIL, which that thread may be waiting for: the process then hangs.
        gc.collect()
        dist.destroy_process_group()


def forget_frames(error: BaseException) -> None:
    """Drop what the frames that ``error`` and its causes came through hold, the model among it."""
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__


def divide(model: nn.Module, group: Processes, device: str | torch.device) -> nn.Module:
    """Return what to call in place of ``model``: itself, or its replica; with "fsdp2" the parameters become shards in
    place.
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
    """Say whether the next backward pass adds up the gradients of all processes, or keeps them for a later one."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = enabled
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def reshard(model: nn.Module) -> None:
    """Have the model's parameters be shards again, which after a forward pass without a backward pass the outermost
    ones are not.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a shard's tensor that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of all of a shard's tensor, on the CPU; every process has to call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().to("cpu", copy=True)


def like(tensor: Tensor, value: Any) -> Tensor:
    """Return ``value``, a whole tensor, on ``tensor``'s device and divided as it is."""
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value
