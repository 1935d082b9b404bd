"""What a study is: arms, seeds, metrics, and the grids that tune them. It opens no config."""

import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

Changes = Mapping[str, Any]  # {"vrpo.n_t": 1}: keys of the config and their values
NAME = re.compile(r"\w[\w.-]*")  # what the name of a folder may be


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm: what it changes in the config, and where its grid point comes from."""

    overrides: Changes = dataclasses.field(default_factory=dict)
    label: str = ""  # its name in tables and pictures; "": its key in Study.arms
    # its own grid points; None: those of Tune.grid; (): it is not tuned
    grid: Sequence[Changes] | None = None
    inherit: str = ""  # the arm whose chosen grid point it takes, instead of a grid of its own


@dataclasses.dataclass(frozen=True)
class Tune:
    """The stage before the runs: each arm is trained at each of its grid points, and one is chosen.

    The chosen point has the best mean of `metric` over `seeds`, at the last step, among the points
    whose mean of the budget's metric is at most its limit.
    """

    metric: str  # what chooses: a name in Study.metrics, or in the evaluations of a run
    grid: Sequence[Changes] = ()  # the grid points of every arm that has none of its own
    largest: bool = True  # whether the largest value of the metric is the best one
    budget: tuple[str, float] | None = None  # (metric, limit); None: every point may be chosen
    seeds: Sequence[int] = (0,)
    overrides: Changes = dataclasses.field(default_factory=dict)  # as validation prompts


@dataclasses.dataclass(frozen=True)
class Study:
    """A study. Its runs are: the base config, changed by `overrides`, an arm and its grid point."""

    base: str  # the config file of all runs
    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    # {short name: name in the evaluations of a run}, as {"reward": "solve/reward"}
    metrics: Mapping[str, str]
    baseline: str  # the arm from which the paired differences are taken
    takes: str  # how long it takes on what, as "two hours on two CPU cores"
    title: str = "Study"
    about: str = ""  # paragraphs for the page, in Markdown
    overrides: Changes = dataclasses.field(default_factory=dict)
    tune: Tune | None = None
    before: str = "before"  # the arm of the evaluations at step 0; "": there is none
    y: str = ""  # the metric of the picture; "": the first
    x: str = ""  # the metric against which it is drawn; "": the step

    def __post_init__(self):
        _check(self)

    def label(self, arm: str) -> str:
        """The name of an arm in tables and pictures."""
        return (self.arms[arm].label if arm in self.arms else "") or arm

    def name_of(self, metric: str) -> str:
        """The name of a metric in the evaluations of a run."""
        return self.metrics.get(metric, metric)

    def grid(self, arm: str) -> Sequence[Changes]:
        """The grid points at which an arm is tuned; () if it is not tuned itself."""
        own = self.arms[arm]
        if self.tune is None or own.inherit:
            return ()
        return self.tune.grid if own.grid is None else own.grid

    @property
    def needed(self) -> list[str]:
        """The names of all metrics that the evaluations of a run must have."""
        names = [*self.metrics.values()]
        if self.tune:
            names.append(self.name_of(self.tune.metric))
            if self.tune.budget:
                names.append(self.name_of(self.tune.budget[0]))
        return list(dict.fromkeys(names))


def load(path: str) -> Study:
    """Returns `get_study()` of a file.

    Raises FileNotFoundError or ValueError, in one line that names the file.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file; name one of configs/studies/")
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: a study is a file.py with get_study()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_study", None)):
            raise ValueError("it has no get_study(), which returns a Study")
        study = module.get_study()
    except Exception as error:  # whatever a study file raises
        raise ValueError(f"{path}: {error or type(error).__name__}") from error
    if not isinstance(study, Study):
        raise ValueError(f"{path}: get_study() returns {type(study).__name__}, not a Study")
    return study


def _check(study: Study):
    """Raises ValueError if the parts of a study do not fit together."""
    if not study.arms:
        raise ValueError("arms is empty: a study needs at least one")
    if not study.metrics:
        raise ValueError("metrics is empty: name what the table shows")
    for arm in (*study.arms, *filter(None, [study.before])):
        if not NAME.fullmatch(arm):
            raise ValueError(f"arm {arm!r}: a folder has its name, so use letters, digits, _ . -")
    if study.before in study.arms:
        raise ValueError(f"arm {study.before!r} is the name of the evaluations at step 0 (before=)")
    if study.baseline not in study.arms:
        raise ValueError(f"baseline={study.baseline!r} is no arm: there are {_list(study.arms)}")
    for axis in filter(None, (study.x, study.y)):
        if axis not in study.metrics:
            raise ValueError(f"{axis!r} of the picture is not one of {_list(study.metrics)}")
    _check_seeds("seeds", study.seeds)
    changes = {"overrides": study.overrides}
    if study.tune:
        _check_seeds("tune.seeds", study.tune.seeds)
        changes["tune.overrides"] = study.tune.overrides
    for arm, own in study.arms.items():
        changes[f"arm {arm!r}"] = own.overrides
        changes |= {f"arm {arm!r}, point {k}": point for k, point in enumerate(study.grid(arm))}
    for where, values in changes.items():
        if "seed" in values:
            raise ValueError(f"{where} sets seed: list the seeds in Study.seeds")
    _check_grids(study)


def _check_grids(study: Study):
    for arm, own in study.arms.items():
        if study.tune is None and (own.grid or own.inherit):
            raise ValueError(f"arm {arm!r} has a grid or inherits one, but the study has no tune")
        if own.grid and own.inherit:
            raise ValueError(f"arm {arm!r} has a grid and inherits from {own.inherit!r}: choose")
        if own.inherit and not (own.inherit in study.arms and study.grid(own.inherit)):
            raise ValueError(f"arm {arm!r} inherits from {own.inherit!r}, which is no tuned arm")
    counts = {arm: len(study.grid(arm)) for arm in study.arms if study.grid(arm)}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{arm} {count}" for arm, count in counts.items())
        raise ValueError(f"the arms have unequal numbers of grid points: {each}")
    if study.tune and not counts:
        raise ValueError("tune has no grid points: give Tune.grid, or Arm.grid")


def _check_seeds(name: str, seeds: Sequence[int]):
    if not seeds:
        raise ValueError(f"{name} is empty: give at least one")
    if len(set(seeds)) < len(seeds) or any(type(s) is not int or s < 0 for s in seeds):
        raise ValueError(f"{name}={seeds} must be different integers of at least 0")


def _list(names) -> str:
    return ", ".join(map(str, names))
