"""What a model thinks of an answer: estimates, greedy check, long texts, exact likelihoods.

`logits_fn(tokens [b, l], None) -> logits [b, l, v]`. Pass a model as
`jax.tree_util.Partial(model.apply, {"params": params})`: a closure would compile its parameters in
as constants, and every new closure would compile again.
"""

from llada_jax.likelihood.estimate import FEW_DRAWS, grid, log_likelihood, log_likelihoods, terms
from llada_jax.likelihood.greedy import are_greedy, is_greedy
from llada_jax.likelihood.orders import exact_log_likelihood, order_log_likelihood
from llada_jax.likelihood.text import bits_per_byte, perplexity, rolling_log_likelihood, windows

__all__ = [
    "FEW_DRAWS",
    "are_greedy",
    "bits_per_byte",
    "exact_log_likelihood",
    "grid",
    "is_greedy",
    "log_likelihood",
    "log_likelihoods",
    "order_log_likelihood",
    "perplexity",
    "rolling_log_likelihood",
    "terms",
    "windows",
]
