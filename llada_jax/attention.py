"""Bidirectional attention over packed rows, without ever holding a whole [L, L] matrix of scores for long rows.

"splash" is the Pallas kernel of JAX on TPU, "cudnn" NVIDIA's flash attention, "xla" plain JAX everywhere.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")

# "xla": rows up to this length are attended to in one piece; longer ones in blocks of this many queries, so that the
# scores held at a time are [heads, QUERY_BLOCK, L].
QUERY_BLOCK = 512

# "splash": (queries, keys) a block by chip, forward and backward, each reduced to a divisor of L. Larger blocks mean
# fewer passes over keys and values. These compile for the chips at head size 128; without a chip they are not tuned.
SPLASH_BLOCKS = {
    "TPU v5 lite": ((1024, 1024), (512, 1024)),
    "TPU v6 lite": ((2048, 2048), (1024, 2048)),
}
SPLASH_DEFAULT = ((1024, 2048), (1024, 1024))


def choose(implementation: str, platform: str, *, length: int, head_size: int, dtype) -> tuple[str, str]:
    """What `implementation` means on a platform ("tpu", "gpu", "cpu") for rows of `length`: (name, reason).

    Raises ValueError where an implementation is asked for by name that cannot do it.
    """
    limits = {"splash": _splash_limit, "cudnn": _cudnn_limit}
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return "xla", "asked for"
    if implementation != "auto":
        if limit := limits[implementation](platform, length, head_size, jnp.dtype(dtype)):
            raise ValueError(f'attention="{implementation}": {limit}; use "auto"')
        return implementation, "asked for"
    best = {"tpu": "splash", "gpu": "cudnn"}.get(platform)
    if best is None:
        return "xla", f"there is no kernel for {platform}"
    if limit := limits[best](platform, length, head_size, jnp.dtype(dtype)):
        return "xla", f"{best}: {limit}"
    return best, f"the kernel for {platform}"


def _splash_limit(platform: str, length: int, head_size: int, dtype) -> str | None:
    if platform not in ("tpu", "cpu"):
        return f"it runs on TPU, not on {platform}"
    if length % 128:
        return f"rows of {length} positions are no multiple of 128"
    if head_size % 64:
        return f"heads of {head_size} are no multiple of 64"
    if dtype == jnp.float32 and platform == "tpu":
        return "it would round float32 products to bfloat16"
    return None


def _cudnn_limit(platform: str, length: int, head_size: int, dtype) -> str | None:
    if platform != "gpu":
        return f"it runs on NVIDIA GPUs, not on {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {dtype}"
    if head_size % 8 or head_size > 128:
        return f"heads of {head_size} are no multiple of 8 up to 128"
    if length % 2:
        return f"it has no gradient for an odd number of positions ({length}) under a mask"
    if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < 8:
        return f"it needs compute capability 8.0, and {jax.devices()[0].device_kind} is older"
    return None


def attend(
    query: Float[Array, "*b l h d"],
    key: Float[Array, "*b l k d"],
    value: Float[Array, "*b l k d"],
    *,
    attention_mask: Bool[Array, "*b l"] | None = None,
    segment_ids: Int[Array, "*b l"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "*b l h d"]:
    """Softmax attention of h query heads over k key heads (h a multiple of k), scaled by 1 / sqrt(d).

    A key is seen where `attention_mask` is true and its segment is the query's own. The softmax is in float32.
    `implementation` as `choose` reads it, for the devices of the mesh in use. ValueError for what it cannot do.
    """
    batch_shape, (length, _, head_size) = query.shape[:-3], query.shape[-3:]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    # One array says who sees whom: what is masked out is a key of no query's segment.
    queries_of = keys_of = None
    if segment_ids is not None or attention_mask is not None:
        queries_of = keys_of = jnp.zeros(query.shape[:2], jnp.int32)
    if segment_ids is not None:
        queries_of = keys_of = segment_ids.reshape(-1, length).astype(jnp.int32)
    if attention_mask is not None:
        keys_of = jnp.where(attention_mask.reshape(-1, length), keys_of, -1)
    platform, kind = _device()
    name, _ = choose(implementation, platform, length=length, head_size=head_size, dtype=query.dtype)
    if name == "splash":
        out = _splash(query, key, value, queries_of, keys_of, platform=platform, kind=kind)
    else:
        out = {"xla": _xla, "cudnn": _cudnn}[name](query, key, value, queries_of, keys_of)
    return out.reshape(*batch_shape, *out.shape[1:])


def _device() -> tuple[str, str]:
    """Platform and kind of the devices that are computed on: those of the mesh in use, or the default ones."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform, device.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def _xla(query, key, value, queries_of, keys_of):
    length = query.shape[1]

    def block(queries, queries_of, key=key, value=value):
        mask = None if keys_of is None else (queries_of[:, :, None] == keys_of[:, None, :])[:, None]
        # float32 means float32: accelerators would multiply it in fewer bits by default.
        with jax.default_matmul_precision("highest" if queries.dtype == jnp.float32 else "default"):
            return jax.nn.dot_product_attention(queries, key, value, mask=mask, implementation="xla")

    if length <= QUERY_BLOCK:
        return block(query, queries_of)
    # Rematerialised, so that the backward pass holds the scores of one block too.
    blocks = -(-length // QUERY_BLOCK)
    padding = blocks * QUERY_BLOCK - length

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    # Closed over in float32, so that the gradients of the blocks add up in it.
    wide = key.astype(jnp.float32), value.astype(jnp.float32)
    parts = jax.tree.map(split, (query, queries_of))
    out = jax.lax.map(jax.checkpoint(lambda part: block(*part, *(x.astype(key.dtype) for x in wide))), parts)
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], blocks * QUERY_BLOCK, *query.shape[2:])[:, :length]


def _splash(query, key, value, queries_of, keys_of, *, platform: str, kind: str):
    """Each device attends over its own rows and heads: the kernel knows nothing of meshes."""

    def local(query, key, value, queries_of, keys_of):
        kernel = _splash_kernel(query.shape[2], query.shape[1], kind, platform == "cpu")
        # [heads, positions, size] is the kernel's form, and it does not scale.
        query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        ids = None if keys_of is None else splash.SegmentIds(queries_of, keys_of)
        return jnp.swapaxes(jax.vmap(kernel)(query, key, value, ids), 1, 2)

    rows, padding = query.shape[0], 0
    if rules := nn.get_logical_axis_rules():
        heads = nn.logical_to_mesh_axes(("act_rows", None, "act_heads"), rules)
        ids = nn.logical_to_mesh_axes(("act_rows",), rules)
        specs = (heads, heads, heads, ids, ids)
        # Rows are filled up to what the devices share evenly: the last batch of a generation may be any number.
        shape = jax.sharding.get_abstract_mesh().shape
        padding = -rows % math.prod(shape[axis] for axis in ids[0])
        # vma: the kernel's outputs do not say over which axes they vary.
        local = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)
    fill = lambda x: None if x is None else jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))  # noqa: E731
    return local(*(fill(x) for x in (query, key, value, queries_of, keys_of)))[:rows]


@functools.lru_cache(maxsize=16)
def _splash_kernel(heads: int, length: int, kind: str, interpret: bool):
    def divisor(size):
        return next(block for block in range(min(size, length), 0, -128) if length % block == 0)

    forward, backward = (tuple(map(divisor, sizes)) for sizes in SPLASH_BLOCKS.get(kind, SPLASH_DEFAULT))
    sizes = splash.BlockSizes(
        block_q=forward[0],
        block_kv=forward[1],
        block_kv_compute=forward[1],
        block_q_dkv=backward[0],
        block_kv_dkv=backward[1],
        block_kv_dkv_compute=backward[1],
        block_q_dq=backward[0],
        block_kv_dq=backward[1],
    )
    mask = splash.MultiHeadMask([splash.FullMask((length, length))] * heads)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )


def _cudnn(query, key, value, queries_of, keys_of):
    if keys_of is None:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return _cudnn_masked(query, key, value, queries_of, keys_of)


def _merge_draws(function):
    """`function` of arrays with rows on axis 0, for which vmapped axes become rows.

    JAX's own batching rule takes a mask for one of every head.
    """
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def rule(size, is_batched, *args):
        args = (
            x if batched else jnp.broadcast_to(x, (size, *x.shape)) for x, batched in zip(args, is_batched, strict=True)
        )
        out = wrapped(*(x.reshape(-1, *x.shape[2:]) for x in args))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return wrapped


# cuDNN has no segment ids: it gets a mask, [rows, 1, L, L], the same for all heads.
def _cudnn_with_mask(query, key, value, queries_of, keys_of):
    mask = (queries_of[:, :, None] == keys_of[:, None, :])[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


@jax.custom_vjp
def _cudnn_masked(query, key, value, queries_of, keys_of):
    return _merge_draws(_cudnn_with_mask)(query, key, value, queries_of, keys_of)


def _cudnn_forward(*args):
    return _cudnn_masked(*args), args


def _cudnn_backward(args, gradient):
    # The forward pass again, as under rematerialisation: custom_vmap cannot be differentiated through.
    @_merge_draws
    def backward(query, key, value, queries_of, keys_of, gradient):
        def attend(query, key, value):
            return _cudnn_with_mask(query, key, value, queries_of, keys_of)

        return jax.vjp(attend, query, key, value)[1](gradient)

    return *backward(*args, gradient), None, None


_cudnn_masked.defvjp(_cudnn_forward, _cudnn_backward)
