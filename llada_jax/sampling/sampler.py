"""`generate` and `stream`: check their arguments and run the compiled loop.

`logits_fn(tokens [B, L], attention_mask [B, L] or None) -> logits [B, L, V]`. Pass a model as
`jax.tree_util.Partial(model.apply, {"params": params})`. In a plain closure the parameters would
be compiled in as constants, and every new closure would compile again. A function that also takes
`positions` gets the RoPE positions of left-padded rows; one that takes `at` [B, T] returns logits
of these positions alone. This file works with arrays only; `python -m llada_jax.sampling` opens
models and tokenizers.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from llada_jax.sampling import loop
from llada_jax.sampling.cache import CACHES
from llada_jax.sampling.model import METHODS, cached_model, takes_positions
from llada_jax.sampling.one_pass import Given
from llada_jax.sampling.revoke import REVOKES
from llada_jax.sampling.settings import Settings, make
from llada_jax.sampling.state import Inputs
from llada_jax.sampling.trace import Trace


def generate(logits_fn: Callable, prompts, *, trace: bool = False, **arguments) -> Any:
    """Generates responses by block-wise iterative unmasking.

    Takes prompts `[B, Lp]` and returns tokens `[B, Lp + gen_length]` int32, prompt first, or with
    trace=True a `Trace`, which also has the pass and the confidence of each commit.

    The response starts as masks and is filled block by block. Each pass predicts positions and
    commits some predictions, chosen by the commit rule. A committed token changes only if a revoke
    rule masks it again. In float32 a row's tokens do not depend on the other rows, on its place in
    the batch, or on its padding.

    The arguments are the fields of `Settings`, and these arrays:

    attention_mask: `[B, Lp]`, 0 = not attended to; marks the left-padding of prompts. logits_fn
        gets it extended over the response, or None if nothing is masked. With a mask, a logits_fn
        that takes `positions` gets those counted from the row's first attended token.
    suffix: `[B, Ls]`, text after the response; it is part of the result. Masks in it are filled
        with the last block.
    lengths: `[B]`, the lengths of responses that are shorter than gen_length. What follows is no
        part of the row: EOS if eos_id is given, else masks.
    allowed: `[V]` bool, the tokens that may be generated; None for all.
    key: of the random draws.
    row_ids: `[B]` int, numbers that tell the random draws of rows apart; by default 0, 1, ... A row
        with the same key, number and prompt draws the same in any batch.

    Ties between confidences are broken as in torch on a CPU for a row that is alone and not padded,
    with one exception: if k > 1 tokens are committed at once in a row of 64 k or more positions,
    the first positions win.

    The sampler is compiled once for each (shapes, settings, logits_fn). Raises ValueError for
    settings that are invalid or contradict each other, before it compiles.
    Source: generate.py of LLaDA; each rule names its own.
    """
    job = prepare(logits_fn, prompts, **arguments)
    result = loop.fill(job.given, job.inputs, job.settings, job.block_only)
    return result if trace else result.tokens


def stream(logits_fn: Callable, prompts, *, every: int = 1, **arguments) -> Iterator[Trace]:
    """Yields the `Trace` (numpy arrays) of what is written, after every so many passes.

    The last one is the result of `generate` with the same arguments; passes and revocations are
    counted up to now. Positions that are not yet committed hold the mask token.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    job = prepare(logits_fn, prompts, **arguments)

    def passes():
        fixed = (job.settings, job.block_only)
        state = loop.blank(job.given, job.inputs, *fixed)
        none = np.zeros(len(job.inputs.prompts), bool)
        refilled, limit, finished = ~none, every, False
        while not finished:
            turn = loop.Turn(job.inputs, refilled, none, np.bool_(False), np.int32(limit))
            state, trace, _ = loop.advance(job.given, state, turn, *fixed)
            trace, refilled = jax.tree.map(np.asarray, trace), none
            finished = bool(trace.finished.all())
            if trace.passes >= limit or finished:  # else it stopped because a row is finished
                limit += every
                yield trace

    return passes()


def lower(logits_fn: Partial, prompts, **arguments) -> jax.stages.Lowered:
    """Lowers the loop of `generate` for prompts and parameters that are shapes.

    `prompts` and the leaves of logits_fn are `jax.ShapeDtypeStruct`, with shardings or without. No
    mask may stand in such prompts.
    """
    job = prepare(logits_fn, prompts, **arguments)
    return loop.fill.lower(job.given, job.inputs, job.settings, job.block_only)


class Job(NamedTuple):
    """Checked arguments, as the loop takes them."""

    given: Given
    inputs: Inputs
    settings: Settings
    block_only: bool  # no mask outside of the responses competes


def prepare(
    logits_fn: Callable,
    prompts,
    *,
    attention_mask=None,
    suffix=None,
    lengths=None,
    allowed=None,
    key=None,
    row_ids=None,
    **settings,
) -> Job:
    """Checks the arguments of `generate`; raises an error of one line."""
    s = make(key is not None, **settings)
    _check_model(logits_fn, s)
    prompts = _ids("prompts", prompts)
    batch = prompts.shape[0]
    attention_mask = _array("attention_mask", attention_mask, prompts.shape)
    lengths = _array("lengths", lengths, (batch,))
    if suffix is not None:
        suffix = _ids("suffix", suffix)
        if suffix.shape[0] != batch:
            raise ValueError(f"suffix has {suffix.shape[0]} rows, the prompts {batch}")
        for name, value in (("lengths", lengths), ("growth", s.growth)):
            if value is not None:
                raise ValueError(f"{name}: a response with a suffix has gen_length positions")
    if lengths is not None:
        if s.growth is not None:
            raise ValueError("lengths: growth finds the lengths itself; leave one of them")
        if not isinstance(lengths, jax.core.Tracer) and bool(
            jnp.any((lengths < 1) | (lengths > s.gen_length))
        ):
            raise ValueError(f"lengths={lengths}: not all from 1 to gen_length={s.gen_length}")
    row_ids = _array("row_ids", row_ids, (batch,))
    if allowed is not None:
        allowed = jnp.asarray(allowed)
        if allowed.ndim != 1 or allowed.dtype != bool:
            raise ValueError(
                f"allowed is {allowed.dtype}{list(allowed.shape)}: give a bool for each token id"
            )
    if not isinstance(logits_fn, Partial):
        logits_fn = Partial(logits_fn)
    block_only = s.infill == "all" and s.growth is None
    block_only &= not any(_has_mask(x, s.mask_id) for x in (prompts, suffix))
    inputs = Inputs(prompts, attention_mask, suffix, lengths, row_ids)
    return Job(Given(logits_fn, allowed, key), inputs, s, block_only)


def _check_model(logits_fn: Callable, s: Settings) -> None:
    kind = CACHES[s.cache].kind
    if s.cache != "none" and cached_model(logits_fn, kind) is None:
        raise ValueError(
            f'cache="{s.cache}" needs the model itself: give logits_fn=jax.tree_util.Partial('
            f"model.apply, variables) of a model that has {' and '.join(METHODS[kind])}"
        )
    if REVOKES[s.revoke].shadow and not takes_positions(logits_fn):
        raise ValueError(
            f'revoke="{s.revoke}" needs a logits_fn that takes positions and an attention_mask'
            " [B, L, L], which says for each query what it attends to"
        )


def _has_mask(tokens, mask_id: int) -> bool:
    """Whether a mask may stand in the tokens; of a tracer nothing is known."""
    if tokens is None or isinstance(tokens, jax.ShapeDtypeStruct):
        return False
    return isinstance(tokens, jax.core.Tracer) or bool(jnp.any(tokens == mask_id))


def _array(name: str, x, shape: tuple[int, ...]):
    if x is None or isinstance(x, jax.ShapeDtypeStruct):
        return x
    x = jnp.asarray(x)
    if x.shape != shape:
        raise ValueError(
            f"{name} has shape {list(x.shape)}; with these prompts it must be {list(shape)}"
        )
    return x


def _ids(name: str, ids):
    if isinstance(ids, jax.ShapeDtypeStruct):
        return ids
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name} are {ids.dtype}{list(ids.shape)}: give token ids of shape [batch, length]"
        )
    return ids.astype(jnp.int32)
