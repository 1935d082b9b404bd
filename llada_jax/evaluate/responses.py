"""The mean score of a model's responses to prompts."""

import functools
from collections.abc import Callable

import numpy as np

from llada_jax import sampling
from llada_jax.data import templates
from llada_jax.tasks.scorer import score_response


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
    """Generates one response to each prompt; returns their mean score with its standard error.

    `records` are (where, raw record, normalised record). `sampler` are arguments of
    `sampling.sample_responses`; the default temperature is 0. The metrics are "solve/rate",
    "solve/rate_stderr" (nan for one record) and "solve/count". Raises ValueError, which names the
    record, if the scorer cannot judge a response.
    """
    prompts = [
        templates.encode_prompt(tokenizer, prompt["prompt"], template) for _, _, prompt in records
    ]
    responses = sampling.sample_responses(
        logits_fn, prompts, batch_size=batch_size, progress=progress, **sampler
    )
    trim = functools.partial(
        sampling.trim, eos_id=sampler.get("eos_id"), eot_id=sampler.get("eot_id")
    )
    texts = [tokenizer.decode(trim(response)) for response in np.asarray(responses)]
    scores = np.array(
        [
            score_response(scorer, where, {**raw, **prompt}, text)
            for (where, raw, prompt), text in zip(records, texts, strict=True)
        ]
    )
    spread = scores.std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.nan
    return {
        "solve/rate": float(scores.mean()),
        "solve/rate_stderr": float(spread),
        "solve/count": len(scores),
    }
