"""The evidence lower bound (ELBO): terms, estimates and exact values.

The ELBO is in nats over the whole response; higher is better. Any model works that is a function
`logits_fn(tokens [b, l]) -> logits [b, l, v]`. For example, a model that ignores its input:

    >>> import jax, jax.numpy as jnp
    >>> from llada_jax import elbo
    >>> logits_fn = lambda tokens: jnp.zeros((*tokens.shape, 4))
    >>> tokens, response = jnp.array([[0, 1, 2]]), jnp.array([[False, True, True]])
    >>> key = jax.random.key(0)
    >>> estimate = elbo.estimate_elbo(key, logits_fn, tokens, response, mask_id=3, n_t=4)
    >>> bool(jnp.allclose(estimate.value, -2 * jnp.log(4.0)))
    True
"""

from collections.abc import Callable
from math import comb

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from llada_jax import noise

LogitsFn = Callable[..., Array]


def token_logps(
    logits: Float[Array, "*b l v"], targets: Int[Array, "..."]
) -> Float32[Array, "*b l"]:
    """The log-probability of every target, in nats; targets broadcast to the logits."""
    logps = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    targets = jnp.broadcast_to(targets, logits.shape[:-1])
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]


def elbo_terms(
    logits_fn: LogitsFn,
    tokens: Int[Array, "b l"],
    masked: Bool[Array, "n b l"] | Int[Array, "n b l"],
    weights: Float[Array, "n b"] | Float[Array, "n b l"],
    *,
    mask_id: int,
) -> Float32[Array, "n b"]:
    """The term of each draw: sum of weight x log-probability of the true token, in nats.

    The sum is over the masked positions. `weights` has one number for each draw and example
    [n, b], or one for each token [n, b, l]. They are L / l in equation 15 and 1 / t in equation 13.
    `logits_fn` gets all draws at once, flattened into the batch: draw j of example k is row
    j b + k.
    """
    masked = masked.astype(bool)
    if weights.ndim == 2:
        weights = weights[..., None]
    logits = logits_fn(jnp.where(masked, mask_id, tokens).reshape(-1, tokens.shape[-1]))
    logps = token_logps(logits.reshape(*masked.shape, -1), tokens)
    return jnp.sum(jnp.where(masked, weights * logps, 0), axis=-1)


@flax.struct.dataclass
class Estimate:
    """A Monte Carlo estimate of the ELBO of b examples, in nats."""

    value: Float32[Array, " b"]
    terms: Float32[Array, "t y b"]
    # Standard error of `value`; nan if the terms do not determine it (see `error_is_known`).
    stderr: Float32[Array, " b"]


def estimate_elbo(
    key: Key[Array, ""],
    logits_fn: LogitsFn,
    tokens: Int[Array, "b l"],
    response_mask: Bool[Array, "b l"] | Int[Array, "b l"],
    *,
    mask_id: int,
    n_t: int = 8,
    n_yt: int = 1,
    times: str = "iid",
    masks: str = "exact",
    weights: str = "plain",
    pseudo_count: float = 0.0,
    chunk: int = 0,
) -> Estimate:
    """Estimates the ELBO by the mean of n_t x n_yt terms, in nats (equation 6).

    The estimate is unbiased unless `Scheme.biased` is true for the scheme. The model processes
    `chunk` draws at a time (0: all).

    Raises ValueError if a scheme is unknown, if its settings do not fit together, or if `chunk`
    does not divide n_t x n_yt.
    """
    scheme = noise.Scheme(n_t, n_yt, times, masks, weights, pseudo_count=pseudo_count)
    drawn = noise.draw_rows(
        jax.random.split(key, tokens.shape[0]),
        response_mask,
        jnp.ones_like(tokens),
        num_segments=1,
        scheme=scheme,
    )

    def terms_of(masked, weights):
        return elbo_terms(logits_fn, tokens, masked, weights, mask_id=mask_id)

    terms = _in_chunks(terms_of, (drawn.masked, drawn.weights), chunk, scheme.n)
    terms = terms.reshape(n_t, n_yt, -1)
    value = terms.mean((0, 1))
    return Estimate(
        value,
        terms,
        standard_error(terms) if error_is_known(scheme) else jnp.full_like(value, jnp.nan),
    )


def exact_elbo(
    logits_fn: LogitsFn,
    tokens: Int[Array, "b l"],
    response_mask: Bool[Array, "b l"] | Int[Array, "b l"],
    *,
    mask_id: int,
    chunk: int = 256,
) -> Float32[Array, " b"]:
    """The exact ELBO in nats, by enumeration of every subset of the response (equation 14).

    The model processes `chunk` subsets at a time. Raises ValueError if a response has more than 20
    tokens (a million model calls).
    """
    response = np.asarray(response_mask).astype(bool)
    lengths = response.sum(-1)
    longest = int(lengths.max())
    if longest > 20:
        raise ValueError(
            f"a response of {longest} tokens has 2^{longest} subsets: "
            "exact_elbo takes at most 20 tokens"
        )
    # Tokens outside the response read bit 31, which no subset sets.
    place = jnp.asarray(np.where(response, response.cumsum(-1) - 1, 31))
    weight_of_size = jnp.asarray(
        [np.pad(subset_weights(n), (0, longest - n)) for n in lengths.tolist()], jnp.float32
    )

    def terms_of(subsets):
        masked = ((subsets[:, None, None] >> place) & 1).astype(bool)
        size = masked.sum(-1)
        # The enumeration is for the longest response. A shorter one counts each subset once.
        whole = subsets[:, None] < 2 ** jnp.asarray(lengths)
        weights = jnp.where(
            whole, jax.vmap(lambda s: weight_of_size[jnp.arange(s.size), s])(size), 0
        )
        return elbo_terms(logits_fn, tokens, masked, weights, mask_id=mask_id).sum(0)

    chunk = min(chunk, 2**longest)
    subsets = np.arange(-(-(2**longest) // chunk) * chunk, dtype=np.int32)
    # Fill the last chunk with subset 0, which masks nothing and has weight 0.
    subsets[2**longest :] = 0
    return jax.lax.map(terms_of, jnp.asarray(subsets.reshape(-1, chunk))).sum(0)


def subset_weights(length: int) -> np.ndarray:
    """The weight in the ELBO of one subset of each size k = 0..length, 1 / (k C(length, k)).

    It is length / k (equation 14), times the probability 1 / length of the size, times the
    probability 1 / C(length, k) of the subset. A subset of size 0 has weight 0.
    """
    return np.array([0.0] + [1 / (k * comb(length, k)) for k in range(1, length + 1)])


def packed_terms(
    logps_fn: Callable[[Array, Array], Array],
    noise: noise.Noise,
    tokens: Int[Array, "r l"],
    segment_ids: Int[Array, "r l"],
    *,
    num_segments: int,
    mask_id: int,
    chunk: int = 0,
) -> Float32[Array, "n r s"]:
    """The term of every draw and segment of packed rows.

    `logps_fn(masked tokens [r, l], targets [r, l])` returns log-probabilities [r, l]. It is
    vmapped over `chunk` draws at a time (0: all n). If chunk < n, the backward pass repeats the
    forward pass of each chunk, so memory does not grow with n. The gradient is the same for every
    chunk. Raises ValueError if `chunk` does not divide n.
    """
    segments = jnp.arange(1, num_segments + 1)

    def one(masked, weights):
        logps = logps_fn(jnp.where(masked, mask_id, tokens), tokens)
        weighted = jnp.where(masked, weights * logps, 0)
        # Masked sums instead of a matrix product, which a TPU would round to bfloat16.
        return jnp.sum(
            jnp.where(segment_ids[..., None] == segments, weighted[..., None], 0), axis=1
        )

    return _in_chunks(jax.vmap(one), (noise.masked, noise.weights), chunk, noise.masked.shape[0])


def standard_error(terms: Float[Array, "t y *b"]) -> Float[Array, "*b"]:
    """Standard error of the mean over all n_t x n_yt terms, from the spread of the n_t means.

    It is nan if n_t = 1. It is right if the draws at different times are independent and
    identically distributed (see `error_is_known`). For other schemes it may be tens of times too
    large, or too small: measure the error by repeats instead.
    """
    n_t = terms.shape[0]
    means = terms.mean(axis=1)
    if n_t == 1:
        return jnp.full(means.shape[1:], jnp.nan, means.dtype)
    return means.std(axis=0, ddof=1) / np.sqrt(n_t)


def error_is_known(scheme: noise.Scheme) -> bool:
    """Whether `standard_error` is right for the terms of this scheme: its square is unbiased.

    The same holds for differences of two terms of the same draw.
    """
    independent = (
        scheme.times == "iid" and noise.MASKS[scheme.masks].block == 1 and scheme.weights == "plain"
    )
    return independent and scheme.n_t > 1


def _in_chunks(
    terms_of: Callable[..., Array], draws: tuple[Array, ...], chunk: int, n: int
) -> Array:
    """Applies terms_of to `chunk` of the n draws at a time (0: all); rematerialises each chunk."""
    if chunk in (0, n):
        return terms_of(*draws)
    if chunk < 0 or n % chunk:
        raise ValueError(
            f"chunk={chunk} does not divide the n_t x n_yt = {n} draws: "
            "choose a divisor, or 0 for all"
        )
    split = jax.tree.map(lambda x: x.reshape(n // chunk, chunk, *x.shape[1:]), draws)
    terms = jax.lax.map(jax.checkpoint(lambda xs: terms_of(*xs)), split)
    return terms.reshape(n, *terms.shape[2:])
