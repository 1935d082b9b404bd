"""What the log-probability of each masked token counts: one function and one entry of WEIGHTS each.

A function maps (draws, pseudo_count) to weights [n, l]."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from llada_jax.noise.arrays import Draws, of_segments, per_token


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
        totals = of_segments(counts, draws.segments)
        means = pseudo_count * of_segments(residual, draws.segments) / jnp.maximum(totals, 1)
        extra += others(jax.vmap(per_token, (0, None))(means, draws.segments))
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
    overlap = of_segments(products, draws.segments).T.reshape(-1, len(plain), len(plain))
    sizes = jnp.maximum(of_segments(masked, draws.segments), 1).T
    total = of_segments(draws.ratio, draws.segments).sum(0) / jnp.maximum(draws.segments.lengths, 1)
    right = (
        of_segments(plain, draws.segments).T
        - total[:, None] * of_segments(shrunk, draws.segments).T
    )
    mu = jnp.linalg.solve(sizes[:, :, None] * jnp.eye(len(plain)) - overlap, right[..., None])[
        ..., 0
    ].T
    mu, total = jax.vmap(per_token, (0, None))(mu, draws.segments), per_token(total, draws.segments)
    surplus = jnp.sum(jnp.where(draws.masked, mu, 0), 0) - total
    return jnp.where(draws.masked, mu - surplus / (pseudo_count + masked.sum(0)), 0)


def self_normalised_weights(draws: Draws, pseudo_count: float) -> Float32[Array, "n l"]:
    """The weights of each token divided by their mean over the draws: biased, as a ratio of two means is.

    A token that no draw masks counts nothing.
    """
    weights = plain_weights(draws, pseudo_count)
    return jnp.where(draws.masked, weights / jnp.where(draws.masked, weights.mean(0), 1), 0)


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """A function of WEIGHTS and what has to be known of it."""

    weigh: Callable[[Draws, float], Array]
    biased: bool = False
    pseudo_count: str = "unused"  # or "optional", or "required"
    independent: bool = False  # needs draws that are
    divides: bool = False  # by ratios


WEIGHTS = {
    "plain": WeightScheme(plain_weights),
    "leave_one_out": WeightScheme(leave_one_out_weights, pseudo_count="optional", independent=True),
    "balanced": WeightScheme(balanced_weights, pseudo_count="required"),
    "self_normalised": WeightScheme(self_normalised_weights, biased=True, divides=True),
}
