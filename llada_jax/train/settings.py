"""Every key of an experiment: one settings dataclass a section, and what must hold between them.

`experiment(objective)` makes the config that configs/base.py hands out; `read` turns a config back
into settings, and refuses what no run could honour before anything is opened.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from llada_jax import config
from llada_jax.data.packing import Packing
from llada_jax.models import attention
from llada_jax.models.layers import REMAT
from llada_jax.objectives import OBJECTIVES, Objective, Reference
from llada_jax.objectives.objective import DTYPES
from llada_jax.parallel import split
from llada_jax.sampling import check_schedule
from llada_jax.train.optim import Optimizer


@dataclasses.dataclass(frozen=True)
class Run:
    """The keys at the top of a config."""

    objective: str = "vrpo"  # set by base.get_config(objective): "pretrain", "sft", "vrpo" or yours
    init_from: str = ""  # Hugging Face style folder or checkpoint of ours; "": random parameters
    seed: int = 0  # of parameters, order of the rows and noise
    num_steps: int = 0  # 0: as many as `epochs` passes over the data take
    epochs: int = 1  # passes over the data, if num_steps is 0
    # "mesh": jit over the mesh; "pmap": parameters on every device, rows split, mesh.data alone
    parallelism: str = "mesh"

    def __post_init__(self):
        config.one_of(self, objective=OBJECTIVES, parallelism=split.KINDS)
        config.at_least(self, num_steps=0, epochs=1, seed=0)


@dataclasses.dataclass(frozen=True)
class Model:
    """How the model computes, and what it is if it starts from random parameters."""

    # keys of a published config.json: needed without init_from, checked against it otherwise
    arch: dict = dataclasses.field(default_factory=dict)
    dtype: str = "float32"  # of activations
    param_dtype: str = "float32"
    remat: str = "none"  # "none", "dots" or "full": what a layer drops and computes again backward
    attention: str = "auto"  # "auto", "xla", "splash" (TPU) or "cudnn" (NVIDIA)
    unroll: int = (
        1  # layers compiled one by one: all is faster for a small model, 1 compiles fastest
    )
    logps_chunk: int = 8192  # entries of the vocabulary whose logits are held at a time

    def __post_init__(self):
        config.one_of(self, dtype=DTYPES, param_dtype=DTYPES)
        config.one_of(self, remat=REMAT, attention=attention.IMPLEMENTATIONS)
        config.at_least(self, unroll=1, logps_chunk=1)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where rows come from, and how many make a batch."""

    train: str = ""  # jsonl:GLOB, tfds:NAME_OR_DIR or python:module:function?key=value
    heldout: str = ""  # another source; "": the share `holdout` of the train source
    tokenizer: str = ""  # folder, tokenizer.json or SentencePiece model; "": beside init_from
    batch_rows: int = 16  # rows of all devices in one step
    cache_dir: str = ""  # of packed rows; "": WORKDIR/data
    packing: Packing = Packing()

    def __post_init__(self):
        config.at_least(self, batch_rows=1)
        if self.heldout and self.packing.holdout:
            raise ValueError(
                f"heldout={self.heldout} and holdout={self.packing.holdout} both say which records are "
                "held out: set one of them"
            )

    @property
    def holds_out(self) -> bool:
        """Whether some records are kept for the evaluation."""
        return bool(self.heldout or self.packing.holdout)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1: what is left."""

    data: int = -1  # rows split; crosses the network between slices
    fsdp: int = 1  # rows and parameters split
    tensor: int = 1  # heads, MLP and vocabulary split


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a run is saved."""

    every: int = 1000  # steps; always at the end and when stopped
    keep: int = 3  # newest steps to keep

    def __post_init__(self):
        config.at_least(self, every=1, keep=1)


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is measured on held-out rows, and when."""

    every: int = 0  # steps; 0: at the start and the end only
    batch_rows: int = 0  # 0: as many as go through the model together in training
    n_t: int = 8  # draws of the held-out metrics, noise shared
    # vrpo: score variance, V_t and V_yt by >= 3 repeats of 2 n + 4 forward passes; 0: off
    variance_repeats: int = 0
    seconds_between_lines: float = 10.0  # of progress, where there is no terminal

    def __post_init__(self):
        config.at_least(
            self, every=0, batch_rows=0, n_t=1, variance_repeats=0, seconds_between_lines=0
        )
        if self.variance_repeats in (1, 2):
            raise ValueError(
                f"variance_repeats={self.variance_repeats} is too few: at least 3, or 0 for off"
            )


@dataclasses.dataclass(frozen=True)
class Solve:
    """Responses to held-out prompts, scored at each evaluation."""

    prompts: str = ""  # a source; "": off
    scorer: str = ""  # module:function, (record, response) -> float
    limit: int = 0  # prompts; 0: all
    gen_length: int = 128  # tokens of a response
    steps: int = 128  # denoising steps of a response
    block_length: int = 32  # tokens unmasked together
    batch_size: int = 50  # prompts answered at once

    def __post_init__(self):
        config.at_least(self, limit=0, batch_size=1, gen_length=1, steps=1, block_length=1)
        if self.prompts:
            check_schedule(self.steps, self.gen_length, self.block_length)


SECTIONS = {
    "model": Model,
    "data": Data,
    "optimizer": Optimizer,
    "mesh": Mesh,
    "checkpoint": Checkpoint,
    "eval": Eval,
    "solve": Solve,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A config, read: every section as its settings."""

    run: Run
    objective: Objective
    loss: Any  # the objective's Settings
    reference: Reference | None  # None: the objective has no reference policy
    model: Model
    data: Data
    optimizer: Optimizer
    mesh: Mesh
    checkpoint: Checkpoint
    eval: Eval
    solve: Solve


def experiment(objective: str) -> ConfigDict:
    """The config of an objective, every key at its default; locked, so that no key can be misspelt.

    Raises ValueError for an objective that OBJECTIVES does not hold.
    """
    top = config.section(Run, objective=objective)
    known = _objective(objective)
    with top.unlocked():
        for name, classes in _sections(known):
            top[name] = config.section(*classes)
    return top


def read(c: ConfigDict, *, dry_run: bool = False) -> Settings:
    """The settings of a config. A dry run may do without init_from.

    Raises ValueError, in one line, for a value that its key or another key forbids.
    """
    run = config.build(Run, c, "config.")
    objective = OBJECTIVES[run.objective]
    if objective.section not in c:
        raise ValueError(
            f"config.objective={run.objective!r} needs the section {objective.section}, which this "
            f"config does not have: start it with base.get_config({run.objective!r})"
        )
    loss = config.build(
        objective.Settings, c[objective.section], f"config.{objective.section}.", seed=run.seed
    )
    reference = None
    if objective.needs_reference:
        reference = config.build(Reference, c[objective.section], f"config.{objective.section}.")
    sections = {
        name: config.build(cls, c[name], f"config.{name}.", **_given(name, objective))
        for name, cls in SECTIONS.items()
    }
    settings = Settings(run, objective, loss, reference, **sections)
    _check_together(settings, dry_run)
    return settings


def describe_keys(c: ConfigDict | None = None) -> str:
    """Every key with its value and comment, a line each; without a config, those of all objectives."""
    lines = ["keys of a config (--config.NAME=VALUE):"]
    if c is not None:
        chosen = [_objective(c.objective)]
    else:
        chosen = list(OBJECTIVES.values())
        lines[0] = "keys of a config and their defaults (--config.NAME=VALUE):"
    done = set()
    for known in chosen:
        for name, classes in [("", (Run,)), *_sections(known)]:
            if (name, classes) in done:
                continue
            done.add((name, classes))
            of = f"  ({', '.join(o.name for o in chosen if o.Settings in classes)})"
            lines += ["", f"{name or 'top'}{of if name == known.section and c is None else ''}"]
            for key, default, comment in config.keys(*classes):
                value = default if c is None else (c[name] if name else c)[key]
                value = value.to_dict() if isinstance(value, ConfigDict) else value
                path = f"{name}.{key}" if name else key
                lines.append(f"  {f'{path}={value!r}':<38}  {comment}".rstrip())
    return "\n".join(lines)


def _objective(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise ValueError(f"config.objective={name!r} is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def _sections(objective: Objective) -> Iterable[tuple[str, tuple[type, ...]]]:
    """(name, settings dataclasses) of every section of an objective's config."""
    yield "model", (Model,)
    yield "data", (Data,)
    own = (objective.Settings, Reference) if objective.needs_reference else (objective.Settings,)
    yield objective.section, own
    yield from ((name, (cls,)) for name, cls in SECTIONS.items() if name not in ("model", "data"))


def _given(section: str, objective: Objective) -> dict[str, str]:
    return {"kind": objective.records, "split": "train"} if section == "data" else {}


def _check_together(s: Settings, dry_run: bool):
    """Refuses values that another section forbids."""
    if repeats := s.eval.variance_repeats:
        name, has = f"config.eval.variance_repeats={repeats}", s.objective.needs_reference
        for wrong, why in (
            (
                not has,
                f"measures scores, which objective={s.run.objective!r} does not have: set it to 0",
            ),
            (
                has and s.reference.is_cached,
                "draws new noise, for which no terms are cached: set vrpo.reference='model', or it to 0",
            ),
            (not s.data.holds_out, "needs held-out pairs: set data.holdout or data.heldout"),
        ):
            if wrong:
                raise ValueError(f"{name} {why}")
    if s.objective.needs_reference and not s.run.init_from and not (dry_run and s.model.arch):
        raise ValueError(
            f"config.init_from is not set: {s.run.objective} starts from a trained model, pass "
            "--config.init_from=DIR"
        )
