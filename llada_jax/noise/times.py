"""Time schemes: the times of the draws.

Each scheme is one function and one entry of TIMES. The function maps (u, lengths) to
(t, ratio, expected), all [n_t, s]. u is uniform on (0, 1], and t is in (0, 1].

A scheme is unbiased if mean_j[ratio_j * h(t_j)] has expectation E[h(t)], t uniform, for every h.
`expected` is E[ratio_j | the other times]. Returning `ratio` for it is always valid, but makes
leave_one_out a weaker control variate.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

# t, ratio, expected.
Times = tuple[Float32[Array, "t s"], Float32[Array, "t s"], Float32[Array, "t s"]]


def iid_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """Independent uniform times."""
    return u, jnp.ones_like(u), jnp.ones_like(u)


def stratified_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """One uniform time in each of n_t equal strata; their mixture is the uniform distribution."""
    n = u.shape[0]
    return (jnp.arange(n)[:, None] + u) / n, jnp.ones_like(u), jnp.ones_like(u)


def systematic_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """Evenly spaced times with one random offset: as "stratified", but all times move together."""
    return stratified_times(jnp.broadcast_to(u[:1], u.shape), lengths)


def antithetic_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """Pairs t, 1 - t as times 2k and 2k + 1, where t is stratified over (0, 1/2].

    The mixture of t and 1 - t is uniform on the two strata of the pair, and the mixture of all
    pairs is uniform on (0, 1]. If n_t is odd, the last time is uniform on (0, 1].
    """
    paired = u.shape[0] // 2 * 2
    low = (jnp.arange(paired // 2)[:, None] + u[0:paired:2]) / max(paired, 1)
    pairs = jnp.stack([low, 1 - low], 1).reshape(paired, u.shape[1])
    return jnp.concatenate([pairs, u[paired:]]), jnp.ones_like(u), jnp.ones_like(u)


def importance_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """Stratified draws of l with P(l) = sqrt(l / L) - sqrt((l - 1) / L): small l more often.

    P(l) is about 1 / (2 sqrt(l L)). The variance of a term is about proportional to 1 / l, and the
    best density is proportional to its square root. ratio = (1 / L) / P(l) is the importance
    weight for l uniform on 1..L.

    To each ratio we add the mean of (expected_k - ratio_k) over the other times k. The correction
    has mean 0. For n_t > 1 it makes the n_t ratios sum to exactly n_t, so the overall scale of the
    estimate is not random. A corrected ratio may be below 0: in one row of twenty for n_t = 4 and
    L = 200, seldom if L < n_t^2.

    t is the middle of the interval of its l, (l - 1/2) / L.
    """
    n = u.shape[0]
    length = jnp.maximum(lengths, 1).astype(jnp.float32)

    def at(v):
        """The count l at quantile v, its ratio, and the integral of the ratio from 0 to v."""
        # ratio = 1 / (L P(l)), written without the difference of two roots.
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
    """The grid of LLaDA's evaluation: l_i = ((round(k + i L / n) - 1) mod L) + 1.

    k is uniform on 1..L. Biased if some i L / n ends in one half: rounding to even makes even l
    more frequent. Source: its get_log_likelihood.py.
    """
    n = u.shape[0]
    length = jnp.maximum(lengths, 1)
    k = jnp.ceil(u[:1] * length)
    count = (
        jnp.round(k + jnp.arange(n)[:, None] * (length / n)).astype(jnp.int32) - 1
    ) % length + 1
    return (count - 0.5) / length, jnp.ones_like(u), jnp.ones_like(u)


def gauss_legendre_times(u: Float32[Array, "t s"], lengths: Int[Array, " s"]) -> Times:
    """The n_t nodes of Gauss-Legendre quadrature on (0, 1) and their weights; t is not random.

    Biased: the quadrature is exact for polynomials in t up to degree 2 n_t - 1, but the mean of a
    term given t is in general no such polynomial.
    """
    n = u.shape[0]
    nodes, weights = np.polynomial.legendre.leggauss(n)
    t, ratio = (jnp.asarray(x, jnp.float32)[:, None] for x in ((nodes + 1) / 2, n * weights / 2))
    t, ratio = jnp.broadcast_to(t, u.shape), jnp.broadcast_to(ratio, u.shape)
    return t, ratio, ratio


@dataclasses.dataclass(frozen=True)
class TimeScheme:
    """An entry of TIMES: the function, and the properties that `Scheme` checks."""

    draw: Callable[[Array, Array], Times]
    biased: bool = False
    by_count: bool = False  # times stand for counts of masked tokens: needs masks by count
    signed: bool = False  # ratios may be 0 or negative


TIMES = {
    "iid": TimeScheme(iid_times),
    "stratified": TimeScheme(stratified_times),
    "systematic": TimeScheme(systematic_times),
    "antithetic": TimeScheme(antithetic_times),
    "importance": TimeScheme(importance_times, by_count=True, signed=True),
    "official": TimeScheme(official_times, biased=True, by_count=True),
    "gauss_legendre": TimeScheme(gauss_legendre_times, biased=True),
}
