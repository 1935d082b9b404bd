"""Random keys: every random number is a function of seed, stream, row and epoch."""

import jax
from jaxtyping import Array, Int, Key

# Raise it when the same scheme and key give other masks or weights than before. A run cannot
# continue under another FORMAT.
FORMAT = 2

# One number for each purpose, so that no two purposes share random bits.
STREAMS = {
    "policy": 0,
    "reference": 1,
    "evaluate": 2,
    "crop": 3,
    "init": 4,
    "solve": 5,
    "divergence": 6,
}


def stream_key(seed: int | Int[Array, ""], stream: str) -> Key[Array, ""]:
    """The key of one purpose (a name in STREAMS) under one seed."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[stream])


def row_keys(
    key: Key[Array, ""], row_ids: Int[Array, " r"], epochs: Int[Array, " r"]
) -> Key[Array, " r"]:
    """One key for each row and epoch, whichever host or step reads the row."""
    return jax.vmap(lambda row, epoch: jax.random.fold_in(jax.random.fold_in(key, row), epoch))(
        row_ids, epochs
    )
