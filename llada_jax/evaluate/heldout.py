"""Held-out metrics with their standard errors, for every objective."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax

from llada_jax.batch import Batch
from llada_jax.metrics import Mean
from llada_jax.objectives import Objective


def heldout_metrics(
    params: Any,
    batch: Batch,
    frozen: Any,
    *,
    objective: Objective,
    model: nn.Module,
    settings: Any,
    axis_name: str | None = None,
) -> dict[str, Mean]:
    """Returns the means over the examples of a batch of all metrics of `objective.examples`.

    frozen: the reference policy's parameters, or None, as for `objective.examples`.
    axis_name: a mapped axis that splits the rows of the batch. None if `batch` has all rows.
    """
    examples = objective.examples(params, batch, frozen, model=model, settings=settings)
    mask = objective.is_example(batch)
    return {name: Mean.of(value, mask).over_devices(axis_name) for name, value in examples.items()}


def over_batches(
    metrics_of: Callable[[Batch], dict[str, Mean]], batches: Iterable[Batch]
) -> dict[str, float]:
    """Merges the Means of all batches; returns every metric and its error, `<name>_stderr`."""
    merged: dict[str, Mean] = {}
    for batch in batches:
        for name, mean in metrics_of(batch).items():
            merged[name] = merged[name].merge(mean) if name in merged else mean
    merged = jax.device_get(merged)
    out = {name: float(mean.value) for name, mean in merged.items()}
    return out | {f"{name}_stderr": float(mean.stderr) for name, mean in merged.items()}
