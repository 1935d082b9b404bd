"""LLaDA in Flax linen: the configuration, the transformer, and log-probabilities of target tokens."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from llada_jax import attention as attention_lib

# What the family uses (spec: Model); any other value in a config.json would compute something else.
_FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "clip_qkv": None,
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}
_REQUIRED = ("d_model", "n_heads", "n_layers", "vocab_size", "mask_token_id")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture, under the checkpoint's own field names (`config.json` of the published models)."""

    d_model: int
    n_heads: int
    n_layers: int
    vocab_size: int
    mask_token_id: int
    n_kv_heads: int | None = None  # None: as many as n_heads
    mlp_hidden_size: int | None = None  # None: 4 x d_model
    embedding_size: int | None = None  # rows of embedding and head; None: vocab_size
    max_sequence_length: int = 4096
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    init_std: float = 0.02

    def __post_init__(self):
        fill = {"n_kv_heads": self.n_heads, "mlp_hidden_size": 4 * self.d_model, "embedding_size": self.vocab_size}
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        problems = [
            f"{name}={getattr(self, name)} is not a positive number"
            for name in (*_REQUIRED[:4], "n_kv_heads", "mlp_hidden_size", "embedding_size", "max_sequence_length")
            if getattr(self, name) < 1
        ]
        if not problems:
            if self.d_model % self.n_heads:
                problems.append(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
            elif self.head_size % 2:
                problems.append(f"d_model / n_heads = {self.head_size} is odd, rotary embedding needs it even")
            if self.n_heads % self.n_kv_heads:
                problems.append(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
            if self.embedding_size < self.vocab_size:
                problems.append(f"embedding_size={self.embedding_size} is below vocab_size={self.vocab_size}")
            if not 0 <= self.mask_token_id < self.embedding_size:
                problems.append(f"mask_token_id={self.mask_token_id} is not below {self.embedding_size}")
        if problems:
            raise ValueError("model config: " + "; ".join(problems))

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Reads the published keys; one ValueError lists every key that is missing or cannot be honoured."""
        problems = [f"{k}={values[k]!r} (only {v!r} is built)" for k, v in _FIXED.items() if values.get(k, v) != v]
        problems += [f"{k} is missing" for k in _REQUIRED if values.get(k) is None]
        if problems:
            raise ValueError(f"{source}: the model cannot honour this config: {'; '.join(problems)}")
        known = {f.name for f in dataclasses.fields(cls)}
        kept = {k: v for k, v in values.items() if k in known and v is not None}
        if "n_kv_heads" not in kept and values.get("multi_query_attention"):
            kept["n_kv_heads"] = 1
        if "mlp_hidden_size" not in kept and values.get("mlp_ratio") is not None:
            kept["mlp_hidden_size"] = values["mlp_ratio"] * values["d_model"]
        try:
            return cls(**kept)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published `config.json`, fixed keys included, which `from_dict` reads back."""
        head = {"architectures": ["LLaDAModelLM"], "model_type": "llada"}
        return {**head, **_FIXED, **dataclasses.asdict(self)}


# Remat policies by name: what one layer keeps between its forward and its backward pass.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def precision(dtype) -> jax.lax.Precision:
    """float32 means float32: accelerators would multiply it in fewer bits by default."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _constrain(x: Array, *axes: str | None) -> Array:
    """Pins an activation [rows, positions, ...] to its logical axes; does nothing outside a mesh."""
    return nn.with_logical_constraint(x, ("act_rows", "act_length", *axes))


def _cast(weight: Array, dtype: Any) -> Array:
    """A weight in the type of the activations, cast where it is used."""
    if weight.dtype == dtype:
        return weight
    # Without the barrier XLA casts the weights of all layers, or of the whole head, before the loop and keeps them.
    return jax.lax.optimization_barrier(weight).astype(dtype)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, times the weight (spec: Model)."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(self.dtype) * scale.astype(self.dtype)


class Linear(nn.Module):
    """x @ kernel, kernel [inputs, outputs], no bias."""

    inputs: int
    outputs: int
    axes: tuple[str, str]
    std: float
    dtype: Any
    param_dtype: Any

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes)
        self.kernel = self.param("kernel", init, (self.inputs, self.outputs), self.param_dtype)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        # One product over all positions: for the gradient of a batched one XLA's CPU backend transposes far more.
        kernel = _cast(self.kernel, self.dtype)
        y = jnp.matmul(x.reshape(-1, self.inputs), kernel, precision=precision(self.dtype))
        return y.reshape(*x.shape[:-1], self.outputs)


def rotate(x: Float[Array, "*b l h d"], positions: Int[Array, "*b l"], theta: float) -> Float[Array, "*b l h d"]:
    """Rotary position embedding over the whole head, first half paired with second, in float32 (spec: Model)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


class Block(nn.Module):
    """One pre-norm layer: bidirectional attention, then the gated MLP."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x, attention_mask, segment_ids, positions):
        cfg = self.config

        def linear(name, outputs, *axes):
            return lambda x: Linear(
                x.shape[-1], outputs, axes, cfg.init_std, self.dtype, self.param_dtype, name=name
            )(x)

        def norm(name):
            return RMSNorm(cfg.rms_norm_eps, self.dtype, self.param_dtype, name=name)

        def split(y, heads):
            return _constrain(y.reshape(*y.shape[:-1], heads, cfg.head_size), "act_heads", None)

        kv_size = cfg.n_kv_heads * cfg.head_size
        y = norm("attn_norm")(x)
        q = split(linear("q_proj", cfg.d_model, "embed", "heads")(y), cfg.n_heads)
        k = split(linear("k_proj", kv_size, "embed", "kv_heads")(y), cfg.n_kv_heads)
        v = split(linear("v_proj", kv_size, "embed", "kv_heads")(y), cfg.n_kv_heads)
        q, k = rotate(q, positions, cfg.rope_theta), rotate(k, positions, cfg.rope_theta)
        y = attention_lib.attend(
            q, k, v, attention_mask=attention_mask, segment_ids=segment_ids, implementation=self.attention
        )
        x = x + linear("attn_out", cfg.d_model, "heads", "embed")(y.reshape(x.shape))
        x = _constrain(x, "act_embed")

        y = norm("ff_norm")(x)
        gate = linear("ff_proj", cfg.mlp_hidden_size, "embed", "mlp")(y)
        up = linear("up_proj", cfg.mlp_hidden_size, "embed", "mlp")(y)
        y = _constrain(nn.silu(gate) * up, "act_mlp")
        x = x + linear("ff_out", cfg.d_model, "mlp", "embed")(y)
        return _constrain(x, "act_embed"), None


class LLaDA(nn.Module):
    """A bidirectional transformer that predicts every token of a partly masked text (spec: Model).

    `dtype` is the type of activations, `param_dtype` that of new parameters; `remat` one of `REMAT`;
    `logps_chunk` the entries of the vocabulary whose logits `token_logps` holds at a time; `unroll` how many layers are
    compiled one by one in the loop over layers (all of a small model's: faster; 1: the quickest to compile).
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    logps_chunk: int = 8192
    unroll: int = 1

    def setup(self):
        cfg = self.config
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is not one of {', '.join(REMAT)}")
        self.wte = nn.Embed(
            cfg.embedding_size,
            cfg.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.with_logical_partitioning(nn.initializers.normal(cfg.init_std), ("vocab", "embed")),
        )
        block = Block
        if self.remat != "none":
            # Inside nn.scan the loop itself prevents the merging that prevent_cse guards against.
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=self.unroll > 1)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.n_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.dtype, self.param_dtype, self.attention)
        self.ln_f = RMSNorm(cfg.rms_norm_eps, self.dtype, self.param_dtype)
        if not cfg.weight_tying:
            axes = ("embed", "vocab")
            self.ff_out = Linear(cfg.d_model, cfg.embedding_size, axes, cfg.init_std, self.dtype, self.param_dtype)

    def _hidden(self, tokens, attention_mask, segment_ids, positions):
        """Tokens [b, l] to the normed output [b, l, d] of the last layer."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape)
        if attention_mask is not None:
            attention_mask = attention_mask.astype(bool)
        x = _constrain(self.wte(tokens), "act_embed")
        x, _ = self.blocks(x, attention_mask, segment_ids, positions)
        return self.ln_f(x)

    def _head(self) -> Float[Array, "d v"]:
        return self.wte.embedding.T if self.config.weight_tying else self.ff_out.kernel

    def __call__(
        self,
        tokens: Int[Array, "*b l"],
        attention_mask: Int[Array, "..."] | Bool[Array, "..."] | None = None,
        segment_ids: Int[Array, "..."] | None = None,
        positions: Int[Array, "..."] | None = None,
    ) -> Float32[Array, "*b l v"]:
        """Logits of every position.

        A key is attended to where `attention_mask` is not 0 and its segment is the query's. `positions` default to
        0, 1, ... along the row. All three broadcast to the shape of `tokens`.
        """

        def rows(x):
            return None if x is None else jnp.broadcast_to(x, tokens.shape).reshape(-1, tokens.shape[-1])

        hidden = self._hidden(*(rows(x) for x in (tokens, attention_mask, segment_ids, positions)))
        logits = _logits(hidden, self._head())
        return logits.reshape(*tokens.shape, -1)

    def token_logps(
        self,
        tokens: Int[Array, "b l"],
        targets: Int[Array, "b l"],
        segment_ids: Int[Array, "b l"] | None = None,
        positions: Int[Array, "b l"] | None = None,
    ) -> Float32[Array, "b l"]:
        """Log-probability, in nats, of each target at its position, from `logps_chunk` logits a position at a time."""
        hidden = self._hidden(tokens, None, segment_ids, positions)
        return chunked_logps(hidden, self._head(), targets, self.logps_chunk)


def _logits(hidden: Float[Array, "*b d"], head: Float[Array, "d v"]) -> Float32[Array, "*b v"]:
    head = _cast(head, hidden.dtype)
    return jnp.matmul(hidden, head, precision=precision(hidden.dtype), preferred_element_type=jnp.float32)


def chunked_logps(
    hidden: Float[Array, "b l d"], head: Float[Array, "d v"], targets: Int[Array, "b l"], chunk: int
) -> Float32[Array, "b l"]:
    """log softmax(hidden @ head)[target], holding the logits of `chunk` entries of the vocabulary at a time.

    The loop is over the vocabulary, not over positions, so that of a sharded head and of its gradient a device holds
    one chunk whole at a time too. The backward pass computes each chunk's logits again.
    """
    vocabulary = head.shape[1]
    # Where the vocabulary is sharded, a chunk takes an equal part of every shard.
    shards = _shards("vocab")
    shard, part = vocabulary // shards, -(-min(chunk, vocabulary) // shards)
    chunks = -(-shard // part)
    wide = hidden.astype(jnp.float32)  # closed over as such, so that the chunks' gradients add up in float32

    def logits_of(head, first):
        """Logits of one chunk, -inf beyond a shard's end, and the target's where it is in the chunk."""
        logits = _logits(wide.astype(hidden.dtype), head)
        place = first + jnp.tile(jnp.arange(part, dtype=targets.dtype), shards)
        entries = place + jnp.repeat(jnp.arange(shards, dtype=targets.dtype) * shard, part)
        logits = jnp.where(place < shard, logits, -jnp.inf) if shard % part else logits
        # A comparison instead of a gather: it fuses, and its transpose is no scatter.
        is_target = (entries == targets[..., None]) & (place < shard)
        return logits, jnp.sum(jnp.where(is_target, logits, 0), -1)

    if chunks == 1:
        logits, target = jax.checkpoint(logits_of)(head, 0)
        return target - jax.nn.logsumexp(logits, -1)

    @jax.checkpoint
    def add(carry, xs):
        target, largest, total = carry
        head, first = xs
        logits, found = logits_of(head.reshape(head.shape[0], -1), first)
        new = jax.lax.stop_gradient(jnp.maximum(largest, logits.max(-1)))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[..., None]).sum(-1)
        return (target + found, new, total), None

    head = jnp.pad(head.reshape(-1, shards, shard), ((0, 0), (0, 0), (0, chunks * part - shard)))
    head = jnp.moveaxis(head.reshape(-1, shards, chunks, part), 2, 0)
    head = nn.with_logical_constraint(head, (None, "embed", "vocab", None))
    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = (zeros, jnp.full_like(zeros, -jnp.inf), zeros)
    (target, largest, total), _ = jax.lax.scan(add, start, (head, jnp.arange(chunks, dtype=targets.dtype) * part))
    return target - (largest + jnp.log(total))


def _shards(axis: str) -> int:
    """In how many parts the mesh in use splits a logical axis; 1 without a mesh."""
    names = nn.logical_to_mesh_axes((axis,))[0] if nn.get_logical_axis_rules() else None
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def num_params(config: ModelConfig) -> dict[str, int]:
    """Number of parameters: "embedding" (with the head) and "layers" (with the last norm)."""
    c = config
    attention = 2 * c.d_model * c.d_model + 2 * c.d_model * c.n_kv_heads * c.head_size
    layer = attention + 3 * c.d_model * c.mlp_hidden_size + 2 * c.d_model
    embedding = c.embedding_size * c.d_model * (1 if c.weight_tying else 2)
    return {"embedding": embedding, "layers": c.n_layers * layer + c.d_model}


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Floating-point operations of one forward pass for each token of a row of `length`, attention and head included.

    Two for each weight that multiplies (all but the embedding and the norms), and 4 length d_model a layer for
    scores and mixing; a backward pass costs twice as much (51.4 GFLOP in all for LLaDA 8B at 4096).
    """
    c = config
    weights = num_params(c)["layers"] - (2 * c.n_layers + 1) * c.d_model + c.embedding_size * c.d_model
    return 2 * weights + 4 * length * c.d_model * c.n_layers
