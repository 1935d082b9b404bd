"""What a model is tested on, one task a file."""

import importlib

from llada_jax.files import load_function
from llada_jax.tasks import (
    arena_hard,
    competition_math,
    countdown,
    gsm8k,
    humaneval,
    ifeval,
    mbpp,
    reviews,
    sudoku,
)
from llada_jax.tasks.task import Score, Settings, Task

TASKS: dict[str, Task] = {
    "arena_hard": arena_hard.TASK,
    "countdown": countdown.TASK,
    "gsm8k": gsm8k.TASK,
    "humaneval": humaneval.TASK,
    "ifeval": ifeval.TASK,
    "math": competition_math.TASK,
    "mbpp": mbpp.TASK,
    "reviews": reviews.TASK,
    "sudoku": sudoku.TASK,
}

__all__ = ["TASKS", "Score", "Settings", "Task", "find"]


def find(name: str) -> Task:
    """Returns a task: a name in TASKS, a module with a TASK, or "module:function", a score.

    A score function alone takes the record's own prompt and has no settings.
    Raises ValueError if there is none.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" in name:
        return Task(fields={}, score=load_function(name, "scorer"), settings={})
    if "." not in name:
        raise ValueError(
            f"{name!r} is none of the tasks {', '.join(TASKS)}, no module, and no module:function"
        )
    try:
        task = getattr(importlib.import_module(name), "TASK", None)
    except ImportError as error:
        raise ValueError(f"task {name!r}: {error}; it must be importable from here") from error
    if not isinstance(task, Task):
        raise ValueError(f"task {name!r}: the module has no TASK of the class llada_jax.tasks.Task")
    return task
