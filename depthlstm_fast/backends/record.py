"""What a backend is: one record that names its tensors, its limits and its kernels. docs/kernels.md says what a new one
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class BackendStatus(NamedTuple):
    """Whether a backend can run here, and a line on what it is or why it cannot."""

    available: bool
    detail: str


@dataclass(frozen=True)
class Backend:
    """A backend with kernels of its own. A why-not is None where nothing speaks against a call, else the reason.

    Attributes:
        name: what ``backend=`` takes.
        title: the name in messages, as in "the CUDA kernels".
        prefix: what its operators' names begin with in torch.ops.depthlstm_fast, as in cuda_gates_forward.
        automatic_for: the device type for which "auto" tries it.
        devices: the tensors it takes, in words.
        device_types: their device types.
        dtypes: the dtypes of z it takes.
        widest: for each op it has, the largest D, or None where every D fits.
        status: whether it can run at all here.
        why_not_here: what this machine, this torch or this build lack.
        why_not_on: what speaks against the tensor's own device, asked when everything else fits.
        kernels: the module with an op's kernels in Python; None where the compiled library defines the operators.
        writes_into_buffer: whether forward can write h into a part of a wider matrix.
        adds_second_product: whether forward can add a second matrix product to z.
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

    def why_not(self, tensor: Tensor, op: str, features: int) -> str | None:
        """Why this backend cannot run ``op`` with D = ``features`` on ``tensor``; None where it can."""
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
        return None if self.why_not_on is None else self.why_not_on(tensor)
