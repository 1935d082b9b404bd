"""Keys: every random number is a function of seed, stream, row and pass over the data (house rule 3)."""

import jax
from jaxtyping import Array, Int, Key

FORMAT = 2  # part of what a run may not change: raise it when a scheme and key draw or weigh otherwise than before

# One number a purpose, so that no two share random bits.
STREAMS = {"policy": 0, "reference": 1, "evaluate": 2, "crop": 3, "init": 4}


def stream_key(seed: int, stream: str) -> Key[Array, ""]:
    """The key of one purpose under one seed (house rule 3)."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS[stream])


def row_keys(
    key: Key[Array, ""], row_ids: Int[Array, " r"], epochs: Int[Array, " r"]
) -> Key[Array, " r"]:
    """One key a row and pass: the same wherever and whenever the row is met in that pass."""
    return jax.vmap(lambda row, epoch: jax.random.fold_in(jax.random.fold_in(key, row), epoch))(
        row_ids, epochs
    )
