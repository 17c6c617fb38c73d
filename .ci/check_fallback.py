"""Compare a package without its library with the reference: forward and backward of a layer run on it."""

import torch

import depthlstm_fast as dl

layer = dl.DepthLSTMEncoderLayer(16, 2, dropout=0.0)
h, c = layer(torch.randn(5, 3, 16))
(h.square().sum() + c.square().sum()).backward()
assert dl.last_backend() == "reference", dl.last_backend()
