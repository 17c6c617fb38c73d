"""A translation Transformer built on depth-wise LSTM layers, in plain PyTorch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..modes import is_direct, is_traced
from ..torch_private import is_transformed
from . import generation
from .layers import DepthLSTMDecoderLayer, DepthLSTMEncoderLayer
from .positions import POSITIONS, Positions, initialise_embedding
from .positions import sinusoidal_positions as sinusoidal_positions
from .stacks import DepthLSTMDecoder, DepthLSTMEncoder


class DepthLSTMTransformer(nn.Module):
    """Encoder-decoder Transformer whose residual connections are depth-wise LSTMs.

    It takes tokens (batch, length) and returns logits.

    Args:
        src_vocab, tgt_vocab: vocabulary sizes.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, activation, layer_norm_eps, bias: sizes
            and kinds as in :class:`DepthLSTMEncoderLayer`.
        dropout: of the layers, and of the embedded input.
        hidden, norm, sublayer, init, forget_bias, merge: see the layers.
        share_cell, init_cell: see the stacks.
        positions: "sinusoidal", or "learned": one table for each side.
        max_len: the longest sequence, source or target.
        share_embeddings: one embedding for both sides; the vocabularies must then have one size.
        tie_output: the output layer's weight is the target embedding. The output layer has no bias.
        final_norm: a LayerNorm on the output of each stack.
        pad_id, bos_id, eos_id: special tokens.

    Embeddings are multiplied by sqrt(d_model). They start at U(+-sqrt(2/(vocab + D))) with ``init="lipschitz"``, at
    Xavier's uniform with "glorot". The padding token's row is an ordinary row, because padding is masked wherever it
    could be seen. With a tied output layer that row is also trained as an output.

    Raises:
        TypeError, ValueError: a size, name or number is invalid.
    """

    encoder_layer_class: type[DepthLSTMEncoderLayer] = DepthLSTMEncoderLayer
    decoder_layer_class: type[DepthLSTMDecoderLayer] = DepthLSTMDecoderLayer
    encoder_class: type[DepthLSTMEncoder] = DepthLSTMEncoder
    decoder_class: type[DepthLSTMDecoder] = DepthLSTMDecoder
    _ties_after_load = _output_alone_is_loaded = False

    def __init__(
        self,
        src_vocab: int,
        tgt_vocab: int,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: str = "gelu",
        *,
        hidden: str = "linear",
        norm: str = "gate",
        merge: str = "add",
        sublayer: bool = False,
        share_cell: bool = False,
        init: str = "lipschitz",
        init_cell: str = "zeros",
        forget_bias: float = 0.0,
        layer_norm_eps: float = 1e-6,
        bias: bool = True,
        positions: str = "sinusoidal",
        max_len: int = 1024,
        share_embeddings: bool = False,
        tie_output: bool = True,
        final_norm: bool = True,
        pad_id: int = 0,
        bos_id: int = 1,
        eos_id: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.check_size("src_vocab", src_vocab)
        checks.check_size("tgt_vocab", tgt_vocab, 2)
        checks.check_size("max_len", max_len)
        checks.check_name("positions", positions, POSITIONS)
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
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        common: dict[str, Any] = {
            "hidden": hidden,
            "norm": norm,
            "forget_bias": forget_bias,
            "sublayer": sublayer,
            "init": init,
            **placed,
        }
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, True, bias)
        encoder_layer = self.encoder_layer_class(*sizes, **common)
        decoder_layer = self.decoder_layer_class(*sizes, merge=merge, **common)
        norms = [nn.LayerNorm(d_model, layer_norm_eps, **placed) if final_norm else None for _ in range(2)]
        self.encoder = self.encoder_class(encoder_layer, num_encoder_layers, norms[0], share_cell, init_cell)
        self.decoder = self.decoder_class(decoder_layer, num_decoder_layers, norms[1], share_cell, init_cell)
        self.src_embedding = nn.Embedding(src_vocab, d_model, **placed)
        self.tgt_embedding = self.src_embedding if share_embeddings else nn.Embedding(tgt_vocab, d_model, **placed)
        self.src_positions = Positions(positions, max_len, d_model, device, dtype)
        self.tgt_positions = Positions(positions, max_len, d_model, device, dtype)
        self.output = nn.Linear(d_model, tgt_vocab, bias=False, **placed)
        self.tie_weights()
        self.input_dropout = nn.Dropout(dropout)
        self._reset_embeddings()
        self.register_load_state_dict_post_hook(_tie_after_load)

    def _is_tied(self) -> bool:
        return getattr(self.output, "weight", None) is getattr(self.tgt_embedding, "weight", self)

    def tie_weights(self) -> None:
        """With ``tie_output=True`` make the output layer's weight the target embedding's again.

        ``to_empty()`` and ``load_state_dict(assign=True)`` of a tied model, and ``reset_parameters()``, call it. Call
        it yourself after any other change that gave each of the two its own parameter. If one of the two is on the meta
        device, the other's weight is taken. Layers that are no longer an nn.Linear or nn.Embedding, and weights of
        different types, are left as they are.
        """
        if not self.tie_output or self._is_tied():
            return
        if not isinstance(self.output, nn.Linear) or not isinstance(self.tgt_embedding, nn.Embedding):
            return
        own, embedded = self.output._parameters.get("weight"), self.tgt_embedding._parameters.get("weight")
        if own is None or embedded is None or type(own) is not type(embedded) or own.shape != embedded.shape:
            return
        if (embedded.is_meta and not own.is_meta) or self._output_alone_is_loaded:
            self.tgt_embedding.weight = own
        else:
            self.output.weight = embedded

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        tied = self._is_tied()
        super()._apply(fn, recurse)
        if tied:
            self.tie_weights()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own, embedded = (state_dict.get(f"{prefix}{name}.weight") for name in ("output", "tgt_embedding"))
        on_meta = any(
            getattr(module.weight, "is_meta", False)
            for module in (self.output, self.tgt_embedding)
            if hasattr(module, "weight")
        )
        # A tie is made again if loading breaks it, or if it was lost before there was a weight to load into. Two
        # weights that differ belong to the user's own head.
        self._ties_after_load = self._is_tied() or (
            on_meta and (own is None or embedded is None or _are_equal(own, embedded))
        )
        self._output_alone_is_loaded = own is not None and embedded is None
        super()._load_from_state_dict(state_dict, prefix, *rest)

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
        self.encoder.reset_parameters()
        self.decoder.reset_parameters()
        self._reset_embeddings()

    def _check_ids(self, argument: str, ids: Any, vocab: int, range_too: bool = True) -> None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"{argument} must be a torch.Tensor; found {type(ids).__name__}")
        if ids.dtype != torch.int64:
            raise TypeError(f"{argument} must be int64; found {ids.dtype}")
        if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
            raise ValueError(f"{argument} must have shape (batch, length), neither of them 0; found {tuple(ids.shape)}")
        if ids.shape[1] > self.max_len:
            raise ValueError(f"{argument} must have at most max_len, {self.max_len}, tokens; found {ids.shape[1]}")
        held = getattr(self.src_embedding, "weight", ids)
        if ids.is_meta and not held.is_meta:  # a CPU embedding would accept them and return uninitialised memory
            raise ValueError(f"{argument} must be on the device of the model, {held.device}; found meta")
        if range_too and not is_traced() and is_direct(ids) and not is_transformed():
            least, most = (int(bound) for bound in torch.aminmax(ids))
            if least < 0 or most >= vocab:
                raise ValueError(
                    f"{argument} must hold ids from 0 to {vocab - 1}; found {least if least < 0 else most}"
                )

    def _embed(self, ids: Tensor, embedding: nn.Embedding, positions: Positions, start: int = 0) -> Tensor:
        return self.input_dropout(positions(embedding(ids) * math.sqrt(self.d_model), start))

    def encode(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        """Return the encoder's output, (batch, S, D), for src (batch, S) int64.

        The mask is ``src == pad_id`` if None.

        Raises:
            TypeError, ValueError: the message names the argument, the wanted and the found value. The range of ids is
                checked only where that does not stall a device: on the CPU, outside torch.compile.
        """
        self._check_ids("src", src, self.src_vocab, src.device.type == "cpu" if isinstance(src, Tensor) else True)
        padding = src == self.pad_id if src_key_padding_mask is None else src_key_padding_mask
        return self.encoder(self._embed(src, self.src_embedding, self.src_positions), src_key_padding_mask=padding)

    def _decode(self, tgt: Tensor, memory: Tensor, tgt_padding: Tensor | None, memory_padding: Tensor | None) -> Tensor:
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
        memory: Tensor,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        return_hidden: bool = False,
    ) -> Tensor:
        """Return logits (batch, L, tgt_vocab) for tgt (batch, L) int64 and memory (batch, S, D); causal.

        With ``return_hidden`` the result is the input of ``output``, (batch, L, D), for losses that make the logits in
        pieces themselves.
        Raises as :meth:`encode`.
        """
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
        """Return logits of the next token at every position of tgt.

        Args:
            src: (batch, S) int64.
            tgt: (batch, L) int64, starting with bos_id.
            src_key_padding_mask: (batch, S), True where padded; ``src == pad_id`` if None.
            tgt_key_padding_mask: (batch, L), True where padded; None for no mask. None is right for targets padded on
                the right: attention is causal, so no token sees padding behind it. Attention without a mask is faster.
            return_hidden: see :meth:`decode`.

        Returns:
            (batch, L, tgt_vocab), or (batch, L, D) with ``return_hidden``.

        Raises:
            TypeError, ValueError: as :meth:`encode`.
        """
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
                (Wu et al., 2016).
            src_key_padding_mask: (batch, S), True where padded; ``src == pad_id`` if None.
            use_cache: keep keys and values of earlier tokens. False recomputes everything at every step and gives the
                same tokens. Layers whose replaced forward takes no ``cache`` run without it.
            return_scores: also return the scores.

        A source is finished when its hypothesis has produced eos_id. With beams ``beam_size`` of its hypotheses must
        have. Decoding stops when all sources are finished. Of equal scores the one of the earlier beam and then the
        smaller id wins. Dropout is off in every mode of the model.

        Returns:
            Tokens (batch, n) int64 with n <= max_length: bos_id left out, eos_id included, then pad_id. With
            ``return_scores`` also the scores, (batch,).

        Raises:
            TypeError, ValueError: the message names the argument, the wanted and the found value; logits are NaN.
        """
        self._check_ids("src", src, self.src_vocab)
        max_length = self.max_len if max_length is None else max_length
        checks.check_size("max_length", max_length)
        checks.check_size("beam_size", beam_size)
        if max_length > self.max_len:
            raise ValueError(f"max_length must be at most max_len, {self.max_len}; found {max_length}")
        if isinstance(length_penalty, bool) or not isinstance(length_penalty, (int, float)):
            raise TypeError(f"length_penalty must be a float; found {type(length_penalty).__name__}")
        if not math.isfinite(length_penalty):
            raise ValueError(f"length_penalty must be finite; found {length_penalty}")
        settings = generation.Settings(
            src.shape[0], beam_size, max_length, length_penalty, self.bos_id, self.eos_id, self.pad_id, src.device
        )
        with self._inference():
            padding = src == self.pad_id if src_key_padding_mask is None else src_key_padding_mask
            memory = self.encode(src, padding)
            takes_caches = getattr(self.decoder, "takes_caches", None)  # a wrapper may lack it
            cached = use_cache and takes_caches is not None and takes_caches()
            decoding = (CachedDecoding if cached else Decoding)(self, memory, padding, beam_size)
            search = generation.greedy_search if beam_size == 1 else generation.beam_search
            tokens, scores = search(decoding.next_logits, decoding.reorder, settings)
        return (tokens, scores) if return_scores else tokens

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Switch to evaluation mode, in which nothing changes the weights, and restore each module's mode."""
        trained = [module for module in self.modules() if module.training]
        for module in trained:
            module.training = False
        try:
            yield
        finally:
            for module in trained:
                module.training = True


def _tie_after_load(model: DepthLSTMTransformer, incompatible_keys: Any) -> None:
    if model._ties_after_load:
        model.tie_weights()
    model._output_alone_is_loaded = False


def _are_equal(a: Any, b: Any) -> bool:
    """Return whether two entries of a state_dict hold the same numbers, as far as that can be told."""
    if a is b or not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.is_meta or b.is_meta:
        return True
    return (
        type(a) is type(b)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
    )


class Decoding:
    """The next token's logits for batch * beams rows; every step recomputes everything."""

    def __init__(self, model: DepthLSTMTransformer, memory: Tensor, padding: Tensor, beams: int) -> None:
        self.model = model
        self.memory, self.padding = memory.repeat_interleave(beams, 0), padding.repeat_interleave(beams, 0)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Return (rows, tgt_vocab) after ids (rows, n)."""
        return self.model.output(self.model._decode(ids, self.memory, None, self.padding)[:, -1])

    def reorder(self, rows: Tensor) -> None:
        """Do nothing: row i continues from row ``rows[i]``, and no state is kept."""


class CachedDecoding:
    """The next token's logits for batch * beams rows, from the last token and the decoder's caches."""

    def __init__(self, model: DepthLSTMTransformer, memory: Tensor, padding: Tensor, beams: int) -> None:
        self.model, self.memory = model, memory
        self.caches = model.decoder.new_caches(memory, padding)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Return (rows, tgt_vocab) after ids (rows, n); all but the last token have been seen."""
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
        if getattr(decoder.step, "__func__", None) is DepthLSTMDecoder.step:  # a wrapper of the decoder sees this call
            return decoder(embedded, self.memory, caches=self.caches)
        return decoder.step(embedded, self.caches)  # the user's own step, such as a compiled one

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue from row ``rows[i]``."""
        for cache in self.caches:
            cache.reorder(rows)
