"""The probabilities of a response's tokens, computed anew: the passes of the sampler once more."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from llada_jax.parallel.rows import to_host
from llada_jax.sampling.responses import Response
from llada_jax.sampling.unmasking import CONFIDENCES


def with_confidence(
    logits_fn: Callable,
    prompt: Sequence[int] | np.ndarray,
    response: Response,
    *,
    remasking: str,
    mask_id: int,
) -> Response:
    """Returns a response whose confidence says something of its tokens.

    The recorded confidence of `remasking="random"` is noise: it becomes the `probabilities` of the
    tokens. Any other is kept.
    """
    if not CONFIDENCES[remasking].random:
        return response
    found = probabilities(logits_fn, prompt, response, mask_id=mask_id)
    return response._replace(confidence=found)


def probabilities(
    logits_fn: Callable, prompt: Sequence[int] | np.ndarray, response: Response, *, mask_id: int
) -> np.ndarray:
    """The probability [N] of each token in the pass that committed it; nan if none did.

    One model call for each pass, without cache and guidance, at temperature 1. A token that was
    revoked before counts as a mask.
    """
    logits_fn = logits_fn if isinstance(logits_fn, Partial) else Partial(logits_fn)
    steps = np.concatenate([np.zeros(len(prompt), np.int32), response.steps])
    tokens = np.concatenate([np.asarray(prompt, np.int32), response.tokens])
    found = to_host(_replayed(logits_fn, tokens, steps, np.unique(steps[steps > 0]), mask_id))
    return np.where(response.steps > 0, found[len(prompt) :], np.nan)


@jax.jit
def _replayed(logits_fn, tokens, steps, passes, mask_id):
    def of_pass(now):
        seen = jnp.where((steps >= now) | (steps < 0), mask_id, tokens)
        logits = logits_fn(seen[None], None)[0].astype(jnp.float32)
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], 1)[:, 0]
        return jnp.where(steps == now, jnp.exp(logps), 0.0)

    return jax.lax.map(of_pass, passes).sum(0)
