"""Long texts: their log-likelihood window by window, perplexity, bits per byte."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Key

from llada_jax.likelihood.estimate import log_likelihoods


def rolling_log_likelihood(
    key: Key[Array, ""],
    logits_fn: Callable,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int,
    context: int,
    prefix: Sequence[int] = (),
    **settings,
) -> float:
    """The estimated log-likelihood of a text of any length, in nats.

    The text is cut into windows of `window` tokens. Each is the answer of a request whose prompt
    are the `context` tokens before it, and the result is the sum over the windows. `prefix`, for
    example the start token, stands before the text and is not scored.

    `settings` are those of `log_likelihoods`, mask_id among them. Raises ValueError as it does, or
    for an impossible window or context.
    """
    prompts, answers = windows(tokens, window=window, context=context, prefix=prefix)
    return float(
        log_likelihoods(key, logits_fn, prompts, answers, **settings).sum(dtype=np.float64)
    )


def windows(
    tokens: Sequence[int] | np.ndarray, *, window: int, context: int, prefix: Sequence[int] = ()
) -> tuple[list[list[int]], list[list[int]]]:
    """The (prompts, answers) of the windows of a text, as `rolling_log_likelihood` makes them."""
    if window < 1 or context < 0:
        raise ValueError(f"window={window}, context={context}: at least 1 and 0")
    first, text = len(prefix), [*prefix, *tokens]
    starts = range(first, len(text), window)
    prompts = [text[max(0, start - context) : start] for start in starts]
    return prompts, [text[start : start + window] for start in starts]


def perplexity(log_likelihood: float, num_tokens: int) -> float:
    """The perplexity by token of a text whose log-likelihood is in nats."""
    return math.exp(-log_likelihood / num_tokens)


def bits_per_byte(log_likelihood: float, num_bytes: int) -> float:
    """The bits by byte of a text, from nats and the length of its UTF-8 text.

    Unlike perplexity, it can be compared between tokenizers.
    """
    return -log_likelihood / (num_bytes * math.log(2))
