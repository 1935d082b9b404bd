"""Times and masks: the forward process, as masks and token weights (DESIGN: "An estimator is masks and token weights").

A draw masks some response tokens of a row; its term for one segment is `sum over masked i of weights[i] * log p_i`, and
the mean of the terms over the draws estimates the segment's ELBO. Every scheme is one entry in TIMES, MASKS or WEIGHTS:
a function of uniform numbers that `draw_row` hands it, and what has to be known of it. Adding one is one function and
one entry. `elbo.md` has the formulas and what each is worth.
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
    """`scheme.n` draws for one row; draw j is sample j % n_yt of time j // n_yt.

    Segments draw independently, but for what `scheme.share_in_pair` says of the two of a pair.
    """
    response_mask = response_mask.astype(bool)
    index = jnp.where(response_mask, segment_ids - 1, num_segments).astype(jnp.int32)
    lengths = jnp.sum(index[:, None] == jnp.arange(num_segments), axis=0, dtype=jnp.int32)
    segments = Segments(index, lengths)
    key_t, key_y = jax.random.split(key)
    # On (0, 1]: a time of 0 would mask nothing.
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
    of_tokens = (jax.vmap(per_token, (0, None))(x, segments) for x in (inverse, ratio, expected))
    draws = Draws(masked, *of_tokens, segments, jnp.asarray(scheme._independent()))
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
    """`draw_row` for each row under its own key: masked and weights [n, r, l]."""

    def one(key, response_mask, segment_ids):
        return draw_row(key, response_mask, segment_ids, num_segments=num_segments, scheme=scheme)

    return jax.vmap(one, out_axes=1)(keys, response_mask, segment_ids)


def _draw_keys(key: Key[Array, ""], n: int) -> Key[Array, " n"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def _places_in_pair(segments: Segments) -> Int[Array, " l"]:
    """Where each token finds its score: a pair's k-th response tokens both at k places after its first.

    A pair's tokens lie side by side, so those places are its own.
    """
    places = jnp.arange(segments.index.size, dtype=jnp.int32)
    first = jnp.argmax(segments.index[:, None] == jnp.arange(segments.lengths.size), axis=0)
    shared = (
        places
        - per_token(first, segments)
        + per_token(first[np.arange(first.size) // 2 * 2], segments)
    )
    return jnp.where(segments.index < first.size, shared, places)
