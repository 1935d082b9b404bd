"""Features that a model keeps between passes: of each layer, what it added to the text.

In a pass every layer computes some positions anew and adds what is kept for the others. The prompt
and the response are computed anew at intervals of their own. Between them, a layer computes those
positions of the response whose values changed most.
Source: dLLM-Cache, arXiv:2506.06295, as in its published code.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Features:
    """Rotated keys, values and outputs of all layers, and what the next pass computes.

    The types say `| Any` because the same tree may also hold shapes.
    """

    keys: Float[Array, "n b l k d"] | Any
    values: Float[Array, "n b l k d"] | Any
    attention: Float[Array, "n b l e"] | Any  # output of attention, after its projection
    mlp: Float[Array, "n b l e"] | Any

    rows_prompt: Bool[Array, " b"] | Any  # rows whose prompt is computed anew
    rows_response: Bool[Array, " b"] | Any
    chosen: Int[Array, " b"] | Any  # positions of the response that are computed in the other rows
    # Whether any row is, where the response begins, and the most positions chosen.
    prompt: bool = flax.struct.field(pytree_node=False, default=True)
    response: bool = flax.struct.field(pytree_node=False, default=True)
    start: int = flax.struct.field(pytree_node=False, default=0)
    most: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def zeros(cls, layers: int, rows: int, length: int, heads: int, size: int, width: int, dtype):
        """Empty features of texts of `length` positions."""
        kept = jnp.zeros((layers, rows, length, heads, size), dtype)
        out = jnp.zeros((layers, rows, length, width), dtype)
        all_rows = jnp.ones(rows, bool)
        return cls(kept, kept, out, out, all_rows, all_rows, jnp.zeros(rows, jnp.int32))

    def plan(
        self, prompt: bool = True, response: bool = True, start: int = 0, most: int = 0, **rows
    ) -> "Features":
        """The same features, for a pass that computes these parts."""
        return dataclasses.replace(
            self, prompt=prompt, response=response, start=start, most=most, **rows
        )


@dataclasses.dataclass(frozen=True)
class Layer:
    """The functions of one layer, on positions [b, w] of the residual stream."""

    values: Callable  # x -> values [b, w, k, d]
    queries: Callable  # x, positions -> (queries, rotated keys)
    attend: Callable  # queries, keys, values, mask -> output of attention [b, w, e]
    mlp: Callable  # x -> [b, w, e]


def layer_pass(layer: Layer, index, x, attention_mask, positions, cache: Features, everything):
    """The residual stream [b, l, e] after a layer, and the features.

    With `everything`, all positions of all rows are computed, as in the first layer of each pass.
    """
    rows, length = x.shape[:2]
    prompt, response = everything or cache.prompt, everything or cache.response
    start, most = cache.start, 0 if everything else cache.most
    kept = {
        name: jax.lax.dynamic_index_in_dim(getattr(cache, name), index, keepdims=False)
        for name in ("keys", "values", "attention", "mlp")
    }
    of_prompt = jnp.arange(length) < start
    renewed = jnp.where(of_prompt, cache.rows_prompt[:, None], cache.rows_response[:, None])
    renewed = jnp.ones((rows, length), bool) if everything else renewed

    # Values of the response are always computed, unless nothing is chosen by them.
    first, stop = 0 if prompt else start, length if response or most else start
    if first < stop:
        fresh = layer.values(x[:, first:stop]).astype(kept["values"].dtype)
        changed = _similarity(fresh, kept["values"][:, first:stop])
        replaced = renewed | (~of_prompt if most else False)
        old = kept["values"][:, first:stop]
        fresh = jnp.where(replaced[:, first:stop, None, None], fresh, old)
        kept["values"] = kept["values"].at[:, first:stop].set(fresh)
    places = []
    if prompt:
        places.append(jnp.broadcast_to(jnp.arange(start), (rows, start)))
    if most:
        order = start + jnp.argsort(changed[:, start - first :], axis=1, stable=True)
        rank = jnp.arange(length - start)
        at = jnp.arange(rows)[:, None]
        picked = jnp.zeros_like(renewed).at[at, order].set(rank < cache.chosen[:, None])
        renewed |= picked
        if not response:
            places.append(order[:, :most])
    if response:
        places.append(jnp.broadcast_to(jnp.arange(start, length), (rows, length - start)))
    if places:
        where = jnp.concatenate(places, 1)
        x = _computed(layer, x, where, renewed, attention_mask, positions, kept)
    else:
        x = x + kept["attention"] + kept["mlp"]
    new = {
        name: jax.lax.dynamic_update_index_in_dim(getattr(cache, name), value, index, 0)
        for name, value in kept.items()
    }
    return x, dataclasses.replace(cache, **new)


def _computed(layer: Layer, x, where, renewed, attention_mask, positions, kept: dict):
    """The residual stream, of which the positions `where` [b, w] are computed; updates `kept`."""
    at = jnp.arange(x.shape[0])[:, None]
    # What is computed and not renewed is dropped.
    to = jnp.where(jnp.take_along_axis(renewed, where, 1), where, x.shape[1])

    def keep(name, value):
        value = value.astype(kept[name].dtype)
        kept[name] = kept[name].at[at, to].set(value, mode="drop")

    queries, keys = layer.queries(x[at, where], jnp.take_along_axis(positions, where, 1))
    keep("keys", keys)
    keep("attention", layer.attend(queries, kept["keys"], kept["values"], attention_mask))
    x = x + kept["attention"]
    keep("mlp", layer.mlp(x[at, where]))
    return x + kept["mlp"]


def _similarity(a: Float[Array, "b w k d"], b: Float[Array, "b w k d"]) -> Float[Array, "b w"]:
    """The cosine of two vectors at each position, over all heads together."""
    a, b = (x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in (a, b))
    size = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, -1) / jnp.maximum(size, 1e-8)
