"""Compile the eager references of one dtype, of some subjects, into inductor's cache on disk.

    python -m depthlstm_fast.bench.subjects bfloat16 gates cell

Compiling costs more than all timing together, and inductor uses one core for it. This process compiles one half while
the benchmark process compiles the other. The benchmark process then finds the first half in the cache.
"""

from __future__ import annotations

import sys

import torch

from ..measure.compiled import Compiled
from .registry import compile_all

if __name__ == "__main__":
    compile_all(Compiled(), getattr(torch, sys.argv[1]), sys.argv[2:])
