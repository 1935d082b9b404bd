"""Held-out metrics with their standard errors."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jaxtyping import Array

from llada_jax import losses
from llada_jax.batch import Batch
from llada_jax.metrics import Mean
from llada_jax.models.llada import LLaDA
from llada_jax.noise import Scheme
from llada_jax.objectives import preference
from llada_jax.objectives import terms as terms_lib
from llada_jax.objectives.preference import Preference


def preference_metrics(
    params: Any,
    batch: Batch,
    reference: Array,
    *,
    model: LLaDA,
    settings: Preference,
    num_segments: int,
    axis_name: str | None = None,
) -> dict[str, Mean]:
    """Means over the pairs of a batch of all that `steps.score_pairs` gives; `reference` as there.

    `axis_name`: of a mapped axis that splits the rows of the batch; None where `batch` holds them all.
    """
    metrics, is_pair = preference.score_pairs(
        params, batch, reference, model=model, settings=settings, num_segments=num_segments
    )
    return {
        name: Mean.of(value, is_pair).over_devices(axis_name) for name, value in metrics.items()
    }


def denoising_metrics(
    params: Any,
    batch: Batch,
    *,
    model: LLaDA,
    scheme: Scheme,
    seed: int,
    num_segments: int,
    chunk: int = 0,
    axis_name: str | None = None,
) -> dict[str, Mean]:
    """Mean over the samples of a batch of the ELBO in nats a response token; `axis_name` as in `preference_metrics`."""
    drawn = terms_lib.draw(batch, scheme, seed=seed, stream="evaluate", num_segments=num_segments)
    terms = terms_lib.model_terms(
        model, params, batch, drawn, num_segments=num_segments, chunk=chunk
    )
    lengths = terms_lib.segment_lengths(batch, num_segments)
    found = Mean.of(-losses.denoising_loss(terms.mean(0), lengths), lengths > 0)
    return {"elbo_per_token": found.over_devices(axis_name)}


def over_batches(
    metrics_of: Callable[[Batch], dict[str, Mean]], batches: Iterable[Batch]
) -> dict[str, float]:
    """Merges the Means of every batch: each metric and, as `<name>_stderr`, its standard error."""
    merged: dict[str, Mean] = {}
    for batch in batches:
        for name, mean in metrics_of(batch).items():
            merged[name] = merged[name].merge(mean) if name in merged else mean
    merged = jax.device_get(merged)
    out = {name: float(mean.value) for name, mean in merged.items()}
    return out | {f"{name}_stderr": float(mean.stderr) for name, mean in merged.items()}
