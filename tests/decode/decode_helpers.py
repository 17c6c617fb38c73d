"""Random small models and sources for the decode engine, and the comparison with the search in PyTorch."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import depthlstm_fast as dl
from depthlstm_fast.checks import ACTIVATIONS
from depthlstm_fast.connections.placements import PreNorm

# Two tokens whose log-probabilities lie closer than this may change places: float32 rounds the logits' sums so.
CLOSE = 2e-5


class Case(NamedTuple):
    model: Any
    src: Tensor
    mask: Tensor | None
    max_length: int
    beams: int
    penalty: float

    def generate(self, model: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
        return (model or self.model).generate(
            self.src,
            self.max_length,
            self.beams,
            self.penalty,
            src_key_padding_mask=self.mask,
            return_scores=True,
            **options,
        )

    def scores(self, models: list[Any], row: int, said: Tensor) -> list[float]:
        """The scores of a row by other models that say the same."""
        return [self.generate(each)[1][row].item() for each in models]

    def is_edge(self, row: int, ours: Tensor, theirs: Tensor) -> bool:
        """Whether fp64 sees no difference between the two tokens at which greedy searches part."""
        at = int((ours != theirs).nonzero()[0])
        exact = double(self.model)
        before = torch.cat((torch.tensor([exact.bos_id]), theirs[:at]))[None]
        mask = None if self.mask is None else self.mask[row : row + 1]
        logp = exact(self.src[row : row + 1], before, mask)[0, -1].log_softmax(0)
        return abs(logp[ours[at]] - logp[theirs[at]]).item() < CLOSE


def sharpen(model: Any) -> None:
    """Make a random model say many different things, and end anywhere: one token over and over tests nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("decoder.norm.weight", "decoder.connection.final_norm.weight"):
                parameter.mul_(3 * (1 + torch.rand_like(parameter)))
            elif "norm" in name and name.endswith("weight"):
                parameter.mul_(1 + torch.rand_like(parameter))
            elif "positions" in name:
                parameter.normal_(0, 1)
            elif parameter.dim() == 1 or name.endswith("norm.bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embedding" in name or "output" in name:
                parameter.normal_(0, model.d_model**-0.5)
            else:
                parameter.mul_(1.7)


def lstm_model(r: random.Random, sizes: dict[str, Any]) -> Any:
    return dl.DepthLSTMTransformer(
        **sizes,
        hidden=r.choice(("linear", "linear", "ffn")),
        norm=r.choice(("gate", "gate", "joint", "none")),
        merge=r.choice(("add", "add", "concat", "cells")),
        sublayer=r.random() < 0.3,
        share_cell=r.random() < 0.3,
        init_cell=r.choice(("zeros", "learned")),
        final_norm=r.random() < 0.8,
    )


def connected_model(r: random.Random, sizes: dict[str, Any]) -> Any:
    lstm = functools.partial(
        dl.connections.DepthLSTM, share_cell=r.random() < 0.3, init_cell=r.choice(("zeros", "learned"))
    )
    pre = functools.partial(PreNorm, norm=r.choice(("layer", "rms")))
    return dl.Transformer(
        **sizes,
        connection=r.choice(("depth-lstm", "pre-norm", lstm, pre)),
        feed_forward=r.random() < 0.6,
        decoder_attention=r.choice(("separate", "add")),
    )


def draw(seed: int) -> Case:
    r = random.Random(seed)
    torch.manual_seed(seed)
    nhead, head = r.choice((1, 2, 3, 4)), r.choice((1, 3, 8, 11, 16, 17, 40))
    share = r.random() < 0.3
    src_vocab, tgt_vocab = r.randint(4, 50), r.choice((3, 7, 31, 33, 64, 97))
    special = r.sample(range(3), 3)
    sizes: dict[str, Any] = {
        "src_vocab": tgt_vocab if share else src_vocab,
        "tgt_vocab": tgt_vocab,
        "d_model": nhead * head,
        "nhead": nhead,
        "num_encoder_layers": r.randint(1, 2),
        "num_decoder_layers": r.randint(1, 3),
        "dim_feedforward": r.choice((None, 1, 37, 64)),
        "activation": r.choice(ACTIVATIONS),
        "bias": r.random() < 0.8,
        "positions": r.choice(("sinusoidal", "learned")),
        "max_len": 20,
        "share_embeddings": share,
        "tie_output": r.random() < 0.5,
        "layer_norm_eps": r.choice((1e-6, 1e-3)),
        "pad_id": special[0],
        "bos_id": special[1],
        "eos_id": special[2],
    }
    model = (lstm_model if r.random() < 0.7 else connected_model)(r, sizes)
    sharpen(model)
    batch, length = r.randint(1, 5), r.randint(1, 20)
    src = torch.randint(0, model.src_vocab, (batch, length))
    for row in range(batch):  # ragged, and in some cases a pad anywhere, or nothing else
        src[row, r.randint(0 if r.random() < 0.1 else 1, length) :] = model.pad_id
    mask = None
    if r.random() < 0.2:
        mask = torch.rand(batch, length) < 0.4
        if r.random() < 0.5:
            mask = torch.where(mask, -torch.inf, torch.randn(batch, length))
    beams = r.choice((1, 1, 1, 2, 3, 4, 5, 6, 7))
    return Case(model.eval(), src, mask, r.choice((1, 2, 7, 12, 19)), beams, r.choice((0.0, 0.6, 1.0, 2.0)))


def differences(case: Any, found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> list[str]:
    """What differs between two results, leaving out sources where two tokens were too close to tell apart."""
    length = max(found[0].shape[1], wanted[0].shape[1])
    ours, theirs = (
        nn.functional.pad(tokens, (0, length - tokens.shape[1]), value=case.model.pad_id)
        for tokens, _ in (found, wanted)
    )
    wrong = []
    for row in range(len(ours)):
        a, b = found[1][row].item(), wanted[1][row].item()
        same_tokens, same_score = torch.equal(ours[row], theirs[row]), abs(a - b) <= 1e-5 * max(1.0, abs(b))
        if same_tokens and not same_score:  # steep logits: as exact as PyTorch's float32, or as the weights are
            exact, *others = case.scores([double(case.model), *rounded(case.model)], row, theirs[row])
            noise = max(3 * abs(b - exact), *(abs(other - exact) for other in others))
            same_score = abs(a - exact) <= noise + 1e-5 * max(1.0, abs(exact))
        if not same_tokens and (same_score if case.beams > 1 else case.is_edge(row, ours[row], theirs[row])):
            continue
        if not (same_tokens and same_score):
            wrong.append(f"source {row}: {ours[row].tolist()} {a}, wanted {theirs[row].tolist()} {b}")
    if not wrong and length != wanted[0].shape[1] and torch.equal(ours, theirs):
        wrong.append(f"{found[0].shape[1]} tokens, wanted {wanted[0].shape[1]}")
    return wrong


def double(model: Any) -> Any:
    return copy.deepcopy(model).double().eval()


def rounded(model: Any) -> list[Any]:
    """Three fp64 copies, whose weights differ from the model's by at most a rounding of float32."""
    copies = [double(model) for _ in range(3)]
    with torch.no_grad():
        for each in copies:
            for parameter in each.parameters():
                parameter.mul_(1 + (torch.rand_like(parameter) - 0.5) * torch.finfo(torch.float32).eps)
    return copies


def compare(seeds: range, draw: Any = draw) -> tuple[int, int]:
    """Compare the engine with the search in PyTorch; returns the numbers of sources and of different tokens."""
    sources = said = 0
    for seed in seeds:
        case = draw(seed)
        found = case.generate()
        assert dl.last_backend() == "cpp"
        with dl.use_backend("reference"):
            wanted = case.generate()
        wrong = differences(case, found, wanted)
        assert not wrong, f"seed {seed}, {case.beams} beams: {wrong}"
        sources += len(found[0])
        said += len(wanted[0].unique())
    return sources, said
