"""Bidirectional attention over packed rows, without ever holding a whole [L, L] matrix of scores for long rows.

"splash" is the Pallas kernel of JAX on TPU, "cudnn" NVIDIA's flash attention, "xla" plain JAX everywhere.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.models.cudnn import (
    cudnn_attend,
    cudnn_backward,
    cudnn_forward,
    cudnn_limit,
    cudnn_masked,
)
from llada_jax.models.splash import splash_attend, splash_limit

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")

# "xla": rows up to this length are attended to in one piece; longer ones in blocks of this many queries, so that the
# scores held at a time are [heads, QUERY_BLOCK, L].
QUERY_BLOCK = 512


def choose(
    implementation: str, platform: str, *, length: int, head_size: int, dtype
) -> tuple[str, str]:
    """What `implementation` means on a platform ("tpu", "gpu", "cpu") for rows of `length`: (name, reason).

    Raises ValueError where an implementation is asked for by name that cannot do it.
    """
    limits = {"splash": splash_limit, "cudnn": cudnn_limit}
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return "xla", "asked for"
    if implementation != "auto":
        if limit := limits[implementation](platform, length, head_size, jnp.dtype(dtype)):
            raise ValueError(f'attention="{implementation}": {limit}; use "auto"')
        return implementation, "asked for"
    best = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
    if best is None:
        return "xla", f"there is no kernel for {platform}"
    if limit := limits[best](platform, length, head_size, jnp.dtype(dtype)):
        return "xla", f"{best}: {limit}"
    return best, f"the kernel for {platform}"


def attend(
    query: Float[Array, "*b l h d"],
    key: Float[Array, "*b l k d"],
    value: Float[Array, "*b l k d"],
    *,
    attention_mask: Bool[Array, "*b l"] | None = None,
    segment_ids: Int[Array, "*b l"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "*b l h d"]:
    """Softmax attention of h query heads over k key heads (h a multiple of k), scaled by 1 / sqrt(d).

    A key is seen where `attention_mask` is true and its segment is the query's own. The softmax is in float32.
    `implementation` as `choose` reads it, for the devices of the mesh in use. ValueError for what it cannot do.
    """
    batch_shape, (length, _, head_size) = query.shape[:-3], query.shape[-3:]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    # One array says who sees whom: what is masked out is a key of no query's segment.
    queries_of = keys_of = None
    if segment_ids is not None or attention_mask is not None:
        queries_of = keys_of = jnp.zeros(query.shape[:2], jnp.int32)
    if segment_ids is not None:
        queries_of = keys_of = segment_ids.reshape(-1, length).astype(jnp.int32)
    if attention_mask is not None:
        keys_of = jnp.where(attention_mask.reshape(-1, length), keys_of, -1)
    platform, kind = _device()
    name, _ = choose(
        implementation, platform, length=length, head_size=head_size, dtype=query.dtype
    )
    if name == "splash":
        out = splash_attend(query, key, value, queries_of, keys_of, platform=platform, kind=kind)
    else:
        out = {"xla": _xla, "cudnn": cudnn_attend}[name](query, key, value, queries_of, keys_of)
    return out.reshape(*batch_shape, *out.shape[1:])


def _device() -> tuple[str, str]:
    """Platform and kind of the devices that are computed on: those of the mesh in use, or the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform, device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def _xla(query, key, value, queries_of, keys_of):
    length = query.shape[1]

    def block(queries, queries_of, key=key, value=value):
        mask = None if keys_of is None else (queries_of[:, :, None] == keys_of[:, None, :])[:, None]
        # float32 means float32: accelerators would multiply it in fewer bits by default.
        with jax.default_matmul_precision("highest" if queries.dtype == jnp.float32 else "default"):
            return jax.nn.dot_product_attention(
                queries, key, value, mask=mask, implementation="xla"
            )

    if length <= QUERY_BLOCK:
        return block(query, queries_of)
    # Rematerialised, so that the backward pass holds the scores of one block too.
    blocks = -(-length // QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - length

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    # Closed over in float32, so that the gradients of the blocks add up in it.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)
    parts = jax.tree.map(split, (query, queries_of))
    out = jax.lax.map(
        jax.checkpoint(lambda part: block(*part, *(x.astype(key.dtype) for x in wide))), parts
    )
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], blocks * QUERY_BLOCK, *query.shape[2:])[
        :, :length
    ]


cudnn_masked.defvjp(cudnn_forward, cudnn_backward)
