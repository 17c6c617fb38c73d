"""Checks of what goes with a batch of tokens: masks, documents, labels."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..modes import is_direct, is_traced
from ..torch_private import is_transformed
from .causal import number_documents


def can_look(tensor: Tensor) -> bool:
    """Whether numbers can be looked at without stalling a device, and without a tracer."""
    return tensor.device.type == "cpu" and not is_traced() and is_direct(tensor) and not is_transformed()


def check_tokens_beside(argument: str, found: Any, ids: Tensor) -> None:
    """Raise TypeError or ValueError unless ``found`` is int64 and has the shape and device of ids."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; found {type(found).__name__}")
    if found.dtype != torch.int64:
        raise TypeError(f"{argument} must be int64; found {found.dtype}")
    checks.check_dense(argument, found)
    checks.check_shape(argument, found, tuple(ids.shape))
    if found.device != ids.device:
        raise ValueError(f"{argument} must be on the device of ids, {ids.device}; found {found.device}")


def check_mask(attention_mask: Any, ids: Tensor) -> Tensor:
    """The mask as bool; raises TypeError or ValueError where it cannot be one of ids."""
    if isinstance(attention_mask, Tensor) and attention_mask.dtype not in (torch.bool, torch.int64):
        raise TypeError(f"attention_mask must be bool or int64; found {attention_mask.dtype}")
    is_bool = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool
    check_tokens_beside("attention_mask", attention_mask.long() if is_bool else attention_mask, ids)
    if attention_mask.dtype == torch.int64 and can_look(attention_mask):
        wrong = (attention_mask != 0) & (attention_mask != 1)
        if wrong.any():
            raise ValueError(f"attention_mask must hold 0 and 1 alone; found {int(attention_mask[wrong][0])}")
    return attention_mask.bool()


def check_documents(document_ids: Any, cu_seqlens: Any, ids: Tensor) -> Tensor | None:
    """The documents' numbers, (rows, L), from either argument; raises TypeError or ValueError."""
    if document_ids is not None:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens must be None with document_ids; found a tensor")
        check_tokens_beside("document_ids", document_ids, ids)
        return document_ids
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a torch.Tensor; found {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64; found {cu_seqlens.dtype}")
    checks.check_dense("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have shape (documents + 1,); found {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != ids.device:
        raise ValueError(f"cu_seqlens must be on the device of ids, {ids.device}; found {cu_seqlens.device}")
    if ids.shape[0] != 1:
        raise ValueError(f"ids must have shape (1, length) with cu_seqlens; found {tuple(ids.shape)}")
    if can_look(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != ids.shape[1] or any(a >= b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"cu_seqlens must rise from 0 to {ids.shape[1]}, the length of ids; found {ends}")
    return number_documents(cu_seqlens, ids.shape[1])
