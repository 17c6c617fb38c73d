"""Checks that a module does no more than its class says.

Hooks, wrappers, adapters and quantisers act when a module is called. Fused code that reads parameters without a call
asks here first.
"""

from __future__ import annotations

from torch import Tensor, nn


def hookless(module: nn.Module) -> bool:
    """Return whether calling ``module`` runs its class's forward and nothing else.

    Global hooks (``register_module_forward_hook``) do not count. FlopCounterMode installs such hooks, and would then
    count another path than the one that runs without it.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return whether calling ``module`` runs the forward of ``cls`` itself and nothing else."""
    return type(module) is cls and hookless(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether ``module(x)`` is exactly ``F.linear(x, module.weight, module.bias)``.

    Code may then use the weight directly.
    """
    return is_plain(module, nn.Linear) and type(module.weight) in (nn.Parameter, Tensor)
