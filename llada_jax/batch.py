"""The arrays that flow from the loader to a step: what one batch is."""

from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float32, Int32


@flax.struct.dataclass
class Batch:
    """R packed rows of L tokens.

    In preference rows segment 2k+1 is the winner and segment 2k+2 the loser of the row's k-th pair.
    Each of the two holds the prompt and its own response, so a pair never leaves its row.
    `| Any`: the same tree may also hold numpy arrays, shapes or shardings.
    """

    tokens: Int32[Array, "r l"] | Any
    segment_ids: Int32[Array, "r l"] | Any  # 0 is padding; segments count from 1 in each row
    positions: Int32[Array, "r l"] | Any  # restart in each segment
    response_mask: Bool[Array, "r l"] | Any  # tokens that may be masked, and are scored
    row_ids: Int32[Array, " r"] | Any  # index of the row in the prepared data; -1: a row of padding
    epochs: Int32[Array, " r"] | Any  # which pass over the data; each pass draws new noise
    # Terms of the reference policy for these rows, where they were computed beforehand.
    reference: Float32[Array, "r n s"] | Any | None = None
    # Most segments of any row: the size s of arrays that have one entry a segment.
    num_segments: int = flax.struct.field(pytree_node=False, kw_only=True)
