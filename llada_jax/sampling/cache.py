"""Caches: which positions a pass computes, and whose keys and values it takes from before.

A cache is one function and one entry of CACHES. At the beginning of each block all positions are
computed (a full pass), and their keys and values are kept. The further passes of the block compute
only a window of the text, at whose positions new keys and values replace the kept ones; the window
attends to all positions. The function says what the window of each block is.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Windows(NamedTuple):
    """The windows of all blocks. Each size is compiled once."""

    sizes: tuple[int, ...]
    size_of: np.ndarray  # [blocks] index into sizes
    starts: np.ndarray  # [blocks] where the window begins


def prefix(start: int, length: int, block_length: int, blocks: int) -> Windows:
    """A window from the block to the end of the text; what is before the block is kept.

    The windows of several blocks share a size, the largest of them: a block whose window is longer
    than its rest keeps the keys before it. There are about log2(blocks) sizes.
    Source: Fast-dLLM, arXiv:2505.22618 (prefix cache).
    """
    begins = sorted({0} | {blocks - 2**j for j in range(blocks.bit_length()) if 2**j <= blocks})
    size_of = np.searchsorted(begins, np.arange(blocks), side="right") - 1
    starts = start + np.asarray(begins) * block_length
    return Windows(tuple(int(length - s) for s in starts), size_of, starts[size_of])


def dual(start: int, length: int, block_length: int, blocks: int) -> Windows:
    """The window is the block; what is before and after it is kept.

    Source: Fast-dLLM, arXiv:2505.22618 (dual cache).
    """
    del length
    starts = start + np.arange(blocks) * block_length
    return Windows((block_length,), np.zeros(blocks, int), starts)


CACHES: dict[str, Callable[[int, int, int, int], Windows] | None] = {
    "none": None,
    "prefix": prefix,
    "dual": dual,
}
