"""Times and masks: the forward process, as masks and token weights (DESIGN: "An estimator is masks and token weights").

A draw masks some response tokens of a row; its term for one segment is `sum over masked i of weights[i] * log p_i`, and
the mean of the terms over the draws estimates the segment's ELBO. Every scheme is one entry in TIMES, MASKS or WEIGHTS:
a function of uniform numbers that `draw_row` hands it, and what has to be known of it. Adding one is one function and
one entry. docs/estimators.md has the formulas, docs/results.md what each is worth.
"""

from llada_jax.noise.arrays import Draws, Noise, Segments, of_segments, per_token
from llada_jax.noise.draw import draw_row, draw_rows
from llada_jax.noise.keys import FORMAT, STREAMS, row_keys, stream_key
from llada_jax.noise.masks import MASKS, MaskScheme
from llada_jax.noise.scheme import SHARED, Scheme
from llada_jax.noise.times import TIMES, TimeScheme
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
    "stream_key",
]
