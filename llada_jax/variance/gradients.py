"""Moments of gradients, streamed: one running sum in memory, not all gradients."""

import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

EVERYTHING = "all parameters"


@flax.struct.dataclass
class Moments:
    """The sum of gradients so far, and the sums of the squared norms of p named parts.

    Memory holds the sum, not the gradients in it. Fields are Any because a pytree of this shape
    may also hold shardings.
    """

    total: Any  # float32, shaped like a gradient
    squares: Any  # float32 [p]
    count: Any  # float32 []

    @classmethod
    def zero(cls, params: Any, parts: tuple[str, ...]) -> "Moments":
        """Moments of no gradient; the sums have the shardings of the parameters."""
        total = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return cls(total, jnp.zeros(len(parts)), jnp.zeros(()))

    def add(self, grads: Any, parts: tuple[str, ...]) -> "Moments":
        """Returns the moments with one more gradient."""
        total = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), self.total, grads)
        return Moments(total, self.squares + squared_norms(grads, parts), self.count + 1)

    def trace(self, parts: tuple[str, ...]) -> Float32[Array, " p"]:
        """The trace of the variance of one gradient, for every part; unbiased."""
        return (self.squares - squared_norms(self.total, parts) / self.count) / (self.count - 1)


def squared_norms(tree: Any, parts: tuple[str, ...]) -> Float32[Array, " p"]:
    """The squared norm of every part of a gradient.

    A part is EVERYTHING, the path of a parameter such as "blocks/up_proj/kernel", or a path with
    an index of the first axis (the layer), such as "blocks/up_proj/kernel[0]".
    Raises ValueError if a part does not exist.
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
