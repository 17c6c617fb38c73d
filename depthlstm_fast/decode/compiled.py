"""A model packed on purpose, for serving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import library
from ..reference import LanguageModel
from ..reference.generation import Settings
from ..reference.token_checks import can_look
from ..reference.translation import TranslationModel, check_ids, check_search
from .captured import CapturedDecoder
from .engine import MOST_BEAMS, additive_mask, make_plan, operators, pack, run
from .plan import WEIGHTS, CannotRun


class CompiledDecoder:
    """A packed copy of a model that translates without it; :func:`compile_decoder` makes it.

    Attributes:
        nbytes: the size of the copy.
        dtype: of its matrices: "float32", "bfloat16" or "int8".
        output_dtype: of the output layer's matrix.
        max_len: the most tokens of a source, and of a translation.
    """

    def __init__(self, model: Any, dtype: str, output_dtype: str) -> None:
        packed = pack(*make_plan(model, dtype, output_dtype))
        self._blob, self._numbers = packed.blob, packed.numbers
        self.dtype, self.output_dtype = dtype, output_dtype
        self._src_vocab, self.max_len = model.src_vocab, model.max_len
        self._ids = (model.bos_id, model.eos_id, model.pad_id)

    @property
    def nbytes(self) -> int:
        return self._blob.numel()

    def __repr__(self) -> str:
        output = "" if self.output_dtype == self.dtype else f"output_dtype={self.output_dtype!r}, "
        return f"CompiledDecoder(dtype={self.dtype!r}, {output}nbytes={self.nbytes})"

    @torch.no_grad()
    def generate(
        self,
        src: Tensor,
        max_length: int | None = None,
        beam_size: int = 1,
        length_penalty: float = 1.0,
        *,
        src_key_padding_mask: Tensor | None = None,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Translate as :meth:`depthlstm_fast.DepthLSTMTransformer.generate` does, with the weights that were packed.

        The arguments are the same but for ``use_cache``; ``beam_size`` is at most 4,096. The mask is bool or float32.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted; logits are NaN.
        """
        range_too = isinstance(src, Tensor) and can_look(src)
        check_ids("src", src, self._src_vocab, self.max_len, range_too=range_too)
        max_length = self.max_len if max_length is None else max_length
        check_search(max_length, beam_size, length_penalty, self.max_len)
        checks.check_flags(return_scores=return_scores)
        if src.device.type != "cpu":
            raise ValueError(f"src must be on the CPU; found {src.device}")
        if beam_size > MOST_BEAMS:
            raise ValueError(f"beam_size must be at most {MOST_BEAMS}; found {beam_size}")
        mask = src_key_padding_mask
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.float32):
                found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"src_key_padding_mask must be a bool or float32 tensor; found {found}")
            checks.check_shape("src_key_padding_mask", mask, tuple(src.shape))
            if mask.device != src.device:
                raise ValueError(f"src_key_padding_mask must be on the CPU; found {mask.device}")
        bos, eos, pad = self._ids
        settings = Settings(src.shape[0], beam_size, max_length, length_penalty, bos, eos, pad, src.device)
        added = additive_mask(mask, src, pad)
        tokens, scores = run(self._blob, self._numbers, src, added, settings, return_scores)
        return (tokens, scores) if return_scores else tokens

    def check(self) -> None:
        """Raise RuntimeError if a byte of the copy is not as it was packed."""
        operators().decode_check(self._blob)


def compile_decoder(
    model: Any, dtype: str | None = None, output_dtype: str | None = None
) -> CompiledDecoder | CapturedDecoder:
    """Pack a model on a CPU for translation, or capture the steps of one on a GPU.

    On a CPU the result holds a copy of the weights, ``nbytes`` large, and never looks at the model again: later changes
    of the model do not reach it. ``generate()`` of the model packs by itself, too, but reads all weights at every call
    to see that they have not changed. On a GPU the result keeps the model itself.

    Args:
        model: a :class:`depthlstm_fast.DepthLSTMTransformer`, or a :class:`depthlstm_fast.Transformer` with a
            depth-wise LSTM or pre-norm, with float32 parameters on the CPU. On a GPU a model of any dtype, with any
            connection, :class:`depthlstm_fast.LanguageModel` too.
        dtype: of the packed matrices; "float32" if None. "bfloat16" and "int8" (a scale for each output) keep states,
            norms, embeddings, keys and values in float32. "int8" rounds the inputs of products to 12 to 15 bits, by
            row. A model on a GPU keeps its own.
        output_dtype: of the output layer's matrix, whose rounding moves every logit; ``dtype`` if None.

    Raises:
        TypeError: model is no translation model of this package.
        ValueError: dtype or output_dtype is not one of these, or the engine does not run this model.
        RuntimeError: the compiled library is missing.
    """
    if isinstance(model, (TranslationModel, LanguageModel)) and _is_on_gpu(model):
        for argument, name in (("dtype", dtype), ("output_dtype", output_dtype)):
            if name is not None:
                raise ValueError(f"{argument} must be None for a model on a GPU, which keeps its own; found {name!r}")
        return CapturedDecoder(model)
    dtype = "float32" if dtype is None else dtype
    checks.check_name("dtype", dtype, WEIGHTS)
    output_dtype = dtype if output_dtype is None else output_dtype
    checks.check_name("output_dtype", output_dtype, WEIGHTS)
    if not isinstance(model, TranslationModel):
        raise TypeError(f"model must be a DepthLSTMTransformer or a Transformer; found {type(model).__name__}")
    if library.load_error is not None:
        raise RuntimeError(f"compile_decoder needs the compiled library: {library.load_error}")
    try:
        return CompiledDecoder(model, dtype, output_dtype)
    except CannotRun as reason:
        raise ValueError(f"model must be one that the decode engine runs: {reason}") from None


def _is_on_gpu(model: Any) -> bool:
    return next(model.parameters()).device.type == "cuda"
