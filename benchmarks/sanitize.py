"""Small calls of every kernel, for compute-sanitizer: both schemes of backward, both sides of a tile's edge, dropout, given g.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own, so that an access beyond its end is seen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import depthlstm_fast as dl

CASES = [  # D, rows, options
    (512, 37, {}),
    (100, 5, {"dropout_p": 0.3, "training": True}),
    (1000, 3, {"norm": "joint"}),
    (4096, 3, {"dropout_p": 0.3, "training": True}),
    (64, 7, {"norm": "none"}),
]


def main(backend: str = "triton", cases: list = CASES, device: str = "cuda") -> None:
    """Forward and backward of every case in bf16 and fp32, and once with a given g."""
    for features, rows, options in cases:
        for dtype in (torch.bfloat16, torch.float32):
            for gates in (4, 3):
                z = torch.randn(rows, gates * features, device=device).to(dtype).requires_grad_()
                c = torch.randn(rows, features, device=device).to(dtype).requires_grad_()
                affine = [torch.randn(gates, features, device=device).to(dtype).requires_grad_() for _ in range(2)]
                more = dict(options)
                if gates == 3:
                    more["hidden"] = torch.randn(rows, features, device=device).to(dtype)
                leaves = [z, c, *affine] if options.get("norm") != "none" else [z, c]
                outputs = dl.depth_lstm_gates(*leaves, backend=backend, **more)
                grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(output) for output in outputs])
                assert all(bool(tensor.isfinite().all()) for tensor in (*outputs, *grads))
    print("sanitize: done")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "triton")
