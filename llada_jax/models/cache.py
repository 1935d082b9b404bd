"""Keys and values that a model keeps between passes over the same text."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class KeyValues:
    """Rotated keys and values of all layers and positions, and where the next pass writes.

    The tokens of a pass stand at `start`, `start` + 1, ... of the text. Those from `first` on
    replace their keys and values; those before it keep what is there.
    """

    keys: Float[Array, "n b l k d"]
    values: Float[Array, "n b l k d"]
    start: Int[Array, ""]
    first: Int[Array, ""]
    layer: Int[Array, ""]  # the next layer to write

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype) -> "KeyValues":
        """An empty cache of shape [layers, rows, length, heads, size]."""
        zero = jnp.int32(0)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zero, zero, zero)

    def put(self, key: Float[Array, "b w k d"], value: Float[Array, "b w k d"]):
        """Writes a layer; returns the cache for the next, and the layer's keys and values."""
        replaced: Bool[Array, "w 1 1"] = (self.start + jnp.arange(key.shape[1]) >= self.first)[
            :, None, None
        ]

        def write(kept, fresh):
            at = (self.layer, 0, self.start, 0, 0)
            old = jax.lax.dynamic_slice(kept, at, (1, *fresh.shape))[0]
            fresh = jnp.where(replaced, fresh.astype(kept.dtype), old)
            # In place: the loops over layers and passes carry the buffer.
            return jax.lax.dynamic_update_slice(kept, fresh[None], at)

        keys, values = write(self.keys, key), write(self.values, value)
        here = (jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (keys, values))
        cache = dataclasses.replace(self, keys=keys, values=values, layer=self.layer + 1)
        return cache, *here
