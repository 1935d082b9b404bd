"""JAX's splash attention kernel for TPU."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

# (queries, keys) in one block by chip, for the forward and the backward pass. Each is reduced to a
# divisor of L. Larger blocks need fewer passes over keys and values. These sizes compile for the
# chips at head size 128. They are not tuned, because there was no chip to run them on.
SPLASH_BLOCKS = {
    "TPU v5 lite": ((1024, 1024), (512, 1024)),
    "TPU v6 lite": ((2048, 2048), (1024, 2048)),
}
SPLASH_DEFAULT = ((1024, 2048), (1024, 1024))


def splash_limit(platform: str, length: int, head_size: int, dtype) -> str | None:
    """Why this kernel cannot run; None if it can."""
    if platform not in ("tpu", "cpu"):
        return f"it runs on TPU, not on {platform}"
    if length % 128:
        return f"rows of {length} positions are no multiple of 128"
    if head_size % 64:
        return f"heads of {head_size} are no multiple of 64"
    if dtype == jnp.float32 and platform == "tpu":
        return "it would round float32 products to bfloat16"
    return None


def splash_attend(query, key, value, queries_of, keys_of, *, platform: str, kind: str):
    """Attention for query, key and value [rows, L, heads, size].

    A query attends to the keys with its own id. The ids `queries_of` and `keys_of` are [rows, L];
    None means that every query attends to all keys of its row. Each device computes its own rows
    and heads (shard_map), because the kernel knows no mesh.
    """

    def local(query, key, value, queries_of, keys_of):
        kernel = _splash_kernel(query.shape[2], query.shape[1], kind, platform == "cpu")
        # The kernel takes [heads, positions, size], and does not scale by 1 / sqrt(size).
        query, key, value = (
            jnp.swapaxes(x, 1, 2) for x in (query * query.shape[-1] ** -0.5, key, value)
        )
        ids = None if keys_of is None else splash.SegmentIds(queries_of, keys_of)
        return jnp.swapaxes(jax.vmap(kernel)(query, key, value, ids), 1, 2)

    rows, padding = query.shape[0], 0
    if rules := nn.get_logical_axis_rules():
        heads = nn.logical_to_mesh_axes(("act_rows", None, "act_heads"), rules)
        ids = nn.logical_to_mesh_axes(("act_rows",), rules)
        specs = (heads, heads, heads, ids, ids)
        # Rows are padded to a multiple of the shards: the last batch of a generation may have any
        # number of rows.
        shape = jax.sharding.get_abstract_mesh().shape
        padding = -rows % math.prod(shape[axis] for axis in (ids or ((),))[0])
        # check_vma=False: the outputs of the kernel do not say over which mesh axes they vary.
        local = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)

    def fill(x):
        return None if x is None else jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))

    return local(*(fill(x) for x in (query, key, value, queries_of, keys_of)))[:rows]


@functools.lru_cache(maxsize=16)
def _splash_kernel(heads: int, length: int, kind: str, interpret: bool):
    def divisor(size):
        return next(block for block in range(min(size, length), 0, -128) if length % block == 0)

    forward, backward = (
        tuple(map(divisor, sizes)) for sizes in SPLASH_BLOCKS.get(kind, SPLASH_DEFAULT)
    )
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
