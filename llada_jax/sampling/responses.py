"""Samples responses to prompts of different lengths, batch by batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.sampling.sampler import generate
from llada_jax.sampling.trace import Trace

# Prompts of different lengths are padded to a multiple of this, so that other prompts can use the
# same compiled sampler.
_PAD_MULTIPLE = 16


def prompt_width(lengths: Iterable[int]) -> int:
    """Returns the number of positions to which `sample_responses` pads prompts of these lengths."""
    lengths = set(lengths)
    width = max(lengths, default=0)
    return width if len(lengths) <= 1 else -(-width // _PAD_MULTIPLE) * _PAD_MULTIPLE


def response_batches(
    logits_fn: Callable,
    prompts: Sequence,
    *,
    mask_id: int,
    pad_id: int,
    batch_size: int,
    gen_length: int,
    key=None,
    row_ids: Sequence[int] | np.ndarray | None = None,
    **settings,
) -> Iterator[np.ndarray | Trace]:
    """Yields the responses `[b, gen_length]` int32 of each batch of prompts, in their order.

    With trace=True it yields a Trace of numpy arrays instead, whose `passes` is `[b]`. The
    arguments and errors are those of `sample_responses`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if settings.get("suffix") is not None:
        raise ValueError("suffix is for one batch: call generate with it")
    numbers = np.arange(len(prompts)) if row_ids is None else np.asarray(row_ids)
    if numbers.shape != (len(prompts),):
        raise ValueError(f"row_ids: {numbers.size} for {len(prompts)} prompts: give one for each")
    width = prompt_width(map(len, prompts))
    padded = len(set(map(len, prompts))) > 1

    def of_host(first, result):
        count = min(batch_size, len(prompts) - first)

        def part(x):
            # If other hosts hold some of the rows, gather them.
            if not (x.is_fully_addressable or x.is_fully_replicated):
                x = multihost_utils.process_allgather(x, tiled=True)
            x = np.asarray(x)
            if x.ndim == 2:
                return x[:count, width : width + gen_length]
            return np.broadcast_to(x, batch_size)[:count]

        return jax.tree.map(part, result)

    running = None
    for first in range(0, len(prompts), batch_size):
        rows = np.full((batch_size, width), pad_id, np.int32)
        attended = np.ones((batch_size, width), np.int32)
        # The last batch is filled up with its last prompt.
        of_rows = np.minimum(first + np.arange(batch_size), len(prompts) - 1)
        for i, of_row in enumerate(of_rows):
            prompt = prompts[of_row]
            rows[i, width - len(prompt) :] = prompt
            attended[i, : width - len(prompt)] = 0
        result = generate(
            logits_fn,
            rows,
            mask_id=mask_id,
            gen_length=gen_length,
            attention_mask=attended if padded else None,
            key=key,
            row_ids=numbers[of_rows],
            **settings,
        )
        if running:  # read the previous batch only now, so that the device never waits
            yield of_host(*running)
        running = first, result
    if running:
        yield of_host(*running)


def sample_responses(
    logits_fn: Callable,
    prompts: Sequence,
    *,
    gen_length: int,
    progress: Callable[[int, int], object] | None = None,
    **settings,
) -> np.ndarray:
    """Returns responses `[N, gen_length]` int32 to N prompts of any lengths.

    All batches of `batch_size` use one compiled sampler. If the prompts differ in length, they are
    left-padded with pad_id to a multiple of 16, and the attention_mask marks the padding. The other
    `settings` are passed to `generate`. progress(done, N) is called after each batch.

    In float32 the response to a prompt does not depend on batch_size or on the other prompts. The
    random draws of a prompt are those of `key` and its entry of row_ids, by default its index: give
    row_ids to have the same draws for the prompts in another order.

    Raises ValueError as `generate` does, if batch_size is less than 1, or for `suffix` or `trace`.
    """
    if settings.get("trace"):
        raise ValueError("trace=True is for response_batches: it gives the trace of each batch")
    out = [np.zeros((0, gen_length), np.int32)]
    for batch in response_batches(logits_fn, prompts, gen_length=gen_length, **settings):
        out.append(batch)
        if progress:
            progress(sum(map(len, out)), len(prompts))
    return np.concatenate(out)


def trim(
    ids: Sequence[int] | np.ndarray, eos_id: int | None = None, eot_id: int | None = None
) -> list[int]:
    """Returns the ids before the first EOS or EoT."""
    ids = [int(i) for i in ids]
    ends = [k for k, i in enumerate(ids) if i in (eos_id, eot_id)]
    return ids[: ends[0]] if ends else ids
