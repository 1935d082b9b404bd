"""NVIDIA's flash attention, through cuDNN."""

import jax
import jax.numpy as jnp


def cudnn_limit(platform: str, length: int, head_size: int, dtype) -> str | None:
    """Why this attention cannot run; None if it can."""
    if platform != "gpu":
        return f"it runs on NVIDIA GPUs, not on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if head_size % 8 or head_size > 128:
        return f"heads of {head_size} are no multiple of 8 up to 128"
    if length % 2:
        return f"it has no gradient for an odd number of positions ({length}) under a mask"
    if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 8:
        return f"it needs compute capability 8.0, and {jax.devices()[0].device_kind} is older"
    return None


def cudnn_attend(query, key, value, queries_of, keys_of):
    """Attention for query, key and value [rows, L, heads, size].

    A query attends to the keys with its own id. The ids `queries_of` and `keys_of` are [rows, L];
    None means that every query attends to all keys of its row.
    """
    if keys_of is None:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return cudnn_masked(query, key, value, queries_of, keys_of)


def _merge_draws(function):
    """Gives `function` a batching rule that merges a vmapped axis into the rows (axis 0).

    JAX's own rule assumes that the mask has one entry for each head; ours has one for all heads.
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def rule(size, is_batched, *args):
        batched_args = (
            x if batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, batched in zip(args, is_batched, strict=True)
        )
        out = wrapped(*(x.reshape(-1, *x.shape[2:]) for x in batched_args))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(
            lambda _: True, out
        )

    return wrapped


# cuDNN has no segment ids. It gets a mask [rows, 1, L, L], the same for all heads.
def _cudnn_with_mask(query, key, value, queries_of, keys_of):
    mask = (queries_of[:, :, None] == keys_of[:, None, :])[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


@jax.custom_vjp
def cudnn_masked(query, key, value, queries_of, keys_of):
    """Attention by ids, vmapped and differentiated by the rules of this module."""
    return _merge_draws(_cudnn_with_mask)(query, key, value, queries_of, keys_of)


def cudnn_forward(*args):
    """The forward rule of `cudnn_masked`; it keeps the inputs only."""
    return cudnn_masked(*args), args


def cudnn_backward(args, gradient):
    """The backward rule of `cudnn_masked`; it repeats the forward pass."""

    # JAX cannot differentiate through custom_vmap, so the backward pass has a rule of its own.
    @_merge_draws
    def backward(query, key, value, queries_of, keys_of, gradient):
        def attend(query, key, value):
            return _cudnn_with_mask(query, key, value, queries_of, keys_of)

        return jax.vjp(attend, query, key, value)[1](gradient)

    return *backward(*args, gradient), None, None
