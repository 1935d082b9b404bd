r"""MATH: competition problems; the last \boxed{} of the response counts.

`math-verify` says whether two answers are equal. It works in a process of its own
(`math_worker.py`), since an answer such as 9^(9^(9^9)) would hold it for ever, and its own time
limits need the main thread.
"""

import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from llada_jax.tasks.task import Settings, Task

_REQUEST = r"Please reason step by step, and put your final answer within \boxed{}."  # OpenCompass
# The opening of a box, a box without braces up to the end of its formula, and other braces.
_MARK = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*)\{|\\(?:boxed|fbox)(?:\s+|(?=\d))(?P<bare>[^\s$\\{}]+)|\\.|[{}]",
    re.DOTALL,
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;: ]|\s")


def prompt(record: dict, shots: Sequence[dict], template: str) -> str | list[dict]:
    """The problem after its worked examples, as turns of a chat or as one text."""
    if template == "plain":
        texts = [f"Problem:\n{r['problem']}\n\nSolution:" for r in (*shots, record)]
        pairs = zip(texts, shots, strict=False)
        return "".join(f"{text} {shot['solution']}\n\n" for text, shot in pairs) + texts[-1]
    asked = [f"{r['problem']}\n{_REQUEST}" for r in (*shots, record)]
    turns = [
        {"role": role, "content": content}
        for question, shot in zip(asked, shots, strict=False)
        for role, content in (("user", question), ("assistant", shot["solution"]))
    ]
    return [*turns, {"role": "user", "content": asked[-1]}]


def score(record: dict, response: str) -> float:
    r"""Returns 1.0 if the last \boxed{} of the response equals the reference answer, else 0.0.

    The reference is `answer`, or the last \boxed{} of `solution`. An answer that cannot be compared
    within 10 seconds of computing and 4 GB is wrong. May be called in any thread.
    Raises ValueError for a record without an answer, and ImportError without math-verify.
    """
    wanted = record.get("answer")
    if wanted is None:
        wanted = last_boxed(record.get("solution", ""))
    if wanted is None:
        raise ValueError(r"the record has neither an answer nor a solution with a \boxed{}")
    found = last_boxed(response)
    if found is None:
        return 0.0
    wanted, found = (text.strip().rstrip(".") for text in (str(wanted), found))
    return float(_plain(wanted) == _plain(found) or _equal(wanted, found))


def last_boxed(text: str) -> str | None:
    r"""Returns what stands in the last complete \boxed{} or \fbox{} of a text, or None."""
    found, last = None, -1  # the text, and where its box begins
    opened: list[re.Match] = []
    for mark in _MARK.finditer(text):
        if mark["bare"] and mark.start() > last:
            found, last = mark["bare"], mark.start()
        elif mark[0].endswith("{") and mark[0] != r"\{":
            opened.append(mark)
        elif mark[0] == "}" and opened:
            start = opened.pop()
            if start["box"] and start.start() > last:
                found, last = text[start.end() : mark.start()], start.start()
    return found


def _plain(answer: str) -> str:
    """An answer without spaces and without the marks of text."""
    return _SPACE.sub("", _TEXT.sub(r"\1", answer))


_LOCK = threading.Lock()
_workers: dict[int, subprocess.Popen] = {}  # by process: a forked one must not share its parent's


def _equal(wanted: str, found: str) -> bool:
    """Whether math-verify finds two answers equal. False if its process ends over them."""
    with _LOCK:
        worker = _workers.get(os.getpid())
        if worker is None or worker.poll() is not None:
            worker = _workers[os.getpid()] = _start_worker()
        worker.stdin.write(json.dumps([wanted, found]) + "\n")
        worker.stdin.flush()
        reply = worker.stdout.readline()
        if not reply and worker.wait() in (-signal.SIGKILL, -signal.SIGTERM):
            raise RuntimeError("the process that compares answers of MATH was killed; try again")
        return reply == "1\n"


def _start_worker() -> subprocess.Popen:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("no package math_verify: pip install 'llada_jax[evaluate]' for MATH")
    worker = subprocess.Popen(
        # -P: the files beside the worker are no modules of its own.
        [sys.executable, "-P", str(pathlib.Path(__file__).with_name("math_worker.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a Ctrl-C stops the caller, which may still want this verdict
    )
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError(
            f"the process that compares answers of MATH ended with {worker.wait()} at its start; "
            "is math-verify installed with all that it needs?"
        )
    return worker


_FINAL_LAST = {"confidence_eos_eot_inf": True}
TASK = Task(
    fields={"problem": str},
    score=score,
    prompt=prompt,
    source="hf:DigitalLearningGmbH/MATH-lighteval?split=test",
    settings={
        "llada15": Settings(
            {"gen_length": 1024, "block_length": 128, **_FINAL_LAST}, published={"LLaDA 1.5": 42.6}
        ),
        "instruct": Settings(
            {"gen_length": 512, "block_length": 512, **_FINAL_LAST},
            published={"LLaDA 8B Instruct": 31.9},
        ),
        "instruct_block": Settings(
            {"gen_length": 512, "block_length": 64}, published={"LLaDA 8B Instruct": 42.2}
        ),
        "base": Settings(
            {"gen_length": 1024, "block_length": 1024},
            template="plain",
            shots=4,
            stop=("Problem:",),
            published={"LLaDA 8B Base": 31.4},
        ),
    },
)
