"""The backends: a record of each (record, library, cuda, triton), and which of them runs a call (choice, fastest)."""

from ..callable_module import make_callable
from .choice import backends, last_backend, set_backend, use_backend
from .record import Backend, BackendStatus

__all__ = ["Backend", "BackendStatus", "backends", "last_backend", "set_backend", "use_backend"]

make_callable(backends, __name__)
