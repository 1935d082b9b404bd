"""Fingerprints of arrays, computed on the devices that hold the arrays."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp


def fingerprint(tree) -> str:
    """Returns a hash (32 hex digits) of the names, shapes, types and bits of a pytree's arrays.

    It is computed on the devices that hold the arrays, and does not depend on the sharding, the
    mesh or the number of devices. It detects accidents (flipped bits, swapped elements or leaves),
    not deliberate forgery.
    """
    return digest(describe(tree))[:32]


def leaf_name(keys) -> str:
    """Returns the name of a leaf, its keys joined by slashes: "params/wte/embedding"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def describe(tree) -> dict[str, list]:
    """Returns {name: [type, shape, hash of the bits]} for every leaf of a pytree."""
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
    """Returns the SHA-256 hash (64 hex digits) of a value that JSON can write."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _hash(x):
    """Computes two uint32 hashes of an array.

    Each element's bits are mixed with its index, and the results are summed modulo 2**32. The sum
    does not depend on the order of the terms, hence not on the sharding. At each index the mixing
    is a bijection of the bits, so a change of one element always changes the hash. It differs from
    index to index, so a swap of two elements changes the hash as well.
    """
    whole = x.sharding.shard_shape(x.shape)
    # Hash in blocks, along an axis that is not sharded: the mixed words of the whole array would
    # take several times its memory.
    axis = next((i for i, size in enumerate(x.shape) if size > 1 and whole[i] == size), None)
    block = 0 if axis is None else max(_HASH_BLOCK * x.shape[axis] // x.size, 1)
    return _hash_in_blocks(x, axis, block)


_HASH_BLOCK = 1 << 20  # elements


@functools.partial(jax.jit, static_argnums=(1, 2))
def _hash_in_blocks(x, axis: int | None, block: int):
    if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 8:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        x = jax.lax.bitcast_convert_type(x, unsigned)  # 8-byte types get two words on a new axis
    if axis is None or block >= x.shape[axis]:
        return _hash_part(x, x.shape, 0, 0)
    blocks, rest = divmod(x.shape[axis], block)

    def part(start, size):
        # Without the barrier, XLA converts the whole array to uint32 before it slices.
        words = jax.lax.optimization_barrier(jax.lax.dynamic_slice_in_dim(x, start, size, axis))
        return _hash_part(words, x.shape, axis, start)

    total = jax.lax.fori_loop(
        0, blocks, lambda i, sums: sums + part(i * block, block), jnp.zeros(2, jnp.uint32)
    )
    return total + part(blocks * block, rest) if rest else total


def _hash_part(words, shape, axis: int, start):
    """Computes what `words`, the part of an array from `start` on along `axis`, add to its hash.

    `shape` is the shape of the whole array; it gives each word its index.
    """
    index = jnp.zeros(words.shape, jnp.uint32)
    for i, size in enumerate(shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, i)
        index = index * jnp.uint32(size) + (place + jnp.uint32(start) if i == axis else place)
    words = words.astype(jnp.uint32)
    lanes = [_mix(words ^ _mix(index + jnp.uint32(seed))) for seed in (0x9E3779B9, 0x7F4A7C15)]
    return jnp.stack([lane.sum(dtype=jnp.uint32) for lane in lanes])


def _mix(x):
    """MurmurHash3's final step: a bijection of uint32; each input bit affects all output bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
