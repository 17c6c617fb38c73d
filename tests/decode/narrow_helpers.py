"""Models whose matrices are rounded in PyTorch as the engine rounds them, and what rounded inputs do to scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import depthlstm_fast as dl

INPUTS = {nn.functional.linear: 0, torch.addmm: 1, Tensor.addmm_: 1}  # of products: their place


class RoundedInputs(TorchFunctionMode):
    """Rounds the inputs of products as csrc/decode/cpu_product_int8.h does, but up or down at random."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = INPUTS.get(function)
        if place is not None:
            x = args[place]
            unit = x.abs().amax(-1, keepdim=True) / min(32767, 2**31 // (127 * x.shape[-1]) - 1)
            rounded = torch.where(unit > 0, (x / unit + torch.rand_like(x)).floor() * unit, x)
            args = (*args[:place], rounded, *args[place + 1 :])
        return function(*args, **(kwargs or {}))


def spread_of_rounded_inputs(case: Any, wanted: Tensor) -> float:
    """The largest difference from the scores ``wanted`` that roundings of the inputs make."""
    with RoundedInputs(), dl.use_backend("reference"):
        scores = [case.generate()[1] for _ in range(4)]
    return max((each - wanted).abs().max().item() for each in scores)


def round_matrices(each: Any, dtype: str) -> None:
    with torch.no_grad():
        for module in each.modules():
            if isinstance(module, nn.Linear) and module is not each.output:
                module.weight.copy_(rounded(module.weight, dtype))
        each.output.weight = nn.Parameter(rounded(each.output.weight, dtype))


def rounded(weight: Tensor, dtype: str) -> Tensor:
    weight = weight.detach()
    if dtype == "bfloat16":
        return weight.bfloat16().float()
    most = weight.abs().amax(1, keepdim=True)
    return torch.where(most > 0, (weight / most * 127).round() * (most / 127), weight)
