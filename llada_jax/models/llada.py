"""LLaDA in Flax linen: configuration, transformer, log-probabilities of targets, FLOPs."""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from llada_jax.models import attention as attention_lib
from llada_jax.models.cache import KeyValues
from llada_jax.models.family import Family, Row
from llada_jax.models.features import Features, Layer, layer_pass
from llada_jax.models.layers import REMAT, Linear, RMSNorm, constrain, rotate
from llada_jax.models.logps import chunked_logps, head_logits

# The values that the family uses (its modeling_llada.py). Another value would need another
# computation.
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
    """The architecture, with the field names of the published `config.json`.

    Raises ValueError if a field has an impossible value.
    """

    model_type: ClassVar[str] = "llada"

    d_model: int
    n_heads: int
    n_layers: int
    vocab_size: int
    mask_token_id: int
    # None is filled in when the object is made.
    n_kv_heads: int = None  # type: ignore[assignment]  # None: n_heads
    mlp_hidden_size: int = None  # type: ignore[assignment]  # None: 4 x d_model
    # Rows of embedding and head; None: vocab_size.
    embedding_size: int = None  # type: ignore[assignment]
    max_sequence_length: int = 4096
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    init_std: float = 0.02

    def __post_init__(self):
        fill = {
            "n_kv_heads": self.n_heads,
            "mlp_hidden_size": 4 * self.d_model,
            "embedding_size": self.vocab_size,
        }
        for name, value in fill.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        problems = [
            f"{name}={getattr(self, name)} is not a positive number"
            for name in (
                *_REQUIRED[:4],
                "n_kv_heads",
                "mlp_hidden_size",
                "embedding_size",
                "max_sequence_length",
            )
            if getattr(self, name) < 1
        ]
        if not problems:
            if self.d_model % self.n_heads:
                problems.append(
                    f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}"
                )
            elif self.head_size % 2:
                problems.append(
                    f"d_model / n_heads = {self.head_size} is odd, rotary embedding needs it even"
                )
            if self.n_heads % self.n_kv_heads:
                problems.append(
                    f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
                )
            if self.embedding_size < self.vocab_size:
                problems.append(
                    f"embedding_size={self.embedding_size} is below vocab_size={self.vocab_size}"
                )
            if not 0 <= self.mask_token_id < self.embedding_size:
                problems.append(
                    f"mask_token_id={self.mask_token_id} is not below {self.embedding_size}"
                )
        if problems:
            raise ValueError("model config: " + "; ".join(problems))

    @property
    def head_size(self) -> int:
        """The width of one attention head."""
        return self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """Reads the keys of a published `config.json`; `source` names the file in errors.

        Raises ValueError with every key that is missing or has a value that is not supported.
        """
        problems = [
            f"{k}={values[k]!r} (only {v!r} is built)"
            for k, v in _FIXED.items()
            if values.get(k, v) != v
        ]
        problems += [f"{k} is missing" for k in _REQUIRED if values.get(k) is None]
        if problems:
            raise ValueError(
                f"{source}: the model cannot honour this config: {'; '.join(problems)}"
            )
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
        head = {"architectures": ["LLaDAModelLM"], "model_type": self.model_type}
        return {**head, **_FIXED, **dataclasses.asdict(self)}


class Block(nn.Module):
    """One pre-norm layer: bidirectional attention, then the gated MLP."""

    config: ModelConfig
    dtype: Any
    param_dtype: Any
    attention: str

    def setup(self):
        """Declares the norms and the seven matrices."""
        cfg = self.config
        kv_size = cfg.n_kv_heads * cfg.head_size

        def linear(inputs, outputs, *axes):
            return Linear(inputs, outputs, axes, cfg.init_std, self.dtype, self.param_dtype)

        def norm():
            return RMSNorm(cfg.rms_norm_eps, self.dtype, self.param_dtype)

        self.attn_norm, self.ff_norm = norm(), norm()
        self.q_proj = linear(cfg.d_model, cfg.d_model, "embed", "heads")
        self.k_proj = linear(cfg.d_model, kv_size, "embed", "kv_heads")
        self.v_proj = linear(cfg.d_model, kv_size, "embed", "kv_heads")
        self.attn_out = linear(cfg.d_model, cfg.d_model, "heads", "embed")
        self.ff_proj = linear(cfg.d_model, cfg.mlp_hidden_size, "embed", "mlp")
        self.up_proj = linear(cfg.d_model, cfg.mlp_hidden_size, "embed", "mlp")
        self.ff_out = linear(cfg.mlp_hidden_size, cfg.d_model, "mlp", "embed")

    def __call__(self, carry, attention_mask, segment_ids, positions):
        """Maps (x [b, l, d], cache or None) to (that of the next layer, None), as nn.scan needs."""
        x, cache = carry
        y = self.attn_norm(x)
        keeps = cache is not None
        (q, k), v = self._queries(y, positions, keeps), self._values(y, keeps)
        if keeps:
            cache, k, v = cache.put(k, v)
        by_query = attention_mask is not None and attention_mask.ndim == 3
        if k.shape[1] == q.shape[1] and not by_query:
            y = attention_lib.attend(
                q,
                k,
                v,
                attention_mask=attention_mask,
                segment_ids=segment_ids,
                implementation=self.attention,
            )
        else:
            y = attention_lib.attend_over(q, k, v, attention_mask=attention_mask)
        x = constrain(x + self.attn_out(y.reshape(x.shape)), "act_embed")
        return (constrain(x + self.mlp(x), "act_embed"), cache), None

    def _split(self, y, heads, keeps):
        if keeps:
            # Without the barrier, XLA for TPU copies q_proj, k_proj and v_proj of all layers to
            # another layout, to get the heads in that of the attention, and keeps the copies.
            y = jax.lax.optimization_barrier(y)
        return constrain(y.reshape(*y.shape[:-1], heads, self.config.head_size), "act_heads", None)

    def _queries(self, y, positions, keeps=True):
        """Rotated queries and keys of normed activations."""
        cfg = self.config
        q = self._split(self.q_proj(y), cfg.n_heads, keeps)
        k = self._split(self.k_proj(y), cfg.n_kv_heads, keeps)
        return rotate(q, positions, cfg.rope_theta), rotate(k, positions, cfg.rope_theta)

    def _values(self, y, keeps=True):
        return self._split(self.v_proj(y), self.config.n_kv_heads, keeps)

    def mlp(self, x):
        """What the gated MLP adds to x [b, l, d]."""
        y = self.ff_norm(x)
        return self.ff_out(constrain(nn.silu(self.ff_proj(y)) * self.up_proj(y), "act_mlp"))

    def queries(self, x, positions):
        """Rotated queries and keys of x [b, w, d], for a cache of features."""
        return self._queries(self.attn_norm(x), positions)

    def values(self, x):
        """Values of x [b, w, d], for a cache of features."""
        return self._values(self.attn_norm(x))

    def attend(self, q, k, v, attention_mask):
        """What attention over all positions adds, for a cache of features."""
        y = attention_lib.attend_over(q, k, v, attention_mask=attention_mask)
        return self.attn_out(y.reshape(*q.shape[:2], -1))


class LLaDA(nn.Module):
    """A bidirectional transformer that predicts every token of a partly masked text.

    Source: arXiv:2502.09992 and its modeling_llada.py.

    - `dtype` is the type of activations, `param_dtype` the type of new parameters.
    - `remat` is a name in `REMAT`.
    - `attention` is a name in `attention.IMPLEMENTATIONS`.
    - `logps_chunk`: `token_logps` holds the logits of this many vocabulary entries at a time.
    - `unroll` is the number of layers in one iteration of the loop over layers. 1 compiles
      fastest. A small model runs faster with all of its layers in one iteration.

    Raises ValueError if `remat` is unknown.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    logps_chunk: int = 8192
    unroll: int = 1

    def setup(self):
        """Declares the embedding, the loop over layers, the last norm and the head."""
        cfg = self.config
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is not one of {', '.join(REMAT)}")
        self.wte = nn.Embed(
            cfg.embedding_size,
            cfg.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(cfg.init_std), ("vocab", "embed")
            ),
        )
        block = Block
        if self.remat != "none":
            # prevent_cse stops XLA from merging the recomputation with the forward pass. If an
            # iteration has one layer, the loop of nn.scan already stops that.
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
            self.ff_out = Linear(
                cfg.d_model, cfg.embedding_size, axes, cfg.init_std, self.dtype, self.param_dtype
            )

    def _hidden(self, tokens, attention_mask, segment_ids, positions, cache=None):
        """Maps tokens [b, l] to the output [b, l, d] of the last layer, and the cache."""
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape
            )
        if attention_mask is not None:
            attention_mask = attention_mask.astype(bool)
        x = constrain(self.wte(tokens), "act_embed")
        (x, cache), _ = self.blocks((x, cache), attention_mask, segment_ids, positions)
        return self.ln_f(x), cache

    def _logits(self, hidden, at=None) -> Float32[Array, "*b p v"]:
        if at is not None:
            hidden = jnp.take_along_axis(hidden, at[..., None], -2)
        return head_logits(hidden, self._head())

    def _head(self) -> Float[Array, "d v"] | Any:
        return self.wte.embedding.T if self.config.weight_tying else self.ff_out.kernel

    def __call__(
        self,
        tokens: Int[Array, "*b l"],
        attention_mask: Int[Array, "..."] | Bool[Array, "..."] | None = None,
        segment_ids: Int[Array, "..."] | None = None,
        positions: Int[Array, "..."] | None = None,
        at: Int[Array, "*b t"] | None = None,
    ) -> Float32[Array, "*b p v"]:
        """The logits of every position, or of the positions `at` alone ([*b, t, v]).

        A query attends to the keys of its own segment whose `attention_mask` is not 0. `positions`
        default to 0, 1, ... along the row. All three arrays broadcast to the shape of `tokens`. An
        attention_mask [b, l, l] says for each query (second axis) what it attends to.
        """

        def rows(x):
            return (
                None
                if x is None
                else jnp.broadcast_to(x, tokens.shape).reshape(-1, tokens.shape[-1])
            )

        if attention_mask is None or attention_mask.ndim <= tokens.ndim:
            attention_mask = rows(attention_mask)
        hidden, _ = self._hidden(rows(tokens), attention_mask, rows(segment_ids), rows(positions))
        return self._logits(hidden.reshape(*tokens.shape, -1), at)

    def init_cache(self, batch: int, length: int) -> KeyValues:
        """An empty cache for texts of `batch` rows and `length` positions."""
        cfg = self.config
        shape = (cfg.n_layers, batch, cfg.n_kv_heads, length, cfg.head_size)
        return KeyValues.zeros(shape, self.dtype)

    def with_cache(
        self,
        tokens: Int[Array, "b w"],
        attention_mask: Int[Array, "..."] | Bool[Array, "..."] | None,
        positions: Int[Array, "b w"],
        cache: KeyValues,
        at: Int[Array, "b t"] | None = None,
    ) -> tuple[Float32[Array, "b p v"], KeyValues]:
        """The logits of a part of the text, and the cache with its keys and values.

        The queries are the tokens, which stand at `cache.places` of the text. They attend to all l
        positions: to their own keys where the cache is written, to the kept ones elsewhere.
        `attention_mask` is that of the whole text, [b, l] or for each query [b, w, l]; `positions`
        are those of the tokens. With `at`, the logits are those of the tokens [b, t] with these
        indices alone.
        """
        hidden, cache = self._hidden(tokens, attention_mask, None, positions, cache)
        return self._logits(hidden, at), cache.at()

    def init_features(self, batch: int, length: int) -> Features:
        """Empty features for texts of `batch` rows and `length` positions."""
        cfg = self.config
        sizes = (cfg.n_layers, batch, length, cfg.n_kv_heads, cfg.head_size, cfg.d_model)
        return Features.zeros(*sizes, self.dtype)

    def with_features(
        self,
        tokens: Int[Array, "b l"],
        attention_mask: Int[Array, "b l"] | Bool[Array, "b l"] | None,
        positions: Int[Array, "b l"],
        cache: Features,
        at: Int[Array, "b t"] | None = None,
    ) -> tuple[Float32[Array, "b p v"], Features]:
        """The logits of a text of which each layer computes only a part, and the features.

        `cache.plan` says which part. The first layer computes all of it. With `at`, the logits are
        those of the positions `at` alone.
        """
        block = Block(self.config, self.dtype, self.param_dtype, self.attention, parent=None)
        params = self.variables["params"]["blocks"]
        if attention_mask is not None:
            attention_mask = attention_mask.astype(bool)

        def one(index, carry, everything=False):
            of_layer = jax.tree.map(
                lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), params
            )
            call = functools.partial(block.apply, {"params": of_layer})
            layer = Layer(
                *(functools.partial(call, method=m) for m in ("values", "queries", "attend", "mlp"))
            )
            return layer_pass(
                layer, index, carry[0], attention_mask, positions, carry[1], everything
            )

        carry = one(0, (constrain(self.wte(tokens), "act_embed"), cache), everything=True)
        x, cache = jax.lax.fori_loop(1, self.config.n_layers, one, carry)
        return self._logits(self.ln_f(x), at), cache.plan()

    def token_logps(
        self,
        tokens: Int[Array, "b l"],
        targets: Int[Array, "b l"],
        segment_ids: Int[Array, "b l"] | None = None,
        positions: Int[Array, "b l"] | None = None,
    ) -> Float32[Array, "b l"]:
        """The log-probability of each target at its position, in nats.

        It holds `logps_chunk` logits of each position at a time.
        """
        hidden, _ = self._hidden(tokens, None, segment_ids, positions)
        return chunked_logps(hidden, self._head(), targets, self.logps_chunk)


def num_params(config: ModelConfig) -> dict[str, int]:
    """The number of parameters: "embedding" (with the head) and "layers" (with the last norm)."""
    c = config
    attention = 2 * c.d_model * c.d_model + 2 * c.d_model * c.n_kv_heads * c.head_size
    layer = attention + 3 * c.d_model * c.mlp_hidden_size + 2 * c.d_model
    embedding = c.embedding_size * c.d_model * (1 if c.weight_tying else 2)
    return {"embedding": embedding, "layers": c.n_layers * layer + c.d_model}


def flops_per_token(config: ModelConfig, length: int) -> int:
    """FLOPs per token of one forward pass of a row of `length`, with attention and head.

    Each weight that multiplies costs 2 (all weights but the embedding and the norms). Each layer
    costs 4 x length x d_model more, for the attention scores and the weighted sum of the values.
    A backward pass costs twice as much as a forward pass. Both together cost 51.4 GFLOP per token
    for LLaDA 8B at 4096.
    """
    c = config
    weights = (
        num_params(c)["layers"] - (2 * c.n_layers + 1) * c.d_model + c.embedding_size * c.d_model
    )
    return 2 * weights + 4 * length * c.d_model * c.n_layers


_BLOCK = "model.transformer.blocks.{i}."
_LINEAR = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
ROWS = (
    Row("wte/embedding", "model.transformer.wte.weight", False),
    Row("blocks/attn_norm/scale", _BLOCK + "attn_norm.weight", False),
    Row("blocks/ff_norm/scale", _BLOCK + "ff_norm.weight", False),
    *(Row(f"blocks/{name}/kernel", f"{_BLOCK}{name}.weight", True) for name in _LINEAR),
    Row("ln_f/scale", "model.transformer.ln_f.weight", False),
    Row("ff_out/kernel", "model.transformer.ff_out.weight", True),
)

LLADA = Family(
    Config=ModelConfig,
    Module=LLaDA,
    rows=ROWS,
    num_params=num_params,
    flops_per_token=flops_per_token,
    activation_width=lambda c: 6 * c.d_model + 3 * c.mlp_hidden_size,
    architecture=(
        "d_model",
        "n_heads",
        "n_kv_heads",
        "n_layers",
        "mlp_hidden_size",
        "vocab_size",
        "embedding_size",
        "weight_tying",
        "rope_theta",
        "rms_norm_eps",
        "mask_token_id",
    ),
    splits={
        "n_heads": "tensor",
        "n_kv_heads": "tensor",
        "mlp_hidden_size": "tensor",
        "embedding_size": "tensor",
        "d_model": "fsdp",
    },
)
