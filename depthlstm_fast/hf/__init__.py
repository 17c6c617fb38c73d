"""Models of Hugging Face's transformers around this package's own; importing this registers them.

Needs the extra ``[hf]``. The package itself never imports it.
"""

from __future__ import annotations

try:
    import transformers
except ImportError as error:
    raise ImportError("depthlstm_fast.hf needs transformers: pip install 'depthlstm_fast[hf]'") from error

from .configuration import DepthLSTMConfig, DepthLSTMSeq2SeqConfig
from .modeling import DepthLSTMForCausalLM
from .seq2seq import DepthLSTMForSeq2SeqLM

for _config in (DepthLSTMConfig, DepthLSTMSeq2SeqConfig):
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)
transformers.AutoModelForCausalLM.register(DepthLSTMConfig, DepthLSTMForCausalLM, exist_ok=True)
transformers.AutoModelForSeq2SeqLM.register(DepthLSTMSeq2SeqConfig, DepthLSTMForSeq2SeqLM, exist_ok=True)

__all__ = ["DepthLSTMConfig", "DepthLSTMForCausalLM", "DepthLSTMSeq2SeqConfig", "DepthLSTMForSeq2SeqLM"]
