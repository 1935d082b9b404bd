"""Which grid point an arm takes."""

import math
from collections.abc import Sequence


def choose(
    values: Sequence[float | int],
    costs: Sequence[float | int],
    limit: float | int,
    *,
    largest: bool = True,
) -> tuple[int, str]:
    """Returns (the chosen point, what there is to say of the choice or "").

    values: the metric of every point; nan: the point failed, and is not chosen.
    costs: what the budget limits. Among the points of at most `limit` the best value is chosen. If
        there is none, the point of the lowest cost is.

    Of equal points the first is chosen. Raises ValueError if all points failed.
    """
    there = [k for k, value in enumerate(values) if math.isfinite(value)]
    if not there:
        raise ValueError("all of its grid points failed: lower the learning rates")
    sign = -1 if largest else 1
    within = [k for k in there if costs[k] <= limit]
    if within:
        return min(within, key=lambda k: sign * values[k]), ""
    nearest = min(there, key=lambda k: costs[k] if math.isfinite(costs[k]) else math.inf)
    return nearest, f"no grid point is within the budget of {limit:g}: it takes the nearest"
