"""A causal language model around layers of any kind: embeddings, positions, output layer, search; plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..modes import autocast_dtype
from . import generation
from .causal import FEED_FORWARDS, CausalCache, Places, PlainCausalStack, place
from .continuation import CachedDecoding, Decoding, check_left_padding, settings_for
from .positions import Positions, initialise_embedding
from .rotary import check_rotation, make_rotation
from .sampling import Sampler
from .tied import TiedModel
from .token_checks import can_look, check_documents, check_mask, check_tokens_beside
from .translation import check_ids

POSITIONS = ("rope", "sinusoidal", "learned", "none")
IGNORED = -100  # a label that is left out of the loss


class LanguageModel(TiedModel):
    """Decoder-only Transformer around a depth connection; tokens (batch, length) in, logits of the next ones out.

    Args:
        vocab_size, d_model, nhead, num_layers: V, D, heads of the queries, layers.
        kv_heads: heads of keys and values, a divisor of ``nhead`` (grouped-query attention); ``nhead`` if None.
        positions: "rope" (rotary, Su et al., arXiv 2104.09864; features j and j + size / 2 of a head are a pair),
            "sinusoidal" or "learned" (added to the embeddings), or "none".
        rope_theta: the base of the rotary frequencies.
        connection: a name (:func:`depthlstm_fast.connections.names`), or a callable (d_model, num_branches) ->
            Connection; in :mod:`depthlstm_fast.reference` "depth-lstm" or "pre-norm".
        feed_forward: whether layers have a feed-forward network; None for what the connection says.
        ffn: of the network: "gelu", or "swiglu" (Shazeer, arXiv 2002.05202).
        dim_feedforward: its inner width; None for 4 D, with "swiglu" for 8 D / 3, rounded up to a multiple of 8.
        norm: "layer" or "rms", the norms of the connection. Those of the depth-wise LSTM's and GRU's gates stay.
        layer_norm_eps, bias, init: see :class:`depthlstm_fast.Encoder`.
        dropout: of the embedded input and of the layers.
        tie_output: the output layer's weight is the embedding. It has no bias.
        max_len: the most tokens of a sequence; of packed ones, of a document.
        pad_id, eos_id: what :meth:`generate` fills finished rows with, and what ends a row; None where nothing does.

    Set ``decoder.gradient_checkpointing = True`` to recompute each layer in the backward pass.

    Raises:
        TypeError, ValueError: a size, name or number is not what is wanted, or connection makes no Connection.
    """

    stack_class: Any = PlainCausalStack

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 512,
        nhead: int = 8,
        num_layers: int = 6,
        *,
        kv_heads: int | None = None,
        positions: str = "rope",
        rope_theta: float = 10000.0,
        connection: Any = "depth-lstm",
        feed_forward: bool | None = None,
        ffn: str = "gelu",
        dim_feedforward: int | None = None,
        norm: str = "layer",
        layer_norm_eps: float = 1e-6,
        bias: bool = True,
        init: str = "lipschitz",
        dropout: float = 0.1,
        tie_output: bool = True,
        max_len: int = 1024,
        pad_id: int = 0,
        eos_id: int | None = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_placement(device, dtype)
        checks.check_size("vocab_size", vocab_size, 2)
        for argument, size in (("d_model", d_model), ("nhead", nhead), ("num_layers", num_layers)):
            checks.check_size(argument, size)
        checks.check_size("max_len", max_len)
        checks.check_name("positions", positions, POSITIONS)
        checks.check_name("ffn", ffn, FEED_FORWARDS)
        checks.check_name("norm", norm, checks.NORMALISATIONS)
        checks.check_probability("dropout", dropout)
        checks.check_flags(tie_output=tie_output, bias=bias)
        if d_model % nhead:
            raise ValueError(f"nhead must divide d_model, {d_model}; found {nhead}")
        check_rotation(positions, d_model // nhead, rope_theta)
        for argument, token in (("pad_id", pad_id), ("eos_id", eos_id)):
            if token is not None or argument == "pad_id":
                checks.check_size(argument, token, 0)
                if token >= vocab_size:  # type: ignore[operator]
                    raise ValueError(f"{argument} must be below the vocabulary size, {vocab_size}; found {token}")
        if dim_feedforward is None:
            dim_feedforward = 4 * d_model if ffn == "gelu" else 8 * math.ceil(d_model / 3)
        checks.check_size("dim_feedforward", dim_feedforward)
        self.vocab_size, self.d_model, self.nhead, self.num_layers = vocab_size, d_model, nhead, num_layers
        self.position_kind, self.rope_theta, self.init = positions, rope_theta, init
        self.tie_output, self.max_len, self.pad_id, self.eos_id = tie_output, max_len, pad_id, eos_id
        self.decoder = self.stack_class(
            d_model, nhead, num_layers, dim_feedforward, dropout, layer_norm_eps, bias, device, dtype,
            connection=connection, feed_forward=feed_forward, init=init, kv_heads=kv_heads, gated=ffn == "swiglu",
            norm=norm,
        )  # fmt: skip
        self.kv_heads = nhead if kv_heads is None else kv_heads
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, d_model, **placed)
        is_added = positions in ("sinusoidal", "learned")
        self.positions = Positions(positions, max_len, d_model, device, dtype) if is_added else None
        self.output = nn.Linear(d_model, vocab_size, bias=False, **placed)
        self.input_dropout = nn.Dropout(dropout)
        self._reset_embeddings()

    def extra_repr(self) -> str:
        return f"positions={self.position_kind!r}, max_len={self.max_len}"

    def _reset_embeddings(self) -> None:
        self.tie_weights()
        if not self._is_tied() and isinstance(self.output, nn.Linear):
            initialise_embedding(self.output.weight, self.init)
        if isinstance(self.embedding, nn.Embedding):
            initialise_embedding(self.embedding.weight, self.init)
        if self.positions is not None:
            self.positions.reset_parameters(self.init)

    def reset_parameters(self) -> None:
        """Draw every parameter of the model anew."""
        self.decoder.reset_parameters()
        self._reset_embeddings()

    def new_cache(self) -> CausalCache:
        """An empty cache for :meth:`forward`."""
        return CausalCache(self.num_layers, self.kv_heads, self.d_model // self.nhead)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: CausalCache | None = None,
        return_hidden: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next token at every position, and with ``labels`` the loss before them.

        Args:
            ids: (batch, L) int64.
            attention_mask: (batch, L), bool or int64: 1 for a real token and 0 for padding, on either side. None where
                every token is real. Positions count the real tokens, and no real token sees padding.
            labels: (batch, L) int64, usually ids themselves: the logits of position t are held against the label of
                t + 1. Labels of -100, of padding and of a document's first token are left out. The loss is the mean
                cross entropy of the others in nats, 0 where there are none.
            document_ids: (batch, L) int64, for packed rows: a document goes on as long as its number does. Tokens
                attend within their document, and each starts at position 0.
            cu_seqlens: (documents + 1,) int32 or int64: the same for one row, ids (1, L), by the documents' ends,
                from 0 to L.
            cache: of :meth:`new_cache`. ids follow the tokens that it has seen, and it is given these.
            return_hidden: what ``output`` would be applied to, (batch, L, D), in place of the logits.

        Returns:
            (batch, L, vocab_size), or (loss, logits) with ``labels``.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted. Numbers inside tensors are
                looked at only where that does not stall a device: on the CPU, outside torch.compile.
        """
        checks.check_flags(return_hidden=return_hidden)
        is_packed = document_ids is not None or cu_seqlens is not None
        past = 0
        if cache is not None:
            self._check_cache(cache, ids, is_packed)
            past = cache.length
        self._check_ids(ids, past, is_packed)
        real = None if attention_mask is None else check_mask(attention_mask, ids)
        documents = check_documents(document_ids, cu_seqlens, ids)
        if labels is not None:
            self._check_labels(labels, ids, cache, return_hidden)
        places = place(ids, real, documents, cache)
        if documents is not None and can_look(ids) and int(places.positions.max()) >= self.max_len:
            raise ValueError(
                f"ids must have at most max_len, {self.max_len}, tokens a document; "
                f"found {int(places.positions.max()) + 1}"
            )
        hidden = self._hidden(ids, places, cache)
        if return_hidden:
            return hidden
        logits = self.output(hidden)
        return logits if labels is None else (_loss(logits, labels, real, places.runs), logits)

    def _hidden(self, ids: Tensor, places: Places, cache: CausalCache | None) -> Tensor:
        if cache is None:
            return self._through_layers(self.embedding(ids), places)
        hidden = self._through_layers(self.embedding(ids), places, cache.layers)
        for index, layer in enumerate(cache.layers):
            if layer.length != cache.length:
                raise ValueError(
                    f"cache must be None: decoder.layers.{index} passes it by (its forward was replaced or it is "
                    f"wrapped); found {layer.length} positions kept, wanted {cache.length}"
                )
        return hidden

    def _through_layers(
        self,
        embedded: Tensor,
        places: Places,
        caches: list[Any] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """The input of ``output`` for ``embedding``'s output (rows, L, D).

        ``caches`` has one a layer; ``outputs`` is given what the connection makes of each depth.
        """
        x = embedded * math.sqrt(self.d_model)
        if self.positions is not None:
            x = self.positions(x, places.positions)
        x = self.input_dropout(x)
        rotation = None
        if self.position_kind == "rope":
            rotation = make_rotation(places.positions, self.d_model // self.nhead, self.rope_theta, x.dtype)
        return self.decoder(x, places, rotation, caches, outputs)

    def _check_ids(self, ids: Any, past: int, is_packed: bool, range_too: bool | None = None) -> None:
        range_too = (not isinstance(ids, Tensor) or ids.device.type == "cpu") if range_too is None else range_too
        most = max(self.max_len, ids.numel()) if is_packed and isinstance(ids, Tensor) else self.max_len
        check_ids("ids", ids, self.vocab_size, most, getattr(self.embedding, "weight", None), range_too)
        if past + ids.shape[1] > self.max_len and not is_packed:
            raise ValueError(
                f"ids must have at most max_len, {self.max_len}, tokens with those of the cache; "
                f"found {past + ids.shape[1]}"
            )

    def _check_cache(self, cache: Any, ids: Any, is_packed: bool) -> None:
        if not isinstance(cache, CausalCache):
            raise TypeError(f"cache must be a CausalCache, as new_cache makes it; found {type(cache).__name__}")
        size = self.d_model // self.nhead
        found, wanted = (len(cache.layers), cache.kv_heads, cache.size), (self.num_layers, self.kv_heads, size)
        if found != wanted:
            raise ValueError(f"cache must be of a model with (layers, kv_heads, head size) {wanted}; found {found}")
        if is_packed:
            raise ValueError("cache must be None with document_ids or cu_seqlens; found a CausalCache")
        keys, weight = cache.layers[0].keys, getattr(self.embedding, "weight", None)
        if keys is not None and weight is not None and autocast_dtype(weight.device.type) is None:
            checks.check_companion("cache", keys, "model", weight, mixed=False)
        if cache.length and isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[0] != cache.rows:
            raise ValueError(f"ids must have the batch that the cache began with, {cache.rows}; found {ids.shape[0]}")

    def _check_labels(self, labels: Any, ids: Tensor, cache: CausalCache | None, return_hidden: bool) -> None:
        check_tokens_beside("labels", labels, ids)
        if cache is not None:
            raise ValueError("labels must be None with a cache; found a tensor")
        if return_hidden:
            raise ValueError("labels must be None with return_hidden=True; found a tensor")
        if can_look(labels):
            wrong = ((labels < 0) & (labels != IGNORED)) | (labels >= self.vocab_size)
            if wrong.any():
                raise ValueError(
                    f"labels must hold ids from 0 to {self.vocab_size - 1}, or {IGNORED}; found {int(labels[wrong][0])}"
                )

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int | None = None,
        beam_size: int = 1,
        length_penalty: float = 1.0,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Go on from prompts: the likeliest tokens, a sample with a temperature above 0, or a beam search.

        Args:
            ids: (batch, L) int64.
            max_new_tokens: the most tokens to produce, eos_id included; what max_len leaves if None.
            beam_size, length_penalty: see :meth:`depthlstm_fast.DepthLSTMTransformer.generate`; the length is that of
                the new tokens.
            attention_mask: (batch, L), bool or int64, 1 for a real token; shorter prompts are padded on the left. None
                where every token is real.
            temperature: tokens are drawn from softmax(logits / temperature); 0 takes the likeliest.
            top_k, top_p: a sample is one of the ``top_k`` likeliest tokens, and of so many of these that their
                probabilities reach ``top_p``.
            generator: of the sample, on the device of ids; None for torch's own.
            use_cache: keep keys and values of earlier tokens; False recomputes everything at every step, to the same
                tokens.
            return_scores: return the scores, too.

        A row is finished with eos_id. Dropout is off, whatever mode the model is in.

        Returns:
            The new tokens (batch, n) int64 with n <= max_new_tokens: eos_id included, then pad_id. With
            ``return_scores`` also the scores, (batch,), of the new tokens.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted; logits are NaN.
        """
        self._check_ids(ids, 0, False, True)
        sampler = Sampler(temperature, top_k, top_p, generator)
        settings = settings_for(
            ids, self.max_len, max_new_tokens, beam_size, length_penalty, self.eos_id, self.pad_id, sampler
        )
        checks.check_flags(use_cache=use_cache, return_scores=return_scores)
        real = check_left_padding(attention_mask, ids)
        begin = generation.own_decoding.get()
        is_own = begin is not None or not use_cache
        found = None if is_own else self._search(ids, real, settings, sampler, return_scores)
        if found is not None:
            return found if return_scores else found[0]
        with self._inference():
            if begin is None:
                decoding = (CachedDecoding if use_cache else Decoding)(self, ids, real, beam_size)
            else:
                decoding = begin(ids, real, settings)
            if beam_size > 1:
                tokens, scores = generation.beam_search(decoding.next_logits, decoding.reorder, settings)
            elif temperature:
                tokens, scores = generation.token_search(decoding.next_logits, sampler.draw, settings)
            else:
                tokens, scores = generation.greedy_search(decoding.next_logits, decoding.reorder, settings)
        return (tokens, scores) if return_scores else tokens

    def _search(
        self, ids: Tensor, real: Tensor | None, settings: generation.Settings, sampler: Sampler, scores: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Tokens and scores by another way than the search in PyTorch; None for none, as here."""
        return None


def _loss(logits: Tensor, labels: Tensor, real: Tensor | None, runs: Tensor | None) -> Tensor:
    """Mean cross entropy of the next tokens that count."""
    targets = labels[:, 1:]
    if real is not None:
        targets = targets.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
    if runs is not None:
        targets = targets.masked_fill(runs[:, 1:] != runs[:, :-1], IGNORED)
    exact = logits[:, :-1].to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    total = F.cross_entropy(exact.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)
