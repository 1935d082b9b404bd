"""Weight schemes: the weight of each masked token's log-probability.

Each scheme is one function and one entry of WEIGHTS. The function maps (draws, pseudo_count) to
weights [n, l].
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from llada_jax.noise.arrays import Draws, of_segments, per_token


def plain_weights(draws: Draws, pseudo_count: float) -> Float32[Array, "n l"]:
    """The weight of every masked token is ratio x inverse of its draw."""
    del pseudo_count
    return jnp.where(draws.masked, draws.ratio * draws.inverse, 0)


def leave_one_out_weights(draws: Draws, pseudo_count: float) -> Float32[Array, "n l"]:
    """Uses the other draws' log-probabilities of the same tokens as a control variate.

    Let a_i be the mean of log p_i over the draws that are independent of draw k and mask token i
    (0 if there are none). With `pseudo_count` c > 0, the mean over all tokens of those draws
    enters a_i as c more draws of token i. The term of draw k becomes

        expected_k sum_i a_i + ratio_k inverse_k sum_{i in m_k} (log p_i - a_i).

    This is unbiased. Given the independent draws, E[inverse_k 1(i in m_k) | t_k] = 1 and
    E[ratio_k] = expected_k, so the contributions of a_i have mean 0. Collecting the terms by
    log-probability gives token weights that depend on times and masks alone.
    """

    def others(x):
        return jnp.matmul(draws.independent, x, precision=jax.lax.Precision.HIGHEST)

    # [k, i]: has mean 0 given the draws that are independent of k.
    residual = draws.expected - draws.ratio * draws.inverse * draws.masked
    counts = others(draws.masked.astype(jnp.float32))
    residual = residual / (counts + pseudo_count if pseudo_count else jnp.maximum(counts, 1))
    extra = others(residual)
    if pseudo_count:
        # a_i of draw k contains the mean over all tokens of a segment. This is the weight that
        # each log-probability gets through that mean.
        totals = of_segments(counts, draws.segments)
        means = pseudo_count * of_segments(residual, draws.segments) / jnp.maximum(totals, 1)
        extra += others(jax.vmap(per_token, (0, None))(means, draws.segments))
    return plain_weights(draws, pseudo_count) + jnp.where(draws.masked, extra, 0)


def balanced_weights(draws: Draws, pseudo_count: float) -> Float32[Array, "n l"]:
    """Moves weight between the tokens of each draw, so that tokens get nearly equal total weights.

    These are the best weights w for the model log p_i = a_i + noise. They minimise

        sum_ij w_ij^2 + (1 / c) sum_i (W_i - W)^2

    while each draw keeps the sum of its plain weights. Here W_i = sum_j w_ij and W = sum_j ratio_j.
    c = `pseudo_count` is the variance of the noise divided by the variance of a. The solution is

        w_ij = mu_j - (sum_{k: i in m_k} mu_k - W) / (c + c_i).

    c_i is the number of draws that mask i. The n unknowns mu_j solve n linear equations.

    This is unbiased. Tokens are exchangeable, so given the times and m_j, every i in m_j has the
    same expected weight. These weights sum to ratio_j inverse_j |m_j|, as the plain ones do.
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
    """The plain weights of each token, divided by their mean over the draws.

    Biased, because the estimate is a ratio of two means. A token that no draw masks contributes
    nothing.
    """
    weights = plain_weights(draws, pseudo_count)
    return jnp.where(draws.masked, weights / jnp.where(draws.masked, weights.mean(0), 1), 0)


@dataclasses.dataclass(frozen=True)
class WeightScheme:
    """An entry of WEIGHTS: the function, and the properties that `Scheme` checks."""

    weigh: Callable[[Draws, float], Array]
    biased: bool = False
    pseudo_count: str = "unused"  # "unused", "optional" or "required"
    independent: bool = False  # needs draws that are independent of each other
    divides: bool = False  # divides by weights, so ratios must not be 0


WEIGHTS = {
    "plain": WeightScheme(plain_weights),
    "leave_one_out": WeightScheme(leave_one_out_weights, pseudo_count="optional", independent=True),
    "balanced": WeightScheme(balanced_weights, pseudo_count="required"),
    "self_normalised": WeightScheme(self_normalised_weights, biased=True, divides=True),
}
