"""The law of total variance: V_t and V_yt (Lemma 5)."""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@flax.struct.dataclass
class Decomposition:
    """Lemma 5: the variance of one term is V_t, of its mean given the time, plus V_yt, the mean of that given it."""

    v_t: Float[Array, "*b"]
    v_yt: Float[Array, "*b"]
    v_t_stderr: Float[Array, "*b"]
    v_yt_stderr: Float[Array, "*b"]


def decompose(terms: Float[Array, "t y *b"]) -> Decomposition:
    """V_t and V_yt from n_t x n_yt nested draws, unbiased, with jackknife standard errors over the times.

    Unbiased, V_t may come out below 0. ValueError for fewer than three times or two samples at each.
    """
    n_t, n_yt = terms.shape[:2]
    if n_t < 3 or n_yt < 2:
        raise ValueError(
            f"n_t={n_t}, n_yt={n_yt} nested draws: V_t and V_yt need at least 3 times and 2 samples"
        )
    within, means = terms.var(1, ddof=1), terms.mean(1)
    deviation = jnp.square(means - means.mean(0))
    between = deviation.sum(0) / (n_t - 1)
    # Without one time each: what is left of the sum of squares.
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
    """Lemma 5: the variance of the mean of n_t x n_yt terms with iid times and plain weights."""
    return v_t / n_t + v_yt / (n_t * n_yt)


def decompose_norms(
    squares: np.ndarray, of_times: np.ndarray, of_all: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Traces V_t and V_yt [p] of n_t x n_yt nested gradients, as `decompose` finds them, from squared norms of p parts.

    A gradient comes in k independent summands, whose variances add up: `squares` [t, y, k, p] of each, `of_times`
    [t, k, p] of the sum at each time, `of_all` [k, p] of the sum of all.
    """
    n_t, n_yt = squares.shape[:2]
    within = (squares.sum(1) - of_times / n_yt).mean(0) / (n_yt - 1)
    between = (of_times.sum(0) - of_all / n_t) / n_yt**2 / (n_t - 1)
    return (between - within / n_yt).sum(0), within.sum(0)
