"""Modules that are called as a function of the same name.

``dl.swap(model)`` and ``import depthlstm_fast.swap as module`` both work. The import reads the attribute of the
package, where the plain function would hide the module.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that runs its function of the same name when called."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.__dict__[self.__name__.rpartition(".")[2]](*arguments, **options)


def make_callable(function: Callable[..., Any], name: str) -> None:
    """Let the module ``name`` be called as ``function``, with its signature and docstring."""
    module = sys.modules[name]
    module.__class__ = CallableModule
    module.__doc__ = function.__doc__
    module.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
