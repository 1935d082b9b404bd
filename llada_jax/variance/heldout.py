"""Measures the variance of the scores of held-out pairs during training."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llada_jax.batch import Batch
from llada_jax.metrics import Mean
from llada_jax.objectives import terms as terms_lib
from llada_jax.objectives.preference import Preference
from llada_jax.variance import decomposition
from llada_jax.variance.problem import NESTED_EPOCH, Estimator, Problem


def score_variance(
    params: Any,
    batch: Batch,
    reference: Any,
    *,
    model: nn.Module,
    settings: Preference,
    repeats: int,
    axis_name: str | None = None,
) -> dict[str, Mean]:
    """Returns the variance of a pair's score, as means over the pairs of a batch; no gradients.

    "score_variance" is the sample variance over `repeats` independent repeats, under the scheme of
    `settings`. "score_v_t" and "score_v_yt" are V_t and V_yt of Lemma 5, for one iid draw with
    shared noise. They are estimated from two samples at each of `repeats` >= 3 times. `reference`
    contains the reference policy's parameters. `axis_name` is a mapped axis that splits the rows.
    """

    # Compute one draw at a time: training may have memory for only one.
    def terms_fn(params, batch, drawn):
        return terms_lib.model_terms(model, params, batch, drawn, chunk=1)

    problem = Problem(terms_fn, settings.beta, settings.seed, parts=(), gradient=False)
    estimator = Estimator(settings.scheme, settings.share_noise)
    is_pair = problem.is_pair(batch)

    def repeat(epoch):
        ratio = jnp.subtract(*problem.estimate(params, reference, batch, epoch, estimator)[1])
        return settings.beta * (ratio[:, 0::2] - ratio[:, 1::2])

    def time(epoch):
        nothing = jnp.zeros(is_pair.shape)
        terms = problem.nested(params, reference, batch, NESTED_EPOCH + epoch, nothing, n_yt=2)[0]
        return settings.beta * (terms[0] - terms[1])

    found = {"score_variance": jax.lax.map(repeat, jnp.arange(repeats)).var(0, ddof=1)}
    split = decomposition.decompose(jax.lax.map(time, jnp.arange(repeats)))
    # Winner and loser have independent draws, so their variances add up.
    found |= {
        f"score_{name}": v[:, 0::2] + v[:, 1::2]
        for name, v in (("v_t", split.v_t), ("v_yt", split.v_yt))
    }
    return {name: Mean.of(value, is_pair).over_devices(axis_name) for name, value in found.items()}
