"""Rows of a batch: from the host to the devices that split them, and back."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def parts(row_sharding: NamedSharding | None, batch_size: int) -> int:
    """The number of parts into which rows are split, 1 for None.

    Raises ValueError if batch_size is no multiple of it.
    """
    if row_sharding is None:
        return 1
    devices = row_sharding.num_devices
    count = devices // row_sharding.shard_shape((devices,))[0]
    if batch_size % count:
        raise ValueError(
            f"batch_size={batch_size} is no multiple of the {count} parts into which row_sharding "
            "splits the rows"
        )
    return count


def place(x: Any, row_sharding: NamedSharding | None) -> Any:
    """Splits a tree of arrays over the devices by rows; None leaves them where they are."""
    return x if row_sharding is None else jax.device_put(x, row_sharding)


def to_host(x: jax.Array) -> np.ndarray:
    """Returns a copy of the result of a computation, with the parts that other hosts hold."""
    if not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)
