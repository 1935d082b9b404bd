"""Tokenizers of the LLaDA family: SentencePiece and tokenizer.json, special ids, chat template.

The ids of special tokens differ between members of the family. They are always read from files; the
code holds no constant id.
"""

from llada_jax.tokenizer.encoding import Tokenizer
from llada_jax.tokenizer.loading import load
from llada_jax.tokenizer.special import BOS, END_HEADER, EOS, EOT, FILES, MASK, START_HEADER
from llada_jax.tokenizer.training import train

__all__ = [
    "BOS",
    "END_HEADER",
    "EOS",
    "EOT",
    "FILES",
    "MASK",
    "START_HEADER",
    "Tokenizer",
    "load",
    "train",
]
