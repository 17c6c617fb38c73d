"""Translate lines of text with a run of examples/translation/train.py: ``python -m depthlstm_fast.translate``.

The command needs SentencePiece and safetensors, which the extra ``translate`` names. Nothing else imports this folder.
"""
