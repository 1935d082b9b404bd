"""Every key of an experiment: one settings dataclass per section, and the checks between them.

`experiment(objective)` makes the config that configs/base.py returns. `read` converts a config to
settings. It refuses values that no run can use before any file is opened.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from llada_jax import config, sampling
from llada_jax.data.packing import Packing
from llada_jax.models import attention
from llada_jax.models.layers import REMAT
from llada_jax.objectives import OBJECTIVES, Objective, Reference
from llada_jax.objectives.objective import DTYPES
from llada_jax.parallel import split
from llada_jax.sampling import flags
from llada_jax.sampling.settings import make
from llada_jax.train.optim import Optimizer


@dataclasses.dataclass(frozen=True)
class Run:
    """The keys at the top of a config."""

    # "pretrain", "sft", "vrpo" or your own; base.get_config(objective) sets it
    objective: str = "vrpo"
    # the initial model: Hugging Face style folder or our checkpoint; "": random parameters
    init_from: str = ""
    seed: int = 0  # seed of the parameters, the order of the rows and the noise
    num_steps: int = 0  # number of steps; 0: `epochs` passes over the data
    epochs: int = 1  # passes over the data if num_steps is 0
    # "mesh": jit over the mesh; "pmap": all parameters on every device, mesh.data only
    parallelism: str = "mesh"

    def __post_init__(self):
        config.one_of(self, objective=OBJECTIVES, parallelism=split.KINDS)
        config.at_least(self, num_steps=0, epochs=1, seed=0)


@dataclasses.dataclass(frozen=True)
class Model:
    """How the model computes, and its architecture if it starts from random parameters."""

    # keys of a published config.json; required without init_from, else compared with it
    arch: dict = dataclasses.field(default_factory=dict)
    dtype: str = "float32"  # type of the activations: "float32" or "bfloat16"
    param_dtype: str = "float32"  # type of the parameters: "float32" or "bfloat16"
    # what a layer recomputes in its backward pass: "none", "dots" (part) or "full"
    remat: str = "none"
    attention: str = "auto"  # "auto", "xla", "splash" (TPU) or "cudnn" (NVIDIA)
    # layers per loop iteration; n_layers: fastest for small models; 1: compiles fastest
    unroll: int = 1
    logps_chunk: int = 8192  # vocabulary entries whose logits are computed at a time

    def __post_init__(self):
        config.one_of(self, dtype=DTYPES, param_dtype=DTYPES)
        config.one_of(self, remat=REMAT, attention=attention.IMPLEMENTATIONS)
        config.at_least(self, unroll=1, logps_chunk=1)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where rows come from, and how many rows a batch has."""

    train: str = ""  # jsonl:GLOB, tfds:NAME_OR_DIR or python:module:function?key=value
    heldout: str = ""  # held-out source; "": the share `holdout` of the train source
    tokenizer: str = ""  # folder, tokenizer.json or SentencePiece model; "": that of init_from
    batch_rows: int = 16  # rows in a step, over all devices
    cache_dir: str = ""  # local folder for packed rows; "": WORKDIR/data
    packing: Packing = Packing()

    def __post_init__(self):
        config.at_least(self, batch_rows=1)
        if self.heldout and self.packing.holdout:
            raise ValueError(
                f"heldout={self.heldout} and holdout={self.packing.holdout} both say which records "
                "are held out: set one of them"
            )

    @property
    def holds_out(self) -> bool:
        """Whether some records are held out for the evaluation."""
        return bool(self.heldout or self.packing.holdout)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The number of devices along each axis of the mesh; one may be -1, all that are left."""

    data: int = -1  # devices that split the rows, the one axis between TPU slices; -1: the rest
    fsdp: int = 1  # devices that split the rows and the parameters
    tensor: int = 1  # devices that split heads, MLP and vocabulary


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a run saves checkpoints, and how many it keeps."""

    every: int = 1000  # steps between checkpoints; a run also saves at its end and when stopped
    keep: int = 3  # number of newest checkpoints to keep

    def __post_init__(self):
        config.at_least(self, every=1, keep=1)


@dataclasses.dataclass(frozen=True)
class Eval:
    """When a run evaluates, and what it measures on held-out rows."""

    every: int = 0  # steps between evaluations; 0: only at the start and at the end
    batch_rows: int = 0  # rows at a time; 0: as many as training computes at a time
    n_t: int = 8  # draws for the held-out metrics; policy and reference share them
    # vrpo: repeats (>= 3, each 2 n + 4 forward passes) for score variance, V_t and V_yt; 0: off
    variance_repeats: int = 0
    seconds_between_lines: float = 10.0  # time between progress lines if there is no terminal

    def __post_init__(self):
        config.at_least(
            self, every=0, batch_rows=0, n_t=1, variance_repeats=0, seconds_between_lines=0
        )
        if self.variance_repeats in (1, 2):
            raise ValueError(
                f"variance_repeats={self.variance_repeats} is too few: at least 3, or 0 for off"
            )


def _sampler_key(name: str) -> tuple[str, Any, Any]:
    """The field of a flag, as `dataclasses.make_dataclass` takes it."""
    kind, comment = sampling.FLAGS[name]
    default = flags.default(name)
    if isinstance(kind, dict):
        kind, comment = str, f"{comment}: {', '.join(kind)}"
    return name, kind if default is not None else kind | None, config.key(default, comment=comment)


# The keys of the sampler are its flags.
Sampler = dataclasses.make_dataclass("Sampler", map(_sampler_key, sampling.FLAGS), frozen=True)


@dataclasses.dataclass(frozen=True)
class Solve:
    """Held-out prompts that the model answers at each evaluation, and the scorer of the answers."""

    prompts: str = ""  # source of prompts, answered at each evaluation; "": none
    scorer: str = ""  # a task, as gsm8k, or module:function, (record, response) -> Score
    limit: int = 0  # number of prompts; 0: all
    batch_size: int = 50  # prompts answered at a time
    # masks for each ELBO in the KL from the reference; 0: off; costs 2 x this many passes a prompt
    kl_draws: int = 0
    show: int = 0  # prompts that are printed with their responses, before and after training
    sampler: Any = Sampler()

    def __post_init__(self):
        config.at_least(self, limit=0, batch_size=1, kl_draws=0, show=0)
        for name in ("kl_draws", "show"):
            if getattr(self, name) and not self.prompts:
                raise ValueError(f"{name}={getattr(self, name)} needs prompts: set solve.prompts")
        if self.prompts:
            # The sampler's own checks. The ids are those of the model, which is not yet known.
            make(True, mask_id=0, eos_id=1, eot_id=2, **dataclasses.asdict(self.sampler))
        if self.kl_draws:
            self._check_draws_of_the_policy()

    def _check_draws_of_the_policy(self):
        """Raises ValueError unless the responses are drawn from the policy itself.

        Of responses from another distribution the mean of log policy / reference is no divergence.
        """
        policy = {"temperature": 1, "remasking": "random", "top_k": None, "top_p": None}
        policy |= {"cfg_scale": 0, "logits_eos_inf": False, "confidence_eos_eot_inf": False}
        for name, value in policy.items():
            if (found := getattr(self.sampler, name)) != value:
                raise ValueError(
                    f"kl_draws={self.kl_draws} needs responses that are drawn from the policy, "
                    f"which they are not with solve.{name}={found}: set it to {value}, or kl_draws "
                    "to 0"
                )


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
    """The settings of a config, section by section."""

    run: Run
    objective: Objective
    loss: Any  # the objective's settings
    reference: Reference | None  # None: the objective has no reference policy
    model: Model
    data: Data
    optimizer: Optimizer
    mesh: Mesh
    checkpoint: Checkpoint
    eval: Eval
    solve: Solve


def experiment(objective: str) -> ConfigDict:
    """Makes the config of an objective, with every key at its default.

    It is locked, so that a misspelt key is an error. Raises ValueError if the objective is not in
    OBJECTIVES.
    """
    top = config.section(Run, objective=objective)
    known = _objective(objective)
    with top.unlocked():
        for name, classes in _sections(known):
            top[name] = config.section(*classes)
    return top


def read(c: ConfigDict, *, dry_run: bool = False) -> Settings:
    """Converts a config to settings. In a dry run init_from may be missing.

    Raises ValueError, in one line, if a value is invalid or conflicts with another key.
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
    """Returns one line for every key, with its value and its comment.

    Without a config, it has the keys of all objectives with their defaults.
    """
    chosen = list(OBJECTIVES.values()) if c is None else [_objective(c.objective)]
    what = "their defaults" if c is None else "their values"
    lines = [f"keys of a config and {what} (--config.NAME=VALUE):"]
    known: dict[tuple, list[str]] = {("", (Run,)): []}
    for objective in sorted(chosen, key=lambda o: o.section):
        for name, classes in _sections(objective):
            known.setdefault((name, classes), []).append(objective.name)
    own = {objective.section for objective in chosen}
    # The sections that belong to one objective stand last.
    for (name, classes), names in sorted(known.items(), key=lambda item: item[0][0] in own):
        of = f"  ({', '.join(names)})" if name in own and c is None else ""
        lines += ["", f"{name or 'top'}{of}"]
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
    """Yields (name, settings dataclasses) of every section of an objective's config."""
    yield "model", (Model,)
    yield "data", (Data,)
    own = (objective.Settings, Reference) if objective.needs_reference else (objective.Settings,)
    yield objective.section, own
    yield from ((name, (cls,)) for name, cls in SECTIONS.items() if name not in ("model", "data"))


def _given(section: str, objective: Objective) -> dict[str, str]:
    return {"kind": objective.records, "split": "train"} if section == "data" else {}


def _check_together(s: Settings, dry_run: bool):
    """Raises ValueError if the values of two sections conflict."""
    if repeats := s.eval.variance_repeats:
        name, has = f"config.eval.variance_repeats={repeats}", s.objective.needs_reference
        for wrong, why in (
            (
                not has,
                f"measures scores, which objective={s.run.objective!r} does not have: set it to 0",
            ),
            (
                has and s.reference.is_cached,
                "draws new noise, for which no terms are cached: set vrpo.reference='model', "
                "or it to 0",
            ),
            (not s.data.holds_out, "needs held-out pairs: set data.holdout or data.heldout"),
        ):
            if wrong:
                raise ValueError(f"{name} {why}")
    if draws := s.solve.kl_draws:
        name = f"config.solve.kl_draws={draws} compares the policy with its reference, "
        if not s.objective.needs_reference:
            raise ValueError(f"{name}and objective={s.run.objective!r} has none: set it to 0")
        if s.reference.is_cached:
            raise ValueError(
                f"{name}whose parameters a cached reference releases: set "
                f"{s.objective.section}.reference='model', or kl_draws to 0"
            )
    if s.objective.needs_reference and not s.run.init_from and not (dry_run and s.model.arch):
        raise ValueError(
            f"config.init_from is not set: {s.run.objective} starts from a trained model, pass "
            "--config.init_from=DIR"
        )
