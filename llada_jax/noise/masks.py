"""Which tokens each draw masks: one function and one entry of MASKS each.

A function maps (scores [n, l], t [n, s], segments, eps) to (masked [n, l], 1 / P(masked | t) [n, s]); scores are uniform.
A scheme is unbiased if each draw alone has the distribution of its t; how the draws depend on each other is free."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int

from llada_jax.noise.arrays import Segments, per_token

Masked = tuple[Bool[Array, "n l"], Float32[Array, "n s"]]


def exact_masks(
    scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float
) -> Masked:
    """l = ceil(t L) tokens of each segment without replacement, weight L / l (equation 15).

    ceil on (0, 1] is the paper's floor(t L) + 1 on [0, 1): l is uniform on 1..L where t is uniform.
    """
    del eps
    counts = _counts(t, segments)
    return _intervals(_ranks(scores, segments), jnp.zeros_like(counts), counts, segments)


def bernoulli_masks(
    scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float
) -> Masked:
    """Each token with probability p = (1 - eps) t + eps, weight 1 / p (equation 13; eps as in pre-training).

    Biased for eps > 0: p is uniform on (eps, 1], and the ELBO is an integral over (0, 1].
    """
    p = (1 - eps) * t + eps
    return scores < jax.vmap(per_token, (0, None))(p, segments), 1 / p


def coupled_masks(
    scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float
) -> Masked:
    """As "exact"; draws 2k and 2k + 1 take the two ends of one random permutation, so that they overlap the least.

    Either end of a uniform permutation is a uniform set of its size.
    """
    del eps
    counts = _counts(t, segments)
    n = scores.shape[0]
    ranks = jnp.repeat(_ranks(scores[::2], segments), 2, axis=0)[:n]
    starts = jnp.where(jnp.arange(n)[:, None] % 2 == 0, 0, segments.lengths - counts)
    return _intervals(ranks, starts, counts, segments)


def cyclic_masks(
    scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float
) -> Masked:
    """As "exact"; the draws take one interval after the other of one random circle: tokens are masked equally often.

    Any interval of a uniform permutation is a uniform set of its size.
    """
    del eps
    counts = _counts(t, segments)
    ranks = jnp.repeat(_ranks(scores[:1], segments), scores.shape[0], axis=0)
    return _intervals(ranks, jnp.cumsum(counts, axis=0) - counts, counts, segments)


@dataclasses.dataclass(frozen=True)
class MaskScheme:
    """A function of MASKS and what has to be known of it."""

    draw: Callable[[Array, Array, Segments, float], Masked]
    block: int = 1  # how many consecutive draws share randomness; 0: all of them
    by_count: bool = True  # t says how many tokens are masked; otherwise with which probability, and eps the least


MASKS = {
    "exact": MaskScheme(exact_masks),
    "bernoulli": MaskScheme(bernoulli_masks, by_count=False),
    "coupled": MaskScheme(coupled_masks, block=2),
    "cyclic": MaskScheme(cyclic_masks, block=0),
}


def _counts(t: Float32[Array, "n s"], segments: Segments) -> Int[Array, "n s"]:
    lengths = segments.lengths
    return jnp.clip(jnp.ceil(t * lengths).astype(jnp.int32), 1, jnp.maximum(lengths, 1))


def _ranks(scores: Float32[Array, "n l"], segments: Segments) -> Int[Array, "n l"]:
    """The place of each response token in its segment's tokens by score: a random permutation."""
    places = jnp.arange(scores.shape[1], dtype=jnp.int32)
    starts = per_token(jnp.cumsum(segments.lengths) - segments.lengths, segments)

    def one(scores):
        _, _, order = jax.lax.sort((segments.index, scores, places), num_keys=2)
        return jnp.zeros_like(places).at[order].set(places) - starts

    return jax.vmap(one)(scores)


def _intervals(
    ranks, starts: Int[Array, "n s"], counts: Int[Array, "n s"], segments: Segments
) -> Masked:
    """Masks the `counts` ranks from `starts` on, around the circle of each segment's ranks."""
    starts, sizes = (jax.vmap(per_token, (0, None))(x, segments) for x in (starts, counts))
    length = jnp.maximum(per_token(segments.lengths, segments), 1)
    return (ranks - starts) % length < sizes, segments.lengths / counts.astype(jnp.float32)
