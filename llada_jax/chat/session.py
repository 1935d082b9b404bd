"""A conversation: its messages, the settings of the sampler, and answers while they are written."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llada_jax import sampling
from llada_jax.data.templates import encode_prompt
from llada_jax.sampling import settings as settings_lib

# Prompts are padded to a multiple of this, so that most turns use a program that is compiled.
PAD_MULTIPLE = 64
_MOST_PARTS = 4  # tokens of a character: a byte each
_SWITCH = {"true": True, "false": False}
GAP = "\N{HORIZONTAL ELLIPSIS}"  # stands for the masks that an interrupted answer has left


@dataclasses.dataclass(frozen=True)
class Frame:
    """An answer of n positions while it is written."""

    words: list[str | None]  # the text of each token; None for a mask. It stops at the first end
    fresh: np.ndarray  # [n] bool, committed since the frame before
    confidence: np.ndarray  # [n] at the commit, in 0..1; nan for masks
    passes: int

    @property
    def tokens(self) -> int:
        """How many of the n are committed."""
        return sum(word is not None for word in self.words)

    @property
    def text(self) -> str:
        """What is written; a gap stands for masks between tokens."""
        whole = "".join(GAP if word is None else word for word in self.words)
        while GAP * 2 in whole:
            whole = whole.replace(GAP * 2, GAP)
        return whole.removesuffix(GAP).strip()


class Session:
    """A conversation with a model. Errors that a user can mend are ValueErrors of one line."""

    def __init__(self, model: tuple, special: dict, args: argparse.Namespace):
        """`args` has `template`, `seed` and the flags of the sampler."""
        self._logits_fn, self._config, self._tokenizer = model
        self._special, self._template = special, args.template
        self._parser = _Parser(add_help=False, allow_abbrev=False)
        sampling.add_flags(self._parser)
        self._defaults = vars(self._parser.parse_args([]))
        self._flags = {name: getattr(args, name) for name in self._defaults}
        self._key = jax.random.key(args.seed)
        self._asked, self._compiled = 0, set()
        self.messages: list[dict[str, str]] = []
        self._check(self._flags)

    @property
    def settings(self) -> dict[str, Any]:
        """The flags of the sampler that have a value."""
        return {name: value for name, value in self._flags.items() if value is not None}

    @property
    def most(self) -> int:
        """The number of tokens that the model takes."""
        return self._config.max_sequence_length

    @property
    def prompt(self) -> list[int]:
        """The ids of the conversation so far."""
        return self._encode(self.messages)

    def set(self, words: Sequence[str]) -> str:
        """Changes settings, given as NAME VALUE or NAME=VALUE; returns what has changed.

        "none" as a VALUE is the default. If one of them is refused, nothing is changed.
        """
        new = dict(self._flags)
        pairs = list(_pairs(words))
        for name, value in pairs:
            new[name] = self._converted(name, value)
        self._check(new)
        self._flags = new
        return ", ".join(f"{name}={new[name]}" for name, _ in pairs)

    def _converted(self, name: str, text: str) -> Any:
        """The value of a setting, of the type of its flag."""
        if name not in self._defaults:
            near = difflib.get_close_matches(name, self._defaults, 1)
            advice = f'did you mean "{near[0]}"?' if near else "/show lists them"
            raise ValueError(f"there is no setting {name!r}; {advice}")
        if text == "none":
            return self._defaults[name]
        if self._defaults[name] is False:
            if text not in _SWITCH:
                raise ValueError(f"{name}={text} must be true or false")
            return _SWITCH[text]
        return getattr(self._parser.parse_args([f"--{name}={text}"]), name)

    def ask(self, text: str, every: int) -> tuple[bool, Iterator[Frame]]:
        """Returns whether the sampler must be compiled, and frames of the answer.

        There is one after every so many passes, and one at the end. The turn is part of the
        conversation once it is `add`ed.
        """
        ids = self._encode([*self.messages, _user(text)])
        gen_length = self._flags["gen_length"]
        room = self.most - gen_length
        if len(ids) > room:
            raise ValueError(
                f"the conversation has {len(ids)} tokens and gen_length={gen_length}, "
                f"the model takes {self.most}: /new begins anew, /undo forgets the last turn, a "
                "lower gen_length makes room"
            )
        width = min(-(-len(ids) // PAD_MULTIPLE) * PAD_MULTIPLE, room)
        self._asked += 1
        program = (width, *self._flags.items())
        return program not in self._compiled, self._frames(ids, width, every, program)

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        # The template "plain" makes a transcript of messages. The first turn is its text alone.
        alone = self._template == "plain" and len(messages) == 1
        prompt = messages[0]["content"] if alone else messages
        return encode_prompt(self._tokenizer, prompt, self._template)

    def _frames(self, ids: list[int], width: int, every: int, program) -> Iterator[Frame]:
        padding = [self._special["pad_id"]] * (width - len(ids))
        special = {k: v for k, v in self._special.items() if k != "pad_id"}
        traces = sampling.stream(
            self._logits_fn,
            np.asarray([[*padding, *ids]], np.int32),
            attention_mask=np.asarray([[0] * len(padding) + [1] * len(ids)], np.int32),
            key=jax.random.fold_in(self._key, self._asked),
            every=every,
            **special,
            **_settings(self._flags),
        )
        before = 0
        for trace in traces:
            self._compiled.add(program)
            yield self._frame(trace, width, before)
            before = int(trace.passes)

    def _frame(self, trace: sampling.Trace, width: int, before: int) -> Frame:
        part = slice(width, width + int(trace.lengths[0]))
        tokens, steps, confidence = (
            np.asarray(x[0, part]) for x in (trace.tokens, trace.steps, trace.confidence)
        )
        ids = [None if i == self._special["mask_id"] else int(i) for i in tokens]
        ends = {self._special["eos_id"], self._special["eot_id"]} - {None}
        shown = next((k for k, i in enumerate(ids) if i in ends), len(ids))
        return Frame(
            words=words(self._tokenizer.decode, ids[:shown]),
            fresh=(steps > before)[:shown],
            # A confidence below 0 is minus an entropy, whose exp is between 0 and 1.
            confidence=np.where(confidence < 0, np.exp(confidence), confidence)[:shown],
            passes=int(trace.passes),
        )

    def add(self, text: str, answer: str):
        """Adds a turn: what the user said, and the answer."""
        self.messages += [_user(text), {"role": "assistant", "content": answer}]

    def undo(self) -> str:
        """Forgets the last turn; returns what the user had said."""
        if not self.messages:
            raise ValueError("there is no turn to undo")
        said = self.messages[-2]["content"]
        del self.messages[-2:]
        return said

    def _check(self, flags: dict[str, Any]):
        given = _settings(flags)
        special = {k: v for k, v in self._special.items() if k != "pad_id"}
        settings_lib.make(True, **special, **given)
        if given["gen_length"] >= self.most:
            raise ValueError(
                f"gen_length={given['gen_length']} leaves no room for a prompt: the model takes "
                f"{self.most} tokens"
            )


class _Parser(argparse.ArgumentParser):
    """Raises its errors."""

    def error(self, message: str):
        raise ValueError(message)


def _settings(flags: dict[str, Any]) -> dict[str, Any]:
    """The keywords of the sampler that have a value."""
    given = sampling.settings_of(argparse.Namespace(**flags))
    return {name: value for name, value in given.items() if value is not None}


def words(decode: Callable[[Sequence[int]], str], ids: Sequence[int | None]) -> list[str | None]:
    """The text that each token adds to the text before it; None for None, which is a mask.

    Tokens that are parts of one character add it with the last of them.
    """
    found: list[str | None] = []
    first = seen = 0  # a token is decoded with the one before it: alone it may lack its space
    for k, token in enumerate(ids):
        if token is None:
            found.append(None)
            first = seen = k + 1
            continue
        before, now = decode(ids[first:seen]), decode(ids[first : k + 1])
        ends = k + 1 == len(ids) or ids[k + 1] is None
        part = now.endswith("\N{REPLACEMENT CHARACTER}") and k + 1 - seen < _MOST_PARTS
        if part and not ends:
            found.append("")
            continue
        found.append(now[len(before) :])
        first, seen = seen, k + 1
    return found


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(NAME, VALUE) of each setting."""
    parts = [part for word in words for part in word.removeprefix("--").split("=", 1)]
    if not parts or len(parts) % 2:
        raise ValueError("write /set NAME VALUE; several: /set NAME VALUE NAME VALUE")
    yield from zip(parts[::2], parts[1::2], strict=True)
