"""A model packed on purpose, for serving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import library
from ..reference.continuation import check_left_padding, settings_for
from ..reference.generation import Settings
from ..reference.language_model import LanguageModel
from ..reference.sampling import Sampler
from ..reference.token_checks import can_look
from ..reference.translation import TranslationModel, check_ids, check_search
from .captured import CapturedDecoder
from .engine import MOST_BEAMS, additive_mask, make_plan, operators, pack, run, run_prompts
from .plan import WEIGHTS, CannotRun


class _Compiled:
    """What the packed copies of both kinds of models have."""

    def __init__(self, model: Any, dtype: str, output_dtype: str) -> None:
        self._packed = pack(*make_plan(model, dtype, output_dtype))
        self.dtype, self.output_dtype, self.max_len = dtype, output_dtype, model.max_len

    @property
    def nbytes(self) -> int:
        return self._packed.blob.numel()

    def __repr__(self) -> str:
        output = "" if self.output_dtype == self.dtype else f"output_dtype={self.output_dtype!r}, "
        return f"{type(self).__name__}(dtype={self.dtype!r}, {output}nbytes={self.nbytes})"

    def check(self) -> None:
        """Raise RuntimeError if a byte of the copy is not as it was packed."""
        operators().decode_check(self._packed.blob)


class CompiledDecoder(_Compiled):
    """A packed copy of a model that translates without it; :func:`compile_decoder` makes it.

    Attributes:
        nbytes: the size of the copy.
        dtype: of its matrices: "float32", "bfloat16" or "int8".
        output_dtype: of the output layer's matrix.
        max_len: the most tokens of a source, and of a translation.
    """

    def __init__(self, model: Any, dtype: str, output_dtype: str) -> None:
        super().__init__(model, dtype, output_dtype)
        self._src_vocab = model.src_vocab
        self._ids = (model.bos_id, model.eos_id, model.pad_id)

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
        tokens, scores = run(self._packed, src, added, settings, return_scores)
        return (tokens, scores) if return_scores else tokens


class CompiledLanguageModel(_Compiled):
    """A packed copy of a language model that goes on from prompts without it; :func:`compile_decoder` makes it.

    Attributes:
        nbytes, dtype, output_dtype: as of a :class:`CompiledDecoder`.
        max_len: the most tokens of a prompt with what follows it.
    """

    def __init__(self, model: Any, dtype: str, output_dtype: str) -> None:
        super().__init__(model, dtype, output_dtype)
        self._vocab, self._eos_id, self._pad_id = model.vocab_size, model.eos_id, model.pad_id

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
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Go on as :meth:`depthlstm_fast.LanguageModel.generate` does, with the weights that were packed.

        The arguments are the same but for ``use_cache``; ``beam_size`` is at most 4,096.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was wanted; logits are NaN.
        """
        range_too = isinstance(ids, Tensor) and can_look(ids)
        check_ids("ids", ids, self._vocab, self.max_len, range_too=range_too)
        if ids.device.type != "cpu":
            raise ValueError(f"ids must be on the CPU; found {ids.device}")
        sampler = Sampler(temperature, top_k, top_p, generator)
        settings = settings_for(
            ids, self.max_len, max_new_tokens, beam_size, length_penalty, self._eos_id, self._pad_id, sampler
        )
        checks.check_flags(return_scores=return_scores)
        if beam_size > MOST_BEAMS:
            raise ValueError(f"beam_size must be at most {MOST_BEAMS}; found {beam_size}")
        real = check_left_padding(attention_mask, ids)
        tokens, scores = run_prompts(self._packed, ids, real, settings, sampler, return_scores)
        return (tokens, scores) if return_scores else tokens


def compile_decoder(
    model: Any, dtype: str | None = None, output_dtype: str | None = None
) -> CompiledDecoder | CompiledLanguageModel | CapturedDecoder:
    """Pack a model on a CPU for translation or for going on from prompts, or capture the steps of one on a GPU.

    On a CPU the result holds a copy of the weights, ``nbytes`` large, and never looks at the model again: later changes
    of the model do not reach it. ``generate()`` of the model packs by itself, too, but reads all weights at every call
    to see that they have not changed. On a GPU the result keeps the model itself.

    Args:
        model: a :class:`depthlstm_fast.DepthLSTMTransformer`, or a :class:`depthlstm_fast.Transformer` or
            :class:`depthlstm_fast.LanguageModel` with a depth-wise LSTM or pre-norm, with float32 parameters on the
            CPU. On a GPU one of any dtype, with any connection.
        dtype: of the packed matrices; "float32" if None. "bfloat16" and "int8" (a scale for each output) keep states,
            norms, embeddings, keys and values in float32. "int8" rounds the inputs of products to 12 to 15 bits, by
            row. A model on a GPU keeps its own.
        output_dtype: of the output layer's matrix, whose rounding moves every logit; ``dtype`` if None.

    Returns:
        A :class:`CompiledDecoder`, of a language model a :class:`CompiledLanguageModel`, and on a GPU a
        :class:`CapturedDecoder`.

    Raises:
        TypeError: model is no translation model and no language model of this package.
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
    if not isinstance(model, (TranslationModel, LanguageModel)):
        raise TypeError(
            f"model must be a DepthLSTMTransformer, a Transformer or a LanguageModel; found {type(model).__name__}"
        )
    if library.load_error is not None:
        raise RuntimeError(f"compile_decoder needs the compiled library: {library.load_error}")
    try:
        if isinstance(model, LanguageModel):
            return CompiledLanguageModel(model, dtype, output_dtype)
        return CompiledDecoder(model, dtype, output_dtype)
    except CannotRun as reason:
        raise ValueError(f"model must be one that the decode engine runs: {reason}") from None


def _is_on_gpu(model: Any) -> bool:
    return next(model.parameters()).device.type == "cuda"
