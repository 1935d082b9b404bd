"""Int8 weights: a matrix as int8 values, with one float32 scale for each of its outputs.

Only the kernels of `layers.Linear` are quantised. The embedding is not: a lookup reads the rows of
the tokens alone, so int8 would save little memory and no time. Norms are small.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

KINDS = ("int8",)  # what `quantize` may be, beside None


@flax.struct.dataclass
class Int8Kernel:
    """A kernel [inputs, outputs]: values * scale. It takes the kernel's place in the parameters.

    The leaves may also be the types or the shardings of the two arrays.
    """

    values: Int8[Array, "*n i o"] | Any
    scale: Float32[Array, "*n o"] | Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return self.values.shape


def check_kind(quantize: str | None) -> None:
    """Raises ValueError unless `quantize` is None or one of KINDS."""
    if quantize not in (None, *KINDS):
        raise ValueError(f"quantize={quantize!r} is not {', '.join(KINDS)}; leave it for none")


def is_kernel(path: str) -> bool:
    """Whether a parameter is quantised, by its path in the parameters ("ff_out/kernel")."""
    return path.rpartition("/")[2] == "kernel"


def is_quantized(tree: Any) -> bool:
    """Whether a tree of parameters has a quantised kernel."""
    return any(isinstance(x, Int8Kernel) for x in jax.tree.leaves(tree, is_leaf=_is_leaf))


def dtype_of(params: Any) -> jnp.dtype:
    """The widest type of the parameters that are not quantised."""
    leaves = jax.tree.leaves(params, is_leaf=_is_leaf)
    return jnp.result_type(*(x.dtype for x in leaves if not isinstance(x, Int8Kernel)))


def quantize(kernel: Float[Array, "*n i o"]) -> Int8Kernel:
    """The nearest kernel whose values are whole numbers from -127 to 127 times a scale.

    The scale of an output is its largest weight / 127, so each weight moves by at most scale / 2.
    """
    wide = kernel.astype(jnp.float32)
    # An output whose weights are all 0 would have scale 0.
    scale = jnp.maximum(jnp.abs(wide).max(-2) / 127, jnp.finfo(jnp.float32).tiny)
    return Int8Kernel(jnp.round(wide / scale[..., None, :]).astype(jnp.int8), scale)


def shardings(sharding: jax.sharding.Sharding, ndim: int) -> Int8Kernel:
    """The shardings of values and scale for a kernel that has `sharding` and `ndim` axes."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return Int8Kernel(sharding, sharding)
    axes = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
    scale = jax.sharding.PartitionSpec(*axes[:-2], axes[-1])
    return Int8Kernel(sharding, jax.sharding.NamedSharding(sharding.mesh, scale))


def abstract(kernel: jax.ShapeDtypeStruct) -> Int8Kernel:
    """Shapes, types and shardings of the quantised kernel."""
    found = jax.eval_shape(quantize, kernel)
    if kernel.sharding is None:
        return found
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        found,
        shardings(kernel.sharding, len(kernel.shape)),
    )


def _is_leaf(x: Any) -> bool:
    return isinstance(x, Int8Kernel)
