"""Scorers: functions (record, response) -> float, named module:function."""

import math
import numbers
from collections.abc import Callable

import numpy as np

from llada_jax.files import load_function


def load_scorer(spec: str) -> Callable[[dict, str], float]:
    """The scorer that "module:function" names. Raises ValueError if there is none."""
    return load_function(spec, "scorer")


def score_response(scorer: Callable, where: str, record: dict, response: str) -> float:
    """The scorer's finite number. Raises one ValueError that names the record otherwise."""
    try:
        value = scorer(record, response)
    except Exception as error:  # whatever a user's function raises
        raise ValueError(
            f"{where}: the scorer raised {type(error).__name__}: {error} "
            f"(response {response[:80]!r})"
        ) from error
    if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
        raise ValueError(
            f"{where}: the scorer returned {value!r}, not a finite number "
            f"(response {response[:80]!r})"
        )
    return float(value)
