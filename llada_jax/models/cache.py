"""Keys and values that a model keeps between passes over the same text."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class KeyValues:
    """Rotated keys and values of all layers and positions, and where the next pass writes.

    Heads come before positions: in this order the attention of TPUs reads them, so that no pass
    copies them to another layout.
    The tokens of a pass stand at `places` of the text (None: at all of them, in order). Their keys
    and values are written where `writes` is true. Without `writes` all are, and the places of a row
    are s, s + 1, ...

    The types say `| Any` because the same tree may also hold shapes.
    """

    keys: Float[Array, "n b k l d"] | Any
    values: Float[Array, "n b k l d"] | Any
    layer: Int[Array, ""] | Any  # the next layer to write
    places: Int[Array, "b w"] | Any | None = None
    writes: Bool[Array, "b w"] | Any | None = None

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype) -> "KeyValues":
        """An empty cache of shape [layers, rows, heads, length, size]."""
        axes = ("layers", "act_rows", "act_heads", "act_length", None)
        keys, values = (nn.with_logical_constraint(jnp.zeros(shape, dtype), axes) for _ in range(2))
        return cls(keys, values, jnp.int32(0))

    def at(
        self,
        places: Int[Array, "b w"] | None = None,
        writes: Bool[Array, "b w"] | None = None,
    ) -> "KeyValues":
        """The same keys and values, for a pass over tokens that stand at `places`."""
        return dataclasses.replace(self, places=places, writes=writes, layer=jnp.int32(0))

    def put(self, key: Float[Array, "b w k d"], value: Float[Array, "b w k d"]):
        """Writes a layer; returns the cache for the next, and the layer's keys and values."""
        keys, values = self._write(self.keys, key), self._write(self.values, value)
        here = (jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (keys, values))
        here = (jnp.swapaxes(x, 1, 2) for x in here)
        return dataclasses.replace(self, keys=keys, values=values, layer=self.layer + 1), *here

    def _write(self, kept, fresh):
        # Always in place: the loops over layers and passes carry the buffer. It is sliced by layers
        # and rows alone: for other slices, XLA for TPU copies all of it to another layout.
        fresh = jnp.swapaxes(fresh.astype(kept.dtype), 1, 2)
        if self.writes is not None:
            old = jax.lax.dynamic_index_in_dim(kept, self.layer, keepdims=False)
            fresh = _among(old, fresh, self.places, self.writes)
        elif self.places is not None:
            rows = jnp.arange(fresh.shape[0])
            at = jnp.stack([jnp.full_like(rows, self.layer), rows, self.places[:, 0]], 1)
            scatter = jax.lax.ScatterDimensionNumbers((1, 2, 3), (0, 1), (0, 1, 3))
            return jax.lax.scatter(
                kept, at, fresh, scatter, indices_are_sorted=True, unique_indices=True, mode="clip"
            )
        return jax.lax.dynamic_update_index_in_dim(kept, fresh, self.layer, 0)


def _among(
    old: Float[Array, "b k l d"],
    fresh: Float[Array, "b k w d"],
    places: Int[Array, "b w"] | Any,
    writes: Bool[Array, "b w"] | Any,
) -> Float[Array, "b k l d"]:
    """A layer in which the fresh positions that are written replace the old ones."""
    # [b, l, w]: a lookup for each position, since TPUs scatter one position at a time.
    source = places[:, None, :] == jnp.arange(old.shape[2])[:, None]
    source &= writes[:, None, :]
    fresh = jnp.take_along_axis(fresh, jnp.argmax(source, -1)[:, None, :, None], 2)
    return jnp.where(jnp.any(source, -1)[:, None, :, None], fresh, old)
