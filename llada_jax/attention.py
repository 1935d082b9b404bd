"""Bidirectional attention over packed rows, without ever holding a whole [L, L] matrix for long rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("auto", "xla")

# Rows up to this length are attended to in one piece; longer ones in blocks of this many queries, so that the scores
# held at a time are [heads, QUERY_BLOCK, L].
QUERY_BLOCK = 512


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
    "auto" is "xla" on every platform so far.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    batch_shape, length = query.shape[:-3], query.shape[-3]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if attention_mask is not None:
        attention_mask = attention_mask.reshape(-1, length)
    if segment_ids is not None:
        segment_ids = segment_ids.reshape(-1, length)

    def block(queries, query_segments):
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, None, None, :]
        if segment_ids is not None:
            same = (query_segments[:, :, None] == segment_ids[:, None, :])[:, None]
            mask = same if mask is None else mask & same
        # float32 means float32: accelerators would multiply it in fewer bits by default.
        with jax.default_matmul_precision("highest" if queries.dtype == jnp.float32 else "default"):
            return jax.nn.dot_product_attention(queries, key, value, mask=mask, implementation="xla")

    if length <= QUERY_BLOCK:
        out = block(query, segment_ids)
    else:
        # Rematerialised, so that the backward pass holds the scores of one block too.
        blocks = -(-length // QUERY_BLOCK)
        padding = blocks * QUERY_BLOCK - length

        def split(x):
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

        if segment_ids is None:
            out = jax.lax.map(jax.checkpoint(lambda q: block(q, None)), split(query))
        else:
            out = jax.lax.map(jax.checkpoint(lambda qs: block(*qs)), (split(query), split(segment_ids)))
        out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], blocks * QUERY_BLOCK, *query.shape[2:])[:, :length]
    return out.reshape(*batch_shape, *out.shape[1:])
