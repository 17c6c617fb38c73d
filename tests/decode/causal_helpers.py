"""Random small language models and prompts for the decode engine, as decode_helpers.py has them for translation."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any, NamedTuple

import torch
from decode_helpers import CLOSE, double, sharpen
from torch import Tensor

import depthlstm_fast as dl
from depthlstm_fast.checks import ACTIVATIONS
from depthlstm_fast.connections.placements import PreNorm
from depthlstm_fast.reference.generation import penalty


class CausalCase(NamedTuple):
    model: Any
    ids: Tensor
    mask: Tensor | None
    max_new_tokens: int
    beams: int
    penalty: float
    sampling: dict[str, Any]  # with "seed" in place of a generator; empty for a search

    def generate(self, model: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
        sampling = dict(self.sampling)
        if sampling:
            sampling["generator"] = torch.Generator().manual_seed(sampling.pop("seed"))
        options |= {"attention_mask": self.mask, "return_scores": True, **sampling}
        return (model or self.model).generate(self.ids, self.max_new_tokens, self.beams, self.penalty, **options)

    def logp(self, model: Any, row: int, said: Tensor) -> Tensor:
        """Log-probabilities (n, vocab) of each token of ``said`` (n), of all before it and of the prompt."""
        prompt = self.ids[row] if self.mask is None else self.ids[row][self.mask[row].bool()]
        logits = model(torch.cat((prompt, said[:-1]))[None])[0, len(prompt) - 1 :]
        return logits.detach().log_softmax(-1)

    def scores(self, models: list[Any], row: int, said: Tensor) -> list[float]:
        words = said.tolist()
        end = words.index(self.model.eos_id) + 1 if self.model.eos_id in words else len(words)
        said = said[:end]
        divisor = penalty(end, self.penalty)
        return [self.logp(each, row, said).gather(1, said[:, None]).sum().item() / divisor for each in models]

    def is_edge(self, row: int, ours: Tensor, theirs: Tensor) -> bool:
        """Whether a rounding decides between the tokens at which two searches part, or two samples."""
        if self.sampling:
            with dl.use_backend("reference"):
                return any(not torch.equal(self.generate(each)[0][row], theirs) for each in nearby(self.model))
        at = int((ours != theirs).nonzero()[0])
        logp = self.logp(double(self.model), row, theirs[: at + 1])[-1]
        return abs(logp[ours[at]] - logp[theirs[at]]).item() < CLOSE


def nearby(model: Any) -> list[Any]:
    """Copies whose weights differ from the model's by roundings of float32."""
    copies = [copy.deepcopy(model) for _ in range(6)]
    with torch.no_grad():
        for each in copies:
            for parameter in each.parameters():
                parameter.mul_(1 + (torch.rand_like(parameter) - 0.5) * 4 * torch.finfo(torch.float32).eps)
    return copies


def connection(r: random.Random) -> Any:
    lstm = functools.partial(
        dl.connections.DepthLSTM,
        hidden=r.choice(("linear", "ffn")),
        norm=r.choice(("gate", "joint", "none")),
        activation=r.choice(ACTIVATIONS),
        share_cell=r.random() < 0.3,
        init_cell=r.choice(("zeros", "learned")),
        output_norm=r.choice(("layer", "rms")),
    )
    pre = functools.partial(PreNorm, norm=r.choice(("layer", "rms")))
    return r.choice(("depth-lstm", "depth-lstm", "pre-norm", "pre-norm", lstm, pre))


def draw_causal(seed: int, samples: bool = True) -> CausalCase:
    r = random.Random(seed)
    torch.manual_seed(seed)
    positions = r.choice(("rope", "rope", "rope", "sinusoidal", "learned", "none"))
    nhead = r.choice((1, 2, 3, 4, 6))
    head = r.choice((2, 8, 12, 16, 18, 40) if positions == "rope" else (1, 3, 8, 11, 16, 17))
    vocab = r.choice((3, 7, 31, 33, 64, 97))
    pad, eos = r.sample(range(3), 2)
    model = dl.LanguageModel(
        vocab,
        nhead * head,
        nhead,
        r.randint(1, 3),
        kv_heads=r.choice([each for each in range(1, nhead + 1) if nhead % each == 0]),
        positions=positions,
        rope_theta=r.choice((10000.0, 10000.0, 100.0, 2.5)),
        connection=connection(r),
        feed_forward=r.random() < 0.6,
        ffn=r.choice(("gelu", "swiglu")),
        dim_feedforward=r.choice((None, 1, 37, 64)),
        norm=r.choice(("layer", "rms")),
        layer_norm_eps=r.choice((1e-6, 1e-3)),
        bias=r.random() < 0.6,
        tie_output=r.random() < 0.5,
        max_len=40,
        pad_id=pad,
        eos_id=r.choice((eos, eos, None)),
    )
    sharpen(model)
    batch, length = r.randint(1, 5), r.choice((1, 2, 5, 16, 17, 20, 33))
    ids = torch.randint(0, vocab, (batch, length))
    mask = None
    if r.random() < 0.6:  # padded on the left, with ids that mean nothing
        mask = torch.arange(length)[None] >= torch.tensor([[r.randrange(length)] for _ in range(batch)])
        mask = mask if r.random() < 0.5 else mask.long()
    beams, sampling = 1, {}
    if samples and r.random() < 0.3:
        sampling = {
            "temperature": r.choice((0.5, 1.0, 2.0)),
            "top_k": r.choice((None, None, 1, 2, 5, 200)),
            "top_p": r.choice((None, None, 0.3, 0.9, 1.0)),
            "seed": seed,
        }
    else:
        beams = r.choice((1, 1, 2, 3, 4, 5))
    new = r.choice((1, 2, 7, 12, 40 - length))
    return CausalCase(model.eval(), ids, mask, min(new, 40 - length), beams, r.choice((0.0, 0.6, 1.0, 2.0)), sampling)
