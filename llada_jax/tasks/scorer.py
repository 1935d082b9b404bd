"""Scorers: (record, response) -> float, named module:function."""

import importlib
import math
import numbers
from collections.abc import Callable

import numpy as np


def load_scorer(spec: str) -> Callable[[dict, str], float]:
    """The function that "module:function" names, (record, response) -> float; ValueError where there is none."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ValueError(
            f"scorer {spec!r} is not of the form module:function, as llada_jax.sudoku:score"
        )
    try:
        scorer = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"scorer {spec!r}: {error}; it must be importable from here") from error
    if not callable(scorer):
        raise ValueError(f"scorer {spec!r}: the module {module} has no function {name}")
    return scorer


def score_response(scorer: Callable, where: str, record: dict, response: str) -> float:
    """The scorer's finite number, or one ValueError that names the record."""
    try:
        value = scorer(record, response)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(
            f"{where}: the scorer raised {type(error).__name__}: {error} (response {response[:80]!r})"
        ) from error
    if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
        raise ValueError(
            f"{where}: the scorer returned {value!r}, not a finite number (response {response[:80]!r})"
        )
    return float(value)
