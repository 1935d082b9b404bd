"""A tokenizer: text to ids and back, special tokens, conversations."""

import hashlib
import itertools
import json
import os
from collections.abc import Collection, Iterable, Sequence

from etils import epath

from llada_jax.files import write_whole
from llada_jax.tokenizer.backends import HuggingFace, SentencePiece
from llada_jax.tokenizer.special import (
    BOS,
    END_HEADER,
    EOS,
    EOT,
    FILES,
    HEADERS,
    MARK,
    MASK,
    START_HEADER,
    any_of,
)
from llada_jax.tokenizer.template import ChatTemplate


class Tokenizer:
    """Encodes text to ids and decodes ids to text.

    bos_id, eos_id, mask_id, start_header_id, end_header_id, eot_id: the ids of the special tokens;
        None for those that the tokenizer does not have.
    vocab_size: the largest id that can occur, plus one.
    special_tokens: all special tokens, {name: id}.
    fingerprint: a hash of the vocabulary and the special ids. Tokenizers with equal fingerprints
        encode alike.
    """

    def __init__(
        self,
        backend: SentencePiece | HuggingFace,
        files: dict[str, bytes],
        specials: dict[str, int | None],
        template: ChatTemplate | None = None,
    ):
        self._backend, self._files, self._specials = backend, files, specials
        self.bos_id, self.eos_id, self.mask_id = specials[BOS], specials[EOS], specials[MASK]
        self.start_header_id, self.end_header_id = specials[START_HEADER], specials[END_HEADER]
        self.eot_id = specials[EOT]
        self.vocab_size = 1 + max(
            [backend.max_id, *(i for i in specials.values() if i is not None)]
        )
        digest = hashlib.sha256(json.dumps(specials).encode())
        for name in FILES:
            digest.update(files.get(name, b""))
        self._roles: dict[str, list[int]] = {}
        # Names of special tokens: those of the tokenizer's file, and those of its template.
        names = {*specials, *(template.names if template else ())}
        found = {name: backend.id_of(name) for name in names}
        self.special_tokens = backend.specials | {k: i for k, i in found.items() if i is not None}
        self._template = template
        if template and self._has_headers() and self._is_llada(template):
            self._template = None  # the same ids, without the work of rendering
        if self._template:
            digest.update(self._template.source.encode())
        self.fingerprint = digest.hexdigest()[:16]

    def encode(self, text: str, special: Collection[str] = ()) -> list[int]:
        """Returns the ids of text, without bos or EOS. Other Python threads can run meanwhile.

        special: names of special tokens that become their ids where they stand in the text, but not
            in the messages of `chat_text`. All others are encoded as ordinary characters.
        """
        if not special:
            return self._backend.encode(text)
        ids: list[int] = []
        for k, part in enumerate(any_of(special).split(text)):
            if k % 2:
                ids.append(self.special_tokens[part])
            elif part:
                ids += self._backend.encode(self._unprotected(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of the ids. Special tokens and unknown ids are skipped."""
        specials = set(self._specials.values())
        ids = [int(i) for i in ids]
        return self._backend.decode(
            [i for i in ids if i not in specials and 0 <= i <= self._backend.max_id]
        )

    def runs(self, ids: Iterable[int]) -> list[tuple[str, bool]]:
        """Returns the text of the ids in runs: (text, False), or (a special token's name, True).

        Unknown ids are skipped.
        """
        names = {i: name for name, i in self.special_tokens.items()}
        found: list[tuple[str, bool]] = []
        for is_special, run in itertools.groupby(map(int, ids), lambda i: i in names):
            if is_special:
                found += [(names[i], True) for i in run]
            else:
                found.append((self.decode(run), False))
        return found

    def chat_text(self, messages: Sequence[dict], answer: str = "") -> str:
        """Returns the text of `chat_prompt`, and behind it the beginning of the answer.

        `encode(text, special_tokens)` gives its ids. A name of a special token in a message or in
        the answer has a mark behind its first letter, by which `encode` knows it as text. Raises
        ValueError as `chat_prompt` does.
        """
        contents = [self._protected(message["content"]) for message in messages]
        if self._template:
            text = self._template.text(messages, contents)
        else:
            self._check_headers()
            turns = [
                f"{START_HEADER}{message['role']}{END_HEADER}\n\n{content.strip()}{EOT}"
                for message, content in zip(messages, contents, strict=True)
            ]
            text = f"{BOS}{''.join(turns)}{START_HEADER}assistant{END_HEADER}\n\n"
        return text + self._protected(answer)

    def _protected(self, text: str) -> str:
        names = any_of(self.special_tokens)
        return names.sub(lambda found: found[0][0] + MARK + found[0][1:], text)

    def _unprotected(self, text: str) -> str:
        if MARK not in text:
            return text
        names = any_of(name[0] + MARK + name[1:] for name in self.special_tokens)
        return names.sub(lambda found: found[0].replace(MARK, ""), text)

    def chat_prompt(self, messages: Sequence[dict]) -> list[int]:
        """Returns the ids of a conversation by the chat template, up to the assistant's answer.

        The template is the tokenizer's own (`chat_template` of tokenizer_config.json, or the file
        chat_template.jinja), or LLaDA's. `messages` are dicts with role and content; content that
        looks like a special token stays text. Raises ValueError if the template refuses the
        messages, or if the tokenizer lacks a special token of LLaDA's template.
        """
        if self._template:
            return self._template.encode(messages, self._backend)
        self._check_headers()
        return self._llada_prompt(messages)

    def _check_headers(self):
        if not self._has_headers():
            missing = [name for name in HEADERS if self._specials[name] is None]
            raise ValueError(
                f"the chat template needs {', '.join(missing)}, which this tokenizer does not have;"
                ' use data.template="plain" or a tokenizer with these tokens'
            )

    def _has_headers(self) -> bool:
        return all(self._specials[name] is not None for name in HEADERS)

    def _is_llada(self, template: ChatTemplate) -> bool:
        """Whether a template gives the ids of LLaDA's for two conversations."""
        turns = [("system", "Be brief."), ("user", " a\n\nb "), ("assistant", "c"), ("user", "d")]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            return all(
                template.encode(m, self._backend) == self._llada_prompt(m)
                for m in (messages, messages[1:2])
            )
        except ValueError:
            return False

    def _llada_prompt(self, messages: Sequence[dict]) -> list[int]:
        ids = [self.bos_id]
        for message in messages:
            ids += (
                self._header(message["role"])
                + self.encode("\n\n" + message["content"].strip())
                + [self.eot_id]
            )
        return ids + self._header("assistant") + self.encode("\n\n")

    def _header(self, role: str) -> list[int]:
        if role not in self._roles:
            self._roles[role] = [self.start_header_id, *self.encode(role), self.end_header_id]
        return self._roles[role]

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the tokenizer's files to a directory.

        config.json is not among them. If the mask id was read from it, `load` needs it there too.
        """
        directory = epath.Path(directory)
        for name, content in self._files.items():
            write_whole(directory / name, content)
