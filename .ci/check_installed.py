"""Train an installed package for three steps: python .ci/check_installed.py FOLDER.

The package must come from FOLDER.
"""

import sys

import torch

import depthlstm_fast as dl

assert dl.__file__.startswith(sys.argv[1]), dl.__file__
torch.manual_seed(0)
model = dl.DepthLSTMTransformer(17, 19, d_model=32, nhead=4, num_encoder_layers=2, num_decoder_layers=2)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
source, target = torch.randint(3, 17, (4, 6)), torch.randint(3, 19, (4, 7))
losses = []
for _ in range(3):
    optimizer.zero_grad()
    logits = model(source, target[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert dl.last_backend() == "cpp", dl.last_backend()
assert losses[-1] < losses[0], losses
print("three training steps on the cpp backend, loss", " ".join(f"{value:.4f}" for value in losses))
