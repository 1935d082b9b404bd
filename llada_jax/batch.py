"""The arrays that flow from the loader to the steps: what one batch is."""

import flax.struct
from jaxtyping import Array, Bool, Int
from numpy import ndarray


@flax.struct.dataclass
class Batch:
    """R packed rows of L tokens (DESIGN: "A batch"), or several such batches stacked on a leading axis.

    In preference rows segment 2k+1 is the winner and 2k+2 the loser of the row's k-th pair; each of the two holds the
    prompt and its own response, so a pair never leaves its row.
    """

    tokens: Int[Array | ndarray, "*r l"]
    segment_ids: Int[Array | ndarray, "*r l"]  # 0 is padding, counted from 1 in each row
    positions: Int[Array | ndarray, "*r l"]  # restart in each segment
    response_mask: Bool[Array | ndarray, "*r l"]  # may be masked, is scored
    row_ids: Int[Array | ndarray, "*r"]  # index of the row in the prepared dataset; -1 is a row of padding
    epochs: Int[Array | ndarray, "*r"]  # which pass over the data: a row met again draws new noise
