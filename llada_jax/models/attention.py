"""Bidirectional attention over packed rows; long rows never hold a whole [L, L] score matrix.

"splash" is JAX's Pallas kernel for TPU, "cudnn" is NVIDIA's flash attention, and "xla" is plain
JAX, which runs everywhere.
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

# "xla": rows up to this length are computed in one piece. Longer rows are computed in blocks of
# this many queries, so that only scores [heads, QUERY_BLOCK, L] are held at a time.
QUERY_BLOCK = 512


def choose(
    implementation: str, platform: str, *, length: int, head_size: int, dtype
) -> tuple[str, str]:
    """Chooses the implementation for a platform ("tpu", "gpu", "cpu"): (name, reason).

    "auto" takes the kernel of the platform if it can compute rows of `length`, else "xla".
    Raises ValueError if `implementation` is unknown, or names a kernel that cannot compute them.
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
    """Softmax attention of h query heads over k key heads, scaled by 1 / sqrt(d).

    h is a multiple of k. A query attends to the keys of its own segment whose `attention_mask` is
    true. The softmax is in float32. `choose` resolves `implementation` for the devices of the
    current mesh, and raises ValueError if it cannot be used.
    """
    batch_shape, (length, _, head_size) = query.shape[:-3], query.shape[-3:]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    # A query attends to the keys with its own id. A key that is masked out gets id -1, which no
    # query has.
    queries_of = keys_of = None
    if segment_ids is not None:
        queries_of = keys_of = segment_ids.reshape(-1, length).astype(jnp.int32)
    if attention_mask is not None:
        if queries_of is None:
            queries_of = jnp.zeros(query.shape[:2], jnp.int32)
        keys_of = jnp.where(attention_mask.reshape(-1, length), queries_of, -1)
    platform, kind = _device()
    name, _ = choose(
        implementation, platform, length=length, head_size=head_size, dtype=query.dtype
    )
    if name == "splash":
        out = splash_attend(query, key, value, queries_of, keys_of, platform=platform, kind=kind)
    else:
        out = {"xla": _xla, "cudnn": cudnn_attend}[name](query, key, value, queries_of, keys_of)
    return out.reshape(*batch_shape, *out.shape[1:])


def attend_over(
    query: Float[Array, "b w h d"],
    key: Float[Array, "b l k d"],
    value: Float[Array, "b l k d"],
    *,
    attention_mask: Bool[Array, "b l"] | Bool[Array, "b w l"] | None = None,
) -> Float[Array, "b w h d"]:
    """Softmax attention of w queries over l other keys, scaled by 1 / sqrt(d): plain JAX.

    A query attends to the keys whose `attention_mask` is true; a mask of three axes says it for
    each query. The softmax is in float32.
    """
    if attention_mask is not None and attention_mask.ndim == 3:
        return _xla(query, key, value, attention_mask, None)
    keys_of = queries_of = None
    if attention_mask is not None:
        queries_of = jnp.zeros(query.shape[:2], jnp.int32)
        keys_of = jnp.where(attention_mask, 0, -1)
    return _xla(query, key, value, queries_of, keys_of)


def _device() -> tuple[str, str]:
    """The platform and kind of the devices of the current mesh, or else of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform, device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def _xla(query, key, value, queries_of, keys_of):
    """Plain attention of a query to the keys with its own id.

    Without ids of keys, `queries_of` [b, w, l] says which keys each query attends to.
    """
    length = query.shape[1]

    def block(queries, queries_of, key=key, value=value):
        mask = queries_of
        if keys_of is not None:
            mask = queries_of[:, :, None] == keys_of[:, None, :]
        mask = None if mask is None else mask[:, None]
        # By default, accelerators multiply float32 in fewer bits.
        with jax.default_matmul_precision("highest" if queries.dtype == jnp.float32 else "default"):
            return jax.nn.dot_product_attention(
                queries, key, value, mask=mask, implementation="xla"
            )

    if length <= QUERY_BLOCK:
        return block(query, queries_of)
    # Each block is rematerialised: the backward pass, too, holds the scores of one block only.
    blocks = -(-length // QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - length

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    # The loop closes over float32 keys and values, so that their gradients are summed in float32.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)
    parts = jax.tree.map(split, (query, queries_of))
    out = jax.lax.map(
        jax.checkpoint(lambda part: block(*part, *(x.astype(key.dtype) for x in wide))), parts
    )
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], blocks * QUERY_BLOCK, *query.shape[2:])[
        :, :length
    ]


cudnn_masked.defvjp(cudnn_forward, cudnn_backward)
