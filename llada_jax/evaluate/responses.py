"""The mean score of a model's responses to the questions of a task."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from llada_jax import sampling
from llada_jax.evaluate.questions import Question, encode
from llada_jax.evaluate.summary import scored
from llada_jax.tasks import Task


def solve_rate(
    logits_fn: Callable,
    task: Task,
    questions: Sequence[Question],
    tokenizer,
    *,
    template: str,
    progress: Callable[[int, int], object] | None = None,
    **sampler,
) -> dict[str, float]:
    """Generates one response to each question; returns their mean score with its standard error.

    `sampler` are arguments of `sampling.respond_in_words`; the default temperature is 0. The
    metrics are "solve/rate", "solve/rate_stderr" (nan for one question) and "solve/count".
    progress(done, N) is called after each response. Raises ValueError, which names the record, if
    the task cannot score a response.
    """
    prompts = encode(tokenizer, task, questions, template, sampler["gen_length"], None)
    texts: list[Any] = [None] * len(prompts)
    found = sampling.respond_in_words(logits_fn, prompts, tokenizer, **sampler)
    for done, (response, text) in enumerate(found, 1):
        texts[response.index] = text
        if progress:
            progress(done, len(prompts))
    result = scored(task, list(zip(questions, texts, strict=True)))
    return {
        "solve/rate": result["mean"],
        "solve/rate_stderr": math.nan if result["stderr"] is None else result["stderr"],
        "solve/count": result["n"],
    }
