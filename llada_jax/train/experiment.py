"""Experiment: a config, validated against data, tokenizer, checkpoint and devices.

`make_plan` decides everything that a run, a benchmark or a compile does. It puts nothing on a
device.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from llada_jax import config as config_lib
from llada_jax import models, sampling, tasks
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.checkpoints import loading
from llada_jax.data import batches as batches_lib
from llada_jax.data import rows as rows_lib
from llada_jax.data.batches import Loader
from llada_jax.data.rows import Rows
from llada_jax.data.synthetic import SyntheticRows
from llada_jax.evaluate.questions import Question, encode, read_questions
from llada_jax.models import attention as attention_lib
from llada_jax.objectives import Objective, Reference
from llada_jax.parallel import agree, hosts
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.parallel.split import Parallel
from llada_jax.tokenizer import Tokenizer
from llada_jax.train import optim
from llada_jax.train import settings as settings_lib
from llada_jax.train.optim import Optimizer
from llada_jax.train.settings import Checkpoint, Data, Eval, Settings, Solve


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config: its settings, and the objects made from them."""

    workdir: epath.Path
    seed: int
    init_from: str  # "": random parameters
    num_steps: int  # 0 only in a dry run without data
    objective: Objective
    settings: Any  # the objective's settings
    reference: Reference | None  # None: the objective has no reference policy
    data: Data
    optimizer: Optimizer
    checkpoint: Checkpoint
    eval: Eval
    solve: Solve
    parallel: Parallel
    model: nn.Module
    tokenizer: Tokenizer | None  # None only in a dry run
    rows: Rows | None  # None only in a dry run
    heldout: Rows | None  # None: nothing is held out
    prompts: list[Question] | None  # answered at each evaluation; None: none
    scored_length: int  # of the rows that hold a prompt and its answer for `Solve.kl_draws`

    @property
    def mesh(self) -> Mesh:
        """The mesh of the devices, with the axes data, fsdp and tensor."""
        return self.parallel.mesh

    @property
    def row_length(self) -> int:
        """The number of tokens in a row."""
        return self.data.packing.row_length

    @property
    def num_segments(self) -> int:
        """The number of segments in a row, the same for training and held-out rows.

        It is a multiple of the number of segments of an example.
        """
        most = max(rows.num_segments for rows in (self.rows, self.heldout) if rows is not None)
        each = self.objective.segments_per_example
        return -(-most // each) * each

    @property
    def heldout_settings(self) -> Any:
        """The objective's settings for held-out rows."""
        return self.settings.for_heldout(self.eval.n_t)

    @functools.cached_property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """The numbers that compiled programs take as arguments: {"settings": .., "optimizer": ..}.

        Experiments that differ in nothing else share their programs.
        """
        return {
            "settings": config_lib.arguments(self.settings),
            "optimizer": config_lib.arguments(self.optimizer),
        }

    @property
    def rows_at_once(self) -> int:
        """The number of rows that a training step computes at a time.

        Without a gradient, as many rows surely fit in memory.
        """
        return self.data.batch_rows // self.optimizer.accumulate

    @property
    def reference_dtype(self) -> jnp.dtype:
        """The data type of the reference policy's parameters."""
        return jnp.dtype(self.reference.reference_dtype or self.model.param_dtype)

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        """The learning-rate schedule."""
        return optim.make(self.optimizer, self.num_steps)[0]

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimiser."""
        return optim.make(self.optimizer, self.num_steps)[1]

    def batches(self, rows: Rows, **settings) -> Loader:
        """Returns a loader of this host's share of every batch.

        `settings` are those of `batches.loader`.
        """
        index, count = self.parallel.shard
        return batches_lib.loader(
            rows,
            num_segments=self.num_segments,
            shard_index=index,
            shard_count=count,
            **settings,
        )

    def attention(self, length: int = 0) -> tuple[str, str]:
        """Returns (name, reason) of the attention for rows of `length` (0: `row_length`).

        Raises ValueError if the implementation that the config names does not support them.
        """
        return attention_lib.choose(
            self.model.attention,
            self.mesh.devices.flat[0].platform,
            length=length or self.row_length,
            head_size=self.model.config.head_size,
            dtype=self.model.dtype,
        )


def make_plan(
    config, workdir: epath.PathLike, *, dry_run: bool = False, devices=None
) -> Experiment:
    """Validates a config against data, tokenizer, checkpoint and devices, and packs the data.

    In a dry run init_from and data may be missing. `devices` may be devices of a described
    topology; None takes all devices of this machine. Raises ValueError or FileNotFoundError, in one
    line.
    """
    s = settings_lib.read(config, dry_run=dry_run)
    workdir = epath.Path(workdir).expanduser()
    hosts.check_joined()
    mesh = mesh_lib.make_mesh(s.mesh.data, s.mesh.fsdp, s.mesh.tensor, devices)
    parallel = Parallel(s.run.parallelism, mesh)
    if not dry_run:
        _ = parallel.shard  # raises an error now if a host cannot load its own rows
        agree.check_same("the config or the workdir", f"{config.to_dict()} {workdir}")
        agree.check_shared(workdir)
    _check_rows(s, mesh)
    tokenizer = _tokenizer(s)
    model = _model(s, mesh, tokenizer)
    rows = heldout = prompts = None
    sampled_length = scored_length = 0
    if s.data.train and tokenizer:
        cache_dir = epath.Path(s.data.cache_dir or workdir / "data").expanduser()
        rows, heldout = agree.once_per_disk(
            cache_dir, lambda: _prepare_rows(s.data, tokenizer, cache_dir)
        )
        agree.check_same("the data", f"{rows.fingerprint} {heldout and heldout.fingerprint}")
    elif not dry_run:
        raise ValueError(
            "config.data.train is not set: pass --config.data.train=jsonl:FILE (or tfds:, python:)"
        )
    if s.solve.prompts:
        prompts, sampled_length, scored_length = _prompts(s, tokenizer, model.config)
        if not dry_run:
            agree.check_same("what solve.prompts holds", repr(prompts))
    plan = Experiment(
        workdir=workdir,
        seed=s.run.seed,
        init_from=s.run.init_from,
        num_steps=_num_steps(s, rows),
        objective=s.objective,
        settings=s.loss,
        reference=s.reference,
        data=s.data,
        optimizer=s.optimizer,
        checkpoint=s.checkpoint,
        eval=s.eval,
        solve=s.solve,
        parallel=parallel,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        heldout=heldout,
        prompts=prompts,
        scored_length=scored_length,
    )
    for length in (0, sampled_length, scored_length if s.solve.kl_draws else 0):
        plan.attention(length)  # raises an error now if the named implementation cannot do it
    if plan.num_steps:
        _ = plan.schedule  # raises an error now if the warm-up is too long
    return plan


def _check_rows(s: Settings, mesh: Mesh):
    shards = mesh_lib.row_shards(mesh)
    for name, batch_rows, parts in (
        ("data", s.data.batch_rows, shards * s.optimizer.accumulate),
        ("eval", s.eval.batch_rows, shards),
    ):
        if batch_rows % parts:
            raise ValueError(
                f"config.{name}.batch_rows={batch_rows} is not a multiple of {parts}: "
                f"data x fsdp = {shards} shards, optimizer.accumulate={s.optimizer.accumulate}"
            )


def _num_steps(s: Settings, rows: Rows | None) -> int:
    if s.run.num_steps or rows is None:
        return s.run.num_steps
    num_steps = s.run.epochs * len(rows) // s.data.batch_rows
    if not num_steps:
        raise ValueError(
            f"{s.run.epochs} epochs of {len(rows)} rows fill no batch of "
            f"data.batch_rows={s.data.batch_rows}: lower it"
        )
    return num_steps


def _model(s: Settings, mesh: Mesh, tokenizer: Tokenizer | None) -> nn.Module:
    config = _architecture(s, tokenizer)
    family = models.family_of(config)
    if s.reference and s.reference.reference_from:
        path = s.reference.reference_from
        name = f"config.{s.objective.section}.reference_from"
        with _naming(name):
            other = loading.read_config(path)
        _check_same(name, path, other, models.architecture(config), "in the policy")
    if tokenizer and tokenizer.vocab_size > config.embedding_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model "
            f"{config.embedding_size} embeddings: they do not belong together, "
            "change data.tokenizer"
        )
    if tokenizer and tokenizer.mask_id != config.mask_token_id:
        raise ValueError(
            f"the tokenizer's mask id {tokenizer.mask_id} is not the model's "
            f"mask_token_id={config.mask_token_id}: change data.tokenizer"
        )
    row_length = s.data.packing.row_length
    if row_length > config.max_sequence_length:
        raise ValueError(
            f"config.data.row_length={row_length} is beyond the model's max_sequence_length="
            f"{config.max_sequence_length}: lower it"
        )
    for name, axis in family.splits.items():
        if getattr(config, name) % mesh.shape[axis]:
            raise ValueError(
                f"{name}={getattr(config, name)} cannot be split over mesh.{axis}="
                f"{mesh.shape[axis]}: change config.mesh"
            )
    m = s.model
    model = family.Module(
        config,
        jnp.dtype(m.dtype),
        jnp.dtype(m.param_dtype),
        m.remat,
        m.attention,
        m.logps_chunk,
        m.unroll,
    )
    return _one_of_equals(model)


@functools.lru_cache
def _one_of_equals(model: nn.Module) -> nn.Module:
    """Returns the first of equal models: what JAX traced with it, as the sampler, serves again."""
    return model


def _architecture(s: Settings, tokenizer: Tokenizer | None) -> Any:
    """Returns the model's configuration, from init_from or from model.arch and the tokenizer."""
    arch = s.model.arch
    if s.run.init_from:
        with _naming("config.init_from"):
            config = loading.read_config(s.run.init_from)
        _check_same("config.init_from", s.run.init_from, config, arch, "in model.arch")
    elif arch:
        # For a new model, the tokenizer gives the ids that model.arch does not set.
        if tokenizer:
            ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
            ids = {"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_id}
            arch = ids | ends | arch
        config = models.config_from_dict(arch, source="config.model.arch")
    else:
        raise ValueError(
            "neither config.init_from nor config.model.arch is set: there is no model to train"
        )
    unknown = arch.keys() - config.to_dict().keys() - {"mlp_ratio", "multi_query_attention"}
    if unknown:
        raise ValueError(
            f"config.model.arch has {', '.join(sorted(unknown))}, no key of a config.json: "
            "remove it"
        )
    return config


def _check_same(name: str, path: str, config: Any, values: dict, where: str):
    there = {k: getattr(config, k, v) for k, v in values.items()}
    wrong = [f"{k}: {v!r} {where}, {there[k]!r} there" for k, v in values.items() if there[k] != v]
    if wrong:
        raise ValueError(f"{name}={path} is another architecture: {'; '.join(wrong)}")


def _tokenizer(s: Settings) -> Tokenizer | None:
    if s.data.tokenizer:
        with _naming("config.data.tokenizer"):
            return tokenizer_lib.load(s.data.tokenizer)
    if s.run.init_from:
        with _naming("config.init_from"):
            loading.read_config(s.run.init_from)  # says first what is no model at all
            return tokenizer_lib.load(loading.model_folder(s.run.init_from))
    if s.data.train:
        raise ValueError(
            "config.data.tokenizer is not set: pass --config.data.tokenizer=FOLDER_OR_FILE"
        )
    return None


def _prepare_rows(d: Data, tokenizer, cache_dir: epath.Path) -> tuple[Rows, Rows | None]:
    prepare = functools.partial(rows_lib.prepare, tokenizer=tokenizer, cache_dir=cache_dir)
    with _naming("config.data.train"):
        rows = prepare(d.train, packing=d.packing)
        if d.packing.holdout:
            heldout = dataclasses.replace(d.packing, split="heldout")
            return rows, prepare(d.train, packing=heldout)
    if not d.heldout:
        return rows, None
    with _naming("config.data.heldout"):  # all of another source
        return rows, prepare(d.heldout, packing=dataclasses.replace(d.packing, limit=0))


@contextlib.contextmanager
def _naming(key: str):
    """Errors of the block begin with the key that led to them."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{key}: {error}") from error


def _prompts(s: Settings, tokenizer, config: Any) -> tuple[list[Question], int, int]:
    """Returns (questions, length of the sampler's rows, length of the rows that are scored).

    The lengths are 0 without a tokenizer. Raises ValueError if there are no records, or if a prompt
    and its response are longer than the model allows.
    """
    packing, gen_length = s.data.packing, s.solve.sampler.gen_length
    template = packing.template
    with _naming("config.solve.scorer"):
        task = tasks.find(s.solve.scorer)
    with _naming("config.solve.prompts"):
        questions = read_questions(task, s.solve.prompts, template, limit=s.solve.limit)
    if not tokenizer:
        return questions, 0, 0
    with _naming("config.solve"):
        prompts = encode(
            tokenizer, task, questions, template, gen_length, config.max_sequence_length
        )
    lengths = [len(ids) for ids in prompts]
    # The answers are padded as in training, but not past the row.
    longest = max(lengths)
    padded = longest + gen_length + -gen_length % packing.answer_multiple
    scored = min(padded, max(packing.row_length, longest + gen_length))
    return questions, sampling.prompt_width(lengths) + gen_length, scored


def with_synthetic_rows(plan: Experiment) -> Experiment:
    """Returns the experiment with rows of random tokens and a number of steps if it has none."""
    if plan.rows is None:
        rows = SyntheticRows(
            plan.objective.records,
            plan.row_length,
            plan.model.config.vocab_size,
            plan.data.batch_rows,
        )
        plan = dataclasses.replace(plan, rows=rows)
    # A schedule needs a number of steps. The compiled program is the same for every number.
    if not plan.num_steps:
        plan = dataclasses.replace(plan, num_steps=plan.optimizer.warmup_steps + 1000)
    return plan
