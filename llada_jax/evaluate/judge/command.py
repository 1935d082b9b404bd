"""The command `python -m llada_jax.evaluate judge`."""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib

import jax

from llada_jax.evaluate.judge import answers, games, judges, report
from llada_jax.files import is_remote, write_whole


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    add, of_address = parser.add_argument, judges.Options()
    add("--responses", required=True, help='jsonl of {"id": ..., "response": ...}: the model')
    add("--baseline", required=True, help="the same of the baseline, or Arena-Hard's own files")
    add("--data", required=True, help="jsonl:FILE, the questions")
    add(
        "--judge",
        required=True,
        help="http://HOST:PORT/v1 (OpenAI-compatible); python:module:function, (question, answer_a,"
        " answer_b) -> verdict; or reward:module:function, (record, response) -> float",
    )
    add("--out", required=True, help="folder of games.jsonl, which a later run continues, and "
        "judge.json")  # fmt: skip
    add("--id_field", default="uid", help="of the records; without it their number, from 0")
    add("--limit", type=int, default=0, help="judge so many questions; 0: all")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--judge_model", default="", help="a model that the address serves")
    add(
        "--judge_key",
        default=of_address.key_variable,
        metavar="VARIABLE",
        help="name of the environment variable that has the key",
    )
    add(
        "--judge_request",
        default="{}",
        metavar="JSON",
        help='fields of the request, over {"temperature": 0, "max_tokens": 4096}; null drops one',
    )
    add("--judge_attempts", type=int, default=of_address.attempts, help="replies until a verdict")
    add("--judge_workers", type=int, default=of_address.workers, help="requests at a time")
    add("--judge_timeout", type=float, default=of_address.timeout, help="seconds of silence")
    add("--judge_total", type=float, default=of_address.total, help="seconds for one reply, with "
        "all that is tried again")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Plays the games that are missing, writes judge.json, and prints a table.

    Raises ValueError, after judge.json is written, if no question has both verdicts.
    """
    if is_remote(args.out):
        raise ValueError(f"--out={args.out}: lines are appended, so it must be a local folder")
    judge = judges.open_judge(args.judge, _options(args))
    if args.judge_model:
        # The progress bar asks JAX for this host's number. It must not take memory of an
        # accelerator on which the judge may be served.
        jax.config.update("jax_platforms", "cpu")
    if args.limit < 0:
        raise ValueError(f"--limit={args.limit} must be at least 0; 0 judges all")
    questions, unanswered = answers.read_questions(
        args.data, args.responses, args.baseline, args.id_field, args.limit
    )
    out = pathlib.Path(args.out).expanduser()
    verdicts = games.play(judge, questions, out / "games.jsonl")
    found = report.report(questions, verdicts, args.seed) | {
        "unanswered_questions": unanswered,
        "settings": judge.settings | {"seed": args.seed, "limit": args.limit},
        "files": {name: getattr(args, name) for name in ("responses", "baseline", "data")},
        "version": _version(),
    }
    if unanswered:
        found["warnings"].append(f"the model has no answer to {unanswered} more questions")
    write_whole(out / "judge.json", json.dumps(found, indent=1) + "\n")
    print("\n".join(report.table(found)))
    if not found["n"]:
        raise ValueError(
            f"no question has both verdicts; the judge's replies are in {out}/games.jsonl"
        )


def _options(args: argparse.Namespace) -> judges.Options:
    try:
        request = json.loads(args.judge_request)
    except ValueError:
        request = None
    if not isinstance(request, dict) or {"model", "messages", "stream"} & request.keys():
        raise ValueError(
            f"--judge_request={args.judge_request} is no JSON object of fields of a request, "
            'without model, messages and stream: write {"seed": 1}'
        )
    return judges.Options(
        args.judge_model,
        args.judge_key,
        request,
        args.judge_attempts,
        args.judge_workers,
        args.judge_timeout,
        args.judge_total,
    )


def _version() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("llada_jax")
    return None
