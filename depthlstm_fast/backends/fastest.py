"""Which backend is the fastest on which GPU, as far as that was measured: what "auto" takes there.

The table is EMPTY: no kernel has been timed on a GPU yet, so that "auto" takes Triton wherever Triton can run. An entry says on which GPU
it was measured, by the name torch.cuda.get_device_name() has for it, for which D and which dtype of z, and names the winner of gates
forward + backward, timed in turn in one process; a comment beside it names the run in benchmarks/results:

    ("NVIDIA H100 80GB HBM3", 512, torch.bfloat16): "cuda",  # benchmarks/results/<folder>

What was not measured is not guessed from its neighbours.
"""

from __future__ import annotations

import torch

FASTEST: dict[tuple[str, int, torch.dtype], str] = {}
