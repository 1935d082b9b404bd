"""Draws masks and token weights for rows under a `Scheme`.

Only this module of the folder draws random numbers. Times, masks and weights are functions of
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from llada_jax.noise.arrays import Draws, Noise, Segments, per_token
from llada_jax.noise.masks import MASKS
from llada_jax.noise.scheme import Scheme
from llada_jax.noise.times import TIMES
from llada_jax.noise.weights import WEIGHTS


def draw_row(
    key: Key[Array, ""],
    response_mask: Bool[Array, " l"] | Int[Array, " l"],
    segment_ids: Int[Array, " l"],
    *,
    num_segments: int,
    scheme: Scheme,
) -> Noise:
    """Makes `scheme.n` draws for one row.

    Draw j is sample j % n_yt of time j // n_yt. The segments of a row draw independently, except
    that the two segments of a pair share what `scheme.share_in_pair` names.

    Returns:
        Noise with masked and weights [n, l].
    """
    response_mask = response_mask.astype(bool)
    index = jnp.where(response_mask, segment_ids - 1, num_segments).astype(jnp.int32)
    lengths = jnp.sum(index[:, None] == jnp.arange(num_segments), axis=0, dtype=jnp.int32)
    segments = Segments(index, lengths)
    key_t, key_y = jax.random.split(key)
    # Uniform on (0, 1]: a time of 0 would mask nothing.
    u = 1 - jax.vmap(lambda k: jax.random.uniform(k, (num_segments,)))(
        _draw_keys(key_t, scheme.n_t)
    )
    scores = jax.vmap(lambda k: jax.random.uniform(k, index.shape))(_draw_keys(key_y, scheme.n))
    if scheme.share_in_pair != "nothing":
        u = u[:, np.arange(num_segments) // 2 * 2]
    if scheme.share_in_pair == "masks":
        scores = scores[:, _places_in_pair(segments)]
    t, ratio, expected = (
        jnp.repeat(x, scheme.n_yt, axis=0) for x in TIMES[scheme.times].draw(u, lengths)
    )
    masked, inverse = MASKS[scheme.masks].draw(scores, t, segments, scheme.eps)
    masked = masked & response_mask
    inverse, ratio, expected = (
        jax.vmap(per_token, (0, None))(x, segments) for x in (inverse, ratio, expected)
    )
    independent = jnp.asarray(scheme.independent())
    draws = Draws(masked, inverse, ratio, expected, segments, independent)
    weights = WEIGHTS[scheme.weights].weigh(draws, scheme.pseudo_count)
    return Noise(masked, weights)


def draw_rows(
    keys: Key[Array, " r"],
    response_mask: Bool[Array, "r l"] | Int[Array, "r l"],
    segment_ids: Int[Array, "r l"],
    *,
    num_segments: int,
    scheme: Scheme,
) -> Noise:
    """Applies `draw_row` to each row with its own key; masked and weights are [n, r, l]."""

    def one(key, response_mask, segment_ids):
        return draw_row(key, response_mask, segment_ids, num_segments=num_segments, scheme=scheme)

    return jax.vmap(one, out_axes=1)(keys, response_mask, segment_ids)


def _draw_keys(key: Key[Array, ""], n: int) -> Key[Array, " n"]:
    """One key for each draw."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def _places_in_pair(segments: Segments) -> Int[Array, " l"]:
    """The index of the score that each token uses if both segments of a pair share their masks.

    The k-th response tokens of winner and loser both use the score k places after the first
    response token of the winner. The tokens of a pair are adjacent in the row, so no other pair
    uses these scores.
    """
    places = jnp.arange(segments.index.size, dtype=jnp.int32)
    first = jnp.argmax(segments.index[:, None] == jnp.arange(segments.lengths.size), axis=0)
    shared = (
        places
        - per_token(first, segments)
        + per_token(first[np.arange(first.size) // 2 * 2], segments)
    )
    return jnp.where(segments.index < first.size, shared, places)
