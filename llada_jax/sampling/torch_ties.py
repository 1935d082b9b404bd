"""Ranks positions by confidence, and breaks ties as torch.topk does on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def ranks(
    score: Float[Array, "b t"],
    competes: Bool[Array, "b t"],
    quota: Int[Array, " b"],
    places: Int[Array, "b t"],
    ends: tuple[Int[Array, " b"], Int[Array, " b"]],
    length: int | None,
) -> Int[Array, "b t"]:
    """The rank of each competing position, 0 for the most confident; t and more elsewhere.

    Equal scores: the first position is the most confident. With the `length` of the text, the first
    `quota` are those that torch.topk would choose in a row that is not padded: the row's text lies
    between its `ends`, and its positions stand at `places` of it.
    """
    batch, size = score.shape
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), score.shape)
    closed = (~competes).astype(jnp.int32)

    def rank(*keys):
        order = jax.lax.sort((closed, *keys, index), num_keys=len(keys) + 1, is_stable=True)[-1]
        rank = jnp.zeros_like(index).at[jnp.arange(batch)[:, None], order].set(index)
        return jnp.where(competes, rank, size + rank)

    found = rank(-score)
    if length is None:
        return found
    # Levels instead of scores: positions that do not compete have the lowest of all in torch.
    ordered = -jax.lax.sort((closed, -score), num_keys=2)[1]
    steps = jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0)))
    level = jnp.cumsum(steps, 1)
    edge = quota[:, None] - 1 + jnp.arange(2)
    inside = (edge[:, 0] >= 0) & (edge[:, 1] < jnp.sum(competes, 1))
    edge = jnp.take_along_axis(level, jnp.clip(edge, 0, size - 1), 1)
    tied = inside & (edge[:, 0] == edge[:, 1])
    level = jnp.take_along_axis(level, jnp.where(competes, found, 0), 1)

    def as_torch():
        start, stop = ends
        rows = jnp.arange(batch)[:, None]
        value = jnp.where(competes, -level.astype(jnp.float32), -jnp.inf)
        at = places - start[:, None]
        text = jnp.full((batch, length), -jnp.inf)
        text = text.at[rows, jnp.where(at < 0, length, at)].set(value, mode="drop")
        chosen = most_confident(text, quota.astype(jnp.int32), stop - start)
        chosen = jnp.take_along_axis(chosen, jnp.clip(at, 0, length - 1), 1)
        return rank((~chosen).astype(jnp.int32), found)

    return jax.lax.cond(jnp.any(tied), as_torch, lambda: found)


def most_confident(
    values: Float[Array, "b l"], k: Int[Array, " b"], lengths: Int[Array, " b"]
) -> Bool[Array, "b l"]:
    """Marks the k highest values of each row, among its first `lengths` positions.

    Among equal values at the edge it chooses those that `torch.topk` would choose on a CPU for a
    row of that length. Such ties are common: with confidence_eos_eot_inf all EOS and EoT candidates
    have the same confidence, so ties decide what the published code generates. There is one
    exception: if k > 1 and 64 k <= length, the first positions win.
    """
    places = jnp.arange(values.shape[1])
    inside = places < lengths[:, None]
    ordered = jnp.where(inside, values, -jnp.inf)
    order = jnp.argsort(-ordered, axis=1, stable=True)
    first = jnp.argsort(order, axis=1) < k[:, None]
    edge = jnp.take_along_axis(ordered, order, 1)
    at = jnp.clip(k[:, None] - 1 + jnp.arange(2), 0, values.shape[1] - 1)
    edge = jnp.take_along_axis(edge, at, 1)
    # If 64 k <= length, torch uses a heap instead of std::nth_element. For k = 1 the heap prefers
    # the first position, as the sort does.
    tied = (edge[:, 0] == edge[:, 1]) & (64 * k > lengths) & (k > 0) & (k < lengths)
    return jax.lax.cond(
        jnp.any(tied),
        lambda: jnp.where(
            tied[:, None], jax.vmap(_first_of_nth_element)(values, k, lengths), first
        ),
        lambda: first,
    )


def _first_of_nth_element(values: Float[Array, " l"], k, end) -> Bool[Array, " l"]:
    """Marks the k values that libstdc++'s std::nth_element moves to the front (highest first).

    Only the first `end` values take part.

    It makes the same swaps as libstdc++, but all swaps of one Hoare partition at once. The i-th
    element from the left that has to move right is swapped with the i-th element from the right
    that has to move left, as long as the first is left of the second.
    """
    length = values.shape[0]
    index = jnp.arange(length)

    def partition(carry):
        order, first, last = carry
        # The median of three elements is the pivot. It is moved to the front.
        a, b, c = first + 1, first + (last - first) // 2, last - 1
        va, vb, vc = (values[order[i]] for i in (a, b, c))
        median = jnp.where(
            va > vb,
            jnp.where(vb > vc, b, jnp.where(va > vc, c, a)),
            jnp.where(va > vc, a, jnp.where(vb > vc, c, b)),
        )
        order = order.at[jnp.stack([first, median])].set(order[jnp.stack([median, first])])
        pivot, v = values[order[first]], values[order]
        inside = (index > first) & (index < last)
        from_left, from_right = inside & (v <= pivot), inside & (v >= pivot)
        rank_left = jnp.where(from_left, jnp.cumsum(from_left) - 1, length)
        rank_right = jnp.where(from_right, jnp.sum(from_right) - jnp.cumsum(from_right), length)
        # left[i] is the position of the i-th element from the left that has to move right.
        left = jnp.full(length + 1, length).at[rank_left].set(index)[:length]
        right = jnp.full(length + 1, -1).at[rank_right].set(index)[:length]
        swapped = left < right
        swaps = jnp.sum(swapped)
        cut = jnp.minimum(left[swaps], jnp.where(swaps > 0, right[swaps - 1], length))
        left, right = jnp.where(swapped, left, length), jnp.where(swapped, right, length)
        source = jnp.arange(length + 1).at[left].set(right).at[right].set(left)[:length]
        keep_right = cut < k  # the k-th element lies right of the cut: go on with that part
        return order[source], jnp.where(keep_right, cut, first), jnp.where(keep_right, last, cut)

    order, first, last = jax.lax.while_loop(
        lambda c: c[2] - c[1] > 3, partition, (index, jnp.int32(0), end.astype(jnp.int32))
    )
    # libstdc++ sorts the last part, at most three elements, by insertion, which is stable.
    left_over = jnp.where(index < first, jnp.inf, jnp.where(index < last, values[order], -jnp.inf))
    order = order[jnp.argsort(-left_over, stable=True)]
    return jnp.zeros(length, bool).at[order].set(index < k)
