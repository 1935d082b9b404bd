"""Log-probabilities of target tokens, computed in chunks of the vocabulary."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from llada_jax.models.layers import product


def head_logits(hidden: Float[Array, "*b d"], head: Any) -> Float32[Array, "*b v"]:
    """Logits: hidden @ head [d, v], in float32. The head is an array or an Int8Kernel."""
    return product(hidden, head, jnp.float32)


def chunked_logps(
    hidden: Float[Array, "b l d"], head: Any, targets: Int[Array, "b l"], chunk: int
) -> Float32[Array, "b l"]:
    """The log-probability of each target: log softmax(hidden @ head)[target], in nats.

    The head [d, v] is an array or an Int8Kernel.
    It holds the logits of `chunk` vocabulary entries at a time. The backward pass recomputes the
    logits of each chunk. The loop is over the vocabulary, not over positions. So if the head is
    sharded, a device holds only one whole chunk of it, and of its gradient, at a time.
    """
    vocabulary = head.shape[1]
    # If the vocabulary is sharded, a chunk takes an equal part of every shard.
    shards = _shards("vocab")
    shard, part = vocabulary // shards, -(-min(chunk, vocabulary) // shards)
    chunks = -(-shard // part)
    # The loop closes over float32, so that the gradients of the chunks are summed in float32.
    wide = hidden.astype(jnp.float32)

    def logits_of(head, first):
        """The logits of one chunk, and the target's logit if it is in the chunk (else 0).

        Logits beyond the end of a shard are -inf.
        """
        logits = head_logits(wide.astype(hidden.dtype), head)
        place = first + jnp.tile(jnp.arange(part, dtype=targets.dtype), shards)
        entries = place + jnp.repeat(jnp.arange(shards, dtype=targets.dtype) * shard, part)
        logits = jnp.where(place < shard, logits, -jnp.inf) if shard % part else logits
        # A comparison instead of a gather: XLA fuses it, and its gradient needs no scatter.
        is_target = (entries == targets[..., None]) & (place < shard)
        return logits, jnp.sum(jnp.where(is_target, logits, 0), -1)

    if chunks == 1:
        logits, target = jax.checkpoint(logits_of)(head, 0)
        return target - jax.nn.logsumexp(logits, -1)

    @jax.checkpoint
    def add(carry, xs):
        target, largest, total = carry
        head, first = xs
        head = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), head)
        logits, found = logits_of(head, first)
        new = jax.lax.stop_gradient(jnp.maximum(largest, logits.max(-1)))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[..., None]).sum(-1)
        return (target + found, new, total), None

    def split(x):
        """Splits the vocabulary, the last axis: [d, v] to [chunks, d, shards, part]."""
        rows = x.shape[:-1]
        x = x.reshape(*rows, shards, shard)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, chunks * part - shard)])
        x = jnp.moveaxis(x.reshape(*rows, shards, chunks, part), -2, 0)
        axes = ("embed",) * len(rows)
        return nn.with_logical_constraint(x, (None, *axes, "vocab", None))

    head = jax.tree.map(split, head)  # of an Int8Kernel: values [d, v] and scale [v]
    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = (zeros, jnp.full_like(zeros, -jnp.inf), zeros)
    (target, largest, total), _ = jax.lax.scan(
        add, start, (head, jnp.arange(chunks, dtype=targets.dtype) * part)
    )
    return target - (largest + jnp.log(total))


def _shards(axis: str) -> int:
    """The number of parts into which the current mesh splits a logical axis; 1 without a mesh."""
    spec = nn.logical_to_mesh_axes((axis,)) if nn.get_logical_axis_rules() else None
    names = spec[0] if spec else None
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)
