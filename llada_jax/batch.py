"""The arrays that flow from the loader to the steps: what one batch is."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class Batch:
    """R packed rows of L tokens (DESIGN: "A batch").

    In preference rows segment 2k+1 is the winner and 2k+2 the loser of the row's k-th pair; each of the two holds the
    prompt and its own response, so a pair never leaves its row. Fields are Any because a pytree of this shape may also
    hold shardings or shapes; as arrays they are what the comments say.
    """

    tokens: Any  # int32 [r, l]
    segment_ids: Any  # int32 [r, l]: 0 is padding, counted from 1 in each row
    positions: Any  # int32 [r, l]: restart in each segment
    response_mask: Any  # bool [r, l]: may be masked, is scored
    row_ids: Any  # int32 [r]: index of the row in the prepared dataset; -1 is a row of padding
    epochs: Any  # int32 [r]: which pass over the data; a row met again draws new noise
