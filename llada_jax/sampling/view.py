"""The part of the text that a pass computes, and the logits that it gives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llada_jax.sampling import state as state_lib
from llada_jax.sampling.cache import CACHES
from llada_jax.sampling.model import call, call_cached
from llada_jax.sampling.revoke import REVOKES
from llada_jax.sampling.settings import Settings
from llada_jax.sampling.state import Rows


@dataclasses.dataclass
class View:
    """What is fed to the model, and where predictions are wanted.

    A shadow (WINO) is one more mask for each position of the block, after the text. It stands for
    its position, whose own token it does not see.
    """

    rows: Rows
    s: Settings
    fed: Any = None  # [b, w] positions that are fed; None: all
    writes: Any = None  # [b, w] whose keys and values are kept; None: all, of s, s + 1, ...
    wanted: Any = None  # [b, t] positions that are predicted; None: all
    parts: Any = None  # of a cache of parts: what its `plan` takes

    def of(self, x: Array) -> Array:
        """The part [b, t] of an array [b, l] where predictions are wanted."""
        return x if self.wanted is None else jnp.take_along_axis(x, self._clipped(), 1)

    def put(self, x: Array, part: Array) -> Array:
        """The array [b, l, ...] with that part replaced."""
        if self.wanted is None:
            return part
        return x.at[jnp.arange(x.shape[0])[:, None], self.wanted].set(part, mode="drop")

    def of_deep(self, x: Array) -> Array:
        """The part [b, t, v] of an array [b, l, v]."""
        if self.wanted is None:
            return x
        return jnp.take_along_axis(x, self._clipped()[..., None], 1)

    @property
    def places(self) -> Array:
        """The positions [b, t] where predictions are wanted."""
        if self.wanted is None:
            return jnp.broadcast_to(state_lib.places(self.rows), self.rows.tokens.shape)
        return self.wanted

    @property
    def shadow(self) -> bool:
        """Whether a shadow is fed, too."""
        return REVOKES[self.s.revoke].shadow

    def _clipped(self):
        return jnp.minimum(self.wanted, self.rows.tokens.shape[1] - 1)

    def logits(self, logits_fn, cache) -> tuple[Float[Array, "b t v"], Any, Any]:
        """Float32 logits of the wanted positions, those of the shadow or None, and the cache."""
        rows, s = self.rows, self.s
        tokens, given = self._feed(rows.tokens), self._feed(rows.given)
        mask, positions, at = self._mask(), self._positions(), self._at()
        if self.shadow:
            extra = jnp.full((tokens.shape[0], s.block_length), s.mask_id, jnp.int32)
            tokens = jnp.concatenate([tokens, extra], 1)
            given = jnp.pad(given, ((0, 0), (0, s.block_length)))
        both = s.cfg_scale > 0

        def twice(x):
            return jnp.concatenate([x, x]) if both and isinstance(x, jax.Array) else x

        if both:
            tokens = jnp.concatenate([tokens, jnp.where(given, s.mask_id, tokens)])
        mask, positions, at = (twice(x) for x in (mask, positions, at))
        if cache is None:
            logits = call(logits_fn, tokens, mask, positions, at)
        else:
            if positions is None:
                positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            if self.parts is not None:
                cache = cache.plan(**{k: twice(x) for k, x in self.parts.items()})
            else:
                cache = cache.at(*(twice(x) for x in self._slots()))
            kind = CACHES[s.cache].kind
            logits, cache = call_cached(logits_fn, kind, tokens, mask, positions, cache, at)
        _check_vocabulary(logits, (tokens if at is None else at).shape, s)
        logits = logits.astype(jnp.float32)
        if both:
            conditional, unconditional = jnp.split(logits, 2)
            logits = unconditional + (s.cfg_scale + 1) * (conditional - unconditional)
        if not self.shadow:
            return logits, None, cache
        return logits[:, : -s.block_length], logits[:, -s.block_length :], cache

    def _feed(self, x):
        """The part [b, w] of an array [b, l] that is fed."""
        return x if self.fed is None else jnp.take_along_axis(x, self.fed, 1)

    def _positions(self):
        """The RoPE positions of what is fed; None for 0, 1, ..."""
        if self.fed is None and not (self.rows.masked or self.shadow):
            return None
        fed = self.fed
        if fed is None:
            fed = jnp.broadcast_to(state_lib.places(self.rows), self.rows.tokens.shape)
        if self.shadow:
            fed = jnp.concatenate([fed, state_lib.block_places(self.rows, self.s)], 1)
        # A row begins at its first real token.
        return jnp.maximum(fed - self.rows.padding[:, None], 0)

    def _mask(self):
        """Which keys are attended to: [b, l], with a shadow [b, w, l]; None for all."""
        rows, s = self.rows, self.s
        if not (rows.masked or self.shadow):
            return None
        places = state_lib.places(rows)
        seen = rows.real & (places < rows.end[:, None])
        if not self.shadow:
            return seen.astype(jnp.int32)
        block, (batch, length) = state_lib.block_places(rows, s), rows.tokens.shape
        fed = length if self.fed is None else self.fed.shape[1]
        of_text = jnp.pad(seen, ((0, 0), (0, s.block_length)))
        of_text = jnp.broadcast_to(of_text[:, None], (batch, fed, length + s.block_length))
        others = seen[:, None] & (places != block[..., None])
        shadows = jnp.broadcast_to(
            (block < rows.end[:, None])[:, None], (batch, s.block_length, s.block_length)
        )
        of_shadow = jnp.concatenate([others, shadows], 2)
        return jnp.concatenate([of_text, of_shadow], 1)

    def _at(self):
        """The indices of the wanted positions in what is fed; None for all."""
        if self.wanted is None:
            return None
        if self.fed is None:
            at, fed = self._clipped(), self.rows.tokens.shape[1]
        else:
            # A position that is not fed is not open: its prediction is not used.
            at = jnp.argmax(self.fed[:, None, :] == self.wanted[:, :, None], -1)
            fed = self.fed.shape[1]
        return jnp.concatenate([at, self._shadow_from(fed)], 1) if self.shadow else at

    def _shadow_from(self, first: int):
        """The numbers [b, n] from `first` on, one for each mask of the shadow."""
        numbers = jnp.arange(first, first + self.s.block_length)
        return jnp.broadcast_to(numbers, (self.rows.tokens.shape[0], self.s.block_length))

    def _slots(self):
        """Where the cache keeps what is fed, and which of it; None for all."""
        if self.fed is None or not self.shadow:
            return self.fed, self.writes
        extra = self._shadow_from(self.rows.tokens.shape[1])
        writes = jnp.ones(self.fed.shape, bool) if self.writes is None else self.writes
        return (
            jnp.concatenate([self.fed, extra], 1),
            jnp.concatenate([writes, jnp.ones(extra.shape, bool)], 1),
        )


def _check_vocabulary(logits, shape: tuple[int, ...], s: Settings) -> None:
    if logits.ndim != 3 or logits.shape[:2] != shape:
        raise ValueError(
            f"logits_fn gave logits of shape {list(logits.shape)} for tokens of {list(shape)}"
        )
    for name in ("mask_id", "eos_id", "eot_id"):
        value = getattr(s, name)
        if value is not None and not 0 <= value < logits.shape[-1]:
            raise ValueError(
                f"{name}={value} is not in the vocabulary of {logits.shape[-1]}"
                " that logits_fn predicts"
            )
