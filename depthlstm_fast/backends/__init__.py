"""The backends and the choice between them.

record, library, cuda and triton describe the backends. choice and fastest pick the backend of a call.
"""

from ..callable_module import make_callable
from .choice import backends, last_backend, set_backend, use_backend
from .record import Backend, BackendStatus

__all__ = ["Backend", "BackendStatus", "backends", "last_backend", "set_backend", "use_backend"]

make_callable(backends, __name__)
