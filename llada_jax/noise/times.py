"""The times of the draws: one function and one entry of TIMES each.

A function maps (u, lengths) to (t, ratio, expected), all [n_t, s]; u is uniform on (0, 1], t is in (0, 1].
A scheme is unbiased if mean_j[ratio_j * h(t_j)] has expectation E[h(t)], t uniform, for every h. `expected` is
E[ratio_j | the other times]. Returning `ratio` for it is always valid, but makes leave_one_out a weaker control
variate."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

Times = tuple[
    Float32[Array, "t s"], Float32[Array, "t s"], Float32[Array, "t s"]
]  # t, ratio, expected


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

    def at(
        v,
    ):  # count, ratio = 1 / (L P(l)) without the difference of two roots, and its integral from 0 to v
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
    count = (
        jnp.round(k + jnp.arange(n)[:, None] * (length / n)).astype(jnp.int32) - 1
    ) % length + 1
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


@dataclasses.dataclass(frozen=True)
class TimeScheme:
    """A function of TIMES and what has to be known of it."""

    draw: Callable[[Array, Array], Times]
    biased: bool = False
    by_count: bool = False  # its times are counts of masked tokens: for masks by count only
    signed: bool = False  # its ratios may be 0 or below


TIMES = {
    "iid": TimeScheme(iid_times),
    "stratified": TimeScheme(stratified_times),
    "systematic": TimeScheme(systematic_times),
    "antithetic": TimeScheme(antithetic_times),
    "importance": TimeScheme(importance_times, by_count=True, signed=True),
    "official": TimeScheme(official_times, biased=True, by_count=True),
    "gauss_legendre": TimeScheme(gauss_legendre_times, biased=True),
}
