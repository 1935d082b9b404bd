"""Mask schemes: which tokens each draw masks.

Each scheme is one function and one entry of MASKS. The function maps
(scores [n, l], t [n, s], segments, eps) to (masked [n, l], 1 / P(masked | t) [n, s]). The scores
are uniform random numbers. A scheme is unbiased if the mask of each draw, taken alone, has the
distribution that belongs to its t. The draws may depend on each other in any way.
"""

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
    """Masks l = ceil(t L) tokens of each segment without replacement; weight L / l (equation 15).

    For uniform t, l is uniform on 1..L: ceil(t L) for t in (0, 1] does the same as the paper's
    floor(t L) + 1 for t in [0, 1).
    """
    del eps
    counts = _counts(t, segments)
    return _intervals(_ranks(scores, segments), jnp.zeros_like(counts), counts, segments)


def bernoulli_masks(
    scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float
) -> Masked:
    """Masks each token with probability p = (1 - eps) t + eps; weight 1 / p (equation 13).

    Pre-training uses eps > 0. The estimate is then biased: p is uniform on (eps, 1], but the ELBO
    is an integral over (0, 1].
    """
    p = (1 - eps) * t + eps
    return scores < jax.vmap(per_token, (0, None))(p, segments), 1 / p


def coupled_masks(
    scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float
) -> Masked:
    """Masks as "exact"; draws 2k and 2k + 1 take opposite ends of one random permutation.

    The two masks overlap as little as possible. Either end of a uniform random permutation is a
    uniform random set of its size, so each mask alone is distributed as in "exact".
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
    """Masks as "exact"; the draws take consecutive intervals of one random permutation.

    The permutation is closed to a circle, so that all tokens are masked equally often, give or
    take one draw. Any interval of a uniform random permutation is a uniform random set of its
    size, so each mask alone is distributed as in "exact".
    """
    del eps
    counts = _counts(t, segments)
    ranks = jnp.repeat(_ranks(scores[:1], segments), scores.shape[0], axis=0)
    return _intervals(ranks, jnp.cumsum(counts, axis=0) - counts, counts, segments)


@dataclasses.dataclass(frozen=True)
class MaskScheme:
    """An entry of MASKS: the function, and the properties that `Scheme` checks."""

    draw: Callable[[Array, Array, Segments, float], Masked]
    block: int = 1  # how many consecutive draws share random numbers; 0: all draws
    # True: t sets the number of masked tokens. False: t sets the probability that a token is
    # masked, and eps the lowest such probability.
    by_count: bool = True


MASKS = {
    "exact": MaskScheme(exact_masks),
    "bernoulli": MaskScheme(bernoulli_masks, by_count=False),
    "coupled": MaskScheme(coupled_masks, block=2),
    "cyclic": MaskScheme(cyclic_masks, block=0),
}


def _counts(t: Float32[Array, "n s"], segments: Segments) -> Int[Array, "n s"]:
    """The number of tokens that each draw masks in each segment, at least 1."""
    lengths = segments.lengths
    return jnp.clip(jnp.ceil(t * lengths).astype(jnp.int32), 1, jnp.maximum(lengths, 1))


def _ranks(scores: Float32[Array, "n l"], segments: Segments) -> Int[Array, "n l"]:
    """The rank of each response token's score in its segment: a random permutation."""
    places = jnp.arange(scores.shape[1], dtype=jnp.int32)
    starts = per_token(jnp.cumsum(segments.lengths) - segments.lengths, segments)

    def one(scores):
        _, _, order = jax.lax.sort((segments.index, scores, places), num_keys=2)
        return jnp.zeros_like(places).at[order].set(places) - starts

    return jax.vmap(one)(scores)


def _intervals(
    ranks, starts: Int[Array, "n s"], counts: Int[Array, "n s"], segments: Segments
) -> Masked:
    """Masks `counts` consecutive ranks from `starts` on; the last rank of a segment wraps to 0."""
    starts, sizes = (jax.vmap(per_token, (0, None))(x, segments) for x in (starts, counts))
    length = jnp.maximum(per_token(segments.lengths, segments), 1)
    return (ranks - starts) % length < sizes, segments.lengths / counts.astype(jnp.float32)
