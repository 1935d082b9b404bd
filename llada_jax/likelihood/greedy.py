"""Whether a model, decoding greedily, would write an answer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool

from llada_jax.likelihood.rows import Rows, one_row, predict


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
    rows = one_row(prompt, answer, mask_id=mask_id)
    return bool(_greedy(Partial(logits_fn), rows, mask_id=mask_id, cfg_scale=cfg_scale)[0, 0])


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
