"""Requests in rows: several prompts with their answers side by side, and how a model sees them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32


@flax.struct.dataclass
class Rows:
    """r rows of l tokens with up to s requests each. A request is a prompt and its answer."""

    tokens: Int32[Array, "r l"] | Any
    segment_ids: Int32[Array, "r l"] | Any  # the request of the row, from 1; 0 is padding
    positions: Int32[Array, "r l"] | Any  # restart in each request
    places: Int32[Array, "r l"] | Any  # 0, 1, ... in an answer, -1 elsewhere
    requests: Int32[Array, "r s"] | Any  # the index of each request; -1: there is none
    lengths: Int32[Array, "r s"] | Any  # tokens of each answer
    # False: each row is one request and no padding, so the model needs no segments.
    packed: bool = flax.struct.field(pytree_node=False, kw_only=True)

    @property
    def is_prompt(self) -> Bool[Array, "r l"]:
        """True at the tokens of the prompts."""
        return (self.segment_ids > 0) & (self.places < 0)


def ids_of(name: str, ids, mask_id: int) -> np.ndarray:
    """Returns token ids [n] as int32; raises ValueError if they are none."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"{name} is {ids.dtype}{list(ids.shape)}: give token ids of shape [length]"
        )
    if ids.size and ids.min() < 0:
        raise ValueError(f"{name} has the id {ids.min()}: token ids are at least 0")
    if mask_id < 0:
        raise ValueError(f"mask_id={mask_id} is no token id: take it from the model's config")
    return ids.astype(np.int32)


def one_row(prompt, answer, *, mask_id: int) -> Rows:
    """The row of one request, without padding; raises ValueError if the ids are none."""
    request = (ids_of("prompt", prompt, mask_id), ids_of("answer", answer, mask_id))
    return _fill([[(0, *request)]], 1, sum(map(len, request)), 1)


def pack(
    prompts: Sequence, answers: Sequence, *, mask_id: int, row_length: int | None, rows: int
) -> Iterator[Rows]:
    """Packs requests into rows of `row_length` (None: of the longest), `rows` rows at a time.

    The longest requests come first, each in the first row that has room for it. All groups of rows
    have the same shapes. Raises ValueError if a request does not fit.
    """
    requests = [
        (i, ids_of(f"prompt {i}", prompt, mask_id), ids_of(f"answer {i}", answer, mask_id))
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    sizes = {i: len(prompt) + len(answer) for i, prompt, answer in requests}
    length = max(sizes.values(), default=1) if row_length is None else row_length
    packed: list[list] = []
    room: list[int] = []
    for request in sorted(requests, key=lambda r: (-sizes[r[0]], r[0])):
        size = sizes[request[0]]
        if size > length:
            raise ValueError(
                f"request {request[0]} has {size} tokens, more than row_length={length}: raise it"
            )
        # A linear search: there are thousands of requests, not millions.
        row = next((row for row, left in enumerate(room) if left >= size), len(packed))
        if row == len(packed):
            packed.append([])
            room.append(length)
        packed[row].append(request)
        room[row] -= size
    most = max(map(len, packed), default=1)
    for first in range(0, len(packed), rows):
        yield _fill(packed[first : first + rows], rows, length, most)


def _fill(packed: list[list], rows: int, length: int, most: int) -> Rows:
    """The arrays of rows of requests (index, prompt, answer); rows that are missing are padding."""
    tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    places = np.full((rows, length), -1, np.int32)
    requests, lengths = np.full((rows, most), -1, np.int32), np.zeros((rows, most), np.int32)
    for r, row in enumerate(packed):
        start = 0
        for s, (index, prompt, answer) in enumerate(row):
            middle, stop = start + len(prompt), start + len(prompt) + len(answer)
            tokens[r, start:stop] = np.concatenate([prompt, answer])
            segments[r, start:stop] = s + 1
            positions[r, start:stop] = np.arange(stop - start)
            places[r, middle:stop] = np.arange(stop - middle)
            requests[r, s], lengths[r, s] = index, len(answer)
            start = stop
    packed_ = bool((segments != 1).any())
    return Rows(tokens, segments, positions, places, requests, lengths, packed=packed_)


def predict(
    logits_fn: Callable, rows: Rows, tokens: Int[Array, "r l"], *, mask_id: int, cfg_scale: float
) -> Float32[Array, "r l v"]:
    """The logits of partly masked rows, with classifier-free guidance.

    Guidance of s > 0 gives u + (s + 1) (c - u), where u are the logits with every prompt masked.
    Both are computed in one batch of 2r rows. Raises ValueError if mask_id is not in the
    vocabulary.
    """
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
