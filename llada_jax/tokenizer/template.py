"""A folder's own chat template, in jinja."""

import re
from collections.abc import Sequence

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llada_jax.tokenizer.backends import HuggingFace, SentencePiece
from llada_jax.tokenizer.special import MARK, SPECIAL_TOKEN, any_of


class ChatTemplate:
    """A chat template: messages to ids, with special tokens from the template alone.

    The template is rendered with a mark in place of each content. Where the mark stands, the
    content is put back as ordinary text, stripped on a side if the template strips there. So a
    content that looks like a special token cannot become one.
    """

    def __init__(self, source: str, names: dict[str, str], where: str):
        self.source, self._names, self._where = source, names, where
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"{where}: the chat template is no jinja: {error}") from error

    @property
    def names(self) -> list[str]:
        """The special tokens that are variables of the template."""
        return [name for name in self._names.values() if name]

    def _refuse(self, message: str):
        raise jinja2.TemplateError(message)

    def encode(self, messages: Sequence[dict], backend: SentencePiece | HuggingFace) -> list[int]:
        """The ids of a conversation. Raises ValueError if the template refuses it."""
        contents = [message["content"] for message in messages]
        ids: list[int] = []
        # Special tokens are split off while the marks stand: no content can add one.
        for k, part in enumerate(self._split(self._marked(messages), backend)):
            if k % 2:
                ids.append(backend.id_of(part))
            elif part:
                ids += backend.encode(_filled(part, contents))
        return ids

    def text(self, messages: Sequence[dict], contents: Sequence[str]) -> str:
        """The text of a conversation with these contents. Raises ValueError as `encode` does."""
        return _filled(self._marked(messages), contents)

    def _marked(self, messages: Sequence[dict]) -> str:
        """The text of a conversation with a mark in place of each content."""
        marked = [{**m, "content": f" {MARK}{i}{MARK} "} for i, m in enumerate(messages)]
        try:
            return self._template.render(messages=marked, add_generation_prompt=True, **self._names)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self._where}: the chat template refuses: {error}") from error

    def _split(self, text: str, backend) -> list[str]:
        """The text split at its special tokens: text, token, text, ..., token, text."""
        known = {*SPECIAL_TOKEN.findall(text), *filter(None, self._names.values())}
        known = {token for token in known if backend.id_of(token) is not None}
        return any_of(known).split(text) if known else [text]


def _filled(text: str, contents: Sequence[str]) -> str:
    """Puts contents in place of their marks, stripped on a side where the template strips."""

    def content(found: re.Match) -> str:
        value = contents[int(found[2])]
        value = value if found[1] else value.lstrip()
        return value if found[3] else value.rstrip()

    return re.sub(f"( ?){MARK}(\\d+){MARK}( ?)", content, text)
