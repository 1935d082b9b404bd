"""The k most confident positions, with ties as in torch.topk on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def most_confident(confidence: Float[Array, "b l"], k, most: int) -> Bool[Array, "b l"]:
    """The k (of at most `most`) highest of each row; ties at the edge fall as in `torch.topk` on a CPU.

    They are common, since without confidence all EOS and EoT are equal, and decide what the published code generates.
    """
    batch, length = confidence.shape
    values, best = jax.lax.top_k(confidence, min(most + 1, length))
    rows = jnp.arange(batch)[:, None]
    chosen = jnp.zeros(confidence.shape, bool).at[rows, best].set(jnp.arange(best.shape[1]) < k)
    tied = jnp.any(jnp.take(values, k - 1, axis=1) == jnp.take(values, k, axis=1))
    # torch keeps a heap where 64 k <= length: for k = 1 its first comes first, as in top_k.
    return jax.lax.cond(
        tied & (64 * k > length),
        lambda: jax.vmap(_first_of_nth_element, (0, None))(confidence, k),
        lambda: chosen,
    )


def _first_of_nth_element(values: Float[Array, " l"], k) -> Bool[Array, " l"]:
    """Which k of the values std::nth_element of libstdc++ brings to the front, the highest first.

    The same swaps, but each Hoare partition is done at once: the i-th element from the left that may not stay there
    changes places with the i-th from the right, as long as they have not met.
    """
    length = values.shape[0]
    index = jnp.arange(length)

    def partition(carry):
        order, first, last = carry
        # The median of three goes to the front and is the pivot.
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
        left = (
            jnp.full(length + 1, length).at[rank_left].set(index)[:length]
        )  # position of the i-th
        right = jnp.full(length + 1, -1).at[rank_right].set(index)[:length]
        swapped = left < right
        swaps = jnp.sum(swapped)
        cut = jnp.minimum(left[swaps], jnp.where(swaps > 0, right[swaps - 1], length))
        left, right = jnp.where(swapped, left, length), jnp.where(swapped, right, length)
        source = jnp.arange(length + 1).at[left].set(right).at[right].set(left)[:length]
        keep_right = cut < k  # the element of rank k lies right of the cut
        return order[source], jnp.where(keep_right, cut, first), jnp.where(keep_right, last, cut)

    order, first, last = jax.lax.while_loop(
        lambda c: c[2] - c[1] > 3, partition, (index, 0, length)
    )
    # What is left, at most three, is sorted by insertion, which is stable.
    left_over = jnp.where(index < first, jnp.inf, jnp.where(index < last, values[order], -jnp.inf))
    order = order[jnp.argsort(-left_over, stable=True)]
    return jnp.zeros(length, bool).at[order].set(index < k)
