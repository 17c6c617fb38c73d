"""A translation model around any encoder and decoder: embeddings, positions, output layer, search; plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..modes import is_direct, is_traced
from ..torch_private import is_transformed
from . import generation
from .positions import POSITIONS, Positions, initialise_embedding
from .tied import TiedModel

Memory = Tensor | tuple[Tensor, ...]


def check_ids(
    argument: str, ids: Any, vocab: int, max_len: int, held: Tensor | None = None, range_too: bool = True
) -> None:
    """Raise TypeError or ValueError unless ids can be a batch of sequences; ``held`` is a weight of the model."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{argument} must be a torch.Tensor; found {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"{argument} must be int64; found {ids.dtype}")
    checks.check_dense(argument, ids)
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(f"{argument} must have shape (batch, length), neither of them 0; found {tuple(ids.shape)}")
    if ids.shape[1] > max_len:
        raise ValueError(f"{argument} must have at most max_len, {max_len}, tokens; found {ids.shape[1]}")
    if held is not None and ids.is_meta and not held.is_meta:
        # an embedding on the CPU would take them, and return what memory holds
        raise ValueError(f"{argument} must be on the device of the model, {held.device}; found meta")
    if range_too and not is_traced() and is_direct(ids) and not is_transformed():
        least, most = (int(bound) for bound in torch.aminmax(ids))
        if least < 0 or most >= vocab:
            raise ValueError(f"{argument} must hold ids from 0 to {vocab - 1}; found {least if least < 0 else most}")


def check_search(max_length: Any, beam_size: Any, length_penalty: Any, max_len: int) -> None:
    """Raise TypeError or ValueError unless these can be the arguments of a search."""
    checks.check_size("max_length", max_length)
    checks.check_size("beam_size", beam_size)
    if max_length > max_len:
        raise ValueError(f"max_length must be at most max_len, {max_len}; found {max_length}")
    generation.check_penalty(length_penalty, max_length)


class TranslationModel(TiedModel):
    """What surrounds ``encoder`` and ``decoder``, which a subclass sets between :meth:`_begin` and :meth:`_surround`.

    The decoder is called as :class:`DepthLSTMDecoder` is, and starts incremental decoding by its ``new_caches``.
    """

    encoder: nn.Module
    decoder: Any
    decoder_class: type[Any]
    _embedding_name = "tgt_embedding"

    def _begin(
        self,
        src_vocab: int,
        tgt_vocab: int,
        d_model: int,
        *,
        init: str,
        positions: str,
        max_len: int,
        share_embeddings: bool,
        tie_output: bool,
        pad_id: int,
        bos_id: int,
        eos_id: int,
    ) -> None:
        """Check the arguments that concern the surroundings, and keep them."""
        checks.check_size("src_vocab", src_vocab)
        checks.check_size("tgt_vocab", tgt_vocab, 2)
        checks.check_size("max_len", max_len)
        checks.check_name("positions", positions, POSITIONS)
        checks.check_flags(share_embeddings=share_embeddings, tie_output=tie_output)
        for argument, token in (("pad_id", pad_id), ("bos_id", bos_id), ("eos_id", eos_id)):
            checks.check_size(argument, token, 0)
            vocab = min(src_vocab, tgt_vocab) if argument == "pad_id" else tgt_vocab
            if token >= vocab:
                raise ValueError(f"{argument} must be below the vocabulary size, {vocab}; found {token}")
        if share_embeddings and src_vocab != tgt_vocab:
            raise ValueError(
                f"tgt_vocab must equal src_vocab, {src_vocab}, with share_embeddings=True; found {tgt_vocab}"
            )
        self.src_vocab, self.tgt_vocab, self.d_model, self.max_len, self.init = (
            src_vocab,
            tgt_vocab,
            d_model,
            max_len,
            init,
        )
        self.pad_id, self.bos_id, self.eos_id, self.tie_output = pad_id, bos_id, eos_id, tie_output

    def _surround(
        self, positions: str, share_embeddings: bool, dropout: float, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Make the embeddings, the positions and the output layer."""
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.src_embedding = nn.Embedding(self.src_vocab, self.d_model, **placed)
        self.tgt_embedding = (
            self.src_embedding if share_embeddings else nn.Embedding(self.tgt_vocab, self.d_model, **placed)
        )
        self.src_positions = Positions(positions, self.max_len, self.d_model, device, dtype)
        self.tgt_positions = Positions(positions, self.max_len, self.d_model, device, dtype)
        self.output = nn.Linear(self.d_model, self.tgt_vocab, bias=False, **placed)
        self.tie_weights()
        self.input_dropout = nn.Dropout(dropout)
        self._reset_embeddings()

    def _reset_embeddings(self) -> None:
        self.tie_weights()
        if not self._is_tied() and isinstance(self.output, nn.Linear):
            initialise_embedding(self.output.weight, self.init)
        for embedding in dict.fromkeys((self.src_embedding, self.tgt_embedding)):
            if isinstance(embedding, nn.Embedding):
                initialise_embedding(embedding.weight, self.init)
        self.src_positions.reset_parameters(self.init)
        self.tgt_positions.reset_parameters(self.init)

    def reset_parameters(self) -> None:
        """Draw every parameter of the model anew."""
        self.encoder.reset_parameters()  # type: ignore[operator]
        self.decoder.reset_parameters()
        self._reset_embeddings()

    def _check_ids(self, argument: str, ids: Any, vocab: int, range_too: bool = True) -> None:
        held = getattr(self.src_embedding, "weight", None)
        check_ids(argument, ids, vocab, self.max_len, held, range_too)

    def _embed(self, ids: Tensor, embedding: nn.Embedding, positions: Positions, start: int = 0) -> Tensor:
        return self.input_dropout(positions(embedding(ids) * math.sqrt(self.d_model), start))

    def encode(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        """The encoder's output, (batch, S, D), for src (batch, S) int64; the mask is ``src == pad_id`` if None.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted. Whether ids are in range is
                looked at only where that does not stall a device: on the CPU, outside torch.compile.
        """
        x, padding = self._embed_source(src, src_key_padding_mask)
        return self.encoder(x, src_key_padding_mask=padding)

    def _embed_source(self, src: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        self._check_ids("src", src, self.src_vocab, src.device.type == "cpu" if isinstance(src, Tensor) else True)
        embedded = self._embed(src, self.src_embedding, self.src_positions)
        return embedded, src == self.pad_id if padding is None else padding

    def _decode(self, tgt: Tensor, memory: Memory, tgt_padding: Tensor | None, memory_padding: Tensor | None) -> Tensor:
        return self.decoder(
            self._embed(tgt, self.tgt_embedding, self.tgt_positions),
            memory,
            tgt_key_padding_mask=tgt_padding,
            memory_key_padding_mask=memory_padding,
            tgt_is_causal=True,
        )

    def decode(
        self,
        tgt: Tensor,
        memory: Memory,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits (batch, L, tgt_vocab) for tgt (batch, L) int64 and memory (batch, S, D); causal.

        With ``return_hidden`` what ``output`` would be applied to, (batch, L, D): for losses that make the logits
        themselves, in pieces. Raises as :meth:`encode`.
        """
        checks.check_flags(return_hidden=return_hidden)
        self._check_ids("tgt", tgt, self.tgt_vocab, tgt.device.type == "cpu" if isinstance(tgt, Tensor) else True)
        hidden = self._decode(tgt, memory, tgt_key_padding_mask, memory_key_padding_mask)
        return hidden if return_hidden else self.output(hidden)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits of the next token at every position of tgt.

        Args:
            src: (batch, S) int64.
            tgt: (batch, L) int64, starting with bos_id.
            src_key_padding_mask: (batch, S), True where padded; ``src == pad_id`` if None.
            tgt_key_padding_mask: (batch, L), True where padded. None for no mask, which is right for targets padded on
                the right: attention is causal, so no token sees padding behind it, and attention without a mask is
                faster.
            return_hidden: see :meth:`decode`.

        Returns:
            (batch, L, tgt_vocab), or (batch, L, D) with ``return_hidden``.

        Raises:
            TypeError, ValueError: as :meth:`encode`.
        """
        for argument, ids in (("src", src), ("tgt", tgt)):
            if isinstance(ids, Tensor):
                checks.check_dense(argument, ids)
        if isinstance(src, Tensor) and isinstance(tgt, Tensor) and src.shape[:1] != tgt.shape[:1]:
            raise ValueError(
                f"tgt must have the batch size of src, {tuple(src.shape[:1])}; found {tuple(tgt.shape[:1])}"
            )
        padding = (
            src == self.pad_id if src_key_padding_mask is None and isinstance(src, Tensor) else src_key_padding_mask
        )
        return self.decode(tgt, self.encode(src, padding), tgt_key_padding_mask, padding, return_hidden)

    @torch.no_grad()
    def generate(
        self,
        src: Tensor,
        max_length: int | None = None,
        beam_size: int = 1,
        length_penalty: float = 1.0,
        *,
        src_key_padding_mask: Tensor | None = None,
        use_cache: bool = True,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Translate: greedy decoding with ``beam_size=1``, otherwise beam search.

        Args:
            src: (batch, S) int64.
            max_length: the most tokens to produce, eos_id included; max_len if None.
            beam_size: hypotheses kept for each source.
            length_penalty: alpha. A hypothesis of n tokens, eos_id included, is scored log p / ((5 + n) / 6) ** alpha
                (Wu et al., 2016). For ``max_length`` tokens the divisor stays between 1e-30 and 1e30.
            src_key_padding_mask: (batch, S), True where padded; ``src == pad_id`` if None.
            use_cache: keep keys and values of earlier tokens; False recomputes everything at every step, to the same
                tokens. Layers whose forward was replaced by one that takes no ``cache`` are run without it.
            return_scores: return the scores, too.

        A source is finished when its hypothesis has produced eos_id, with beams when ``beam_size`` of its hypotheses
        have; decoding stops when all are. Of equal scores the one of the earlier beam and then the smaller id wins.
        Dropout is off, whatever mode the model is in.

        Returns:
            Tokens (batch, n) int64 with n <= max_length: bos_id left out, eos_id included, then pad_id. With
            ``return_scores`` also the scores, (batch,).

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted; logits are NaN.
        """
        self._check_ids("src", src, self.src_vocab)
        max_length = self.max_len if max_length is None else max_length
        check_search(max_length, beam_size, length_penalty, self.max_len)
        checks.check_flags(use_cache=use_cache, return_scores=return_scores)
        settings = generation.Settings(
            src.shape[0], beam_size, max_length, length_penalty, self.bos_id, self.eos_id, self.pad_id, src.device
        )
        begin = generation.own_decoding.get()
        is_own = begin is not None or not use_cache
        found = None if is_own else self._search(src, src_key_padding_mask, settings, return_scores)
        if found is not None:
            return found if return_scores else found[0]
        with self._inference():
            padding = src == self.pad_id if src_key_padding_mask is None else src_key_padding_mask
            memory = self.encode(src, padding)
            takes_caches = getattr(self.decoder, "takes_caches", None)  # a wrapper need not have it
            cached = use_cache and takes_caches is not None and takes_caches()
            if begin is None:
                decoding = (CachedDecoding if cached else Decoding)(self, memory, padding, beam_size)
            else:
                decoding = begin(memory, padding, settings)
            search = generation.greedy_search if beam_size == 1 else generation.beam_search
            tokens, scores = search(decoding.next_logits, decoding.reorder, settings)
        return (tokens, scores) if return_scores else tokens

    def _search(
        self, src: Tensor, mask: Tensor | None, settings: generation.Settings, scores: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Tokens and scores by another way than the search in PyTorch; None for none, as here."""
        return None


class Decoding:
    """The next token's logits for batch * beams rows, everything computed anew at every step."""

    def __init__(self, model: TranslationModel, memory: Memory, padding: Tensor, beams: int) -> None:
        self.model = model
        self.memory: Memory = (
            tuple(each.repeat_interleave(beams, 0) for each in memory)
            if isinstance(memory, tuple)
            else memory.repeat_interleave(beams, 0)
        )
        self.padding = padding.repeat_interleave(beams, 0)

    def next_logits(self, ids: Tensor) -> Tensor:
        """(rows, tgt_vocab) after ids (rows, n)."""
        return self.model.output(self.model._decode(ids, self.memory, None, self.padding)[:, -1])

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row ``rows[i]``: nothing is kept, so there is nothing to do."""


class CachedDecoding:
    """The next token's logits for batch * beams rows, from the last token and what the decoder's caches keep."""

    def __init__(self, model: TranslationModel, memory: Memory, padding: Tensor, beams: int) -> None:
        self.model, self.memory = model, memory
        self.caches = model.decoder.new_caches(memory, padding)

    def next_logits(self, ids: Tensor) -> Tensor:
        """(rows, tgt_vocab) after ids (rows, n), of which all but the last token have been seen."""
        model = self.model
        embedded = model._embed(ids[:, -1:], model.tgt_embedding, model.tgt_positions, ids.shape[1] - 1)
        hidden = self._step(embedded)
        for index, cache in enumerate(self.caches):
            if cache.length != ids.shape[1]:
                raise ValueError(
                    f"use_cache must be False: decoder.layers.{index} passes its cache "
                    f"by (its forward was replaced or it is wrapped); "
                    f"found {cache.length} positions kept, wanted {ids.shape[1]}"
                )
        return model.output(hidden[:, 0])

    def _step(self, embedded: Tensor) -> Tensor:
        decoder = self.model.decoder
        if (
            getattr(decoder.step, "__func__", None) is self.model.decoder_class.step
        ):  # what wraps the decoder sees the call
            return decoder(embedded, self.memory, caches=self.caches)
        return decoder.step(embedded, self.caches)  # the user's own: compiled, for example

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row ``rows[i]``."""
        for cache in self.caches:
            cache.reorder(rows)
