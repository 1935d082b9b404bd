"""ELBO terms of a packed batch under a model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from llada_jax import elbo, noise
from llada_jax.batch import Batch

Metrics = dict[str, Array]


def model_terms(
    model: nn.Module,
    params: Any,
    batch: Batch,
    drawn: noise.Noise,
    *,
    chunk: int = 0,
) -> Float32[Array, "n r s"]:
    """The ELBO terms of every draw and segment of a batch under `params`."""

    def logps(params, *arrays):
        return model.apply({"params": params}, *arrays, method="token_logps")

    def draws_as_rows(count, batched, params, *arrays):
        if any(jax.tree.leaves(batched[0])):
            raise NotImplementedError("model_terms under a vmap over parameters: use jax.lax.map")
        # Make the draws of a row neighbouring rows, so that each matrix product has one axis of
        # positions. With two axes, XLA's CPU backend would transpose for the gradient. Rows stay
        # outermost because they are sharded.
        rows = [
            jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
            if by_draw
            else jnp.repeat(x, count, axis=0)
            for x, by_draw in zip(arrays, batched[1:], strict=True)
        ]
        found = logps(params, *rows)
        return jnp.swapaxes(found.reshape(-1, count, *found.shape[1:]), 0, 1), True

    vmapped = jax.custom_batching.custom_vmap(logps)
    vmapped.def_vmap(draws_as_rows)

    def logps_fn(tokens, targets):
        return vmapped(params, tokens, targets, batch.segment_ids, batch.positions)

    return elbo.packed_terms(
        logps_fn,
        drawn,
        batch.tokens,
        batch.segment_ids,
        num_segments=batch.num_segments,
        mask_id=model.config.mask_token_id,
        chunk=chunk,
    )


def draw(batch: Batch, scheme: noise.Scheme, *, seed: int | Array, stream: str) -> noise.Noise:
    """The noise of a batch. It depends only on seed, stream, row, epoch and draw."""
    keys = noise.row_keys(noise.stream_key(seed, stream), batch.row_ids, batch.epochs)
    return noise.draw_rows(
        keys,
        batch.response_mask,
        batch.segment_ids,
        num_segments=batch.num_segments,
        scheme=scheme,
    )


def segment_lengths(batch: Batch) -> Float32[Array, "r s"]:
    """The number of response tokens of each segment."""
    of_segment = batch.segment_ids[..., None] == jnp.arange(1, batch.num_segments + 1)
    return jnp.sum(of_segment & batch.response_mask[..., None], axis=1).astype(jnp.float32)
