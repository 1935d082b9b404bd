"""Accuracy against forward passes: how many right answers each rule of the sampler costs.

A curve is one commit rule (with a revoke rule or without) and one cache, for a sweep of the rule's
number. A point of it is a number: the accuracy over a task's records, and the tokens that a forward
pass writes. Rules and caches are those of the sampler's tables.
"""

import argparse
import itertools
import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax import metrics, sampling, tasks
from llada_jax.evaluate import lines
from llada_jax.evaluate.answers import Model
from llada_jax.evaluate.passes_picture import draw
from llada_jax.evaluate.questions import Question, encode, read_questions
from llada_jax.evaluate.summary import scored
from llada_jax.files import write_whole
from llada_jax.sampling.flags import FLAGS
from llada_jax.tasks import Task

# The values of a rule's number. A number without an entry takes ANY, or WHOLE if it is an integer.
SWEEPS = {
    "threshold": (0.99, 0.95, 0.9, 0.8, 0.7, 0.5),
    "factor": (0.1, 0.25, 0.5, 1.0, 2.0, 4.0),
    "entropy_budget": (0.01, 0.05, 0.1, 0.3, 1.0, 3.0),
}
ANY, WHOLE = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (1, 2, 4, 8)
# The other numbers of rules that have several, and those of caches, as their papers have them.
FIXED = {
    "kl_threshold": 0.01,
    "threshold_back": 0.9,
    "revoke_number": 1,
    "revoke_passes": 4,
    "refresh": 7,
    "refresh_prompt": 100,
    "transfer_ratio": 0.25,
}
ALPHA = 3.0  # of `aup`
MOST_LOST = 5.0  # per cent of accuracy; see `aup`


class Point(NamedTuple):
    """A setting of the sampler that is measured."""

    rule: str
    cache: str
    settings: dict[str, Any]  # arguments of `sampling.generate`


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument("--out", required=True, help="folder of passes.jsonl and passes.png")
    parser.add_argument(
        "--task",
        default="sudoku",
        help=f"one of {', '.join(tasks.TASKS)}, a module with a TASK, or module:function",
    )
    parser.add_argument("--data", help="the task's records, as jsonl:FILE; default: its own")
    parser.add_argument("--template", choices=("chat", "plain"), default="plain")
    parser.add_argument("--gen_length", type=int, default=16, help="tokens of the response")
    parser.add_argument("--block_length", type=int, default=8)
    parser.add_argument("--rule", default=",".join(rules()), help="NAME,NAME,...; default: all")
    parser.add_argument("--cache", default="none,prefix,dual", help="NAME,NAME,...")
    parser.add_argument("--batch_size", type=int, default=250)


def rules() -> dict[str, tuple[str, str]]:
    """All rules by name: (commit, revoke).

    A revoke rule goes with the commit rule of its name, or else with the schedule: "wino+wino",
    "schedule+remdm".
    """
    found = {commit: (commit, "none") for commit in sampling.COMMITS}
    for revoke in sampling.REVOKES:
        if revoke != "none":
            commit = revoke if revoke in sampling.COMMITS else "schedule"
            found[f"{commit}+{revoke}"] = (commit, revoke)
    return found


def points(names: Iterable[str], caches: Sequence[str], shape: dict[str, int]) -> Iterator[Point]:
    """Yields the points of all curves; `shape` has gen_length and block_length."""
    for cache, name in itertools.product(caches, names):
        commit, revoke = rules()[name]
        rule = sampling.COMMITS[commit]
        needs = [*rule.needs, *sampling.REVOKES[revoke].needs, *sampling.CACHES[cache].needs]
        fixed = {need: FIXED.get(need, _sweep(need)[0]) for need in needs[1 if rule.needs else 0 :]}
        # Fast-dLLM's rules, and most others, take the probability without rounding.
        fixed |= shape | {"commit": commit, "cache": cache, "remasking": "probability"}
        if revoke != "none":
            fixed["revoke"] = revoke
        if rule.scheduled:
            block, blocks = shape["block_length"], shape["gen_length"] // shape["block_length"]
            values = [blocks * n for n in range(block, 0, -1) if block % n == 0]
            swept = ("steps", values)
        else:
            swept = (rule.needs[0], _sweep(rule.needs[0])) if rule.needs else ("commit", [commit])
        for value in swept[1]:
            yield Point(name, cache, fixed | {swept[0]: value})


def _sweep(name: str) -> Sequence[float | int]:
    return SWEEPS.get(name) or (WHOLE if FLAGS.get(name, (float,))[0] is int else ANY)


def aup(curve: Iterable[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism of (tokens per pass, accuracy in per cent).

    With the points in the order of their tokens per pass r_1 < r_2 < ...:
    r_1 y_1 + sum_i (r_i - r_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2,
    W(y) = min(exp(-3 (1 - y / best)), 1), where points with y < y_1 - 5 are left out.

    best: the highest accuracy of any rule on the task.
    Source: d3LLM, arXiv:2601.07568.
    """
    curve = sorted(curve, key=lambda point: (point[0], -point[1]))
    kept = [(r, y) for r, y in curve if y >= curve[0][1] - MOST_LOST]

    def weighted(y):
        return y * min(np.exp(-ALPHA * (1 - y / best)), 1.0) if y else 0.0

    area = kept[0][0] * kept[0][1]
    for (r, y), (s, z) in itertools.pairwise(kept):
        area += (s - r) * (weighted(y) + weighted(z)) / 2
    return float(area)


def measure(
    point: Point,
    task: Task,
    questions: list[Question],
    prompts: list[list[int]],
    model: Model,
    batch_size: int,
) -> dict:
    """Answers all questions. Returns accuracy, its standard error, passes and tokens.

    prompts: the ids of the questions.

    `tokens_per_pass` is the number of tokens of all responses, up to EOS or EoT, divided by their
    forward passes: those in which a row was not yet complete. Full and cached passes count alike.
    """
    began = time.monotonic()
    texts, tokens, passes = [""] * len(prompts), 0, 0
    found = sampling.respond_in_words(
        model.logits_fn,
        prompts,
        model.tokenizer,
        batch_size=batch_size,
        **model.special,
        **point.settings,
    )
    for response, text in found:
        ids = sampling.trim(response.tokens, model.special["eos_id"], model.special["eot_id"])
        texts[response.index] = text
        tokens, passes = tokens + len(ids), passes + response.passes
    result = scored(task, list(zip(questions, texts, strict=True)))
    return {
        "accuracy": result["mean"],
        "accuracy_stderr": result["stderr"],
        "tokens_per_pass": tokens / passes,
        "passes": passes,
        "seconds": round(time.monotonic() - began, 3),
    }


def read(path: pathlib.Path, about: dict) -> list[dict]:
    """The lines of a file of an earlier run; cuts off a line that is not whole.

    Raises ValueError if the file is not of the same model, task and lengths.
    """
    found = lines.read(path)
    wrong = next((line.get("about") for line in found if line.get("about") != about), about)
    if not isinstance(wrong, dict):
        raise ValueError(f"{path} is not a file of this command: give another --out")
    names = [name for name in about if wrong.get(name) != about[name]]
    if names:
        was, now = ({name: x.get(name) for name in names} for x in (wrong, about))
        raise ValueError(f"{path} is of {was}, not of {now}: give another --out")
    return found


def curves(measured: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The lines of each (cache, rule), by tokens per pass."""
    found: dict[tuple[str, str], list[dict]] = {}
    for line in measured:
        found.setdefault((line["cache"], line["rule"]), []).append(line)
    return {k: sorted(v, key=lambda line: line["tokens_per_pass"]) for k, v in found.items()}


def areas(measured: list[dict]) -> dict[tuple[str, str], float]:
    """The `aup` of each curve; the best accuracy is that of all lines."""
    best = 100 * max(line["accuracy"] for line in measured)
    return {
        key: aup([(line["tokens_per_pass"], 100 * line["accuracy"]) for line in curve], best)
        for key, curve in curves(measured).items()
    }


def _chosen(args: argparse.Namespace) -> list[Point]:
    tables = {"rule": rules(), "cache": sampling.CACHES}
    wanted = {name: getattr(args, name).split(",") for name in tables}
    for name, table in tables.items():
        for value in wanted[name]:
            if value not in table:
                raise ValueError(f"--{name}={value} is not one of {', '.join(table)}")
    sampling.check_schedule(args.gen_length, args.gen_length, args.block_length)
    shape = {"gen_length": args.gen_length, "block_length": args.block_length}
    return list(points(wanted["rule"], wanted["cache"], shape))


def run(args: argparse.Namespace, model: Model) -> None:
    """Measures what is missing in passes.jsonl, prints the areas, and draws passes.png."""
    out = lines.folder(args.out)
    wanted = _chosen(args)
    task = tasks.find(args.task)
    source = args.data or task.source
    if not source:
        raise ValueError(f"{args.task} has no records of its own: give --data=jsonl:FILE")
    questions = read_questions(task, source, args.template)
    prompts = encode(
        model.tokenizer, task, questions, args.template, args.gen_length, model.longest
    )
    names = ("model", "dtype", "quantize", "task", "template", "gen_length", "block_length")
    about = {name: getattr(args, name) for name in names} | {"data": source}
    found = read(out / "passes.jsonl", about)
    done = [Point(line["rule"], line["cache"], line["settings"]) for line in found]
    missing = [point for point in wanted if point not in done]
    first = len(wanted) - len(missing)
    with metrics.Progress(len(wanted), first, unit="point", show=(), every=2) as progress:
        progress.update(first)
        for count, point in enumerate(missing, first + 1):
            measured = measure(point, task, questions, prompts, model, args.batch_size)
            found.append(point._asdict() | measured | {"about": about})
            lines.append(out / "passes.jsonl", found[-1])
            progress.update(count)
    found_areas = areas(found)
    for (cache, rule), area in sorted(found_areas.items(), key=lambda item: -item[1]):
        print(f"AUP {area:6.1f}  {rule}, cache {cache}")
    write_whole(out / "passes.png", draw(curves(found), found_areas))
