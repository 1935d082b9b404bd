"""Runs tasks: answers what is missing, scores the responses, writes results and a table."""

import argparse
import importlib.metadata
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

from llada_jax import metrics
from llada_jax.evaluate import lines, table
from llada_jax.evaluate.answers import Model, answer, prompts_of
from llada_jax.evaluate.plan import Plan
from llada_jax.evaluate.summary import scored
from llada_jax.files import write_whole
from llada_jax.parallel import agree, hosts

PACKAGES = ("llada_jax", "jax", "flax", "numpy", "tokenizers", "lm_eval", "math-verify")


def run(
    args: argparse.Namespace, plans: Sequence[Plan], model: Model, about: dict[str, Any]
) -> None:
    """Runs all tasks and writes --out: NAME.json, NAME.responses.jsonl, NAME.settings.json.

    about: what is recorded of the model. What an earlier run wrote is continued; it must be of the
    same model, questions and settings. Raises ValueError if it is not.
    """
    out = lines.folder(args.out)
    host = (jax.process_index(), jax.process_count())
    agree.check_shared(out)
    prompts = [prompts_of(plan, model) for plan in plans]  # before answers, all is known to fit
    for plan in plans:
        settings = out / f"{plan.name}.settings.json"
        agree.once_per_disk(out, lambda at=settings, p=plan: lines.check_same(at, p.about | about))
    for plan, ids in zip(plans, prompts, strict=True):
        hosts.say(f"{plan.name}: {len(plan.questions)} questions, settings {_shown(plan)}")
        parts = lines.Parts(out, plan.name, *host)
        answer(plan, ids, model, parts, args.batch_size, host)
        agree.meet()
        if hosts.is_first():
            _write(plan, parts, out, about, args.unsafe)
    if hosts.is_first():
        text = table.of_folder(out)
        write_whole(out / "table.md", text)
        print(text, end="")
    agree.meet()  # a host that ends early would take the first one with it, which still scores


def _shown(plan: Plan) -> str:
    values = " ".join(f"{name}={value}" for name, value in plan.about["sampler"].items())
    return f"{plan.about['settings']} ({values})"


def _write(plan: Plan, parts: lines.Parts, out: pathlib.Path, about: dict, unsafe: bool) -> None:
    """Joins the responses of all hosts, and writes their scores."""
    order = {question.id: i for i, question in enumerate(plan.questions)}
    found = parts.merge(lambda line: (order[line["id"]], line["sample"]))
    result = {"task": plan.name, "n": len(plan.questions)}
    if plan.task.score is not None:
        result |= _scored(plan, found, unsafe)
    passes, tokens = (sum(line[name] for line in found) for name in ("passes", "tokens"))
    result |= {
        "responses": len(found),
        "passes": passes,
        "tokens": tokens,
        "tokens_per_pass": tokens / passes,
        "seconds": round(sum(line["seconds"] for line in found), 3),
        "published": dict(plan.published),
        "about": plan.about | about,
        "environment": environment(),
    }
    lines.write_json(out / f"{plan.name}.json", result)


def _scored(plan: Plan, found: list[dict], unsafe: bool) -> dict[str, Any]:
    by_id = {question.id: question for question in plan.questions}
    responses = [(by_id[line["id"]], line["response"]) for line in found]
    with metrics.Progress(len(responses), unit="verdict", show=(), every=5) as progress:
        result = scored(plan.task, responses, unsafe=unsafe, progress=progress.update)
    if "protection" in result:
        print(f"the programs ran under: {result['protection']}")
    return result


def environment() -> dict[str, Any]:
    """Versions and devices, for the record."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "hosts": jax.process_count(),
    }
