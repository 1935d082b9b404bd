"""The runs of a study: which there are, the config of each, and its folder."""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from llada_jax import cli
from llada_jax.study.definition import Changes, Study
from llada_jax.train import settings

FINAL = "final"  # the stage after the grid points
# Keys that change neither what a run learns nor what its evaluations say.
WITHOUT_EFFECT = ("checkpoint.", "data.cache_dir", "eval.seconds_between_lines")
# Keys that name files. A run is another one if their content is another.
NAMES_FILES = ("init_from", "reference_from", "train", "heldout", "tokenizer", "prompts")
ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study."""

    arm: str
    point: int | None  # the grid point that it tries; None: the run is one of the final ones
    seed: int
    changes: dict[str, Any]  # what it changes in the base config
    config: ConfigDict = dataclasses.field(repr=False, compare=False)
    folder: epath.Path

    def __str__(self) -> str:
        point = "" if self.point is None else f"grid point {self.point}, "
        return f"{self.arm}, {point}seed {self.seed}"


class Planner:
    """Makes the runs of a study in a folder.

    Raises ValueError, which names the arm, if a key does not exist or its value is refused.
    """

    def __init__(self, study: Study, out: epath.Path):
        self.study, self._out = study, out
        self._base = cli.read_config([f"--config={study.base}"])
        for arm in study.arms:
            for point in study.grid(study.arms[arm].inherit or arm) or [{}]:
                self._run(arm, None, study.seeds[0], point)
            self.tuning(arm)

    def tuning(self, arm: str) -> list[Run]:
        """The runs that choose the grid point of an arm; [] if it is not tuned itself."""
        return [
            self._run(arm, k, seed, {**point, **self.study.tune.overrides})
            for k, point in enumerate(self.study.grid(arm))
            for seed in self.study.tune.seeds
        ]

    def final(self, arm: str, point: Changes) -> list[Run]:
        """The runs of an arm at its chosen grid point, one a seed."""
        return [self._run(arm, None, seed, point) for seed in self.study.seeds]

    def _run(self, arm: str, point: int | None, seed: int, last: Changes) -> Run:
        changes = {**self.study.overrides, **self.study.arms[arm].overrides, **last, "seed": seed}
        config = self._base.copy_and_resolve_references()
        try:
            for path, value in changes.items():
                cli.set_key(config, path, value, self.study.base)
            settings.read(config)
        except ValueError as error:
            raise ValueError(f"arm {arm!r}: {error}") from error
        stage = FINAL if point is None else f"point{point}"
        folder = self._out / "runs" / arm / stage / f"{seed}-{digest(config)}"
        if not config.data.cache_dir:
            config.data.cache_dir = str(self._out / "data")  # rows are packed once for all runs
        return Run(arm, point, seed, changes, config, folder)


def digest(config: ConfigDict) -> str:
    """Eight letters that are others if a run would be another one.

    They come from every value that is not its key's default, and from the content of the local
    files that such a value names: of each file its first and its last MiB.
    """
    defaults = _defaults(config.objective)
    values = {}
    for path, value in _flat(config):
        if value == defaults.get(path) or path.startswith(WITHOUT_EFFECT):
            continue
        values[path] = value
        if isinstance(value, str):
            # The same study in another checkout is the same.
            values[path] = value.replace(str(ROOT), "")
            if path.rpartition(".")[2] in NAMES_FILES:
                values[f"{path}, content"] = [_content(part) for part in value.split(",")]
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@functools.cache
def _defaults(objective: str) -> dict[str, Any]:
    return dict(_flat(settings.experiment(objective)))


def _flat(config: ConfigDict, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        path = f"{above}{name}"
        if isinstance(value, ConfigDict) and path != "model.arch":
            yield from _flat(value, f"{path}.")
        else:
            yield path, value.to_dict() if isinstance(value, ConfigDict) else value


@functools.cache
def _content(source: str) -> str:
    hashed = hashlib.sha256()
    for found in sorted(glob.glob(os.path.expanduser(source.removeprefix("jsonl:")))):
        path = pathlib.Path(found)
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                size = file.stat().st_size
                hashed.update(f"{file.relative_to(path)} {size}".encode())
                with file.open("rb") as opened:
                    hashed.update(opened.read(2**20))
                    opened.seek(max(size - 2**20, 0))
                    hashed.update(opened.read())
    return hashed.hexdigest()
