"""Published sampling loops in PyTorch: LLaDA's, and Fast-dLLM's with prefix and dual cache.

They are eager loops written from the conventions of the published code: LLaDA's `generate.py`
(arXiv:2502.09992) and Fast-dLLM's `v1/llada/generate.py` (arXiv:2505.22618). Two things differ. The
mask token is no candidate, so that no mask is left, as in `sampling.generate`. The cache holds
rotated keys, which saves the rotation of all keys in each pass.
"""

import itertools
import time
from typing import NamedTuple

import numpy as np
import torch

from llada_jax.benchmark.torch_model import TorchLLaDA


def has_loop(commit: str, cache: str) -> bool:
    """Whether there is a loop for a commit rule and a cache."""
    return commit in ("schedule", "threshold") and cache in ("none", "prefix", "dual")


def describe() -> dict:
    """What the JSON file says of PyTorch."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


class Written(NamedTuple):
    """What a loop wrote."""

    tokens: torch.Tensor  # [b, l], the prompts first
    passes: int  # forward passes of the batch, full and partial
    block_seconds: list[float]  # since the call, at the end of each block


@torch.inference_mode()
def generate(
    model: TorchLLaDA,
    prompts: np.ndarray,
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    steps: int | None = None,
    cache: str = "none",
    threshold: float | None = None,
) -> Written:
    """Writes `gen_length` tokens after prompts [b, lp] (ids, no masks), at temperature 0.

    steps: passes for the whole response, which the schedule needs.
    cache: "none", "prefix" or "dual". A block begins with a full pass, which fills the cache. The
        other passes compute the block and all after it (prefix), or the block alone (dual).
    threshold: commits all that are at least that confident. None: LLaDA's schedule by `steps`.

    The softmax is in float32 in LLaDA's loop (schedule without a cache), else in float64.
    """
    began = time.perf_counter()
    batch, start = prompts.shape
    ids = torch.from_numpy(prompts).long()
    x = torch.cat([ids, ids.new_full((batch, gen_length), mask_id)], 1)
    length = x.shape[1]
    kept = None if cache == "none" else model.new_cache(batch, length)
    dtype = torch.float32 if kept is None and threshold is None else torch.float64
    # How many the schedule commits in each pass of a block; a threshold does not read it.
    block_steps = (steps or gen_length) // (gen_length // block_length)
    passes, seconds = 0, []
    for first in range(start, length, block_length):
        end = first + block_length
        for turn in itertools.count():
            if not (x[:, first:end] == mask_id).any():
                break
            is_full = turn == 0 or kept is None
            since = 0 if is_full else first
            part = x[:, since : length if is_full or cache == "prefix" else end]
            logits = model(part, cache=kept, start=since)
            competes = part == mask_id
            competes[:, end - since :] = False
            quota = block_length // block_steps + (turn < block_length % block_steps)
            _commit(part, logits, competes, mask_id, quota, threshold, dtype)
            passes += 1
        seconds.append(time.perf_counter() - began)
    return Written(x, passes, seconds)


def _commit(part, logits, competes, mask_id: int, quota: int, threshold: float | None, dtype):
    """Writes the chosen predictions of logits [b, w, v] into the tokens [b, w]."""
    probabilities = torch.softmax(logits.to(dtype), -1)
    logits[..., mask_id] = -torch.inf
    candidates = logits.argmax(-1)
    confidence = probabilities.gather(-1, candidates[..., None])[..., 0]
    confidence = confidence.masked_fill(~competes, -torch.inf)
    chosen = torch.zeros_like(competes)
    for row, values in enumerate(confidence):
        count = min(quota, int(competes[row].sum()))
        if threshold is not None:
            chosen[row] = values >= threshold
            count = int(competes[row].any() and not chosen[row].any())
        chosen[row, values.topk(count).indices] = True
    part[chosen] = candidates[chosen]
