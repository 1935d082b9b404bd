"""The arrays that pass between times, masks and weights; sums and spreads over segments."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int


@flax.struct.dataclass
class Noise:
    """n draws for rows of l tokens: which tokens are masked, and what the log-probability of each counts."""

    masked: Bool[Array, "n *r l"]
    weights: Float32[Array, "n *r l"]  # 0 where not masked


@flax.struct.dataclass
class Segments:
    """Which response token of one row belongs to which of s segments."""

    index: Int[Array, " l"]  # 0..s-1, and s where the token is no response token
    lengths: Int[Array, " s"]  # response tokens of each segment


@flax.struct.dataclass
class Draws:
    """What WEIGHTS turn into token weights; all is 0 at tokens that are no response tokens."""

    masked: Bool[Array, "n l"]
    inverse: Float32[Array, "n l"]  # 1 / P(the token is masked | the draw's time): L / l, or 1 / p
    ratio: Float32[
        Array, "n l"
    ]  # what the draw's time counts: 1, unless some times are drawn more often than others
    expected: Float32[Array, "n l"]  # the mean of ratio given the draws at other times
    segments: Segments
    independent: Float32[
        Array, "n n"
    ]  # 1 where two draws have other times, and masks independent given those


def of_segments(values: Float32[Array, "n l"], segments: Segments) -> Float32[Array, "n s"]:
    """Sums over the response tokens of each segment."""
    sums = jax.ops.segment_sum(values.T, segments.index, segments.lengths.size + 1)
    return sums[:-1].T


def per_token(values: Array, segments: Segments) -> Array:
    """values [s] of segments as values [l] of their response tokens, 0 elsewhere."""
    return jnp.append(values, jnp.zeros((1,), values.dtype))[segments.index]
