"""Check an installed package: python .ci/check_installed.py FOLDER.

The package must come from FOLDER. Its library must load; forward, backward and generate() on it must be those of the
reference, in the decode engine, too; and three training steps must lower the loss.
"""

import sys

import torch

import depthlstm_fast as dl

assert dl.__file__.startswith(sys.argv[1]), dl.__file__
cpp = dl.backends()["cpp"]
assert cpp.available, cpp
torch.manual_seed(0)
sizes = {"d_model": 32, "nhead": 4, "num_encoder_layers": 2, "num_decoder_layers": 2, "dropout": 0.0}
model = dl.DepthLSTMTransformer(17, 19, **sizes)
plain = dl.reference.DepthLSTMTransformer(17, 19, **sizes)
plain.load_state_dict(model.state_dict())
source, target = torch.randint(3, 17, (4, 6)), torch.randint(3, 19, (4, 7))


def loss_of(each: torch.nn.Module) -> torch.Tensor:
    logits = each(source, target[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())


found = [loss_of(each) for each in (model, plain)]
torch.testing.assert_close(*found)
assert dl.last_backend() == "cpp", dl.last_backend()
gradients = [
    torch.autograd.grad(loss, list(each.parameters())) for loss, each in zip(found, (model, plain), strict=True)
]
for name, own, wanted in zip(dict(model.named_parameters()), *gradients, strict=True):
    torch.testing.assert_close(own, wanted, msg=lambda text, name=name: f"{name}: {text}")
engine = dl.compile_decoder(model.eval())
for beams in (1, 4):
    tokens = plain.eval().generate(source, 9, beams)
    assert torch.equal(model.generate(source, 9, beams), tokens)
    assert torch.equal(engine.generate(source, 9, beams), tokens)
language = dl.LanguageModel(19, d_model=32, nhead=4, num_layers=2).eval()
plain_language = dl.reference.LanguageModel(19, d_model=32, nhead=4, num_layers=2).eval()
plain_language.load_state_dict(language.state_dict())
torch.testing.assert_close(language(target), plain_language(target))
assert torch.equal(language.generate(target, 9), plain_language.generate(target, 9))

optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print("forward, backward and generate() are the reference's")
print("three training steps on the cpp backend, loss", " ".join(f"{value:.4f}" for value in losses))
