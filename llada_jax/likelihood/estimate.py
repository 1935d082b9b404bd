"""Estimates of the log-likelihood of an answer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float32, Int

from llada_jax import elbo, noise
from llada_jax.likelihood.rows import Rows, one_row, predict


def grid(length: int, batch: int) -> np.ndarray:
    """The numbers of masked tokens of LLaDA's evaluation, int [length, batch].

    Row k - 1 is one batch of draws for an answer of `length` tokens, if k is its random start.
    """
    return np.asarray(_grid(length, batch))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grid(length: int, batch: int) -> Int[Array, "k n"]:
    starts = (jnp.arange(length) + 0.5) / length
    u = jnp.broadcast_to(starts, (batch, length))
    times, _, _ = noise.TIMES["official"].draw(u, jnp.full(length, length))
    return jnp.ceil(times * length).astype(jnp.int32).T


def terms(
    logits_fn: Callable,
    prompt,
    answer,
    masks,
    num_masked,
    *,
    mask_id: int,
    batch_size: int = 16,
    cfg_scale: float | int = 0.0,
) -> np.ndarray:
    """The terms [N] of LLaDA's evaluation at given masks, in nats; the estimate is their mean.

    masks: bool [N, prompt + answer], the positions that the model does not see. All are counted,
        also those of the prompt.
    num_masked: [N], the number l of masks that were drawn; a term is L / l times the sum of the
        log-probabilities at the masks, for an answer of L tokens.

    Raises ValueError if shapes do not fit.
    """
    rows = one_row(prompt, answer, mask_id=mask_id)
    masks, num_masked = np.asarray(masks, bool), np.asarray(num_masked)
    if masks.shape != (*num_masked.shape, rows.tokens.shape[1]) or masks.ndim != 2:
        raise ValueError(
            f"masks have shape {list(masks.shape)}, num_masked {list(num_masked.shape)}: give "
            f"[N, {rows.tokens.shape[1]}] and [N] for this prompt and answer"
        )
    weights = np.broadcast_to((rows.lengths[0, 0] / num_masked)[:, None], masks.shape)
    drawn = noise.Noise(jnp.asarray(masks[:, None]), jnp.asarray(weights[:, None], jnp.float32))
    found = _terms(
        Partial(logits_fn), rows, drawn, mask_id=mask_id, cfg_scale=cfg_scale, chunk=batch_size
    )
    return np.asarray(found[:, 0, 0])


@functools.partial(jax.jit, static_argnames=("mask_id", "cfg_scale", "chunk"))
def _terms(
    logits_fn, rows: Rows, drawn: noise.Noise, *, mask_id: int, cfg_scale: float, chunk: int
) -> Float32[Array, "n r s"]:
    """The terms of all draws of all requests; the model processes `chunk` draws at a time."""

    def logps_fn(tokens, targets):
        logits = predict(logits_fn, rows, tokens, mask_id=mask_id, cfg_scale=cfg_scale)
        return elbo.token_logps(logits, targets)

    n = drawn.masked.shape[0]
    chunk = min(chunk, n)
    missing = -n % chunk  # draws that mask nothing fill the last chunk
    drawn = jax.tree.map(lambda x: jnp.pad(x, ((0, missing), (0, 0), (0, 0))), drawn)
    return elbo.packed_terms(
        logps_fn,
        drawn,
        rows.tokens,
        rows.segment_ids,
        num_segments=rows.lengths.shape[1],
        mask_id=mask_id,
        chunk=chunk,
    )[:n]
