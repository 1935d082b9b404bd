"""Trace: what the sampler did, position by position."""

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Trace:
    """The result of `generate` with trace=True.

    A row's `steps` and `row_passes` do not depend on its batch unless rows begin their blocks
    together (`lockstep`, or a cache of windows): then a row waits for the others, and `steps`
    counts the passes of the batch.
    """

    tokens: Int[Array, "b l"]
    steps: Int[Array, "b l"]  # the pass, from 1, that committed the position; 0 given, -1 never
    confidence: Float[Array, "b l"]  # at that commit; nan where nothing was committed
    revocations: Int[Array, "b l"]  # how often the position was masked again
    passes: Int[Array, ""]  # forward passes of the batch, full and cached
    row_passes: Int[Array, " b"]  # passes in which the row was not yet done with its block
    lengths: Int[Array, " b"]  # of the responses
    finished: Bool[Array, " b"]
