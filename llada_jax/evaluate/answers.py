"""A model's responses to the questions of a task, with what is missing of an earlier run."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax import metrics, sampling
from llada_jax.evaluate.lines import Parts
from llada_jax.evaluate.plan import Plan
from llada_jax.evaluate.questions import encode
from llada_jax.parallel import mesh as mesh_lib


class Model(NamedTuple):
    """What answers."""

    logits_fn: Callable
    tokenizer: Any
    special: dict[str, int | None]  # mask_id, pad_id, eos_id, eot_id
    longest: int  # tokens that it takes
    mesh: jax.sharding.Mesh | None = None


def prompts_of(plan: Plan, model: Model) -> list[list[int]]:
    """The ids of all prompts. Raises ValueError if one leaves no room for the response."""
    return encode(
        model.tokenizer, plan.task, plan.questions, plan.template, plan.gen_length, model.longest
    )


def answer(
    plan: Plan,
    prompts: list[list[int]],
    model: Model,
    parts: Parts,
    batch_size: int,
    host: tuple[int, int] = (0, 1),
) -> None:
    """Appends the lines {id, sample, response, tokens, passes, seconds} that are missing.

    prompts: those of `prompts_of`.
    host: (index, count); of several hosts, each answers its share of the questions.
    `seconds` are those since the line before it.
    """
    index, count = host
    done = {(line["id"], line["sample"]) for line in parts.read()}
    share = [
        (question, sample)
        for question in range(len(plan.questions))
        for sample in range(plan.samples)
    ][index::count]
    missing = [
        (question, sample)
        for question, sample in share
        if (plan.questions[question].id, sample) not in done
    ]
    if not missing:
        return
    with contextlib.ExitStack() as stack:
        if model.mesh is not None:
            stack.enter_context(mesh_lib.use(model.mesh))
        first = len(share) - len(missing)
        progress = metrics.Progress(len(share), first, unit="response", show=(), every=5)
        stack.enter_context(progress)
        progress.update(first)
        began = time.monotonic()
        found = _responses(plan, model, missing, prompts, batch_size)
        for number, (question, sample, response, text) in enumerate(found, first + 1):
            now = time.monotonic()
            ids = sampling.trim(response.tokens, model.special["eos_id"], model.special["eot_id"])
            parts.append(
                {
                    "id": plan.questions[question].id,
                    "sample": sample,
                    "response": text,
                    "tokens": len(ids),
                    "passes": response.passes,
                    "seconds": round(now - began, 3),
                }
            )
            began = now
            progress.update(number)


def _responses(
    plan: Plan,
    model: Model,
    asked: Sequence[tuple[int, int]],
    prompts: list[list[int]],
    batch_size: int,
) -> Iterator[tuple[int, int, sampling.Response, str]]:
    """Yields (question, sample, response, text); draws depend on these two numbers alone."""
    rows = [question * plan.samples + sample for question, sample in asked]
    found = sampling.respond_in_words(
        model.logits_fn,
        [prompts[question] for question, _ in asked],
        model.tokenizer,
        stop=plan.stop,
        batch_size=batch_size,
        key=jax.random.key(plan.about["seed"]),
        row_ids=np.array(rows),
        row_sharding=None if model.mesh is None else mesh_lib.rows(model.mesh),
        **model.special,
        **plan.sampler,
    )
    for response, text in found:
        yield *asked[response.index], response, text
