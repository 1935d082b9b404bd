"""What a config means here: validated against data, tokenizer, checkpoint and devices, before the first array."""

import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from llada_jax import noise, sampling
from llada_jax import tokenizer as tokenizer_lib
from llada_jax.checkpoints import loading
from llada_jax.data import rows as rows_lib
from llada_jax.data import templates
from llada_jax.data.records import read_records
from llada_jax.data.rows import Rows
from llada_jax.models import attention as attention_lib
from llada_jax.models.attention import IMPLEMENTATIONS
from llada_jax.models.layers import REMAT
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.objectives.denoising import Denoising
from llada_jax.objectives.preference import Preference
from llada_jax.parallel import agree
from llada_jax.parallel import hosts as hosts_lib
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.parallel.split import Parallel
from llada_jax.tasks import scorer
from llada_jax.tokenizer import Tokenizer
from llada_jax.train import optim
from llada_jax.train.optim import SCHEDULES

# What two models must share for one to be the reference of the other.
ARCHITECTURE = (
    "d_model n_heads n_kv_heads n_layers mlp_hidden_size vocab_size embedding_size weight_tying rope_theta "
    "rms_norm_eps mask_token_id"
).split()
KIND = {"pretrain": "text", "sft": "sft", "vrpo": "preference"}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config means here: validated, with the data packed, and nothing on a device yet."""

    config: Any
    workdir: epath.Path
    mesh: Mesh
    model: LLaDA
    tokenizer: Tokenizer | None  # None, and no rows: only in a dry run
    rows: Rows | None
    heldout: Rows | None
    prompts: list | None  # of config.solve
    settings: Preference | Denoising
    num_steps: int

    @property
    def num_segments(self) -> int:
        """Segments in a row: even for pairs, the same for training and held-out rows."""
        most = max(rows.num_segments for rows in (self.rows, self.heldout) if rows is not None)
        return most + most % 2 if self.config.objective == "vrpo" else most

    @property
    def eval_settings(self) -> Preference:
        """VRPO's settings for held-out pairs: the same good estimator, whatever the training uses."""
        scheme = noise.Scheme(self.config.eval.n_t or 8)
        return dataclasses.replace(
            self.settings, share_noise=True, scheme=scheme, mc_chunk=1, stream="evaluate"
        )

    @property
    def rows_at_once(self) -> int:
        """Rows that go through the model together in training, and so may without a gradient."""
        return self.config.data.batch_rows // self.config.optimizer.accumulate

    @functools.cached_property
    def parallel(self) -> Parallel:
        return Parallel(self.config.parallelism, self.mesh)

    def attention(self, length: int = 0) -> tuple[str, str]:
        """(name, why) of the attention for rows of `length` (0: those of the data); ValueError where there is none."""
        return attention_lib.choose(
            self.model.attention,
            self.mesh.devices.flat[0].platform,
            length=length or self.config.data.row_length,
            head_size=self.model.config.head_size,
            dtype=self.model.dtype,
        )

    @functools.cached_property
    def schedule(self):
        o = self.config.optimizer
        return optim.make_schedule(
            peak=o.peak,
            warmup_steps=o.warmup_steps,
            num_steps=self.num_steps,
            end_fraction=o.end_fraction,
            kind=o.schedule,
        )

    @functools.cached_property
    def tx(self):
        o = self.config.optimizer
        return optim.make_optimizer(
            self.schedule,
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            clip_norm=o.clip_norm,
        )


def make_plan(config, workdir: epath.PathLike, *, dry_run: bool = False, devices=None) -> Plan:
    """Validates a config against data, tokenizer, checkpoint and devices; packs the data where that is not done yet.

    ValueError or FileNotFoundError, in one line. A dry run may do without init_from and data. `devices`: None for all
    that are there, or those of a described topology.
    """
    c = config
    workdir = epath.Path(workdir).expanduser()
    _check_choices(c, dry_run)
    hosts_lib.check_joined()
    mesh = mesh_lib.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices)
    shares = Parallel(c.parallelism, mesh)
    if not dry_run:
        _ = shares.shard  # says now whether each host can load its rows
        agree.check_same("the config or the workdir", f"{c.to_dict()} {workdir}")
        agree.check_shared(workdir)
    parts = mesh_lib.row_shards(mesh) * c.optimizer.accumulate
    for name, batch_rows in (
        ("data.batch_rows", c.data.batch_rows),
        ("eval.batch_rows", c.eval.batch_rows),
    ):
        parts = parts if name == "data.batch_rows" else mesh_lib.row_shards(mesh)
        if batch_rows < 0 or batch_rows % parts or (not batch_rows and name == "data.batch_rows"):
            raise ValueError(
                f"{name}={batch_rows} is not a positive multiple of {parts}: data x fsdp = "
                f"{mesh_lib.row_shards(mesh)} shards, optimizer.accumulate={c.optimizer.accumulate}"
            )
    settings = _settings(c)
    tokenizer = _tokenizer(c)
    model = _model(c, mesh, tokenizer)
    rows = heldout = prompts = None
    sampled_length = 0
    if c.data.train and tokenizer:
        cache_dir = epath.Path(c.data.cache_dir or workdir / "data").expanduser()
        rows, heldout = agree.once_per_disk(cache_dir, lambda: _rows(c, tokenizer, cache_dir))
        agree.check_same("the data", f"{rows.fingerprint} {heldout and heldout.fingerprint}")
    elif not dry_run:
        raise ValueError(
            "data.train is not set: pass --config.data.train=jsonl:FILE (or tfds:, python:)"
        )
    if c.solve.prompts:
        prompts, sampled_length = _prompts(c, tokenizer, model.config)
        if not dry_run:
            agree.check_same("what solve.prompts holds", repr(prompts))
    num_steps = c.num_steps
    if not num_steps and rows is not None:
        num_steps = c.epochs * len(rows) // c.data.batch_rows
        if not num_steps:
            raise ValueError(
                f"{c.epochs} epochs of {len(rows)} rows fill no batch of data.batch_rows={c.data.batch_rows}: lower it"
            )
    plan = Plan(c, workdir, mesh, model, tokenizer, rows, heldout, prompts, settings, num_steps)
    for length in (c.data.row_length, sampled_length):
        plan.attention(length)  # says now what an implementation asked for by name cannot do
    if num_steps:
        _ = plan.schedule  # says now whether the warm-up fits
    return plan


def _check_choices(c, dry_run: bool):
    for name, value, known in (
        ("objective", c.objective, tuple(KIND)),
        ("vrpo.reference", c.vrpo.reference, ("model", "cached")),
        ("model.remat", c.model.remat, tuple(REMAT)),
        ("model.attention", c.model.attention, IMPLEMENTATIONS),
        ("optimizer.schedule", c.optimizer.schedule, SCHEDULES),
        ("model.dtype", c.model.dtype, DTYPES),
        ("model.param_dtype", c.model.param_dtype, DTYPES),
        ("vrpo.reference_dtype", c.vrpo.reference_dtype, ("", *DTYPES)),
    ):
        if value not in known:
            raise ValueError(f"config.{name}={value!r} is not one of {', '.join(known)}")
    for name, value, least in (
        ("num_steps", c.num_steps, 0),
        ("epochs", c.epochs, 1),
        ("optimizer.accumulate", c.optimizer.accumulate, 1),
        ("model.logps_chunk", c.model.logps_chunk, 1),
        ("model.unroll", c.model.unroll, 1),
        ("checkpoint.every", c.checkpoint.every, 1),
        ("eval.every", c.eval.every, 0),
        ("solve.batch_size", c.solve.batch_size, 1),
        ("eval.variance_repeats", c.eval.variance_repeats, 0),
    ):
        if value < least:
            raise ValueError(f"config.{name}={value} must be at least {least}")
    if c.data.heldout and c.data.holdout:
        raise ValueError(
            f"data.heldout and data.holdout={c.data.holdout} both say what is held out: set one of them"
        )
    if repeats := c.eval.variance_repeats:
        for wrong, why in (
            (repeats < 3, "is too few: at least 3, or 0 for off"),
            (
                c.objective != "vrpo",
                f"measures scores, which objective={c.objective!r} has none of: set it to 0",
            ),
            (
                c.vrpo.reference != "model",
                "draws anew, beyond cached terms: set vrpo.reference='model', or it to 0",
            ),
            (
                not (c.data.heldout or c.data.holdout),
                "needs held-out pairs: set data.holdout or data.heldout",
            ),
        ):
            if wrong:
                raise ValueError(f"eval.variance_repeats={repeats} {why}")
    if c.denoising.crop_probability and c.objective != "pretrain":
        raise ValueError(
            f"denoising.crop_probability={c.denoising.crop_probability} is for pretrain: set it to 0"
        )
    if c.objective == "vrpo" and not c.init_from and not (dry_run and c.model.arch):
        raise ValueError(
            "init_from is not set: VRPO starts from a trained model, pass --config.init_from=DIR"
        )


def _settings(c) -> Preference | Denoising:
    if c.objective == "vrpo":
        v = c.vrpo
        scheme = noise.Scheme(
            v.n_t,
            v.n_yt,
            v.times,
            v.masks,
            v.weights,
            pseudo_count=v.pseudo_count,
            share_in_pair=v.share_in_pair,
        )
        return Preference(
            v.beta,
            v.kind,
            v.label_smoothing,
            v.sft_weight,
            v.share_noise,
            scheme,
            v.mc_chunk,
            c.seed,
        )
    d = c.denoising
    if d.mc_chunk < 0 or (d.mc_chunk and d.n_t % d.mc_chunk):
        raise ValueError(
            f"denoising.mc_chunk={d.mc_chunk} does not divide denoising.n_t={d.n_t}: choose a divisor"
        )
    if not 0 <= d.crop_probability <= 1:
        raise ValueError(
            f"denoising.crop_probability={d.crop_probability} is no probability: at least 0, at most 1"
        )
    scheme = noise.Scheme(d.n_t, masks=d.masks, eps=d.eps if d.masks == "bernoulli" else 0.0)
    return Denoising(scheme, d.crop_probability, d.mc_chunk, c.seed)


def _model(c, mesh: Mesh, tokenizer: Tokenizer | None) -> LLaDA:
    arch = c.model.arch.to_dict()
    if c.init_from:
        config = loading.read_config(c.init_from)
        _check_same("init_from", c.init_from, config, arch, "in model.arch")
    elif arch:
        if tokenizer:  # a new model takes from its tokenizer what model.arch leaves open
            ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
            arch = {
                "vocab_size": tokenizer.vocab_size,
                "mask_token_id": tokenizer.mask_id,
                **ends,
            } | arch
        config = ModelConfig.from_dict(arch, source="config.model.arch")
    else:
        raise ValueError("neither init_from nor model.arch is set: there is no model to train")
    unknown = arch.keys() - config.to_dict().keys() - {"mlp_ratio", "multi_query_attention"}
    if unknown:
        raise ValueError(
            f"config.model.arch has {', '.join(sorted(unknown))}, no key of a config.json: remove it"
        )
    if c.objective == "vrpo" and c.vrpo.reference_from:
        other = loading.read_config(c.vrpo.reference_from)
        values = {k: getattr(config, k) for k in ARCHITECTURE}
        _check_same("vrpo.reference_from", c.vrpo.reference_from, other, values, "in the policy")
    if tokenizer and tokenizer.vocab_size > config.embedding_size:
        raise ValueError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model {config.embedding_size} embeddings: "
            "they do not belong together, change data.tokenizer"
        )
    if tokenizer and tokenizer.mask_id != config.mask_token_id:
        raise ValueError(
            f"the tokenizer's mask id {tokenizer.mask_id} is not the model's mask_token_id={config.mask_token_id}: "
            "change data.tokenizer"
        )
    if c.data.row_length > config.max_sequence_length:
        raise ValueError(
            f"data.row_length={c.data.row_length} is beyond the model's max_sequence_length="
            f"{config.max_sequence_length}: lower it"
        )
    tensor = mesh.shape["tensor"]
    for name, axis in (("n_heads", tensor), ("n_kv_heads", tensor), ("mlp_hidden_size", tensor),
                       ("embedding_size", tensor), ("d_model", mesh.shape["fsdp"])):  # fmt: skip
        if getattr(config, name) % axis:
            raise ValueError(
                f"{name}={getattr(config, name)} cannot be split over a mesh axis of {axis}: change mesh"
            )
    return LLaDA(
        config,
        jnp.dtype(c.model.dtype),
        jnp.dtype(c.model.param_dtype),
        c.model.remat,
        c.model.attention,
        c.model.logps_chunk,
        c.model.unroll,
    )


def _check_same(name: str, path: str, config: ModelConfig, values: dict, where: str):
    there = {k: getattr(config, k, v) for k, v in values.items()}
    wrong = [f"{k}: {v!r} {where}, {there[k]!r} there" for k, v in values.items() if there[k] != v]
    if wrong:
        raise ValueError(f"{name}={path} is another architecture: {'; '.join(wrong)}")


def _tokenizer(c) -> Tokenizer | None:
    path = c.data.tokenizer or (loading.model_folder(c.init_from) if c.init_from else "")
    if not path:
        if c.data.train:
            raise ValueError(
                "data.tokenizer is not set: pass --config.data.tokenizer=FOLDER_OR_FILE"
            )
        return None
    return tokenizer_lib.load(path)


def _rows(c, tokenizer, cache_dir: epath.Path) -> tuple[Rows, Rows | None]:
    d = c.data
    prepare = functools.partial(
        rows_lib.prepare,
        kind=KIND[c.objective],
        tokenizer=tokenizer,
        row_length=d.row_length,
        cache_dir=cache_dir,
        template=d.template,
        append_eos=d.append_eos,
        answer_multiple=d.answer_multiple,
        too_long=d.too_long,
        bad_records=d.bad_records,
    )
    rows = prepare(d.train, holdout=d.holdout, split="train", limit=d.limit)
    if d.heldout:
        return rows, prepare(d.heldout)
    return rows, prepare(
        d.train, holdout=d.holdout, split="heldout", limit=d.limit
    ) if d.holdout else None


def _prompts(c, tokenizer, config: ModelConfig) -> tuple[list, int]:
    """Records of the prompts, and how long the rows are that they are answered in (0: no tokenizer tells)."""
    scorer.load_scorer(c.solve.scorer)
    try:
        sampling.check_schedule(c.solve.steps, c.solve.gen_length, c.solve.block_length)
    except ValueError as error:
        raise ValueError(f"config.solve: {error}") from None
    prompts = list(itertools.islice(read_records(c.solve.prompts, "prompt"), c.solve.limit or None))
    if not prompts:
        raise ValueError(
            f"solve.prompts={c.solve.prompts} holds no record; give one that does, or none"
        )
    lengths = [
        len(templates.encode_prompt(tokenizer, p["prompt"], c.data.template))
        for _, _, p in prompts
        if tokenizer
    ]
    for (where, _, _), length in zip(prompts, lengths, strict=False):
        if length + c.solve.gen_length > config.max_sequence_length:
            raise ValueError(
                f"{where}: a prompt of {length} tokens and solve.gen_length={c.solve.gen_length} exceed the model's "
                f"max_sequence_length={config.max_sequence_length}: lower it or leave the prompt out"
            )
    return prompts, (sampling.prompt_width(lengths) + c.solve.gen_length if lengths else 0)
