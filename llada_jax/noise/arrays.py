"""The arrays that pass between times, masks and weights, and helpers to sum over segments."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int


@flax.struct.dataclass
class Noise:
    """n draws for rows of l tokens: which tokens are masked, and the weight of each."""

    masked: Bool[Array, "n *r l"]
    weights: Float32[Array, "n *r l"]  # 0 where not masked


@flax.struct.dataclass
class Segments:
    """The segment of each response token of one row; s is the number of segments."""

    index: Int[Array, " l"]  # 0..s-1 for response tokens, s for all other tokens
    lengths: Int[Array, " s"]  # number of response tokens


@flax.struct.dataclass
class Draws:
    """n draws for one row, the input of WEIGHTS; [n, l] arrays are 0 outside the responses."""

    masked: Bool[Array, "n l"]
    # 1 / P(the token is masked | the time of the draw): L / l, or 1 / p.
    inverse: Float32[Array, "n l"]
    # The weight of the time of the draw; 1 if the times are uniform.
    ratio: Float32[Array, "n l"]
    # E[ratio | the other times].
    expected: Float32[Array, "n l"]
    segments: Segments
    # 1 where two draws have different times, and masks that are independent given the times.
    independent: Float32[Array, "n n"]


def of_segments(values: Float32[Array, "n l"], segments: Segments) -> Float32[Array, "n s"]:
    """Sums values over the response tokens of each segment."""
    sums = jax.ops.segment_sum(values.T, segments.index, segments.lengths.size + 1)
    return sums[:-1].T


def per_token(values: Array, segments: Segments) -> Array:
    """Gives each response token the value of its segment; all other tokens get 0."""
    return jnp.append(values, jnp.zeros((1,), values.dtype))[segments.index]
