"""Held-out evaluation: ELBO per token, implicit-reward accuracy, and the share of prompts that a verifier accepts."""

import functools
import importlib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llada_jax import losses, packing, sampling, steps, variance
from llada_jax.batch import Batch
from llada_jax.metrics import Mean
from llada_jax.model import LLaDA
from llada_jax.noise import Scheme


def preference_metrics(
    params: Any,
    batch: Batch,
    reference: Array,
    *,
    model: LLaDA,
    settings: steps.Preference,
    num_segments: int,
    axis_name: str | None = None,
) -> dict[str, Mean]:
    """Means over the pairs of a batch of all that `steps.score_pairs` gives; `reference` as there.

    `axis_name`: of a mapped axis that splits the rows of the batch; None where `batch` holds them all.
    """
    metrics, is_pair = steps.score_pairs(
        params, batch, reference, model=model, settings=settings, num_segments=num_segments
    )
    return {name: Mean.of(value, is_pair).over_devices(axis_name) for name, value in metrics.items()}


def score_variance(
    params: Any,
    batch: Batch,
    reference: Any,
    *,
    model: LLaDA,
    settings: steps.Preference,
    num_segments: int,
    repeats: int,
    axis_name: str | None = None,
) -> dict[str, Mean]:
    """Means over the pairs of a batch of how much a score varies, without gradients; `reference`: its parameters.

    "score_variance" is that of the scheme of `settings`, whichever it is, over independent repeats; "score_v_t" and
    "score_v_yt" are Lemma 5's, of one iid draw of noise that is shared, by two samples at each of `repeats` >= 3 times.
    """

    def terms_fn(params, batch, drawn):  # one draw at a time: the memory of training may be that of one
        return steps.model_terms(model, params, batch, drawn, num_segments=num_segments, chunk=1)

    problem = variance.Problem(terms_fn, num_segments, settings.beta, settings.seed, parts=(), gradient=False)
    estimator = variance.Estimator(settings.scheme, settings.share_noise)
    is_pair = problem.is_pair(batch)

    def repeat(epoch):
        ratio = jnp.subtract(*problem.estimate(params, reference, batch, epoch, estimator)[1])
        return settings.beta * (ratio[:, 0::2] - ratio[:, 1::2])

    def time(epoch):
        nothing = jnp.zeros(is_pair.shape)
        terms = problem.nested(params, reference, batch, variance.NESTED_EPOCH + epoch, nothing, n_yt=2)[0]
        return settings.beta * (terms[0] - terms[1])

    found = {"score_variance": jax.lax.map(repeat, jnp.arange(repeats)).var(0, ddof=1)}
    split = variance.decompose(jax.lax.map(time, jnp.arange(repeats)))
    # One draw of winner and loser each, independent: their variances add up.
    found |= {f"score_{name}": v[:, 0::2] + v[:, 1::2] for name, v in (("v_t", split.v_t), ("v_yt", split.v_yt))}
    return {name: Mean.of(value, is_pair).over_devices(axis_name) for name, value in found.items()}


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
    drawn = steps.draw(batch, scheme, seed=seed, stream="evaluate", num_segments=num_segments)
    terms = steps.model_terms(model, params, batch, drawn, num_segments=num_segments, chunk=chunk)
    lengths = steps.segment_lengths(batch, num_segments)
    found = Mean.of(-losses.denoising_loss(terms.mean(0), lengths), lengths > 0)
    return {"elbo_per_token": found.over_devices(axis_name)}


def over_batches(metrics_of: Callable[[Batch], dict[str, Mean]], batches: Iterable[Batch]) -> dict[str, float]:
    """Merges the Means of every batch: each metric and, as `<name>_stderr`, its standard error."""
    merged: dict[str, Mean] = {}
    for batch in batches:
        for name, mean in metrics_of(batch).items():
            merged[name] = merged[name].merge(mean) if name in merged else mean
    merged = jax.device_get(merged)
    out = {name: float(mean.value) for name, mean in merged.items()}
    return out | {f"{name}_stderr": float(mean.stderr) for name, mean in merged.items()}


def load_scorer(spec: str) -> Callable[[dict, str], float]:
    """The function that "module:function" names, (record, response) -> float; ValueError where there is none."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ValueError(f"scorer {spec!r} is not of the form module:function, as llada_jax.sudoku:score")
    try:
        scorer = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"scorer {spec!r}: {error}; it must be importable from here") from error
    if not callable(scorer):
        raise ValueError(f"scorer {spec!r}: the module {module} has no function {name}")
    return scorer


def score_response(scorer: Callable, where: str, record: dict, response: str) -> float:
    """The scorer's finite number, or one ValueError that names the record."""
    try:
        value = scorer(record, response)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(
            f"{where}: the scorer raised {type(error).__name__}: {error} (response {response[:80]!r})"
        ) from error
    if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
        raise ValueError(f"{where}: the scorer returned {value!r}, not a finite number (response {response[:80]!r})")
    return float(value)


def solve_rate(
    logits_fn: Callable,
    records: list[tuple[str, dict, dict]],
    tokenizer,
    scorer: Callable[[dict, str], float],
    *,
    template: str,
    batch_size: int,
    progress: Callable[[int, int], object] | None = None,
    **sampler,
) -> dict[str, float]:
    """Mean score of one generated response to each (where, raw, normalised) prompt record, with its standard error.

    `sampler` goes to `sampling.sample_responses`; temperature 0 unless it says otherwise.
    """
    prompts = [packing.encode_prompt(tokenizer, prompt["prompt"], template) for _, _, prompt in records]
    responses = sampling.sample_responses(logits_fn, prompts, batch_size=batch_size, progress=progress, **sampler)
    trim = functools.partial(sampling.trim, eos_id=sampler.get("eos_id"), eot_id=sampler.get("eot_id"))
    texts = [tokenizer.decode(trim(response)) for response in np.asarray(responses)]
    scores = np.array(
        [
            score_response(scorer, where, {**raw, **prompt}, text)
            for (where, raw, prompt), text in zip(records, texts, strict=True)
        ]
    )
    spread = scores.std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.nan
    return {"solve/rate": float(scores.mean()), "solve/rate_stderr": float(spread), "solve/count": len(scores)}
