"""Times and masks: the forward process, as masks and token weights (DESIGN: "An estimator is masks and token weights").

A draw masks some response tokens of a row; its term for one segment is `sum over masked i of weights[i] * log p_i`, and
the mean of the terms over the draws estimates the segment's ELBO. Every scheme is one entry in TIMES, MASKS or WEIGHTS.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Key

# One number a purpose, so that no two share random bits.
STREAMS = {"policy": 0, "reference": 1, "evaluate": 2, "crop": 3, "init": 4}


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


def iid_times(key: Key[Array, ""], n_t: int, segments: int) -> Float32[Array, "t s"]:
    """Independent uniform times on (0, 1]."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n_t))
    return 1 - jax.vmap(lambda k: jax.random.uniform(k, (segments,)))(keys)


def exact_masks(key, t: Float32[Array, "n s"], segments: Segments, eps: float):
    """l = ceil(t L) tokens of each segment without replacement, weight L / l (equation 15).

    ceil on (0, 1] is the paper's floor(t L) + 1 on [0, 1): l is uniform on 1..L where t is uniform.
    """
    del eps
    lengths = segments.lengths
    counts = jnp.clip(jnp.ceil(t * lengths).astype(jnp.int32), 1, jnp.maximum(lengths, 1))
    starts = jnp.cumsum(lengths) - lengths

    def one(key, count):
        # Sorted by segment, then by a uniform score: the place within the segment is a random permutation.
        scores = jax.random.uniform(key, segments.index.shape)
        places = jnp.arange(scores.size, dtype=jnp.int32)
        _, _, order = jax.lax.sort((segments.index, scores, places), num_keys=2)
        rank = jnp.zeros_like(places).at[order].set(places)
        return rank < _per_token(starts + count, segments)

    masked = jax.vmap(one)(_draw_keys(key, t), counts)
    return masked, lengths / counts.astype(jnp.float32)


def bernoulli_masks(key, t: Float32[Array, "n s"], segments: Segments, eps: float):
    """Each token with probability p = (1 - eps) t + eps, weight 1 / p (equation 13; eps as in pre-training)."""
    p = (1 - eps) * t + eps

    def one(key, p):
        return jax.random.uniform(key, segments.index.shape) < _per_token(p, segments)

    return jax.vmap(one)(_draw_keys(key, t), p), 1 / p


def plain_weights(masked: Bool[Array, "n l"], weights: Float32[Array, "n l"]) -> Float32[Array, "n l"]:
    """Every masked token counts what its draw says."""
    return jnp.where(masked, weights, 0)


TIMES = {"iid": iid_times}
MASKS = {"exact": exact_masks, "bernoulli": bernoulli_masks}
WEIGHTS = {"plain": plain_weights}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the Monte Carlo budget of n_t x n_yt draws is spent (equation 6); `eps` is for Bernoulli masks only."""

    n_t: int = 8
    n_yt: int = 1
    times: str = "iid"
    masks: str = "exact"
    weights: str = "plain"
    eps: float = 0.0

    def __post_init__(self):
        for name, known in (("times", TIMES), ("masks", MASKS), ("weights", WEIGHTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.n_t < 1 or self.n_yt < 1:
            raise ValueError(f"n_t={self.n_t}, n_yt={self.n_yt}: both must be at least 1")
        if not 0 <= self.eps < 1 or (self.eps and self.masks != "bernoulli"):
            raise ValueError(f"eps={self.eps}, masks={self.masks!r}: eps is in [0, 1), and 0 unless masks='bernoulli'")

    @property
    def n(self) -> int:
        return self.n_t * self.n_yt


def stream_key(seed: int, stream: str) -> Key[Array, ""]:
    """The key of one purpose under one seed (house rule 3)."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[stream])


def row_keys(key: Key[Array, ""], row_ids: Int[Array, " r"], epochs: Int[Array, " r"]) -> Key[Array, " r"]:
    """One key a row and pass: the same wherever and whenever the row is met in that pass."""
    return jax.vmap(lambda row, epoch: jax.random.fold_in(jax.random.fold_in(key, row), epoch))(row_ids, epochs)


def draw_row(
    key: Key[Array, ""],
    response_mask: Bool[Array, " l"] | Int[Array, " l"],
    segment_ids: Int[Array, " l"],
    *,
    num_segments: int,
    scheme: Scheme,
) -> Noise:
    """`scheme.n` draws for one row, independent in each segment; draw j is sample j % n_yt of time j // n_yt."""
    response_mask = response_mask.astype(bool)
    index = jnp.where(response_mask, segment_ids - 1, num_segments).astype(jnp.int32)
    lengths = jnp.sum(index[:, None] == jnp.arange(num_segments), axis=0, dtype=jnp.int32)
    segments = Segments(index, lengths)
    key_t, key_y = jax.random.split(key)
    t = jnp.repeat(TIMES[scheme.times](key_t, scheme.n_t, num_segments), scheme.n_yt, axis=0)
    masked, weights = MASKS[scheme.masks](key_y, t, segments, scheme.eps)
    masked = masked & response_mask
    per_token = jax.vmap(_per_token, (0, None))(weights, segments)
    return Noise(masked, WEIGHTS[scheme.weights](masked, per_token))


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


def _draw_keys(key: Key[Array, ""], t: Float32[Array, "n s"]) -> Key[Array, " n"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(t.shape[0]))


def _per_token(values: Array, segments: Segments) -> Array:
    """values [s] of segments as values [l] of their response tokens, 0 elsewhere."""
    return jnp.append(values, jnp.zeros((1,), values.dtype))[segments.index]
