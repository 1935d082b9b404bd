"""Runs what is missing of a study, one run after another, and knows what is there."""

import json
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from llada_jax.files import write_whole
from llada_jax.metrics import duration
from llada_jax.metrics.writer import lines_until
from llada_jax.parallel import agree, hosts
from llada_jax.parallel.stop import Stop
from llada_jax.study.choice import choose
from llada_jax.study.definition import Study
from llada_jax.study.runs import Planner, Run
from llada_jax.train import STOPPED, make_plan, train
from llada_jax.train.cost import training_passes

SECONDS_BETWEEN_LINES = 60  # of the study, between the trainer's own
Result = dict[str, Any]


class Session:
    """A study in a folder: its runs, the results that are there, and the choices they allow.

    `execute(run, watch, stop)` trains one run and returns its result, or None if it was stopped.
    """

    def __init__(self, study: Study, out: epath.Path, execute: Callable | None = None):
        self.study = study
        self.planner = Planner(study, out)
        self._execute: Callable[..., Result | None] = execute or train_run
        self._tuning = {arm: self.planner.tuning(arm) for arm in study.arms}
        self._results: dict[Any, Result | None] = {}
        self._final: dict[str, list[Run]] = {}

    @property
    def total(self) -> int:
        """The number of runs of the study, those included that are not known yet."""
        tuning = sum(map(len, self._tuning.values()))
        return tuning + len(self.study.arms) * len(self.study.seeds)

    def runs(self) -> list[Run]:
        """The runs that are known so far, in their order.

        First come the grid points. Then each seed is one round of all arms, so that arms can be
        compared early.
        """
        tuning = [run for arm in self.study.arms for run in self._tuning[arm]]
        final = [runs for arm in self.study.arms if (runs := self._final_of(arm))]
        return tuning + [run for a_round in zip(*final, strict=True) for run in a_round]

    def finished(self) -> list[tuple[Run, Result]]:
        """The runs that have a result."""
        return [(run, result) for run in self.runs() if (result := self.result(run))]

    def result(self, run: Run) -> Result | None:
        """The result of a run; None if it is not finished."""
        if run.folder not in self._results:
            path = run.folder / "result.json"
            text = path.read_text() if hosts.is_first() and path.exists() else "null"
            found = json.loads(agree.from_first(text.encode()))
            if found and not found.get("failed"):
                self._check(found["evaluations"][-1])
            self._results[run.folder] = found
        return self._results[run.folder]

    def grid(self, arm: str) -> list[tuple[list[float], list[float]]] | None:
        """(metric, what the budget limits) at each grid point of an arm: one value a seed.

        Both are nan if the run failed. None if a run is missing, or the arm is not tuned.
        """
        tune, runs = self.study.tune, self._tuning[arm]
        if not runs or not all(map(self.result, runs)):
            return None
        names = [tune.metric, tune.budget[0] if tune.budget else tune.metric]
        found = []
        for k in range(len(self.study.grid(arm))):
            of_point = [self.last(run) for run in runs if run.point == k]
            first, second = ([_number(at, self.study.name_of(n)) for at in of_point] for n in names)
            found.append((first, second))
        return found

    def choice(self, arm: str) -> tuple[int, str] | None:
        """(the chosen grid point of an arm, a remark on it); None if it is not known, or none is.

        Raises ValueError if all grid points failed.
        """
        tune, source = self.study.tune, self.study.arms[arm].inherit or arm
        grid = self.grid(source)
        if grid is None:
            return None
        means = [[sum(values) / len(values) for values in point] for point in grid]
        limit = tune.budget[1] if tune.budget else float("inf")
        try:
            values, costs = zip(*means, strict=True)
            if not tune.budget:
                costs = [0.0] * len(values)
            return choose(values, costs, limit, largest=tune.largest)
        except ValueError as error:
            raise ValueError(f"arm {source!r}: {error}") from error

    def last(self, run: Run) -> dict[str, Any]:
        """The last evaluation of a finished run; {} if the run failed."""
        result = self._results[run.folder]
        return {} if result.get("failed") else result["evaluations"][-1]

    def to_the_end(self, stop: Stop, report: Callable[[], object]) -> int:
        """Runs all that is missing, and reports after each run; returns the exit status."""
        while run := next((run for run in self.runs() if not self.result(run)), None):
            done = len(self.finished())
            found = None
            if not stop.agreed():
                found = self._execute(run, self._watch(run, done), stop)
            if found is None:
                hosts.say(f"{done} of {self.total} runs are finished; the same command continues")
                return STOPPED
            about = {"arm": run.arm, "point": run.point, "seed": run.seed, "changes": run.changes}
            if hosts.is_first():
                write_whole(run.folder / "result.json", json.dumps(about | found, indent=1) + "\n")
            self._results.pop(run.folder)
            report()
        return 0

    def _final_of(self, arm: str) -> list[Run]:
        """The final runs of an arm; [] if its grid point is not known yet."""
        if arm not in self._final:
            source = self.study.arms[arm].inherit or arm
            point = {}
            if grid := self.study.grid(source):
                choice = self.choice(arm)
                if choice is None:
                    return []
                point = grid[choice[0]]
            self._final[arm] = self.planner.final(arm, point)
        return self._final[arm]

    def _watch(self, run: Run, done: int) -> Callable[[int, dict[str, float]], None]:
        """Says which run begins; returns what checks its evaluations and shows the time left."""
        begun = shown = time.monotonic()
        head = f"run {done + 1} of {self.total} ({run})"
        left = self._seconds_left()
        hosts.say(head + ("" if left is None else f", about {duration(left)} left in all"))

        def watch(step: int, values: dict[str, float]):
            nonlocal shown
            if any(name.startswith("eval/") for name in values):
                self._check({name.removeprefix("eval/"): value for name, value in values.items()})
            now = time.monotonic()
            if now - shown >= SECONDS_BETWEEN_LINES and "seconds_left" in values:
                shown, this = now, values["seconds_left"]
                others = self._seconds_left(besides=run, guess=now - begun + this)
                hosts.say(f"{head}, about {duration(this + (others or 0))} left in all")

        return watch

    def _seconds_left(self, besides: Run | None = None, guess: float | None = None) -> float | None:
        """How long the runs that are missing may take; None if nothing is known about it.

        A run takes as long as the finished runs of its arm and stage, or as all finished runs, or
        as `guess`.
        """
        seconds: dict[Any, list[float]] = {}
        for run, result in self.finished():
            if result.get("seconds"):
                for group in ((run.arm, run.point is None), None):
                    seconds.setdefault(group, []).append(result["seconds"])
        mean = {group: sum(values) / len(values) for group, values in seconds.items()}
        default = mean.get(None, guess)
        if default is None:
            return None
        known = self.runs()
        missing = [run for run in known if not self.result(run) and run != besides]
        left = sum(mean.get((run.arm, run.point is None), default) for run in missing)
        return left + (self.total - len(known)) * default

    def _check(self, evaluation: dict[str, Any]):
        """Raises ValueError if an evaluation lacks a metric that the study names."""
        missing = [name for name in self.study.needed if name not in evaluation]
        if missing:
            there = [name for name in evaluation if name != "step" and not name.endswith("_stderr")]
            raise ValueError(
                f"the evaluations of the runs have no {', '.join(missing)}: "
                f"they have {', '.join(there) or 'nothing'}"
            )


def train_run(run: Run, watch: Callable, stop: Stop) -> Result | None:
    """Trains one run, or continues it; returns its result, or None if a signal stopped it.

    A loss that is not finite ends the run, but not the study: the result says so.
    """
    lines = run.folder / "metrics.jsonl"
    continues, begun = lines.exists(), time.monotonic()
    plan = make_plan(run.config, run.folder)
    result: Result = {"steps": plan.num_steps, "passes": training_passes(plan)}
    try:
        if train(plan, watch, stop=stop, table=False) == STOPPED:
            return None
    except FloatingPointError as error:
        hosts.say(f"the run failed: {error}")
        return result | {"failed": str(error), "evaluations": []}
    result["evaluations"] = _evaluations(lines) if hosts.is_first() else []
    # What a run took that another process began is not known.
    return result | {"seconds": None if continues else time.monotonic() - begun}


def _evaluations(path) -> list[dict[str, Any]]:
    found = []
    for line in map(json.loads, lines_until(path, float("inf"))):
        values = {n.removeprefix("eval/"): v for n, v in line.items() if n.startswith("eval/")}
        if values:
            found.append({"step": line["step"], **values})
    return found


def _number(evaluation: dict[str, Any], name: str) -> float:
    value = evaluation.get(name)
    return float("nan") if value is None else float(value)
