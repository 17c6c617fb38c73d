"""Configurations of the models for transformers: what a file says of a model of this package."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from transformers import PreTrainedConfig

from .. import checks, connections


class DepthLSTMConfig(PreTrainedConfig):
    """The arguments of a :class:`depthlstm_fast.LanguageModel`, by the names that transformers has for them.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size,
            max_position_embeddings, tie_word_embeddings: vocab_size, d_model, num_layers, nhead, kv_heads,
            dim_feedforward, max_len and tie_output.
        positions, rope_theta, feed_forward, ffn, norm, layer_norm_eps, bias, init, dropout: as they are called there.
        connection: a name of :func:`depthlstm_fast.connections.names`.
        connection_options: keyword arguments of its class, or None.

    Numbers and names are checked where the model is made.
    """

    model_type = "depth_lstm"

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    positions: str = "rope"
    rope_theta: float = 10000.0
    connection: str = "depth-lstm"
    connection_options: dict | None = None
    feed_forward: bool | None = None
    ffn: str = "gelu"
    norm: str = "layer"
    layer_norm_eps: float = 1e-6
    bias: bool = True
    init: str = "lipschitz"
    dropout: float = 0.1
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def model_arguments(self) -> dict[str, Any]:
        """The keyword arguments of the :class:`depthlstm_fast.LanguageModel`.

        Raises:
            TypeError, ValueError: there is no connection of that name, or it takes no such options.
        """
        return {
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "nhead": self.num_attention_heads,
            "num_layers": self.num_hidden_layers,
            "kv_heads": self.num_key_value_heads,
            "positions": self.positions,
            "rope_theta": self.rope_theta,
            "connection": _connection(self),
            "feed_forward": self.feed_forward,
            "ffn": self.ffn,
            "dim_feedforward": self.intermediate_size,
            "norm": self.norm,
            "layer_norm_eps": self.layer_norm_eps,
            "bias": self.bias,
            "init": self.init,
            "dropout": self.dropout,
            "tie_output": self.tie_word_embeddings,
            "max_len": self.max_position_embeddings,
            "pad_id": 0 if self.pad_token_id is None else self.pad_token_id,
            "eos_id": self.eos_token_id if isinstance(self.eos_token_id, int) else None,
        }


class DepthLSTMSeq2SeqConfig(PreTrainedConfig):
    """The arguments of a :class:`depthlstm_fast.Transformer`, by the names that transformers has for them.

    Args:
        vocab_size, src_vocab_size, hidden_size, num_attention_heads, num_encoder_layers, num_hidden_layers,
            intermediate_size, max_position_embeddings, tie_word_embeddings: tgt_vocab, src_vocab (vocab_size if None),
            d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, max_len and tie_output.
        positions, feed_forward, layer_norm_eps, bias, init, dropout, share_embeddings: as they are called there.
        decoder_attention: "separate" or "add"; None for what the connection says.
        memory, fusion: as they are called there.
        connection, connection_options: see :class:`DepthLSTMConfig`.
        decoder_start_token_id: what targets begin with; it is the model's bos_id.

    Numbers and names are checked where the model is made.
    """

    model_type = "depth_lstm_seq2seq"

    vocab_size: int = 32000
    src_vocab_size: int | None = None
    hidden_size: int = 512
    num_encoder_layers: int = 6
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    positions: str = "sinusoidal"
    connection: str = "depth-lstm"
    connection_options: dict | None = None
    feed_forward: bool | None = None
    decoder_attention: str | None = None
    memory: str = "top"
    fusion: str = "gate"
    layer_norm_eps: float = 1e-6
    bias: bool = True
    init: str = "lipschitz"
    dropout: float = 0.1
    share_embeddings: bool = False
    use_cache: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.src_vocab_size is None:
            self.src_vocab_size = self.vocab_size
        super().__post_init__(**kwargs)

    def model_arguments(self) -> dict[str, Any]:
        """The keyword arguments of the :class:`depthlstm_fast.Transformer`.

        Raises:
            TypeError, ValueError: as :meth:`DepthLSTMConfig.model_arguments`; decoder_attention is another one, or
                eos_token_id an empty list.
        """
        if self.decoder_attention is not None:
            checks.check_name("decoder_attention", self.decoder_attention, ("separate", "add"))
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        if not ends:
            raise ValueError("eos_token_id must be an id, or a list of at least one; found []")
        return {
            "src_vocab": self.src_vocab_size,
            "tgt_vocab": self.vocab_size,
            "d_model": self.hidden_size,
            "nhead": self.num_attention_heads,
            "num_encoder_layers": self.num_encoder_layers,
            "num_decoder_layers": self.num_hidden_layers,
            "dim_feedforward": self.intermediate_size,
            "dropout": self.dropout,
            "connection": _connection(self),
            "feed_forward": self.feed_forward,
            "decoder_attention": self.decoder_attention,
            "memory": self.memory,
            "fusion": self.fusion,
            "init": self.init,
            "layer_norm_eps": self.layer_norm_eps,
            "bias": self.bias,
            "positions": self.positions,
            "max_len": self.max_position_embeddings,
            "share_embeddings": self.share_embeddings,
            "tie_output": self.tie_word_embeddings,
            "pad_id": self.pad_token_id,
            "bos_id": self.decoder_start_token_id,
            "eos_id": ends[0],
        }


def _connection(config: Any) -> Any:
    options = config.connection_options
    if options is None:
        return config.connection
    if not isinstance(options, dict):
        raise TypeError(f"connection_options must be a dict or None; found {type(options).__name__}")
    made = connections.get(config.connection)
    known = list(inspect.signature(made).parameters)[2:]  # behind d_model and num_branches
    for option in options:
        if option not in known:
            raise ValueError(
                f"connection_options must have arguments of {made.__name__} as keys, {', '.join(known)}; "
                f"found {option!r}"
            )
    return functools.partial(made, **options) if options else config.connection
