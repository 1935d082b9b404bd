"""Revocation: which tokens become masks again.

A rule is one function and one entry of REVOKES. It works on the block of one row, after the commits
of a pass. A position that is revoked competes again in the next pass. The schedule then commits as
many as were revoked, and that pass does not count as one of its steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llada_jax.sampling.unmasking import CONFIDENCES

# ReMDM's loop begins when this share of a block is committed (arXiv:2503.00307, appendix D.4).
LOOP_FROM = 7 / 8


class Written(NamedTuple):
    """What a revoke rule sees of one row's block of n positions, after the commits of a pass."""

    written: Bool[Array, " n"]  # committed in an earlier pass of the block
    committed: Bool[Array, " n"]  # committed in this pass
    score: Float[Array, " n"]  # confidence at the commit; +inf where nothing was committed
    shadow: Float[Array, " n"]  # log-odds of the token by its shadow; zeros without one
    number: Int[Array, ""]  # commits of this pass
    last: Int[Array, ""]  # those of the pass before it
    planned: Int[Array, ""]  # masks that the block began with
    revisions: Int[Array, ""]  # passes of the block that revoked something


def wino(row: Written, numbers: Any) -> Bool[Array, " n"]:
    """Revokes tokens whose probability, by a mask that does not see them, is below threshold_back.

    Nothing is revoked in a pass that commits one token. Fewer are revoked than the pass before
    committed, those with the lowest probability. The shadows see the tokens of earlier passes.
    Source: WINO (arXiv:2507.18578), as published in `decoding_wino`.
    """
    limit = np.float32(CONFIDENCES["probability"].limit(numbers.threshold_back))
    low = row.written & (row.shadow < limit)
    rank = _rank(jnp.where(low, row.shadow, jnp.inf))
    most = jnp.where(jnp.sum(low) >= row.last, row.last - 1, row.written.size)
    return low & (rank < most) & (row.number > 1)


def remdm(row: Written, numbers: Any) -> Bool[Array, " n"]:
    """Revokes the revoke_number least confident tokens, in revoke_passes passes of a block.

    These passes begin when 7/8 of the block are committed.
    Source: ReMDM (arXiv:2503.00307), appendix D.4: its form for LLaDA.
    """
    done = row.written | row.committed
    loops = jnp.sum(done) >= jnp.floor(LOOP_FROM * row.planned).astype(jnp.int32)
    loops &= row.revisions < numbers.revoke_passes
    rank = _rank(jnp.where(done, row.score, jnp.inf))
    return done & (rank < numbers.revoke_number) & loops


def _rank(values):
    """The rank of each value, 0 for the lowest; the first of equal ones comes first."""
    order = jnp.argsort(values, stable=True)
    return jnp.zeros_like(order).at[order].set(jnp.arange(order.size))


@dataclasses.dataclass(frozen=True)
class Revoke:
    """An entry of REVOKES: the function, and what `generate` must know of it."""

    choose: Callable[[Written, Any], Array] | None = None
    needs: tuple[str, ...] = ()  # the settings that must be given
    shadow: bool = False  # reads Written.shadow: a second set of masks is computed


REVOKES = {
    "none": Revoke(),
    "wino": Revoke(wino, needs=("threshold_back",), shadow=True),
    "remdm": Revoke(remdm, needs=("revoke_number", "revoke_passes")),
}
