"""Countdown: reach a number with the given numbers, each used once; a generator and a verifier.

A prompt is "03,04,07:25": the numbers, then the target. A response is the equations that lead to
it, "03*07=21,21+04=25". All results are from 1 to 99, and all numbers are written with two digits,
so that all responses to as many numbers have one length. As a data source it is written
`python:llada_jax.tasks.countdown:records?count=8000&seed=0`.
"""

import re
import zlib
from collections.abc import Iterator

import numpy as np

from llada_jax.tasks.task import Settings, Task

SPLITS = ("train", "heldout")
_HELDOUT_SHARE = 8  # one problem in 8 is held out
_MOST = 99
_PROMPT = re.compile(r"(\d+(?:,\d+)+):(\d+)")
_EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
_BARREN = 10_000  # after so many problems that were given before, assume there are no more


def records(
    count: int, seed: int = 0, split: str = "train", numbers: int = 3, most: int = 9
) -> Iterator[dict[str, str]]:
    """Yields `count` distinct problems that can be solved, with one solution each.

    A record is {"prompt": problem, "response": solution}; the numbers given are from 1 to `most`.
    The same seed gives the same problems. The splits "train" and "heldout" (one problem in eight)
    share none, whatever the seeds.
    Raises ValueError for an invalid argument, or if there are fewer than `count` problems.
    """
    for name, value, least, limit in (
        ("count", count, 1, None),
        ("seed", seed, 0, None),
        ("numbers", numbers, 2, 9),
        ("most", most, 1, _MOST),
    ):
        if not isinstance(value, int) or not least <= value <= (limit or value):
            upper = "" if limit is None else f" and at most {limit}"
            raise ValueError(
                f"{name}={value!r}: Countdown needs an integer of at least {least}{upper}"
            )
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: Countdown has the splits {', '.join(SPLITS)}")
    rng = np.random.default_rng((seed, numbers, most))
    seen: set[str] = set()
    barren = 0
    while len(seen) < count:
        prompt, response = _problem(rng, numbers, most)
        barren += 1
        if prompt not in seen and split_of(prompt) == split:
            seen.add(prompt)
            barren = 0
            yield {"prompt": prompt, "response": response}
        elif barren == _BARREN:
            raise ValueError(
                f"count={count}, split={split}, numbers={numbers}: only {len(seen)} such problems "
                "found; lower count"
            )


def split_of(prompt: str) -> str:
    """Returns the split of a problem, "train" or "heldout"; the order of its numbers is one."""
    numbers, target = _read(prompt)
    name = f"{sorted(numbers)}:{target}"
    return SPLITS[zlib.crc32(name.encode()) % _HELDOUT_SHARE == 0]


def score(record: dict, response: str) -> float:
    """Returns 1.0 if the equations of the response solve the problem, else 0.0.

    Each equation must be right, and use numbers that are given or that an equation before it made,
    each once. The last one makes the target, and nothing is left over. White space is ignored.
    Raises ValueError if the prompt is no problem.
    """
    pool, target = _read(record.get("prompt"))
    made = None
    for part in "".join(response.split()).split(","):
        found = _EQUATION.fullmatch(part)
        if not found:
            return 0.0
        left, operator, right, made = int(found[1]), found[2], int(found[3]), int(found[4])
        for number in (left, right):
            if number not in pool:
                return 0.0
            pool.remove(number)
        if _result(left, operator, right) != made:
            return 0.0
        pool.append(made)
    return float(made == target and len(pool) == 1)


def _read(prompt: object) -> tuple[list[int], int]:
    found = _PROMPT.fullmatch(prompt.strip()) if isinstance(prompt, str) else None
    if not found:
        raise ValueError(f"not a Countdown problem: {prompt!r}; write 03,04,07:25")
    return [int(n) for n in found[1].split(",")], int(found[2])


def _result(left: int, operator: str, right: int) -> int | None:
    """The result, or None if it is no whole number."""
    if operator == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _problem(rng: np.random.Generator, numbers: int, most: int) -> tuple[str, str]:
    """A random problem and the equations by which it was made."""
    while True:
        given = rng.integers(1, most + 1, numbers).tolist()
        equations, target = _equations(rng, list(given))
        if target is not None:
            shown = ",".join(f"{number:02}" for number in given)
            return f"{shown}:{target:02}", ",".join(equations)


def _equations(rng: np.random.Generator, pool: list[int]) -> tuple[list[str], int | None]:
    """Random equations that use up the pool, and their last result; None: they led nowhere."""
    equations = []
    while len(pool) > 1:
        left, right = (pool.pop(int(rng.integers(len(pool)))) for _ in range(2))
        made = [(sign, _result(left, sign, right)) for sign in "+-*/"]
        fitting = [(sign, result) for sign, result in made if result and 1 <= result <= _MOST]
        if not fitting:
            return [], None
        sign, result = fitting[int(rng.integers(len(fitting)))]
        equations.append(f"{left:02}{sign}{right:02}={result:02}")
        pool.append(result)
    return equations, pool[0]


TASK = Task(
    fields={"prompt": str},
    score=score,
    source="python:llada_jax.tasks.countdown:records?count=500&seed=1&split=heldout",
    settings={
        "three": Settings({"gen_length": 17, "block_length": 17}, template="plain"),
        "two": Settings({"gen_length": 8, "block_length": 8}, template="plain"),
    },
)
