"""The kinds of judges: a model at an address, a Python function, a reward function."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llada_jax import tasks
from llada_jax.evaluate.judge import verdict
from llada_jax.evaluate.judge.answers import Question
from llada_jax.evaluate.judge.client import REQUEST, Client, RefusedError, read_address
from llada_jax.files import load_function

# Who is A in the game, and who is B.
ORDERS = ("model_first", "baseline_first")


class Ruling(NamedTuple):
    """What a judge says of one game: a verdict or None, and its replies word for word."""

    verdict: str | None
    replies: list[str]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says of a judge at an address."""

    model: str = ""
    key_variable: str = "OPENAI_API_KEY"
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attempts: int = 3  # until a verdict
    workers: int = 8
    timeout: float | int = 120
    total: float | int = 600


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge of games.

    rule: (question, order) -> Ruling.
    settings: what its verdicts depend on, for the result file.
    check: raises ValueError if it cannot work; called before the first game.
    workers: games at a time; 1 for functions, which may not be safe in threads.
    """

    rule: Callable[[Question, str], Ruling]
    settings: dict[str, Any]
    check: Callable[[], object] = lambda: None
    workers: int = 1


def in_order(question: Question, order: str) -> tuple[str, str]:
    """Returns the answers (A, B) of a game."""
    answers = (question.response, question.baseline)
    return answers if order == "model_first" else answers[::-1]


def _address(spec: str, options: Options) -> Judge:
    if not options.model:
        raise ValueError(f"--judge={spec} needs --judge_model, the name of a model that it serves")
    if options.attempts < 1 or options.workers < 1:
        raise ValueError(
            f"--judge_attempts={options.attempts} and --judge_workers={options.workers} must be at "
            "least 1"
        )
    if min(options.timeout, options.total) <= 0:
        raise ValueError(
            f"--judge_timeout={options.timeout:g} and --judge_total={options.total:g} must be "
            "more than 0 seconds"
        )
    client = Client(
        read_address(spec),
        options.model,
        options.request,
        os.environ.get(options.key_variable, "").strip(),
        options.timeout,
        options.total,
    )
    asked = hashlib.sha256((verdict.INSTRUCTIONS + verdict.AGAIN).encode()).hexdigest()[:12]
    settings = {
        "judge": client.address,
        "judge_model": options.model,
        "request": REQUEST | dict(options.request),
        "attempts": options.attempts,
        "instructions": asked,
    }
    rule = functools.partial(_ask, client, options.attempts)
    return Judge(rule, settings, client.check, options.workers)


def _ask(client: Client, attempts: int, question: Question, order: str) -> Ruling:
    """Asks until a reply has a verdict. A request that is refused ends the game without one."""
    asked, replies = verdict.messages(question.text, *in_order(question, order)), []
    for _ in range(attempts):
        try:
            replies.append(client.complete(asked))
        except RefusedError as error:
            return Ruling(None, [*replies, f"refused: {error}"])
        if found := verdict.read(replies[-1]):
            return Ruling(found, replies)
        asked = verdict.ask_again(asked, replies[-1])
    return Ruling(None, replies)


def _python(spec: str, options: Options) -> Judge:
    function = load_function(spec.partition(":")[2], "judge")

    def rule(question, order):
        where = f"question {question.id!r}, {order}"
        try:
            found = function(question.text, *in_order(question, order))
        except Exception as error:  # whatever a user's function raises
            raise ValueError(
                f"{where}: the judge raised {type(error).__name__}: {error}"
            ) from error
        if found is not None and found not in verdict.VERDICTS:
            raise ValueError(
                f"{where}: the judge returned {found!r}, none of {', '.join(verdict.VERDICTS)} or "
                "None"
            )
        return Ruling(found, [])

    return Judge(rule, {"judge": spec})


def _reward(spec: str, options: Options) -> Judge:
    task = tasks.find(spec.partition(":")[2])
    known: dict[tuple[str, str], float] = {}  # each answer is in two games

    def reward(question, response):
        key = (question.digest, response)
        if key not in known:
            where = f"question {question.id!r}"
            known[key] = task.number(where, question.record, response)
        return known[key]

    def rule(question, order):
        a, b = (reward(question, answer) for answer in in_order(question, order))
        return Ruling("A>B" if a > b else "B>A" if b > a else "A=B", [json.dumps([a, b])])

    return Judge(rule, {"judge": spec})


# By what --judge begins with, up to its colon.
JUDGES: dict[str, Callable[[str, Options], Judge]] = {
    "http": _address,
    "https": _address,
    "python": _python,
    "reward": _reward,
}


def open_judge(spec: str, options: Options) -> Judge:
    """The judge that --judge names. Raises ValueError if there is none."""
    kind = spec.partition(":")[0]
    if kind not in JUDGES:
        raise ValueError(
            f"--judge={spec} is none of http://HOST:PORT/v1, https://..., python:module:function, "
            "reward:module:function"
        )
    if JUDGES[kind] is not _address and options.model:
        raise ValueError(f"--judge_model={options.model} is for a judge at an address")
    return JUDGES[kind](spec, options)
