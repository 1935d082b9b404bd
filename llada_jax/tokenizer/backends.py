"""What encodes and decodes ordinary text: a SentencePiece model, or a tokenizer.json."""

import json
import re
from typing import ClassVar

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from llada_jax.tokenizer.special import BOS, EOS, SPECIAL_TOKEN

# Tokens that ordinary text must never encode to, whatever type the tokenizer's file gives them.
_SPECIAL = re.compile(r"<\|.+\|>")


class SentencePiece:
    """A SentencePiece model, from the content of its file."""

    def __init__(self, content: bytes):
        # Make special tokens control pieces, which never match text. User-defined pieces always do.
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        if not model.pieces:
            raise ValueError("it holds no pieces")
        for piece in model.pieces:
            if _SPECIAL.fullmatch(piece.piece):
                piece.type = piece.CONTROL
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=model.SerializeToString()
        )
        self._ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        self.max_id = len(model.pieces) - 1
        own = {BOS: self._processor.bos_id(), EOS: self._processor.eos_id()}
        self.defaults = {name: i for name, i in own.items() if i >= 0}
        self.specials = {
            piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == piece.CONTROL
        }

    def id_of(self, name: str) -> int | None:
        """The id of a token by its name, None if there is none."""
        return self._ids.get(name)

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text."""
        return self._processor.encode_as_ids(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self._processor.decode(ids)


class HuggingFace:
    """A tokenizer.json, from its content."""

    defaults: ClassVar[dict[str, int]] = {}

    def __init__(self, content: bytes):
        model = json.loads(content)
        for token in model.get("added_tokens", []):
            token["special"] = token.get("special", False) or bool(
                _SPECIAL.fullmatch(token["content"])
            )
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(model))
        self._tokenizer.encode_special_tokens = True  # encode their names as ordinary text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.max_id = max(vocab.values())
        added = {token["content"] for token in model.get("added_tokens", []) if token["special"]}
        self.specials = {
            name: i for name, i in vocab.items() if name in added or SPECIAL_TOKEN.fullmatch(name)
        }

    def id_of(self, name: str) -> int | None:
        """The id of a token by its name, None if there is none."""
        return self._tokenizer.token_to_id(name)

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)
