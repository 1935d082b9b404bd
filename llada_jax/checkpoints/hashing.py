"""Fingerprints of arrays, computed where the arrays are."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp


def fingerprint(tree) -> str:
    """Fingerprint (32 hex digits) of the names, shapes, types and bits of a pytree's arrays.

    Computed where the arrays are, and the same for every sharding, mesh and number of devices. It finds accidents
    (flipped bits, swapped elements or leaves); it is no defence against forgery.
    """
    return digest(describe(tree))[:32]


def leaf_name(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def describe(tree) -> dict[str, list]:
    """name -> [type, shape, hash of the bits] for every leaf."""
    leaves = {
        leaf_name(keys): jnp.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    hashes = jax.device_get({name: _hash(leaf) for name, leaf in leaves.items()})
    return {
        name: [str(leaf.dtype), list(leaf.shape), "".join(f"{lane:08x}" for lane in hashes[name])]
        for name, leaf in leaves.items()
    }


def digest(described) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _hash(x):
    """Two uint32 hashes of an array: sums, wrapping around, of each element's bits mixed with its index.

    A sum does not depend on the order of its terms, hence not on the sharding; the mixing is a bijection of the bits at
    each index, so that one changed element always shows, and differs from index to index, so that swaps show.
    """
    whole = x.sharding.shard_shape(x.shape)
    # In blocks along an axis that no device splits: the mixed words of a whole array would be several times its size.
    axis = next((i for i, size in enumerate(x.shape) if size > 1 and whole[i] == size), None)
    block = 0 if axis is None else max(_HASH_BLOCK * x.shape[axis] // x.size, 1)
    return _hash_in_blocks(x, axis, block)


_HASH_BLOCK = 1 << 20  # elements


@functools.partial(jax.jit, static_argnums=(1, 2))
def _hash_in_blocks(x, axis: int | None, block: int):
    if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 8:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        x = jax.lax.bitcast_convert_type(x, unsigned)  # of 8 bytes: two words on a new last axis
    if axis is None or block >= x.shape[axis]:
        return _hash_part(x, x.shape, 0, 0)
    blocks, rest = divmod(x.shape[axis], block)

    def part(start, size):
        # Without the barrier XLA widens the whole array first and slices that.
        words = jax.lax.optimization_barrier(jax.lax.dynamic_slice_in_dim(x, start, size, axis))
        return _hash_part(words, x.shape, axis, start)

    total = jax.lax.fori_loop(
        0, blocks, lambda i, sums: sums + part(i * block, block), jnp.zeros(2, jnp.uint32)
    )
    return total + part(blocks * block, rest) if rest else total


def _hash_part(words, shape, axis: int, start):
    """The share of the words from `start` along `axis` in the hash of an array of `shape`."""
    index = jnp.zeros(words.shape, jnp.uint32)
    for i, size in enumerate(shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, i)
        index = index * jnp.uint32(size) + (place + jnp.uint32(start) if i == axis else place)
    words = words.astype(jnp.uint32)
    lanes = [_mix(words ^ _mix(index + jnp.uint32(seed))) for seed in (0x9E3779B9, 0x7F4A7C15)]
    return jnp.stack([lane.sum(dtype=jnp.uint32) for lane in lanes])


def _mix(x):
    """A bijection of uint32 in which every bit of the input moves every bit of the output (the end of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
