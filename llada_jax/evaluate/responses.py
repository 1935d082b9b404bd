"""A model's responses to the questions of a task, their verdicts, and the mean scores."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llada_jax import sampling
from llada_jax.evaluate.questions import Question, encode
from llada_jax.evaluate.summary import Verdict, judge_all, summarise
from llada_jax.tasks import Task

COUNT, KL = "solve/count", "solve/kl"  # no number of a scorer may take these names


class Solved(NamedTuple):
    """One response to each question, in the order of the questions."""

    prompts: list[list[int]]
    responses: list[sampling.Response]
    texts: list[str]  # before EOS, EoT or a stop string
    verdicts: list[Verdict]

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each number of the verdicts, and its standard error `<name>_stderr`.

        The number of a scorer that returns one is "solve/rate"; numbers with names are
        "solve/<name>", in the scorer's order. An error is nan for one question. "solve/count" is
        the number of questions. Raises ValueError if a scorer takes a name that means another
        number.
        """
        found = summarise({str(i): [verdict] for i, verdict in enumerate(self.verdicts)})
        out = {}
        for name, number in found["metrics"].items():
            key = "solve/rate" if name == "score" else f"solve/{name}"
            if key in (COUNT, KL):
                raise ValueError(f"the scorer's {name!r} would be {key}: give it another name")
            out[key] = number["mean"]
            out[f"{key}_stderr"] = math.nan if number["stderr"] is None else number["stderr"]
        return out | {COUNT: found["n"]}


def solve(
    logits_fn: Callable,
    task: Task,
    questions: Sequence[Question],
    tokenizer,
    *,
    template: str,
    progress: Callable[[int, int], object] | None = None,
    **sampler,
) -> Solved:
    """Generates one response to each question and judges it.

    `sampler` are arguments of `sampling.respond_in_words`; the default temperature is 0.
    progress(done, N) is called after each response. Raises ValueError, which names the record, if
    the task cannot score a response.
    """
    prompts = encode(tokenizer, task, questions, template, sampler["gen_length"], None)
    answers: list[Any] = [None] * len(prompts)
    found = sampling.respond_in_words(logits_fn, prompts, tokenizer, **sampler)
    for done, (response, text) in enumerate(found, 1):
        answers[response.index] = (response, text)
        if progress:
            progress(done, len(prompts))
    responses, texts = (list(each) for each in zip(*answers, strict=True))
    asked = ((q.where, q.record, text) for q, text in zip(questions, texts, strict=True))
    return Solved(prompts, responses, texts, judge_all(task, asked))
