"""Responses to prompts of any lengths, from a queue of prompts.

A row that is finished frees its place for the next prompt. Prompts of similar lengths share one
compiled sampler, a bucket.
"""

import bisect
import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llada_jax.parallel.rows import parts, place, to_host
from llada_jax.sampling import loop
from llada_jax.sampling.sampler import prepare
from llada_jax.sampling.settings import Settings

# Prompts of different lengths are padded to a multiple of this, so that other prompts can use the
# same compiled sampler.
_PAD_MULTIPLE = 16


class Response(NamedTuple):
    """The answer to one prompt, in numpy."""

    index: int  # of the prompt
    tokens: np.ndarray  # [n] int32, n the length of the response
    steps: np.ndarray  # [n] the row's pass, from 1, that committed the position; 0 given, -1 never
    confidence: np.ndarray  # [n] at that commit; nan where nothing was committed
    revocations: np.ndarray  # [n] how often the position was masked again
    passes: int  # in which the row was not yet done with its block


def prompt_width(lengths: Iterable[int]) -> int:
    """Returns the number of positions of the longest prompts in `sample_responses`."""
    lengths = set(lengths)
    width = max(lengths, default=0)
    return width if len(lengths) <= 1 else -(-width // _PAD_MULTIPLE) * _PAD_MULTIPLE


def buckets(lengths: Sequence[int], batch_size: int) -> list[tuple[int, list[int]]]:
    """Returns (width, indices of prompts) of each bucket, the shortest prompts first.

    Widths grow by a half or a third, so that at most a third of a row is padding. A bucket with
    fewer than `batch_size` prompts joins the next.
    """
    longest = prompt_width(lengths)
    sizes = [16 * n << k for k in range(40) for n in (2, 3) if 16 * n << k < longest]
    sizes = [*sorted({16, *sizes} & set(range(longest))), longest]
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    found: list[tuple[int, list[int]]] = []
    first = 0
    for size in sizes:
        last = bisect.bisect_right(order, size, key=lambda i: lengths[i])
        if last - first >= batch_size or (size == longest and last > first):
            found.append((size, order[first:last]))
            first = last
    return found


def respond(
    logits_fn: Callable,
    prompts: Sequence,
    *,
    pad_id: int,
    batch_size: int,
    gen_length: int | Sequence[int],
    key=None,
    row_ids: Sequence[int] | np.ndarray | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    row_sharding: jax.sharding.NamedSharding | None = None,
    **settings,
) -> Iterator[Response]:
    """Yields the response to each prompt as soon as it is finished.

    gen_length: one length for all, or one for each prompt.
    stop: is called with the tokens of a response whenever it has finished a block, up to the end of
        that block; if it returns True, the response ends there. The rest of it is pad_id.
    row_sharding: how the rows are split over devices; batch_size must be a multiple of the parts.

    The other arguments and the errors are those of `sample_responses`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for name in ("suffix", "attention_mask", "lengths"):
        if settings.get(name) is not None:
            raise ValueError(f"{name} is for one batch: call generate with it")
    numbers = np.arange(len(prompts)) if row_ids is None else np.asarray(row_ids)
    if numbers.shape != (len(prompts),):
        raise ValueError(f"row_ids: {numbers.size} for {len(prompts)} prompts: give one for each")
    lengths = np.broadcast_to(np.asarray(gen_length), (len(prompts),))
    longest = int(gen_length) if np.ndim(gen_length) == 0 else _whole_blocks(lengths, settings)
    settings |= dict(gen_length=longest, key=key)
    # Masks in a prompt compete with the response: these prompts have a sampler of their own.
    has_mask = np.array([settings.get("mask_id") in np.asarray(p) for p in prompts], bool)
    count = parts(row_sharding, batch_size)
    for group in (np.flatnonzero(~has_mask), np.flatnonzero(has_mask)):
        for width, chosen in buckets([len(prompts[i]) for i in group], batch_size):
            indices = [int(group[i]) for i in chosen]
            queue = _Queue(
                prompts=prompts,
                numbers=numbers,
                lengths=lengths if (lengths != longest).any() else None,
                width=width,
                padded=any(len(prompts[i]) != width for i in indices),
                pad_id=pad_id,
                size=min(batch_size, -(-len(indices) // count) * count),
                sharding=row_sharding,
            )
            yield from _serve(logits_fn, queue, indices, stop, settings)


def _whole_blocks(lengths: np.ndarray, settings: dict) -> int:
    block = max(settings.get("block_length", 1), 1)
    return -(-int(max(lengths, default=0)) // block) * block


@dataclasses.dataclass
class _Queue:
    """How prompts become rows."""

    prompts: Sequence
    numbers: np.ndarray  # of the random draws
    lengths: np.ndarray | None  # of the responses
    width: int
    padded: bool
    pad_id: int
    size: int  # rows
    sharding: jax.sharding.NamedSharding | None

    def rows(self, of_row: Sequence[int | None]) -> dict[str, Any]:
        """The arguments of `prepare` for the prompts of all rows; None has no prompt."""
        tokens = np.full((self.size, self.width), self.pad_id, np.int32)
        attended = np.ones(tokens.shape, np.int32)
        lengths = None if self.lengths is None else np.ones(self.size, np.int32)
        numbers = np.zeros(self.size, np.int32)
        for row, index in enumerate(of_row):
            if index is None:
                continue
            prompt = self.prompts[index]
            tokens[row, self.width - len(prompt) :] = prompt
            attended[row, : self.width - len(prompt)] = 0
            numbers[row] = self.numbers[index]
            if lengths is not None:
                lengths[row] = self.lengths[index]
        rows = dict(
            prompts=tokens,
            attention_mask=attended if self.padded else None,
            lengths=lengths,
            row_ids=numbers,
        )
        return place(rows, self.sharding)


def _serve(logits_fn, queue: _Queue, indices: list[int], stop, settings) -> Iterator[Response]:
    """Yields the responses of a bucket; a row that is finished takes the next prompt."""
    waiting = collections.deque(indices)
    of_row: list[int | None] = [None] * queue.size
    free, job, state = list(range(queue.size)), None, None
    while True:
        for row in free:
            of_row[row] = waiting.popleft() if waiting else None
        if all(index is None for index in of_row):
            return
        rows = queue.rows(of_row)
        if job is None:  # all checks
            job = prepare(logits_fn, **rows, **settings)
            fixed = (job.settings, job.block_only)
            state = loop.blank(job.given, job.inputs, *fixed, queue.sharding)
        turn = loop.Turn(
            inputs=job.inputs._replace(**rows),
            refilled=place(np.isin(np.arange(queue.size), free), queue.sharding),
            empty=place(np.array([index is None for index in of_row]), queue.sharding),
            looks=np.bool_(stop is not None),
            limit=np.int32(2**31 - 1),
        )
        state, trace, blocks = loop.advance(job.given, state, turn, *fixed)
        trace, blocks = jax.tree.map(to_host, (trace, blocks))
        free = []
        for row, response in _finished(trace, blocks, job.settings, queue, of_row, stop):
            yield response
            free.append(row)


def _finished(trace, blocks, s: Settings, queue: _Queue, of_row, stop):
    """Yields (row, response) of the rows that are finished, or that `stop` ends."""
    for row, index in enumerate(of_row):
        if index is None:
            continue
        part = slice(queue.width, queue.width + int(trace.lengths[row]))
        arrays = (trace.tokens, trace.steps, trace.confidence, trace.revocations)
        response = Response(index, *(x[row, part] for x in arrays), int(trace.row_passes[row]))
        if not trace.finished[row]:
            known = response.tokens[: blocks[row] * s.block_length]
            if stop is None or not stop(known.tolist()):
                continue
            response.tokens[len(known) :] = queue.pad_id
        yield row, response


def sample_responses(
    logits_fn: Callable,
    prompts: Sequence,
    *,
    gen_length: int | Sequence[int],
    pad_id: int,
    progress: Callable[[int, int], object] | None = None,
    **settings,
) -> np.ndarray:
    """Returns responses `[N, gen_length]` int32 to N prompts of any lengths.

    At most `batch_size` prompts are answered at a time. Prompts are left-padded with pad_id to the
    width of their bucket (`buckets`), and the attention_mask marks the padding. A response that is
    shorter than the longest is followed by pad_id. The other `settings` are those of `generate`.
    progress(done, N) is called after each response.

    In float32 the response to a prompt does not depend on batch_size or on the other prompts. The
    random draws of a prompt are those of `key` and its entry of row_ids, by default its index: give
    row_ids to have the same draws for the prompts in another order.

    Raises ValueError as `generate` does, if batch_size is less than 1, or for `suffix`.
    """
    width = int(np.max(gen_length)) if len(prompts) or not np.ndim(gen_length) else 0
    out = np.full((len(prompts), width), pad_id, np.int32)
    found = respond(logits_fn, prompts, gen_length=gen_length, pad_id=pad_id, **settings)
    for done, response in enumerate(found, 1):
        out[response.index, : len(response.tokens)] = response.tokens
        if progress:
            progress(done, len(prompts))
    return out


def trim(
    ids: Sequence[int] | np.ndarray, eos_id: int | None = None, eot_id: int | None = None
) -> list[int]:
    """Returns the ids before the first EOS or EoT."""
    ids = [int(i) for i in ids]
    ends = [k for k, i in enumerate(ids) if i in (eos_id, eot_id)]
    return ids[: ends[0]] if ends else ids
