"""The text that is written, and the part of it that a pass computes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llada_jax.sampling.model import call, call_cached
from llada_jax.sampling.settings import Settings


@dataclasses.dataclass
class Text:
    """What stays the same through all passes."""

    start: int  # where the response begins
    length: int
    is_prompt: Array  # [b, l] given tokens: masked in the unconditional input
    may_open: Array  # [b, l] not padding
    attention_mask: Array | None  # [b, l]
    padding: Array  # [b] positions before the first real token
    positions: Array | None  # [b, l] of RoPE; None: 0, 1, ...


@dataclasses.dataclass
class View:
    """The part of the text that a pass computes: all of it, or a window."""

    start: Any  # a traced number if the view is a window
    size: int
    text: Text
    s: Settings

    @property
    def is_full(self) -> bool:
        """Whether a pass computes the whole text."""
        return self.size == self.text.length

    @property
    def places(self):
        """The positions [w] of the view."""
        return self.start + jnp.arange(self.size)

    def of(self, x):
        """The part [b, w] of an array [b, l] of the text."""
        if x is None or self.is_full:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, 1)

    def put(self, x, part):
        """The array [b, l] with its part replaced."""
        if self.is_full:
            return part
        return jax.lax.dynamic_update_slice_in_dim(x, part, self.start, 1)

    def logits(self, logits_fn, tokens, cache):
        """Float32 logits [b, w, v] with classifier-free guidance, and the cache."""
        text, s = self.text, self.s

        def predict(tokens, attention_mask, positions):
            if cache is None:
                return call(logits_fn, tokens, attention_mask, positions), None
            if positions is None:
                positions = jnp.broadcast_to(self.places, tokens.shape)
            return call_cached(logits_fn, tokens, attention_mask, positions, cache)

        tokens, positions = self.of(tokens), self.of(text.positions)
        rest = (text.attention_mask, positions)
        if s.cfg_scale == 0:
            logits, cache = predict(tokens, *rest)
            _check_vocabulary(logits, tokens, s)
            return logits.astype(jnp.float32), cache
        given = self.of(text.is_prompt)
        both = jnp.concatenate([tokens, jnp.where(given, s.mask_id, tokens)])
        rest = tuple(None if x is None else jnp.concatenate([x, x]) for x in rest)
        logits, cache = predict(both, *rest)
        _check_vocabulary(logits, both, s)
        conditional, unconditional = jnp.split(logits.astype(jnp.float32), 2)
        return unconditional + (s.cfg_scale + 1) * (conditional - unconditional), cache


def _check_vocabulary(logits, tokens, s: Settings) -> None:
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits_fn gave logits of shape {list(logits.shape)}"
            f" for tokens of {list(tokens.shape)}"
        )
    for name in ("mask_id", "eos_id", "eot_id"):
        value = getattr(s, name)
        if value is not None and not 0 <= value < logits.shape[-1]:
            raise ValueError(
                f"{name}={value} is not in the vocabulary of {logits.shape[-1]}"
                " that logits_fn predicts"
            )
