"""The laboratory: how much ELBO estimates, scores, losses and gradients vary, and why.

The command is `python -m llada_jax.variance`; the functions work with any model. In this example,
the log-probabilities depend only on the number of masked tokens. So all variance comes from the
time (V_t), and none from the choice of the masked tokens (V_yt).

    >>> import jax, jax.numpy as jnp
    >>> from llada_jax import elbo, variance
    >>> def logits_fn(tokens):  # three tokens and the mask, id 3
    ...     masks = jnp.sum(tokens == 3, -1)[..., None, None]
    ...     logits = masks * jnp.array([1.0, 0.0, 0.0, -jnp.inf])
    ...     return jnp.broadcast_to(logits, (*tokens.shape, 4))
    >>> tokens, response = jnp.zeros((1, 6), int), jnp.arange(6)[None] >= 2
    >>> estimate = elbo.estimate_elbo(
    ...     jax.random.key(0), logits_fn, tokens, response, mask_id=3, n_t=512, n_yt=2
    ... )
    >>> found = variance.decompose(estimate.terms)
    >>> # The term at l masked tokens:
    >>> per_count = jnp.array([4 * (l - jnp.log(jnp.exp(l) + 2)) for l in range(1, 5)])
    >>> bool(jnp.abs(found.v_t - per_count.var()) < 4 * found.v_t_stderr)
    True
    >>> bool(jnp.abs(found.v_yt) < 1e-6)
    True
"""

from llada_jax.variance.decomposition import (
    Decomposition,
    decompose,
    decompose_norms,
    predicted_variance,
)
from llada_jax.variance.gradients import EVERYTHING, Moments, squared_norms
from llada_jax.variance.problem import Estimator, Problem, TermsFn, terms_of
from llada_jax.variance.statistics import (
    best_times,
    bootstrap,
    neyman,
    pair_statistics,
    scores_of,
    theorem_4,
)

__all__ = [
    "EVERYTHING",
    "Decomposition",
    "Estimator",
    "Moments",
    "Problem",
    "TermsFn",
    "best_times",
    "bootstrap",
    "decompose",
    "decompose_norms",
    "neyman",
    "pair_statistics",
    "predicted_variance",
    "scores_of",
    "squared_norms",
    "terms_of",
    "theorem_4",
]
