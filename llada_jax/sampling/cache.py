"""Caches: which positions a pass computes, and what it takes from before.

A cache is one function and one entry of CACHES.

A cache of windows computes all positions when a block begins (a full pass) and keeps their keys and
values. The further passes of the block compute only a window of the text, at whose positions new
keys and values replace the kept ones; the window attends to all positions. The function says what
the window of each block is.

A cache of parts has every layer compute some positions and take the others' outputs from before
(see `models.features`).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Windows(NamedTuple):
    """The windows of all blocks. Each size is compiled once."""

    sizes: tuple[int, ...]
    size_of: np.ndarray  # [blocks] index into sizes
    # [blocks] where the window begins. None: it is what was a mask before the pass before.
    starts: np.ndarray | None


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


def delayed(start: int, length: int, block_length: int, blocks: int) -> Windows:
    """The window is what was a mask before the pass before: a token is kept one pass late.

    The second pass of a block is full, too. The sizes are those of the prefix cache.
    Source: dKV-Cache-Decode, arXiv:2505.15781.
    """
    sizes, size_of, _ = prefix(start, length, block_length, blocks)
    return Windows(sizes, size_of, None)


@dataclasses.dataclass(frozen=True)
class Cache:
    """An entry of CACHES: the function, and what `generate` must know of it."""

    # (start of the response, length of the text, block_length, blocks) -> the windows
    windows: Callable[[int, int, int, int], Windows] | None = None
    kind: str = "windows"  # the methods that it asks of a model
    full_passes: int = 1  # at the beginning of a block
    needs: tuple[str, ...] = ()  # the settings that must be given
    takes: tuple[str, ...] = ()  # those that may be given


CACHES = {
    "none": Cache(),
    "prefix": Cache(prefix, takes=("refresh",)),
    "dual": Cache(dual, takes=("refresh",)),
    "delayed": Cache(delayed, full_passes=2, takes=("refresh",)),
    "selective": Cache(kind="parts", needs=("refresh", "refresh_prompt", "transfer_ratio")),
}
