"""Whether a model, decoding greedily, would write an answer."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool

from llada_jax.likelihood.rows import (
    Rows,
    checked,
    in_order,
    pack,
    predict,
    traced,
)
from llada_jax.parallel.rows import parts, place, to_host


def is_greedy(
    logits_fn: Callable, prompt, answer, *, mask_id: int, cfg_scale: float | int = 0.0
) -> bool:
    """Whether greedy decoding of as many tokens as the answer has writes the answer.

    Each pass commits the candidate with the highest probability of all masks. A mask in the prompt
    is filled as well, and a candidate that is the mask token leaves its position open; either way
    a token of the answer is never written, and the result is False. An empty answer is True.

    The loop stops at the first committed token that differs. Source: `suffix_greedy_prediction` of
    LLaDA's eval_llada.py. Raises ValueError if the ids are none.
    """
    return bool(are_greedy(logits_fn, [prompt], [answer], mask_id=mask_id, cfg_scale=cfg_scale)[0])


def are_greedy(
    logits_fn: Callable,
    prompts: Sequence,
    answers: Sequence,
    *,
    mask_id: int,
    batch_size: int = 16,
    cfg_scale: float | int = 0.0,
    row_length: int | None = None,
    row_sharding: NamedSharding | None = None,
) -> np.ndarray:
    """`is_greedy` of N requests, bool [N], packed and split as `log_likelihoods` does.

    `batch_size` rows are computed at a time, until all of their requests are decided. Raises
    ValueError if ids are none, if a request does not fit into a row, or if batch_size is no
    multiple of the parts of the rows.
    """
    requests = checked(prompts, answers, mask_id, row_length)
    count = parts(row_sharding, batch_size)

    def started():
        for rows in pack(requests, row_length=row_length, rows=batch_size, multiple=count):
            given = place(rows, row_sharding)
            found = _greedy(traced(logits_fn), given, mask_id=mask_id, cfg_scale=cfg_scale)
            yield rows.requests, found

    out = np.zeros(len(requests), bool)
    for at, found in in_order(started()):
        out[at[at >= 0]] = to_host(found)[at >= 0]
    return out


@functools.partial(jax.jit, static_argnames=("mask_id", "cfg_scale"))
def _greedy(logits_fn, rows: Rows, *, mask_id: int, cfg_scale: float) -> Bool[Array, "r s"]:
    segments = jnp.arange(1, rows.lengths.shape[1] + 1)
    in_request = rows.segment_ids[:, None] == segments[:, None]  # [r, s, l]
    is_answer = rows.places >= 0

    def alive(tokens, when=True):
        """Whether each request [r, s] still has only right tokens, looking where `when`."""
        wrong = is_answer & when & (tokens != rows.tokens)
        return ~jnp.any(in_request & wrong[:, None], axis=-1)

    def unfinished(state):
        done, tokens = state
        return jnp.any(alive(tokens, tokens != mask_id) & (done < rows.lengths))

    def one_pass(state):
        done, tokens = state
        logits = predict(logits_fn, rows, tokens, mask_id=mask_id, cfg_scale=cfg_scale)
        confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
        is_open = in_request & (tokens == mask_id)[:, None]
        best = jnp.argmax(jnp.where(is_open, confidence[:, None], -1), axis=-1)
        chosen = is_open & (best[..., None] == jnp.arange(tokens.shape[1]))
        chosen &= (done < rows.lengths)[..., None]
        tokens = jnp.where(jnp.any(chosen, axis=1), jnp.argmax(logits, -1), tokens)
        return done + 1, tokens.astype(jnp.int32)

    start = jnp.where(is_answer, mask_id, rows.tokens).astype(jnp.int32)
    _, tokens = jax.lax.while_loop(unfinished, one_pass, (jnp.int32(0), start))
    return alive(tokens)
