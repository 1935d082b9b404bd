"""Growth: responses whose length is found while they are written (DAEDAL).

A response starts short. Before anything is committed, it gets more masks until the model expects it
to end within them. While it is written, an uncertain mask becomes several masks.
The functions take and return `state.Rows`.
Source: DAEDAL (arXiv:2508.00819), with the published code's order of operations and defaults.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Growth:
    """How the length of a response is found; gen_length is the limit.

    The expectation of an end, E, is the mean probability of EOS over the last `eos_window`
    positions whose most probable token is EOS; where there are fewer, the missing ones count as 0.
    """

    initial_length: int  # masks of a response at the beginning
    factor: int = 8  # masks that are added, or put in the place of one
    eos_confidence: float = 0.5  # before the first commit, the response grows while E is below it
    insert_eos_confidence: float = 0.9  # a mask becomes several only while E is below it
    insert_confidence: float = 0.1  # and only a mask less confident than this
    eos_window: int = 32


def expectation(
    logits: Float[Array, "b l v"], rows: Any, eos_id: int, window: int
) -> Float[Array, " b"]:
    """E of each row (see `Growth`), from the logits of all positions."""
    places = jnp.arange(rows.tokens.shape[1])
    response = (places >= rows.start) & (places < rows.end[:, None])
    ends = response & (jnp.argmax(logits, -1) == eos_id)
    behind = jnp.cumsum(ends[:, ::-1], 1)[:, ::-1]  # of them from here on
    chance = jnp.exp(logits[..., eos_id] - jax.nn.logsumexp(logits, -1))
    return jnp.sum(jnp.where(ends & (behind <= window), chance, 0.0), 1) / window


def lengthen(rows: Any, expected: Float[Array, " b"], growth: Growth, limit: int, eos_id: int):
    """The rows after a pass before their first commit.

    A row grows by `factor` masks. If it does not, eos_window // 2 tokens EOS follow, as published,
    and it may begin to commit.
    """
    longest = rows.start + limit
    grows = rows.sizing & (expected < growth.eos_confidence) & (rows.end < longest)
    ready = rows.sizing & ~grows
    tail = jnp.minimum(rows.end + growth.eos_window // 2, longest)
    end = jnp.where(grows, jnp.minimum(rows.end + growth.factor, longest), rows.end)
    places = jnp.arange(rows.tokens.shape[1])
    is_tail = ready[:, None] & (places >= rows.end[:, None]) & (places < tail[:, None])
    return rows.replace(
        tokens=jnp.where(is_tail, eos_id, rows.tokens),
        steps=jnp.where(is_tail, 0, rows.steps),
        end=jnp.where(ready, tail, end),
        sizing=rows.sizing & ~ready,
    )


def insert(
    rows: Any,
    expected: Float[Array, " b"],
    value: Float[Array, "b l"],
    open_before: Array,
    growth: Growth,
    limit: int,
    mask_id: int,
) -> Any:
    """The rows in which the least confident mask of the block has become `factor` masks.

    value [b, l]: the confidence of this pass, as a probability; open_before [b, l]: the masks of
    the block before its commits. What passes the limit of the length is cut off.
    """
    longest = rows.start + limit
    uncertain = open_before & (rows.tokens == mask_id) & (value < growth.insert_confidence)
    wants = expected < growth.insert_eos_confidence
    wants &= (rows.end < longest) & ~rows.sizing & jnp.any(uncertain, 1)
    at = jnp.argmin(jnp.where(uncertain, value, jnp.inf), 1)
    places = jnp.arange(rows.tokens.shape[1])
    added = jnp.where(wants, growth.factor - 1, 0)
    source: Int[Array, "b l"] = jnp.where(
        places > at[:, None] + added[:, None],
        places - added[:, None],
        jnp.minimum(places, at[:, None]),
    )
    source = jnp.where(wants[:, None], source, places)

    def moved(x):
        return jnp.take_along_axis(x, source.reshape(*source.shape, *[1] * (x.ndim - 2)), 1)

    history = jax.tree.map(moved, rows.history)
    if history is not None:  # what is new has no past: no prediction is near to nan
        new = wants[:, None] & (places > at[:, None]) & (places <= (at + added)[:, None])
        history["logits"] = jnp.where(new[..., None], jnp.nan, history["logits"])
    return rows.replace(
        tokens=moved(rows.tokens),
        given=moved(rows.given),
        score=moved(rows.score),
        steps=moved(rows.steps),
        revocations=moved(rows.revocations),
        history=history,
        end=jnp.minimum(rows.end + added, longest),
    )
