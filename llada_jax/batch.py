"""Batch: the arrays that the loader hands to a step."""

from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float32, Int32


@flax.struct.dataclass
class Batch:
    """R packed rows of L tokens.

    In preference rows segment 2k+1 is the winner and segment 2k+2 is the loser of the row's k-th
    pair. Each of the two contains the prompt and its own response, so a pair never leaves its row.

    The types say `| Any` because the same tree may also hold numpy arrays, shapes or shardings.
    """

    tokens: Int32[Array, "r l"] | Any
    segment_ids: Int32[Array, "r l"] | Any  # 0 is padding; segments count from 1 in each row
    positions: Int32[Array, "r l"] | Any  # restart in each segment
    response_mask: Bool[Array, "r l"] | Any  # tokens that may be masked and are scored
    row_ids: Int32[Array, " r"] | Any  # index of the row in the prepared data; -1: a row of padding
    epochs: Int32[Array, " r"] | Any  # which pass over the data; each pass draws new noise
    # ELBO terms of the reference policy for these rows, if they were computed before training.
    reference: Float32[Array, "r n s"] | Any | None = None
    # The largest number of segments in any row: the size s of arrays with one entry a segment.
    num_segments: int = flax.struct.field(pytree_node=False, kw_only=True)
