"""Verdicts on responses, and what they come to: means, standard errors, pass@k."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llada_jax.evaluate.questions import Question
from llada_jax.tasks import Task, sandbox

Verdict = Mapping[str, float | list[float]]  # what `Task.judge` returns
KS = (1, 2, 4, 5, 8, 10, 16, 32, 64, 100)  # of pass@k


def judge_all(
    task: Task,
    responses: Iterable[tuple[str, dict, str]],
    *,
    unsafe: bool = False,
    progress: Callable[[int], object] | None = None,
) -> list[Verdict]:
    """The verdicts on (where, record, response)s, in their order.

    Programs run beside each other on all cores. unsafe: programs may run without protection.
    progress(done) is called after each verdict. Raises ValueError as `Task.judge` does.
    """
    options = {"unsafe": unsafe} if task.runs_code else {}
    found = []

    def collect(verdicts: Iterable[Verdict]):
        for done, verdict in enumerate(verdicts, 1):
            found.append(verdict)
            if progress:
                progress(done)

    if not task.runs_code:
        collect(task.judge(*each) for each in responses)
        return found
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = [pool.submit(task.judge, *each, **options) for each in responses]
        try:
            collect(future.result() for future in futures)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def scored(
    task: Task,
    responses: Sequence[tuple[Question, str]],
    *,
    unsafe: bool = False,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Judges responses (`judge_all`) and summarises them; several of a question are its samples.

    The result of a task that runs programs also has `protection`, the sandbox's.
    """
    asked = ((question.where, question.record, text) for question, text in responses)
    verdicts: dict[str, list[Verdict]] = {}
    found = judge_all(task, asked, unsafe=unsafe, progress=progress)
    for (question, _), verdict in zip(responses, found, strict=True):
        verdicts.setdefault(question.id, []).append(verdict)
    protected = {"protection": sandbox.protection()} if task.runs_code else {}
    return summarise(verdicts) | protected


def summarise(verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, Any]:
    """The means and standard errors of the verdicts on each question's samples, by id.

    Returns `mean`, `stderr` (None for one question) and `n`, the number of questions, of the first
    number of the verdicts; `metrics`, the same of all numbers, with `share`, whether all of them
    are from 0 to 1; `verdicts`, the mean over the samples by id; and, if there are several samples
    of 0 or 1 of every question, `samples` and `pass@k` (`pass_at_k`).
    """
    names = list(next(iter(verdicts.values()))[0])
    values = {
        name: [_of_question([verdict[name] for verdict in of_id]) for of_id in verdicts.values()]
        for name in names
    }
    means = {name: _mean(of_name) for name, of_name in values.items()}
    metrics = {name: mean | {"share": _is_share(values[name])} for name, mean in means.items()}
    main = {key: [v[names[0]] for v in of_id] for key, of_id in verdicts.items()}
    out = means[names[0]] | {"n": len(verdicts), "metrics": metrics}
    least = min(map(len, verdicts.values()))
    if least > 1 and all(value in (0, 1) for values in main.values() for value in values):
        right = [(len(values), round(sum(values))) for values in main.values()]
        for k in (k for k in KS if k <= least):
            metrics[f"pass@{k}"] = _mean([[pass_at_k(n, c, k)] for n, c in right])
            metrics[f"pass@{k}"]["share"] = True
    if max(map(len, verdicts.values())) > 1:
        out["samples"] = main
    return out | {"verdicts": {key: float(np.mean(values)) for key, values in main.items()}}


def _of_question(samples: list[float | list[float]]) -> list[float]:
    """The numbers with which a question enters a mean: one, or those of all lists."""
    if isinstance(samples[0], list):
        return [number for numbers in samples for number in numbers]
    return [float(np.mean(samples))]


def _is_share(values: Iterable[Sequence[float]]) -> bool:
    return all(0 <= number <= 1 for numbers in values for number in numbers)


def _mean(values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The mean of all numbers and its standard error, in which a question is one observation."""
    counts = np.array([len(x) for x in values], float)
    sums = np.array([sum(x) for x in values], float)
    mean = sums.sum() / counts.sum()
    if len(counts) < 2:
        return {"mean": float(mean), "stderr": None}
    variance = ((sums - mean * counts) ** 2).sum() * len(counts) / (len(counts) - 1)
    return {"mean": float(mean), "stderr": float(np.sqrt(variance) / counts.sum())}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k of the samples, drawn without replacement, is right.

    1 - C(n - c, k) / C(n, k), unbiased for k fresh samples. Source: arXiv:2107.03374, equation 1.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
