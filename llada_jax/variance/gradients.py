"""Moments of gradients, streamed: never a second gradient."""

import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

EVERYTHING = "all parameters"


@flax.struct.dataclass
class Moments:
    """The running sum of gradients, and of their squared norms, of every named part: never a second gradient.

    Fields are Any because a pytree of this shape may also hold shardings.
    """

    total: Any  # like a gradient, float32
    squares: Any  # float32 [p]
    count: Any  # float32 []

    @classmethod
    def zero(cls, params: Any, parts: tuple[str, ...]) -> "Moments":
        """No gradient so far; sums lie where the parameters lie."""
        total = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return cls(total, jnp.zeros(len(parts)), jnp.zeros(()))

    def add(self, grads: Any, parts: tuple[str, ...]) -> "Moments":
        """One gradient more."""
        total = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), self.total, grads)
        return Moments(total, self.squares + squared_norms(grads, parts), self.count + 1)

    def trace(self, parts: tuple[str, ...]) -> Float32[Array, " p"]:
        """tr Var of one gradient, unbiased, of every part."""
        return (self.squares - squared_norms(self.total, parts) / self.count) / (self.count - 1)


def squared_norms(tree: Any, parts: tuple[str, ...]) -> Float32[Array, " p"]:
    """|gradient|^2 of every part: EVERYTHING, a path as "blocks/up_proj/kernel", or "...[0]", its first index (layer).

    ValueError for a part that is not there.
    """
    leaves = {
        "/".join(str(getattr(k, "key", k)) for k in path): x
        for path, x in jax.tree.leaves_with_path(tree)
    }

    def norm(part):
        if part == EVERYTHING:
            return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves.values())
        name, index = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", part).groups()
        if name not in leaves or (index and int(index) >= leaves[name].shape[0]):
            raise ValueError(
                f"the model has no parameter {part!r}; it has {', '.join(sorted(leaves))}"
            )
        x = leaves[name][int(index)] if index else leaves[name]
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    return jnp.stack([norm(part) for part in parts])
