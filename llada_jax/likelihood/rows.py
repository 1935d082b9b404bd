"""Requests in rows: several prompts with their answers side by side, and how a model sees them."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float32, Int, Int32

Request = tuple[np.ndarray, np.ndarray]  # the ids of a prompt and of its answer


@flax.struct.dataclass
class Rows:
    """r rows of l tokens with up to s requests each. A request is a prompt and its answer."""

    tokens: Int32[Array, "r l"] | Any
    segment_ids: Int32[Array, "r l"] | Any  # the request of the row, from 1; 0 is padding
    positions: Int32[Array, "r l"] | Any  # restart in each request
    places: Int32[Array, "r l"] | Any  # 0, 1, ... in an answer, -1 elsewhere
    requests: Int32[Array, "r s"] | Any  # the index of each request; -1: there is none
    lengths: Int32[Array, "r s"] | Any  # tokens of each answer
    # False: each row is one whole request, so the model needs no segments.
    packed: bool = flax.struct.field(pytree_node=False, kw_only=True)

    @property
    def is_prompt(self) -> Bool[Array, "r l"]:
        """True at the tokens of the prompts."""
        return (self.segment_ids > 0) & (self.places < 0)


def checked(
    prompts: Sequence, answers: Sequence, mask_id: int, row_length: int | None = None
) -> list[Request]:
    """Returns the ids of prompts and answers as int32.

    Raises ValueError if they are none, or if a request does not fit into a row.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts, {len(answers)} answers: give one answer to each")
    if mask_id < 0:
        raise ValueError(f"mask_id={mask_id} is no token id: take it from the model's config")
    requests = [
        (_ids(f"prompt {i}", prompt), _ids(f"answer {i}", answer))
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    for i, (prompt, answer) in enumerate(requests):
        size = len(prompt) + len(answer)
        if row_length is not None and size > row_length:
            raise ValueError(
                f"request {i} has {size} tokens, more than row_length={row_length}: raise it"
            )
    return requests


def _ids(name: str, ids) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(f"{name} is {ids.dtype}{list(ids.shape)}: give token ids [length]")
    if ids.size and ids.min() < 0:
        raise ValueError(f"{name} has the id {ids.min()}: token ids are at least 0")
    return ids.astype(np.int32)


def one_row(prompt, answer, *, mask_id: int) -> Rows:
    """The row of one request, without padding; raises ValueError if the ids are none."""
    return pack(checked([prompt], [answer], mask_id), row_length=None, rows=1)[0]


def pack(
    requests: Sequence[Request], *, row_length: int | None, rows: int, multiple: int = 1
) -> list[Rows]:
    """Packs requests into rows of `row_length` (None: of the longest), at most `rows` at a time.

    The longest requests come first, each in the first row that has room for it. All results have
    the same shapes, with a multiple of `multiple` rows; missing rows are padding.
    """
    sizes = [len(prompt) + len(answer) for prompt, answer in requests]
    length = max([1, *sizes]) if row_length is None else row_length
    packed: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((row for row, left in enumerate(room) if left >= sizes[i]), len(packed))
        if row == len(packed):
            packed.append([])
            room.append(length)
        packed[row].append(i)
        room[row] -= sizes[i]
    rows, most = min(rows, len(packed)), max(map(len, packed), default=1)
    rows = -(-rows // multiple) * multiple
    several = most > 1 or any(room)
    return [
        _fill(requests, packed[first : first + rows], (rows, length, most), several)
        for first in range(0, len(packed), max(rows, 1))
    ]


def _fill(
    requests: Sequence[Request], packed: list[list[int]], shape: tuple[int, int, int], several: bool
) -> Rows:
    """The arrays of rows that hold the requests of these indices; rows that lack are padding."""
    rows, length, most = shape
    tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    places = np.full((rows, length), -1, np.int32)
    indices, lengths = np.full((rows, most), -1, np.int32), np.zeros((rows, most), np.int32)
    for r, row in enumerate(packed):
        start = 0
        for s, index in enumerate(row):
            prompt, answer = requests[index]
            middle, stop = start + len(prompt), start + len(prompt) + len(answer)
            tokens[r, start:stop] = np.concatenate([prompt, answer])
            segments[r, start:stop] = s + 1
            positions[r, start:stop] = np.arange(stop - start)
            places[r, middle:stop] = np.arange(stop - middle)
            indices[r, s], lengths[r, s] = index, len(answer)
            start = stop
    return Rows(tokens, segments, positions, places, indices, lengths, packed=several)


def in_order(started: Iterable, ahead: int = 2) -> Iterator:
    """Yields the items of an iterator that starts a computation for each, `ahead` items later."""
    waiting: collections.deque = collections.deque()
    for item in started:
        waiting.append(item)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def traced(logits_fn: Callable) -> Partial:
    """Returns logits_fn as an argument of compiled functions; a Partial keeps its parameters."""
    # Partial(Partial(...)) would hide the parameters, and compile them in.
    return logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)


def predict(
    logits_fn: Callable, rows: Rows, tokens: Int[Array, "r l"], *, mask_id: int, cfg_scale: float
) -> Float32[Array, "r l v"]:
    """The logits of partly masked rows, with classifier-free guidance.

    Guidance of s > 0 gives u + (s + 1) (c - u), where u are the logits with every prompt masked.
    Both are computed in one batch of 2r rows. Raises ValueError if s is negative, or if mask_id is
    not in the vocabulary.
    """
    if not cfg_scale >= 0:
        raise ValueError(f"cfg_scale={cfg_scale} must be at least 0")
    count = tokens.shape[0]
    if cfg_scale:
        tokens = jnp.concatenate([tokens, jnp.where(rows.is_prompt, mask_id, tokens)])
    if rows.packed:
        repeats = (tokens.shape[0] // rows.tokens.shape[0], 1)
        segment_ids, positions = (jnp.tile(x, repeats) for x in (rows.segment_ids, rows.positions))
        logits = logits_fn(tokens, None, segment_ids=segment_ids, positions=positions)
    else:
        logits = logits_fn(tokens, None)
    if not mask_id < logits.shape[-1]:
        raise ValueError(
            f"mask_id={mask_id} is not in the vocabulary of {logits.shape[-1]} that logits_fn "
            "predicts: take it from the model's config"
        )
    logits = logits.astype(jnp.float32)
    if not cfg_scale:
        return logits
    conditional, unconditional = logits[:count], logits[count:]
    return unconditional + (cfg_scale + 1) * (conditional - unconditional)
