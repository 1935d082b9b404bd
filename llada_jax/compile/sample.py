"""Compiles the sampler for devices that this machine does not have."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial

from llada_jax import models, sampling
from llada_jax.compile.step import compile_lowered
from llada_jax.compile.summary import out_of_memory
from llada_jax.models import quantized
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.sampling.settings import make
from llada_jax.train.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What is compiled: a model on a mesh, and the batch that it answers."""

    model: nn.Module
    mesh: Mesh
    batch_size: int
    prompt_length: int
    quantize: str | None
    settings: sampling.Settings

    @property
    def length(self) -> int:
        """The positions of a row: prompt and response."""
        return self.prompt_length + self.settings.gen_length

    @property
    def rows(self) -> int:
        """The rows that a pass computes; guidance doubles them."""
        return self.batch_size * (2 if self.settings.cfg_scale > 0 else 1)

    @property
    def shadow(self) -> int:
        """The masks after the text that a revoke rule feeds as well."""
        s = self.settings
        return s.block_length if sampling.REVOKES[s.revoke].shadow else 0

    @property
    def windows(self) -> sampling.Windows | None:
        """The windows of the cache; None without a cache."""
        s = self.settings
        windows = sampling.CACHES[s.cache].windows
        blocks = s.gen_length // s.block_length
        return windows and windows(self.prompt_length, self.length, s.block_length, blocks)

    def cache_shape(self) -> tuple[int, ...] | None:
        """The part of the keys that a chip holds (the values are as large); None without a cache.

        Its axes are layers, rows, heads, positions and the size of a head.
        """
        if self.windows is None:
            return None
        c, shape = self.model.config, self.mesh.shape
        rows, heads = self.rows // mesh_lib.row_shards(self.mesh), c.n_kv_heads // shape["tensor"]
        return c.n_layers, rows, heads, self.length + self.shadow, c.head_size


def sampler_of(
    plan: Experiment,
    *,
    batch_size: int,
    prompt_length: int,
    quantize: str | None = None,
    **settings: Any,
) -> Sampler:
    """The sampler of an experiment's model; weights and activations have its `model.dtype`.

    `settings` are those of `sampling.generate`, which mask_id and eos_id of the model join. Raises
    ValueError, in one line, for settings that are wrong or do not fit model and mesh.
    """
    config, dtype = plan.model.config, plan.model.dtype
    ends = {} if config.eos_token_id is None else {"eos_id": config.eos_token_id}
    settings = {"mask_id": config.mask_token_id, **ends, **settings}
    for name, value in (("batch_size", batch_size), ("prompt_length", prompt_length)):
        if value < 1:
            raise ValueError(f"--{name}={value}: at least 1")
    s = make(True, **settings)
    if sampling.CACHES[s.cache].kind != "windows":
        raise ValueError(
            f"--cache={s.cache} computes parts of each layer, whose cost is not known here: give "
            "another cache"
        )
    length, shards = prompt_length + s.gen_length, mesh_lib.row_shards(plan.mesh)
    if length > config.max_sequence_length:
        raise ValueError(
            f"--prompt_length={prompt_length} and --gen_length={s.gen_length} are {length} tokens, "
            f"the model takes {config.max_sequence_length}: lower one of them"
        )
    if batch_size % shards:
        raise ValueError(
            f"--batch_size={batch_size} is not a multiple of data x fsdp = {shards}: raise it, or "
            "use config.mesh.tensor"
        )
    plan.attention(length)  # raises an error now if the named implementation cannot do it
    # As `load` makes it: a loop of one layer an iteration, without remat.
    model = models.family_of(config).Module(
        config, dtype=dtype, param_dtype=dtype, attention=plan.model.attention
    )
    return Sampler(model, plan.mesh, batch_size, prompt_length, quantize, s)


def abstract_params(sampler: Sampler):
    """Returns the parameters as shapes, types and shardings."""
    config, dtype = sampler.model.config, sampler.model.param_dtype
    boxed = models.boxed_shapes(config)

    def leaf(path, x, sharding):
        x = jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return quantized.abstract(x) if sampler.quantize and quantized.is_kernel(name) else x

    shardings = nn.unbox(mesh_lib.shardings(sampler.mesh, boxed))
    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(boxed), shardings)


def compile_sampler(sampler: Sampler):
    """Compiles the loop of the sampler; returns (compiled loop, seconds).

    Raises MemoryError, in one line with a remedy, if a chip's memory is too small.
    """
    s = sampler.settings
    given = {field.name: getattr(s, field.name) for field in dataclasses.fields(s)}
    if s.temperature > 0 or sampling.CONFIDENCES[s.remasking].random:
        given["key"] = jax.eval_shape(jax.random.key, 0)
    prompts = jax.ShapeDtypeStruct(
        (sampler.batch_size, sampler.prompt_length),
        jnp.int32,
        sharding=mesh_lib.rows(sampler.mesh),
    )
    logits_fn = Partial(sampler.model.apply, {"params": abstract_params(sampler)})
    with mesh_lib.use(sampler.mesh):
        lowered = sampling.lower(logits_fn, prompts, **given)
    return compile_lowered(lowered, lambda message: _too_large(sampler, message))


def _too_large(sampler: Sampler, message: str) -> str:
    remedies = [
        ("vmem" in message.lower(), 'model.attention="xla"'),
        (sampler.quantize is None, "--quantize=int8"),
        (
            sampler.batch_size > mesh_lib.row_shards(sampler.mesh),
            f"a smaller --batch_size (now {sampler.batch_size})",
        ),
        (sampler.windows is not None, "--cache=none"),
        (True, "more chips, and a larger config.mesh.tensor"),
    ]
    advice = next(text for applies, text in remedies if applies)
    return out_of_memory("the sampler", message, advice)
