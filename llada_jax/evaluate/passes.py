"""Accuracy against forward passes: how many right answers each rule of the sampler costs.

A curve is one commit rule (with a revoke rule or without) and one cache, for a sweep of the rule's
number. A point of it is a number: the accuracy over a task's records, and the tokens that a forward
pass writes. Rules and caches are those of the sampler's tables.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llada_jax import metrics, sampling
from llada_jax.data.records import read_records
from llada_jax.data.templates import encode_prompt
from llada_jax.evaluate.passes_picture import draw
from llada_jax.files import is_remote, write_whole
from llada_jax.sampling.flags import FLAGS
from llada_jax.tasks.scorer import load_scorer, score_response

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
        "--task", default="sudoku", help="a file of llada_jax/tasks, or a module that has the same"
    )
    parser.add_argument(
        "--records", default="count=500&split=heldout", help="arguments of the task's records"
    )
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


@dataclasses.dataclass
class Task:
    """Prompts, and the judge of their responses."""

    prompts: list[list[int]]
    judge: Callable[[int, str], float]  # (index of the prompt, response) -> score

    @classmethod
    def open(cls, name: str, arguments: str, template: str, tokenizer) -> "Task":
        """Opens a module that has `records` and `score`. Raises ValueError if there is none."""
        module = name if "." in name else f"llada_jax.tasks.{name}"
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"--task={name}: {error}; name a file of llada_jax/tasks") from None
        scorer = load_scorer(f"{module}:score")
        source = f"python:{module}:records" + (f"?{arguments}" if arguments else "")
        records = list(read_records(source, "prompt"))
        if not records:
            raise ValueError(f"--task={name} --records={arguments}: there are no records")

        def judge(index, text):
            where, raw, normal = records[index]
            return score_response(scorer, where, {**raw, **normal}, text)

        prompts = [encode_prompt(tokenizer, normal["prompt"], template) for *_, normal in records]
        return cls(prompts, judge)


def measure(point: Point, logits_fn, task: Task, tokenizer, special: dict, batch_size: int) -> dict:
    """Answers all prompts of a task. Returns accuracy, its standard error, passes and tokens.

    `tokens_per_pass` is the number of tokens of all responses, up to EOS or EoT, divided by their
    forward passes: those in which a row was not yet complete. Full and cached passes count alike.
    """
    began = time.monotonic()
    scores, tokens, passes = np.zeros(len(task.prompts)), 0, 0
    found = sampling.respond(
        logits_fn, task.prompts, batch_size=batch_size, **special, **point.settings
    )
    for response in found:
        ids = sampling.trim(response.tokens, special["eos_id"], special["eot_id"])
        scores[response.index] = task.judge(response.index, tokenizer.decode(ids))
        tokens, passes = tokens + len(ids), passes + response.passes
    error = scores.std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.nan
    return {
        "accuracy": float(scores.mean()),
        "accuracy_stderr": None if np.isnan(error) else float(error),
        "tokens_per_pass": tokens / passes,
        "passes": passes,
        "seconds": round(time.monotonic() - began, 3),
    }


def read(path: pathlib.Path, about: dict) -> list[dict]:
    """The lines of a file of an earlier run; cuts off a line that is not whole.

    Raises ValueError if the file is not of the same model, task and lengths.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        wrong = next((line["about"] for line in lines if line["about"] != about), None)
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is not a file of this command: give another --out") from None
    if wrong:
        names = [name for name in about if wrong.get(name) != about[name]]
        was, now = ({name: x.get(name) for name in names} for x in (wrong, about))
        raise ValueError(f"{path} is of {was}, not of {now}: give another --out")
    if whole != content:
        os.truncate(path, len(whole))
    return lines


def curves(lines: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """The lines of each (cache, rule), by tokens per pass."""
    found: dict[tuple[str, str], list[dict]] = {}
    for line in lines:
        found.setdefault((line["cache"], line["rule"]), []).append(line)
    return {k: sorted(v, key=lambda line: line["tokens_per_pass"]) for k, v in found.items()}


def areas(lines: list[dict]) -> dict[tuple[str, str], float]:
    """The `aup` of each curve; the best accuracy is that of all lines."""
    best = 100 * max(line["accuracy"] for line in lines)
    return {
        key: aup([(line["tokens_per_pass"], 100 * line["accuracy"]) for line in curve], best)
        for key, curve in curves(lines).items()
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


def run(args: argparse.Namespace, logits_fn, tokenizer, special: dict, longest: int) -> None:
    """Measures what is missing in passes.jsonl, prints the areas, and draws passes.png.

    longest: tokens that the model takes.
    """
    if is_remote(args.out):
        raise ValueError(f"--out={args.out}: lines are appended, so it must be a local folder")
    wanted = _chosen(args)
    task = Task.open(args.task, args.records, args.template, tokenizer)
    needed = max(map(len, task.prompts)) + args.gen_length
    if needed > longest:
        raise ValueError(
            f"the longest prompt and --gen_length={args.gen_length} are {needed} tokens, the model"
            f" takes {longest}: lower it"
        )
    names = ("model", "dtype", "quantize", "task", "records", "template")
    names += ("gen_length", "block_length")
    about = {name: getattr(args, name) for name in names}
    out = pathlib.Path(args.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    lines = read(out / "passes.jsonl", about)
    done = [Point(line["rule"], line["cache"], line["settings"]) for line in lines]
    missing = [point for point in wanted if point not in done]
    first = len(wanted) - len(missing)
    with metrics.Progress(len(wanted), first, unit="point", show=(), every=2) as progress:
        progress.update(first)
        for count, point in enumerate(missing, first + 1):
            found = measure(point, logits_fn, task, tokenizer, special, args.batch_size)
            lines.append(point._asdict() | found | {"about": about})
            with (out / "passes.jsonl").open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            progress.update(count)
    found = areas(lines)
    for (cache, rule), area in sorted(found.items(), key=lambda item: -item[1]):
        print(f"AUP {area:6.1f}  {rule}, cache {cache}")
    write_whole(out / "passes.png", draw(curves(lines), found))
