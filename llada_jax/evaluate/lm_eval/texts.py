"""Texts of the harness as token ids, and token ids as the texts that it scores."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llada_jax import sampling
from llada_jax.tokenizer import Tokenizer


@dataclasses.dataclass
class Texts:
    """How texts become ids, and ids texts.

    Names of special tokens in a text become their ids, as for every model of the harness. The mask
    token's name stays text: it would be filled, or make a likelihood impossible.

    max_length: tokens that the model takes. Longer prompts are cut from the left; `cut` is their
        number.
    bos_id: a token before every prompt that does not begin with it; None for none.
    published: ids and texts as LLaDA's eval_llada.py makes them. Letters are lost where the
        tokenizer merges over the end of a prompt, the mask token's name is a mask, a response goes
        on after its end, and nothing is cut.
    """

    tokenizer: Tokenizer
    max_length: int
    eos_id: int | None
    bos_id: int | None = None
    published: bool = False
    cut: int = 0

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without the token before it."""
        special, mask_id = self.tokenizer.special_tokens, self.tokenizer.mask_id
        if not self.published:
            special = {name: i for name, i in special.items() if i != mask_id}
        return self.tokenizer.encode(text, special)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a prompt and its answer; raises ValueError if they do not fit the model.

        White space at the end of the context belongs to the continuation, unless a special token
        stands before it. Both texts are encoded as one. The prompt are the first ids that the
        context alone has too; the answer are all others. So no letter is lost: if the tokenizer
        merges letters of both, the answer has the merged token.
        """
        context, continuation = self._split(context, continuation)
        alone, whole = self.encode(context), self.encode(context + continuation)
        if self.published:
            prompt, answer = alone, whole[len(alone) :]
        else:
            same = next(
                (k for k, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b),
                min(len(alone), len(whole)),
            )
            prompt, answer = whole[:same], whole[same:]
        return self.fit(prompt, len(answer), f"the continuation {continuation[:40]!r}"), answer

    def _split(self, context: str, continuation: str) -> tuple[str, str]:
        kept = context.rstrip()
        if not self.published and kept.endswith(tuple(self.tokenizer.special_tokens)):
            return context, continuation  # the header of a turn
        return kept, context[len(kept) :] + continuation

    def fit(self, prompt: list[int], others: int, what: str) -> list[int]:
        """The prompt with its first token, cut from the left so that `others` tokens have room.

        Raises ValueError if they alone have none; `what` names them in the message.
        """
        if self.bos_id is not None and prompt[:1] != [self.bos_id]:
            prompt = [self.bos_id, *prompt]
        room = self.max_length - others
        if room < 0 or (self.published and len(prompt) > room):
            has = f"{len(prompt)} tokens of the prompt and " if self.published else ""
            raise ValueError(
                f"{what} has {has}{others} tokens, the model takes {self.max_length}: leave it out"
            )
        if len(prompt) <= room:
            return prompt
        self.cut += 1
        return prompt[len(prompt) - room :]

    def ended(self, tokens: Sequence[int] | np.ndarray) -> bool:
        """Whether a response has its last token."""
        return not self.published and len(self._own(tokens)) < len(tokens)

    def said(self, tokens: Sequence[int] | np.ndarray, until: Sequence[str]) -> str:
        """The text of a response before its end, and before each stop string in turn.

        A stop string may be the name of a special token. These are left out of the result.
        """
        runs = self.tokenizer.runs(self._own(tokens))
        text = "".join(run for run, _ in runs)
        for word in until:
            text = text.partition(word)[0]
        said, left = "", len(text)
        for run, is_special in runs:
            kept = run[:left]
            # LLaDA's adapter encodes the text anew, which finds whole names of special tokens only.
            is_letters = self.published and 0 < len(kept) < len(run)
            said += kept if is_letters or not is_special else ""
            left -= len(kept)
        return said

    def stops(self, tokens: Sequence[int] | np.ndarray, until: Sequence[str]) -> bool:
        """Whether a response has its end or a stop string."""
        text = "".join(run for run, _ in self.tokenizer.runs(self._own(tokens)))
        return self.ended(tokens) or any(word in text for word in until)

    def _own(self, tokens: Sequence[int] | np.ndarray) -> list[int]:
        """The tokens before EOS and EoT."""
        if self.published:
            return [int(i) for i in tokens]
        return sampling.trim(tokens, self.eos_id, self.tokenizer.eot_id)
