"""The law of total variance: V_t and V_yt (Lemma 5)."""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@flax.struct.dataclass
class Decomposition:
    """V_t and V_yt with standard errors; the variance of one term is V_t + V_yt (Lemma 5).

    V_t is the variance of the term's mean given the time. V_yt is the mean of the term's variance
    given the time.
    """

    v_t: Float[Array, "*b"]
    v_yt: Float[Array, "*b"]
    v_t_stderr: Float[Array, "*b"]
    v_yt_stderr: Float[Array, "*b"]


def decompose(terms: Float[Array, "t y *b"]) -> Decomposition:
    """Estimates V_t and V_yt from nested draws: n_t times and n_yt samples at each.

    Both estimates are unbiased, so V_t may come out below 0. The standard errors are jackknife
    errors over the times. Raises ValueError for fewer than 3 times or 2 samples at each.
    """
    n_t, n_yt = terms.shape[:2]
    if n_t < 3 or n_yt < 2:
        raise ValueError(
            f"n_t={n_t}, n_yt={n_yt} nested draws: V_t and V_yt need at least 3 times and 2 samples"
        )
    within, means = terms.var(1, ddof=1), terms.mean(1)
    deviation = jnp.square(means - means.mean(0))
    between = deviation.sum(0) / (n_t - 1)
    # Leave out one time: the variances between and within the remaining times.
    between_but = (deviation.sum(0) - n_t / (n_t - 1) * deviation) / (n_t - 2)
    within_but = (within.sum(0) - within) / (n_t - 1)

    def jackknife(values):
        return jnp.sqrt((n_t - 1) * jnp.square(values - values.mean(0)).mean(0))

    return Decomposition(
        between - within.mean(0) / n_yt,
        within.mean(0),
        jackknife(between_but - within_but / n_yt),
        jackknife(within_but),
    )


def predicted_variance(
    v_t: Array | float, v_yt: Array | float, n_t: int, n_yt: int
) -> Array | float:
    """The variance of the mean of n_t x n_yt terms, for iid times and plain weights (Lemma 5)."""
    return v_t / n_t + v_yt / (n_t * n_yt)


def decompose_norms(
    squares: np.ndarray, of_times: np.ndarray, of_all: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The traces of V_t and V_yt [p] of nested gradients, from squared norms of p parts.

    The estimators are as in `decompose`. Each gradient is the sum of k independent summands,
    whose variances add up. The squared norms are, for each summand:

    - `squares` [t, y, k, p] of each draw,
    - `of_times` [t, k, p] of the sum over the samples at each time,
    - `of_all` [k, p] of the sum over all draws.
    """
    n_t, n_yt = squares.shape[:2]
    within = (squares.sum(1) - of_times / n_yt).mean(0) / (n_yt - 1)
    between = (of_times.sum(0) - of_all / n_t) / n_yt**2 / (n_t - 1)
    return (between - within / n_yt).sum(0), within.sum(0)
