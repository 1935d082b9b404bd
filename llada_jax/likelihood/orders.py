"""Likelihoods by the orders in which an answer can be written: all of them, or one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from llada_jax import elbo, noise
from llada_jax.likelihood.estimate import weighted
from llada_jax.likelihood.rows import Rows, one_row, predict, traced

LONGEST = 16  # tokens of an answer: 65,536 model calls


def exact_log_likelihood(
    logits_fn: Callable,
    prompt,
    answer,
    *,
    mask_id: int,
    batch_size: int = 256,
    cfg_scale: float | int = 0.0,
) -> float:
    """The log-likelihood of an answer under the uniform mixture of all L! orders, in nats.

    An order writes the answer token by token, and each token is predicted from the tokens before it
    in this order. The likelihood is the mean over all orders. If f(S) is the mean probability that
    the tokens S are the right ones, over the orders that begin with S, then

        f(S) = 1 / |S| sum_{i in S} f(S without i) p_i(S without i),   f(nothing) = 1.

    The model sees each of the 2^L - 1 masked answers once, `batch_size` at a time. The exact ELBO
    (`elbo.exact_elbo`) is the mean of the logarithms instead, so it is never higher.

    Raises ValueError if the answer is empty or has more than 16 tokens.
    """
    rows = one_row(prompt, answer, mask_id=mask_id)
    length = int(rows.lengths[0, 0])
    if not 1 <= length <= LONGEST:
        raise ValueError(
            f"an answer of {length} tokens has 2^{length} masked forms: "
            f"exact_log_likelihood takes 1 to {LONGEST} tokens"
        )
    count = 2**length
    batch_size = min(batch_size, count)
    revealed = np.arange(-(-count // batch_size) * batch_size, dtype=np.int32) % count
    logps = _logps(
        traced(logits_fn),
        rows,
        revealed.reshape(-1, batch_size),
        length=length,
        mask_id=mask_id,
        cfg_scale=cfg_scale,
    )
    return _over_orders(np.asarray(logps, np.float64).reshape(-1, length)[:count])


def order_log_likelihood(
    logits_fn: Callable,
    prompt,
    answer,
    steps,
    *,
    mask_id: int,
    batch_size: int = 16,
    cfg_scale: float | int = 0.0,
) -> float:
    """The log-likelihood of an answer that is written in one given order, in nats.

    steps: [L] int, the step that writes each token. A token is predicted from the prompt and the
        tokens of lower steps; tokens of the same step do not see each other. `range(L)` is left to
        right, and `Trace.steps` of the sampler are its own commits.

    It is the likelihood of another model than that of the mixture: neither the ELBO nor
    `exact_log_likelihood` bounds it. Raises ValueError if steps do not fit the answer.
    """
    rows = one_row(prompt, answer, mask_id=mask_id)
    steps, length = np.asarray(steps), int(rows.lengths[0, 0])
    if steps.shape != (length,):
        raise ValueError(
            f"steps have shape {list(steps.shape)}: give one for each of the {length} tokens of "
            "the answer"
        )
    if not length:
        return 0.0
    passes = np.unique(steps)[:, None]
    before = ((0, 0), (rows.tokens.shape[1] - length, 0))  # the prompt
    masked, written = np.pad(steps >= passes, before), np.pad(steps == passes, before)
    drawn = noise.Noise(jnp.asarray(masked[:, None]), jnp.asarray(written[:, None], jnp.float32))
    found = weighted(
        traced(logits_fn), rows, drawn, mask_id=mask_id, cfg_scale=cfg_scale, chunk=batch_size
    )
    return float(found.sum())


@functools.partial(jax.jit, static_argnames=("length", "mask_id", "cfg_scale"))
def _logps(
    logits_fn,
    rows: Rows,
    revealed: Int[Array, "c b"] | np.ndarray,
    *,
    length: int,
    mask_id: int,
    cfg_scale: float,
) -> Float32[Array, "c b n"]:
    """The log-probability of each of n answer tokens, given the tokens whose bits are set."""

    def one(revealed):
        hidden = (revealed[:, None] >> jnp.arange(length)) & 1 == 0
        hidden = jnp.pad(hidden, ((0, 0), (rows.tokens.shape[1] - length, 0)))
        tokens = jnp.where(hidden, mask_id, rows.tokens)
        logits = predict(logits_fn, rows, tokens, mask_id=mask_id, cfg_scale=cfg_scale)
        return elbo.token_logps(logits, rows.tokens)[:, -length:]

    return jax.lax.map(one, revealed)


def _over_orders(logps: np.ndarray) -> float:
    """The recursion over subsets; logps [2^n, n] are given the tokens whose bits are set."""
    count, length = logps.shape
    subsets = np.arange(count)
    sizes = ((subsets[:, None] >> np.arange(length)) & 1).sum(-1)
    found = np.full(count, -np.inf)
    found[0] = 0
    for size in range(1, length + 1):
        chosen = subsets[sizes == size]
        total = np.full(chosen.size, -np.inf)
        for i in range(length):
            has = (chosen >> i) & 1 == 1
            without = chosen[has] ^ (1 << i)
            total[has] = np.logaddexp(total[has], found[without] + logps[without, i])
        found[chosen] = total - np.log(size)
    return float(found[-1])
