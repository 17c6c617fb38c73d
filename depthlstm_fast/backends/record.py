"""The record of a backend: its tensors, its limits and its kernels.

docs/kernels.md says what a new backend needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class BackendStatus(NamedTuple):
    """Whether a backend can run here, and one line on what it is or why it cannot."""

    available: bool
    detail: str


@dataclass(frozen=True)
class Backend:
    """A backend with its own kernels.

    Each "why not" is the reason against a call, or None.

    Attributes:
        name: the value of ``backend=``.
        title: the name in messages, as in "the CUDA kernels".
        prefix: prefix of its operators' names in torch.ops.depthlstm_fast, as in cuda_gates_forward.
        automatic_for: the device type for which "auto" tries it.
        devices: the accepted tensors, in words.
        device_types: the device types of these tensors.
        dtypes: the accepted dtypes of z.
        widest: the largest D of each op that the backend has, or None where every D fits.
        status: whether the backend can run here at all.
        why_not_here: the reason against this machine, this torch or this build.
        why_not_on: the reason against the tensor's own device; asked when everything else fits.
        kernels: the Python module with an op's kernels; None where the compiled library defines the operators.
        writes_into_buffer: whether forward can write h into a part of a wider matrix.
        adds_second_product: whether forward can add a second matrix product to z.
        absent: the ops that the loaded library lacks, because it was built before they were written.
    """

    name: str
    title: str
    prefix: str
    automatic_for: str
    devices: str
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    widest: Mapping[str, int | None]
    status: Callable[[], BackendStatus]
    why_not_here: Callable[[], str | None]
    why_not_on: Callable[[Tensor], str | None] | None = None
    kernels: Callable[[str], ModuleType] | None = None
    writes_into_buffer: bool = False
    adds_second_product: bool = False
    absent: set[str] = field(default_factory=set)

    def why_not(self, tensor: Tensor, op: str, features: int) -> str | None:
        """Say why this backend cannot run ``op`` with D = ``features`` on ``tensor``; None where it can."""
        reason = self.why_not_here()
        if reason is not None:
            return reason
        if tensor.device.type not in self.device_types:
            return f"the {self.title} kernels take {self.devices} tensors; found {tensor.device}"
        if tensor.dtype not in self.dtypes:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes[:-1])
            found = [str(dtype).removeprefix("torch.") for dtype in (self.dtypes[-1], tensor.dtype)]
            return f"the {self.title} kernels take {wanted} and {found[0]}; found {found[1]}"
        widest = self.widest.get(op, 0)
        if widest is not None and features > widest:
            if op not in self.widest:
                return f"the {self.title} kernels have no {op}"
            return f"the {self.title} kernels take D up to {widest}; found {features}"
        if op in self.absent:
            return f"the library that is loaded was built before it had {op}: build it again"
        return None if self.why_not_on is None else self.why_not_on(tensor)
