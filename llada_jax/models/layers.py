"""Parts that architectures share: norm, product, linear layer, rotary embedding, remat policies."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llada_jax.models.quantized import Int8Kernel

# Remat policies by name: what a layer keeps between its forward and its backward pass.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def precision(dtype) -> jax.lax.Precision:
    """Full precision for float32, which accelerators multiply in fewer bits by default."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation [rows, positions, ...] to its logical axes; no effect without a mesh."""
    return nn.with_logical_constraint(x, ("act_rows", "act_length", *axes))


def cast(weight: Array, dtype: Any) -> Array:
    """Casts a weight to the type of the activations, at the place where it is used."""
    if weight.dtype == dtype:
        return weight
    # Without the barrier, XLA casts the weights of all layers, or the whole head, before the loop
    # and keeps the copies.
    return jax.lax.optimization_barrier(weight).astype(dtype)


def product(x: Float[Array, "*b i"], kernel: Any, dtype: Any = None) -> Float[Array, "*b o"]:
    """Returns x @ kernel [i, o], an array or an Int8Kernel, in `dtype` (None: that of x)."""
    if not isinstance(kernel, Int8Kernel):
        return jnp.matmul(
            x, cast(kernel, x.dtype), precision=precision(x.dtype), preferred_element_type=dtype
        )
    # The type of x holds every int8 value exactly. No barrier as in `cast`: XLA does not move a
    # cast to a wider type out of a loop, and on TPU it makes this cast a part of the product, which
    # then reads int8.
    y = jnp.matmul(
        x,
        kernel.values.astype(x.dtype),
        precision=precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return (y * kernel.scale).astype(dtype or x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm: x / rms(x) in float32, cast back, then times the weight."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Normalises the last axis."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale: Any = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * scale.astype(self.dtype)


class Linear(nn.Module):
    """Linear layer without bias: x @ kernel, where kernel is [inputs, outputs].

    In the parameters, an Int8Kernel may stand for the kernel.
    """

    inputs: int
    outputs: int
    axes: tuple[str, str]
    std: float
    dtype: Any
    param_dtype: Any

    def setup(self):
        """Declares the kernel."""
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes)
        self.kernel: Any = self.param("kernel", init, (self.inputs, self.outputs), self.param_dtype)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """Applies the layer to the last axis."""
        # The leading axes are flattened to one: for the gradient of a batched product, XLA's CPU
        # backend transposes far more.
        y = product(x.reshape(-1, self.inputs).astype(self.dtype), self.kernel)
        return y.reshape(*x.shape[:-1], self.outputs)


def rotate(
    x: Float[Array, "*b l h d"], positions: Int[Array, "*b l"], theta: float
) -> Float[Array, "*b l h d"]:
    """Rotary position embedding over the whole head, in float32.

    Element i of the first half is paired with element i of the second half.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
