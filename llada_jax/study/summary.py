"""Rows, means over seeds and paired differences of the final runs of a study."""

import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any

from llada_jax.study.session import Session

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error; the error of one seed is nan."""

    mean: float
    stderr: float
    count: int

    @property
    def errors(self) -> float:
        """How many standard errors the mean is from 0; nan if that is not known."""
        return self.mean / self.stderr if self.stderr > 0 else math.nan


def estimate(values: Mapping[int, float]) -> Estimate:
    """The mean over seeds of {seed: value}."""
    there = [value for value in values.values() if math.isfinite(value)]
    if not there:
        return Estimate(math.nan, math.nan, 0)
    spread = statistics.stdev(there) / math.sqrt(len(there)) if len(there) > 1 else math.nan
    if spread < 1e-9 * max(map(abs, there)):
        spread = 0.0  # rounding
    return Estimate(statistics.fmean(there), spread, len(there))


def paired(one: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """The mean difference one - baseline over the seeds that both have."""
    return estimate({seed: one[seed] - baseline[seed] for seed in one if seed in baseline})


def rows(session: Session) -> list[Row]:
    """One row for each arm and seed: the metrics at its last step, and the passes it took.

    The arm `Study.before` has those at step 0, of the first arm that has finished with a seed.
    Failed runs have no row.
    """
    study = session.study
    found, before = [], {}
    for run, result in session.finished():
        if run.point is not None or result.get("failed"):
            continue
        first = result["evaluations"][0]
        if study.before and first["step"] == 0:
            before.setdefault(run.seed, _row(session, study.before, run.seed, first, 0))
        last = result["evaluations"][-1]
        found.append(_row(session, run.arm, run.seed, last, result["passes"]))
    order = [study.before, *study.arms]
    return sorted([*before.values(), *found], key=lambda row: order.index(row["arm"]))


def by_seed(rows: list[Row], arm: str, metric: str) -> dict[int, float]:
    """{seed: value} of one metric of an arm; nan where a run has no value."""
    return {
        row["seed"]: math.nan if row[metric] is None else row[metric]
        for row in rows
        if row["arm"] == arm
    }


def _row(session: Session, arm: str, seed: int, at: Row, passes: int) -> Row:
    row = {"arm": arm, "seed": seed, "step": at["step"]}
    for short, name in session.study.metrics.items():
        row[short] = at[name]
        if at.get(f"{name}_stderr") is not None:
            row[f"{short}_stderr"] = at[f"{name}_stderr"]
    return row | {"passes": passes}


def curves(session: Session) -> list[Row]:
    """All evaluations of all runs, those at grid points included."""
    return [
        {"arm": run.arm, "point": run.point, "seed": run.seed, "changes": result["changes"]}
        | {"evaluations": result["evaluations"]}
        for run, result in session.finished()
    ]
