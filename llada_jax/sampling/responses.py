"""Responses to prompts of any lengths, batch by batch."""

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from llada_jax.sampling.sampler import generate

_PAD_MULTIPLE = (
    16  # prompts of different lengths are padded to a multiple of it, so that other prompts fit too
)


def prompt_width(lengths: Iterable[int]) -> int:
    """How many positions `sample_responses` gives prompts of these lengths."""
    lengths = set(lengths)
    width = max(lengths, default=0)
    return width if len(lengths) <= 1 else -(-width // _PAD_MULTIPLE) * _PAD_MULTIPLE


def sample_responses(
    logits_fn: Callable,
    prompts: Sequence,
    *,
    mask_id: int,
    pad_id: int,
    batch_size: int,
    gen_length: int,
    key=None,
    progress: Callable[[int, int], object] | None = None,
    **settings,
) -> np.ndarray:
    """Responses `[N, gen_length]` int32 to N prompts of any lengths, batch by batch with one compiled sampler.

    Prompts of different lengths are left-padded with pad_id to a multiple of 16, which logits_fn learns from its
    attention_mask. `settings` go to `generate`; each batch has its own key. progress(done, N) is called after each
    batch. ValueError as in `generate`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    width = prompt_width(map(len, prompts))
    out = np.zeros((len(prompts), gen_length), np.int32)

    def collect(first, tokens):
        if not (
            tokens.is_fully_addressable or tokens.is_fully_replicated
        ):  # other hosts hold some of the rows
            tokens = multihost_utils.process_allgather(tokens, tiled=True)
        out[first : first + batch_size] = np.asarray(tokens)[: len(prompts) - first, width:]
        if progress:
            progress(min(first + batch_size, len(prompts)), len(prompts))

    running = None
    for first in range(0, len(prompts), batch_size):
        rows = np.full((batch_size, width), pad_id, np.int32)
        attended = np.ones((batch_size, width), np.int32)
        for i in range(batch_size):
            prompt = prompts[
                min(first + i, len(prompts) - 1)
            ]  # the last batch is filled up with its last prompt
            rows[i, width - len(prompt) :] = prompt
            attended[i, : width - len(prompt)] = 0
        tokens = generate(
            logits_fn,
            rows,
            mask_id=mask_id,
            gen_length=gen_length,
            attention_mask=attended if len(set(map(len, prompts))) > 1 else None,
            key=None if key is None else jax.random.fold_in(key, first),
            **settings,
        )
        if running:  # read the batch before only now, so that the device never waits
            collect(*running)
        running = first, tokens
    if running:
        collect(*running)
    return out


def trim(
    ids: Sequence[int] | np.ndarray, eos_id: int | None = None, eot_id: int | None = None
) -> list[int]:
    """The ids before the first EOS or EoT."""
    ids = [int(i) for i in ids]
    ends = [k for k, i in enumerate(ids) if i in (eos_id, eot_id)]
    return ids[: ends[0]] if ends else ids
