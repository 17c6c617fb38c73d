"""generate with a compiled decoder step.

The tokens are the same, and the number of graphs does not grow with the length.
"""

from __future__ import annotations

import torch
from client_helpers import batch, model
from torch._dynamo.utils import counters

STEPS = 12  # more than the graphs allowed below, and past the lengths at which the cache doubles


def test_compiled_step() -> None:
    made, source = model(num_encoder_layers=1, num_decoder_layers=1).eval(), batch()[0]
    with torch.no_grad():
        # its logit is 0, hardly ever the largest, so decoding continues to the end
        made.tgt_embedding.weight[made.eos_id] = 0
    wanted = made.generate(source, max_length=STEPS, beam_size=2)
    assert wanted.shape[1] == STEPS
    torch._dynamo.reset()
    counters.clear()
    made.decoder.step = torch.compile(made.decoder.step, backend="eager")
    torch.testing.assert_close(made.generate(source, max_length=STEPS, beam_size=2), wanted)
    assert 1 <= counters["stats"]["unique_graphs"] <= 6
