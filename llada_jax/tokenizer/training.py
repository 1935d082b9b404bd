"""Trains a SentencePiece model that has LLaDA's special tokens."""

import io
import os
import re
from collections.abc import Iterable

import sentencepiece
from etils import epath

from llada_jax.files import write_whole
from llada_jax.tokenizer.encoding import Tokenizer
from llada_jax.tokenizer.loading import load
from llada_jax.tokenizer.special import BOS, END_HEADER, EOS, EOT, FILES, MASK, START_HEADER


def train(lines: Iterable[str], out: str | os.PathLike, vocab_size: int = 4096) -> Tokenizer:
    """Trains a SentencePiece BPE model with LLaDA's special tokens; writes `out`/tokenizer.model.

    `lines` must not contain newlines; in text, a newline is encoded as its byte. Every digit is a
    token of its own. Text is not normalised and no space is put in front, so that
    decode(encode(text)) == text and encodings can be joined. Characters without a piece fall back
    to bytes. The 7 special tokens (with <unk>) and 256 bytes take the first 263 ids.

    Raises ValueError if vocab_size does not suit the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for line in lines if line.strip()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=[MASK, START_HEADER, END_HEADER, EOT],
            minloglevel=1,
        )
    except RuntimeError as e:
        # The message begins with a place in SentencePiece's C++ code.
        reason = re.sub(r"^.*\] ", "", str(e).splitlines()[0])
        raise ValueError(f"vocab_size={vocab_size} cannot be trained on this text: {reason}") from e
    directory = epath.Path(out)
    write_whole(directory / FILES[1], model.getvalue())
    return load(directory / FILES[1])
