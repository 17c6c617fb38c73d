"""Whether a module does no more than its class says, so that its parameters may be used without calling it.

Hooks, wrappers, adapters and quantisers act when a module is called. Fused code that reads parameters past a module
asks here first.
"""

from __future__ import annotations

from torch import Tensor, nn


def hookless(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's forward and nothing else.

    Global hooks (``register_module_forward_hook``) do not count.
    FlopCounterMode installs some, and would then count another path than the one that runs without it.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs the forward of ``cls`` itself and nothing else."""
    return type(module) is cls and hookless(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module(x)`` is ``F.linear(x, module.weight, module.bias)`` and nothing else, so that its weight may be
    used directly.
    """
    return is_plain(module, nn.Linear) and type(module.weight) in (nn.Parameter, Tensor)
