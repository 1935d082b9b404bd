"""Times and masks: the forward process, as masks and token weights (DESIGN: "An estimator is masks and token weights").

A draw masks some response tokens of a row; its term for one segment is `sum over masked i of weights[i] * log p_i`, and
the mean of the terms over the draws estimates the segment's ELBO. Every scheme is one entry in TIMES, MASKS or WEIGHTS:
a function of uniform numbers that `draw_row` hands it, and what has to be known of it. Adding one is one function and
one entry. `elbo.md` has the formulas and what each is worth.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Key

FORMAT = 2  # part of what a run may not change: raise it when a scheme and key draw or weigh otherwise than before

# One number a purpose, so that no two share random bits.
STREAMS = {"policy": 0, "reference": 1, "evaluate": 2, "crop": 3, "init": 4}

Times = tuple[Float32[Array, "t s"], Float32[Array, "t s"], Float32[Array, "t s"]]  # t, ratio, expected
Masked = tuple[Bool[Array, "n l"], Float32[Array, "n s"]]


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
    ratio: Float32[Array, "n l"]  # what the draw's time counts: 1, unless some times are drawn more often than others
    expected: Float32[Array, "n l"]  # the mean of ratio given the draws at other times
    segments: Segments
    independent: Float32[Array, "n n"]  # 1 where two draws have other times, and masks independent given those


# ---- times: (u, lengths) -> (t, ratio, expected), all [n_t, s]; u is uniform on (0, 1], t is in (0, 1].
# Unbiased where the mean over the draws of ratio x h(t) has the expectation of h(t) under uniform t, for every h.
# expected is the mean of ratio given the other times; ratio itself is always right there, and serves less.


def iid_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """Independent uniform times."""
    return u, jnp.ones_like(u), jnp.ones_like(u)


def stratified_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """One uniform time in each of n_t equal strata; their mixture is the uniform distribution."""
    n = u.shape[0]
    return (jnp.arange(n)[:, None] + u) / n, jnp.ones_like(u), jnp.ones_like(u)


def systematic_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """Evenly spaced times with one random offset: each is stratified, all move together."""
    return stratified_times(jnp.broadcast_to(u[:1], u.shape), lengths)


def antithetic_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """Pairs t, 1 - t in draws 2k and 2k + 1, the t stratified over (0, 1/2]; an odd last draw is uniform on (0, 1].

    t and 1 - t of one pair are together uniform on the pair's two strata, and all strata together on (0, 1].
    """
    paired = u.shape[0] // 2 * 2
    low = (jnp.arange(paired // 2)[:, None] + u[0:paired:2]) / max(paired, 1)
    pairs = jnp.stack([low, 1 - low], 1).reshape(paired, u.shape[1])
    return jnp.concatenate([pairs, u[paired:]]), jnp.ones_like(u), jnp.ones_like(u)


def importance_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """Stratified draws of l with P(l) = sqrt(l / L) - sqrt((l - 1) / L), about 1 / (2 sqrt(l L)): small l more often.

    A term's variance goes about as 1 / l, and its square root is the best density. ratio = (1 / L) / P(l) makes the
    weighted count uniform. To each is added the mean of what the ratios of the other times lack of their expectations:
    that has mean 0, and for n_t > 1 all add up to n_t, so that the whole ELBO is not weighed by chance. A ratio may
    be below 0, in one row of twenty for n_t = 4 and L = 200, seldom where L < n_t^2. t is the middle of its l.
    """
    n = u.shape[0]
    length = jnp.maximum(lengths, 1).astype(jnp.float32)

    def at(v):  # count, ratio = 1 / (L P(l)) without the difference of two roots, and its integral from 0 to v
        count = jnp.clip(jnp.ceil(jnp.square(v) * length), 1, length)
        ratio = (jnp.sqrt(count) + jnp.sqrt(count - 1)) / jnp.sqrt(length)
        return count, ratio, (count - 1) / length + (v - jnp.sqrt((count - 1) / length)) * ratio

    count, ratio, _ = at(stratified_times(u, lengths)[0])
    _, _, integral = at(jnp.arange(n + 1)[:, None] / n)
    expected = n * jnp.diff(integral, axis=0)
    lack = expected - ratio
    others = (lack.sum(0) - lack) / max(n - 1, 1)
    return (count - 0.5) / length, ratio + others, expected + others


def official_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """LLaDA's evaluation grid l_i = ((round(k + i L / n) - 1) mod L) + 1, k uniform on 1..L (spec: Objectives).

    Biased where some i L / n ends in one half: rounding to even makes even l more frequent.
    """
    n = u.shape[0]
    length = jnp.maximum(lengths, 1)
    k = jnp.ceil(u[:1] * length)
    count = (jnp.round(k + jnp.arange(n)[:, None] * (length / n)).astype(jnp.int32) - 1) % length + 1
    return (count - 0.5) / length, jnp.ones_like(u), jnp.ones_like(u)


def gauss_legendre_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """The n_t nodes of Gauss-Legendre quadrature on (0, 1) and their weights, without chance in t.

    Biased: exact for polynomials in t up to degree 2 n_t - 1, and the conditional mean is none.
    """
    n = u.shape[0]
    nodes, weights = np.polynomial.legendre.leggauss(n)
    t, ratio = (jnp.asarray(x, jnp.float32)[:, None] for x in ((nodes + 1) / 2, n * weights / 2))
    t, ratio = jnp.broadcast_to(t, u.shape), jnp.broadcast_to(ratio, u.shape)
    return t, ratio, ratio


# ---- masks: (scores [n, l], t [n, s], segments, eps) -> (masked [n, l], 1 / P(masked | t) [n, s]); scores are uniform.
# Unbiased where each draw alone has the distribution of its t; how the draws depend on each other is free.


def exact_masks(scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float) -> Masked:
    """l = ceil(t L) tokens of each segment without replacement, weight L / l (equation 15).

    ceil on (0, 1] is the paper's floor(t L) + 1 on [0, 1): l is uniform on 1..L where t is uniform.
    """
    del eps
    counts = _counts(t, segments)
    return _intervals(_ranks(scores, segments), jnp.zeros_like(counts), counts, segments)


def bernoulli_masks(scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float) -> Masked:
    """Each token with probability p = (1 - eps) t + eps, weight 1 / p (equation 13; eps as in pre-training).

    Biased for eps > 0: p is uniform on (eps, 1], and the ELBO is an integral over (0, 1].
    """
    p = (1 - eps) * t + eps
    return scores < jax.vmap(_per_token, (0, None))(p, segments), 1 / p


def coupled_masks(scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float) -> Masked:
    """As "exact"; draws 2k and 2k + 1 take the two ends of one random permutation, so that they overlap the least.

    Either end of a uniform permutation is a uniform set of its size.
    """
    del eps
    counts = _counts(t, segments)
    n = scores.shape[0]
    ranks = jnp.repeat(_ranks(scores[::2], segments), 2, axis=0)[:n]
    starts = jnp.where(jnp.arange(n)[:, None] % 2 == 0, 0, segments.lengths - counts)
    return _intervals(ranks, starts, counts, segments)


def cyclic_masks(scores: Float32[Array, "n l"], t: Float32[Array, "n s"], segments: Segments, eps: float) -> Masked:
    """As "exact"; the draws take one interval after the other of one random circle: tokens are masked equally often.

    Any interval of a uniform permutation is a uniform set of its size.
    """
    del eps
    counts = _counts(t, segments)
    ranks = jnp.repeat(_ranks(scores[:1], segments), scores.shape[0], axis=0)
    return _intervals(ranks, jnp.cumsum(counts, axis=0) - counts, counts, segments)


# ---- weights: draws -> what the log-probability of each masked token counts [n, l].


def plain_weights(draws: Draws, pseudo_count: float) -> Float32[Array, "n l"]:
    """Every masked token counts what its draw says."""
    del pseudo_count
    return jnp.where(draws.masked, draws.ratio * draws.inverse, 0)


def leave_one_out_weights(draws: Draws, pseudo_count: float) -> Float32[Array, "n l"]:
    """Each draw has the other draws' log-probabilities of the same tokens as its control variate.

    With a_i the mean of log p_i over the independent draws that mask i (`pseudo_count` c > 0: over those and c times
    the mean over all their tokens), draw k becomes
    expected_k sum_i a_i + ratio_k inverse_k sum_{i in m_k} (log p_i - a_i).
    Unbiased: given the independent draws, E[inverse_k 1(i in m_k) | t_k] = 1 and E[ratio_k] = expected_k, so what a_i
    adds has mean 0. Collected by log-probability, a sum of weights that depend on times and masks alone.
    """
    others = lambda x: jnp.matmul(draws.independent, x, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    # [k, i]: mean 0 whatever the draws that are independent of k.
    residual = draws.expected - draws.ratio * draws.inverse * draws.masked
    counts = others(draws.masked.astype(jnp.float32))
    residual = residual / (counts + pseudo_count if pseudo_count else jnp.maximum(counts, 1))
    extra = others(residual)
    if pseudo_count:
        # What the mean over all tokens of a segment gets, for every draw k that it is a part of.
        totals = _of_segments(counts, draws.segments)
        means = pseudo_count * _of_segments(residual, draws.segments) / jnp.maximum(totals, 1)
        extra += others(jax.vmap(_per_token, (0, None))(means, draws.segments))
    return plain_weights(draws, pseudo_count) + jnp.where(draws.masked, extra, 0)


def balanced_weights(draws: Draws, pseudo_count: float) -> Float32[Array, "n l"]:
    """Each draw's weights moved among the tokens it masks, so that all draws together count every token alike.

    The best weights w under log p_i = a_i + noise: the least sum_ij w_ij^2 + (1 / c) sum_i (W_i - W)^2 with the sum of
    each draw kept, W_i = sum_j w_ij, W = sum_j ratio_j, c = `pseudo_count` (variance of the noise over that of a). So
    w_ij = mu_j - (sum_{k: i in m_k} mu_k - W) / (c + c_i), c_i the draws that mask i, mu by n linear equations.
    Unbiased: tokens are exchangeable, so given the times and m_j every i in m_j has the same expected weight, and these
    add up to the draw's ratio_j inverse_j |m_j|.
    """
    plain, masked = plain_weights(draws, pseudo_count), draws.masked.astype(jnp.float32)
    shrunk = masked / (pseudo_count + masked.sum(0))
    products = (masked[:, None] * shrunk).reshape(-1, masked.shape[1])
    overlap = _of_segments(products, draws.segments).T.reshape(-1, len(plain), len(plain))
    sizes = jnp.maximum(_of_segments(masked, draws.segments), 1).T
    total = _of_segments(draws.ratio, draws.segments).sum(0) / jnp.maximum(draws.segments.lengths, 1)
    right = _of_segments(plain, draws.segments).T - total[:, None] * _of_segments(shrunk, draws.segments).T
    mu = jnp.linalg.solve(sizes[:, :, None] * jnp.eye(len(plain)) - overlap, right[..., None])[..., 0].T
    mu, total = jax.vmap(_per_token, (0, None))(mu, draws.segments), _per_token(total, draws.segments)
    surplus = jnp.sum(jnp.where(draws.masked, mu, 0), 0) - total
    return jnp.where(draws.masked, mu - surplus / (pseudo_count + masked.sum(0)), 0)


def self_normalised_weights(draws: Draws, pseudo_count: float) -> Float32[Array, "n l"]:
    """The weights of each token divided by their mean over the draws: biased, as a ratio of two means is.

    A token that no draw masks counts nothing.
    """
    weights = plain_weights(draws, pseudo_count)
    return jnp.where(draws.masked, weights / jnp.where(draws.masked, weights.mean(0), 1), 0)


@dataclasses.dataclass(frozen=True)
class TimeScheme:
    """A function of TIMES and what has to be known of it."""

    draw: Callable[[Array, Array], Times]
    biased: bool = False
    by_count: bool = False  # its times are counts of masked tokens: for masks by count only
    signed: bool = False  # its ratios may be 0 or below


@dataclasses.dataclass(frozen=True)
class MaskScheme:
    """A function of MASKS and what has to be known of it."""

    draw: Callable[[Array, Array, Segments, float], Masked]
    block: int = 1  # how many consecutive draws share randomness; 0: all of them
    by_count: bool = True  # t says how many tokens are masked; otherwise with which probability, and eps the least


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """A function of WEIGHTS and what has to be known of it."""

    weigh: Callable[[Draws, float], Array]
    biased: bool = False
    pseudo_count: str = "unused"  # or "optional", or "required"
    independent: bool = False  # needs draws that are
    divides: bool = False  # by ratios


TIMES = {
    "iid": TimeScheme(iid_times),
    "stratified": TimeScheme(stratified_times),
    "systematic": TimeScheme(systematic_times),
    "antithetic": TimeScheme(antithetic_times),
    "importance": TimeScheme(importance_times, by_count=True, signed=True),
    "official": TimeScheme(official_times, biased=True, by_count=True),
    "gauss_legendre": TimeScheme(gauss_legendre_times, biased=True),
}
MASKS = {
    "exact": MaskScheme(exact_masks),
    "bernoulli": MaskScheme(bernoulli_masks, by_count=False),
    "coupled": MaskScheme(coupled_masks, block=2),
    "cyclic": MaskScheme(cyclic_masks, block=0),
}
WEIGHTS = {
    "plain": WeightScheme(plain_weights),
    "leave_one_out": WeightScheme(leave_one_out_weights, pseudo_count="optional", independent=True),
    "balanced": WeightScheme(balanced_weights, pseudo_count="required"),
    "self_normalised": WeightScheme(self_normalised_weights, biased=True, divides=True),
}
SHARED = ("nothing", "times", "masks")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the Monte Carlo budget of n_t x n_yt draws is spent (equation 6).

    `eps` is for Bernoulli masks only, and biased above 0; `pseudo_count` for leave_one_out (how much its control
    variates shrink) and balanced (how much its weights stay the plain ones).
    `share_in_pair`: what a winner's draws (segment 2k + 1) have in common with its loser's (2k + 2): "nothing" as in
    the paper, "times", or times and "masks", which are then alike token by token from the start of the responses.
    """

    n_t: int = 8
    n_yt: int = 1
    times: str = "iid"
    masks: str = "exact"
    weights: str = "plain"
    eps: float = 0.0
    pseudo_count: float = 0.0
    share_in_pair: str = "nothing"

    def __post_init__(self):
        for name, known in (("times", TIMES), ("masks", MASKS), ("weights", WEIGHTS), ("share_in_pair", SHARED)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.n_t < 1 or self.n_yt < 1:
            raise ValueError(f"n_t={self.n_t}, n_yt={self.n_yt}: both must be at least 1")
        times, masks, weights = TIMES[self.times], MASKS[self.masks], WEIGHTS[self.weights]
        if not 0 <= self.eps < 1 or (self.eps and masks.by_count):
            raise ValueError(f"eps={self.eps}, masks={self.masks!r}: eps is in [0, 1), and 0 for masks by count")
        if times.by_count and not masks.by_count:
            raise ValueError(f"times={self.times!r} are counts of masked tokens: use masks by count, not {self.masks}")
        if self.pseudo_count < 0 or (self.pseudo_count and weights.pseudo_count == "unused"):
            takes = ", ".join(name for name, each in WEIGHTS.items() if each.pseudo_count != "unused")
            raise ValueError(
                f"pseudo_count={self.pseudo_count}, weights={self.weights!r}: pseudo_count is at least 0, and 0 but "
                f"for weights {takes}"
            )
        if weights.pseudo_count == "required" and not self.pseudo_count:
            raise ValueError(f"weights={self.weights!r} needs pseudo_count above 0, for example 1")
        if weights.divides and times.signed:
            raise ValueError(
                f"weights={self.weights!r} divides by ratios, which may be 0 for times={self.times!r}: use other times"
            )
        if weights.independent and not self._independent().any():
            raise ValueError(
                f"weights={self.weights!r} needs independent draws; n_t={self.n_t} times with masks={self.masks!r} "
                "have none: use more times, or other masks"
            )

    @property
    def n(self) -> int:
        return self.n_t * self.n_yt

    @property
    def biased(self) -> bool:
        """Whether the estimate's expectation may differ from the ELBO."""
        return TIMES[self.times].biased or WEIGHTS[self.weights].biased or self.eps > 0

    def _independent(self) -> np.ndarray:
        """[n, n]: 1 where two draws have other times, and masks that are independent given those."""
        draw = np.arange(self.n)
        block, time = draw // (MASKS[self.masks].block or self.n), draw // self.n_yt
        return ((block[:, None] != block) & (time[:, None] != time)).astype(np.float32)


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
    """`scheme.n` draws for one row; draw j is sample j % n_yt of time j // n_yt.

    Segments draw independently, but for what `scheme.share_in_pair` says of the two of a pair.
    """
    response_mask = response_mask.astype(bool)
    index = jnp.where(response_mask, segment_ids - 1, num_segments).astype(jnp.int32)
    lengths = jnp.sum(index[:, None] == jnp.arange(num_segments), axis=0, dtype=jnp.int32)
    segments = Segments(index, lengths)
    key_t, key_y = jax.random.split(key)
    # On (0, 1]: a time of 0 would mask nothing.
    u = 1 - jax.vmap(lambda k: jax.random.uniform(k, (num_segments,)))(_draw_keys(key_t, scheme.n_t))
    scores = jax.vmap(lambda k: jax.random.uniform(k, index.shape))(_draw_keys(key_y, scheme.n))
    if scheme.share_in_pair != "nothing":
        u = u[:, np.arange(num_segments) // 2 * 2]
    if scheme.share_in_pair == "masks":
        scores = scores[:, _places_in_pair(segments)]
    t, ratio, expected = (jnp.repeat(x, scheme.n_yt, axis=0) for x in TIMES[scheme.times].draw(u, lengths))
    masked, inverse = MASKS[scheme.masks].draw(scores, t, segments, scheme.eps)
    masked = masked & response_mask
    per_token = (jax.vmap(_per_token, (0, None))(x, segments) for x in (inverse, ratio, expected))
    draws = Draws(masked, *per_token, segments, jnp.asarray(scheme._independent()))
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


def _counts(t: Float32[Array, "n s"], segments: Segments) -> Int[Array, "n s"]:
    lengths = segments.lengths
    return jnp.clip(jnp.ceil(t * lengths).astype(jnp.int32), 1, jnp.maximum(lengths, 1))


def _ranks(scores: Float32[Array, "n l"], segments: Segments) -> Int[Array, "n l"]:
    """The place of each response token in its segment's tokens by score: a random permutation."""
    places = jnp.arange(scores.shape[1], dtype=jnp.int32)
    starts = _per_token(jnp.cumsum(segments.lengths) - segments.lengths, segments)

    def one(scores):
        _, _, order = jax.lax.sort((segments.index, scores, places), num_keys=2)
        return jnp.zeros_like(places).at[order].set(places) - starts

    return jax.vmap(one)(scores)


def _intervals(ranks, starts: Int[Array, "n s"], counts: Int[Array, "n s"], segments: Segments) -> Masked:
    """Masks the `counts` ranks from `starts` on, around the circle of each segment's ranks."""
    starts, sizes = (jax.vmap(_per_token, (0, None))(x, segments) for x in (starts, counts))
    length = jnp.maximum(_per_token(segments.lengths, segments), 1)
    return (ranks - starts) % length < sizes, segments.lengths / counts.astype(jnp.float32)


def _places_in_pair(segments: Segments) -> Int[Array, " l"]:
    """Where each token finds its score: a pair's k-th response tokens both at k places after its first.

    A pair's tokens lie side by side, so those places are its own.
    """
    places = jnp.arange(segments.index.size, dtype=jnp.int32)
    first = jnp.argmax(segments.index[:, None] == jnp.arange(segments.lengths.size), axis=0)
    shared = places - _per_token(first, segments) + _per_token(first[np.arange(first.size) // 2 * 2], segments)
    return jnp.where(segments.index < first.size, shared, places)


def _of_segments(values: Float32[Array, "n l"], segments: Segments) -> Float32[Array, "n s"]:
    """Sums over the response tokens of each segment."""
    sums = jax.ops.segment_sum(values.T, segments.index, segments.lengths.size + 1)
    return sums[:-1].T


def _per_token(values: Array, segments: Segments) -> Array:
    """values [s] of segments as values [l] of their response tokens, 0 elsewhere."""
    return jnp.append(values, jnp.zeros((1,), values.dtype))[segments.index]
