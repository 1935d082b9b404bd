"""The forward process: which tokens each draw masks, and how much each masked token weighs.

A draw masks some response tokens of a row. Its term for one segment is the sum of
weights[i] * log p_i over the masked tokens i. The mean of the terms over the draws estimates the
ELBO of the segment.

A scheme is one function and one entry in TIMES, MASKS or WEIGHTS. `draw_row` calls the functions
of the three tables in this order. They draw no random numbers: TIMES and MASKS get uniform ones
from `draw_row`. The entry also records the properties of the scheme that `Scheme` checks. To add
a scheme, write the function and add the entry. docs/estimators.md has the formulas,
docs/results.md the measured variances.
"""

from llada_jax.noise.arrays import Draws, Noise, Segments, of_segments, per_token
from llada_jax.noise.draw import draw_row, draw_rows
from llada_jax.noise.keys import FORMAT, STREAMS, row_keys, stream_key
from llada_jax.noise.masks import MASKS, MaskScheme
from llada_jax.noise.scheme import SHARED, Scheme
from llada_jax.noise.times import TIMES, TimeScheme, stratified_times
from llada_jax.noise.weights import WEIGHTS, WeightScheme

__all__ = [
    "FORMAT",
    "MASKS",
    "SHARED",
    "STREAMS",
    "TIMES",
    "WEIGHTS",
    "Draws",
    "MaskScheme",
    "Noise",
    "Scheme",
    "Segments",
    "TimeScheme",
    "WeightScheme",
    "draw_row",
    "draw_rows",
    "of_segments",
    "per_token",
    "row_keys",
    "stratified_times",
    "stream_key",
]
