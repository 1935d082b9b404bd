"""Estimates of the log-likelihood of answers: LLaDA's published one, and those of `elbo`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float32, Int, Key

from llada_jax import elbo, noise
from llada_jax.likelihood.rows import (
    Request,
    Rows,
    checked,
    in_order,
    one_row,
    pack,
    predict,
    traced,
)
from llada_jax.parallel.rows import parts, place, to_host

# The fewest draws (a power of two) that had the variance of the published estimator at mc_num=128
# on every model measured: on Sudoku; text needs fewer. See docs/likelihood.md.
FEW_DRAWS = {
    "mc_num": 64,
    "times": "importance",
    "weights": "balanced",
    "pseudo_count": 0.2,
}


def log_likelihood(
    key: Key[Array, ""],
    logits_fn: Callable,
    prompt,
    answer,
    *,
    mask_id: int,
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float | int = 0.0,
    **scheme,
) -> float:
    """The estimated log-likelihood of an answer given its prompt: its ELBO, in nats.

    It is `log_likelihoods` of one request, which has the arguments (`scheme` are times, masks,
    weights and pseudo_count) and errors.
    """
    settings = {"mc_num": mc_num, "batch_size": batch_size, "cfg_scale": cfg_scale, **scheme}
    return float(
        log_likelihoods(key, logits_fn, [prompt], [answer], mask_id=mask_id, **settings)[0]
    )


def log_likelihoods(
    key: Key[Array, ""],
    logits_fn: Callable,
    prompts: Sequence,
    answers: Sequence,
    *,
    mask_id: int,
    mc_num: int = 128,
    batch_size: int = 16,
    cfg_scale: float | int = 0.0,
    times: str = "systematic",
    masks: str = "exact",
    weights: str = "plain",
    pseudo_count: float | int = 0.0,
    row_length: int | None = None,
    request_ids: Sequence[int] | np.ndarray | None = None,
    row_sharding: NamedSharding | None = None,
    report: Callable[[np.ndarray, np.ndarray], object] | None = None,
) -> np.ndarray:
    """The estimated log-likelihoods [N] float32 of N answers given their prompts, in nats.

    `prompts` and `answers` are lists of token ids of any lengths; prompts may be empty. Requests
    are packed into rows of `row_length` tokens, by default the length of the longest request. If a
    row then holds several requests or padding, `logits_fn` must also take `segment_ids` and
    `positions` [b, l], as the models of this library do.

    mc_num: draws for each answer, the model calls that it costs. If an answer has no more subsets
        (2^L - 1 for L tokens), each is computed once instead, and the value is the exact ELBO.
    batch_size: rows in one model call, whose logits take 4 bytes x batch_size x row_length x
        vocabulary, twice that with guidance. Only times="official" depends on it in its result.
    cfg_scale: s > 0 applies classifier-free guidance: u + (s + 1) (c - u), where u are the logits
        with the whole prompt masked.
    times, masks, weights, pseudo_count: names and a number of a `noise.Scheme`. The default is the
        published estimator without its bias.
    times="official": LLaDA's get_log_likelihood.py, rounding included, with mc_num // batch_size
        batches; the rest of mc_num is dropped, and no answer is enumerated. Every mask token of
        the request is counted, also one that stands in the prompt or in the answer.
    request_ids: [N] int, numbers that tell the draws of requests apart; by default 0, 1, ... A
        request with the same key and number has the same draws, however it is packed.
    row_sharding: how the rows are split over devices; batch_size must be a multiple of the parts.
    report: is called with the indices [n] of some requests and their values [n] once these are
        known, until it had all.

    Raises ValueError if an answer is empty, or if it holds the mask token and times are not
    "official"; if a request does not fit into a row; if settings do not fit together; and if the
    result is nan, because a token is not in the vocabulary or the logits are nan.
    """
    plan = _plan(mc_num, batch_size, times, masks, weights, pseudo_count)
    requests = checked(prompts, answers, mask_id, row_length)
    _check_answers(requests, None if plan.published else mask_id)
    ids = np.arange(len(requests)) if request_ids is None else np.asarray(request_ids)
    if ids.shape != (len(requests),):
        raise ValueError(f"request_ids: {ids.size} for {len(requests)} requests: give one for each")
    count = parts(row_sharding, batch_size)

    def started():
        for each, members in _by_plan(plan, requests).items():
            chosen = [requests[i] for i in members]
            settings = {
                "mask_id": mask_id,
                "cfg_scale": cfg_scale,
                "batch_size": batch_size,
                "plan": each,
                "width": max(len(answer) for _, answer in chosen),
            }
            most = max(1, batch_size // each.draws)
            for rows in pack(chosen, row_length=row_length, rows=most, multiple=count):
                at = members[rows.requests]
                given = place((rows, ids[at]), row_sharding)
                found = _estimate(key, traced(logits_fn), *given, **settings)
                yield at[rows.requests >= 0], rows.requests >= 0, found

    out = np.zeros(len(requests), np.float32)
    for at, there, found in in_order(started()):
        out[at] = to_host(found)[there]
        if report:
            report(at, out[at])
    if np.isnan(out).any():
        raise ValueError(
            f"the log-likelihood of request {int(np.isnan(out).argmax())} is nan: a token is not "
            "in the vocabulary of the model, or its logits are nan"
        )
    return out


def terms(
    logits_fn: Callable,
    prompt,
    answer,
    masks,
    num_masked,
    *,
    mask_id: int,
    batch_size: int = 16,
    cfg_scale: float | int = 0.0,
) -> np.ndarray:
    """The terms [N] of LLaDA's evaluation at given masks, in nats; the estimate is their mean.

    masks: bool [N, prompt + answer], the positions that the model does not see. All are counted,
        also those of the prompt.
    num_masked: [N], the number l of masks that were drawn; a term is L / l times the sum of the
        log-probabilities at the masks, for an answer of L tokens.

    Raises ValueError if shapes do not fit.
    """
    rows = one_row(prompt, answer, mask_id=mask_id)
    masks, num_masked = np.asarray(masks, bool), np.asarray(num_masked)
    if masks.shape != (*num_masked.shape, rows.tokens.shape[1]) or masks.ndim != 2:
        raise ValueError(
            f"masks have shape {list(masks.shape)}, num_masked {list(num_masked.shape)}: give "
            f"[N, {rows.tokens.shape[1]}] and [N] for this prompt and answer"
        )
    weights = np.broadcast_to((rows.lengths[0, 0] / num_masked)[:, None], masks.shape)
    drawn = noise.Noise(jnp.asarray(masks[:, None]), jnp.asarray(weights[:, None], jnp.float32))
    found = weighted(
        traced(logits_fn), rows, drawn, mask_id=mask_id, cfg_scale=cfg_scale, chunk=batch_size
    )
    return np.asarray(found[:, 0, 0])


def grid(length: int, batch: int) -> np.ndarray:
    """The numbers of masked tokens of LLaDA's evaluation, int [length, batch].

    Row k - 1 is one batch of draws for an answer of `length` tokens, if k is its random start.
    """
    return np.asarray(_grid(length, batch))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grid(length: int, batch: int) -> Int[Array, "k n"]:
    starts = (jnp.arange(length) + 0.5) / length
    u = jnp.broadcast_to(starts, (batch, length))
    times, _, _ = noise.TIMES["official"].draw(u, jnp.full(length, length))
    return jnp.ceil(times * length).astype(jnp.int32).T


@functools.partial(jax.jit, static_argnames=("mask_id", "cfg_scale", "chunk"))
def weighted(
    logits_fn, rows: Rows, drawn: noise.Noise, *, mask_id: int, cfg_scale: float, chunk: int
) -> Float32[Array, "n r s"]:
    """The term of each draw and request; the model processes `chunk` draws at a time."""

    def logps_fn(tokens, targets):
        logits = predict(logits_fn, rows, tokens, mask_id=mask_id, cfg_scale=cfg_scale)
        return elbo.token_logps(logits, targets)

    n = drawn.masked.shape[0]
    chunk = min(chunk, n)
    missing = -n % chunk  # draws that mask nothing fill the last chunk
    drawn = jax.tree.map(lambda x: jnp.pad(x, ((0, missing), (0, 0), (0, 0))), drawn)
    return elbo.packed_terms(
        logps_fn,
        drawn,
        rows.tokens,
        rows.segment_ids,
        num_segments=rows.lengths.shape[1],
        mask_id=mask_id,
        chunk=chunk,
    )[:n]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a request makes its draws."""

    draws: int
    scheme: noise.Scheme | None  # None: every subset of the answer once
    groups: int = 1  # independent repetitions of the scheme
    published: bool = False  # mask tokens of the text count


def _plan(mc_num, batch_size, times, masks, weights, pseudo_count) -> _Plan:
    for name, value in (("mc_num", mc_num), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if times != "official":
        scheme = noise.Scheme(
            mc_num, times=times, masks=masks, weights=weights, pseudo_count=pseudo_count
        )
        return _Plan(mc_num, scheme)
    if (masks, weights) != ("exact", "plain"):
        raise ValueError(
            f'times="official", masks={masks!r}, weights={weights!r}: the published estimator has '
            'masks="exact", weights="plain"; leave them, or take other times'
        )
    if mc_num < batch_size:
        raise ValueError(
            f'mc_num={mc_num} is less than batch_size={batch_size}: times="official" makes '
            "mc_num // batch_size batches; lower batch_size"
        )
    groups = mc_num // batch_size
    return _Plan(groups * batch_size, noise.Scheme(batch_size, times=times), groups, published=True)


def _by_plan(plan: _Plan, requests: Sequence[Request]) -> dict[_Plan, np.ndarray]:
    """The indices of the requests of each plan: short answers have fewer subsets than draws."""
    out: dict[_Plan, list[int]] = {}
    for i, (_, answer) in enumerate(requests):
        # 20 tokens have a million subsets.
        short = not plan.published and len(answer) < 20 and 2 ** len(answer) - 1 <= plan.draws
        each = _Plan(2 ** len(answer) - 1, None) if short else plan
        out.setdefault(each, []).append(i)
    return {each: np.array(members) for each, members in out.items()}


def _check_answers(requests: Sequence[Request], forbidden: int | None) -> None:
    for i, (_, answer) in enumerate(requests):
        if not answer.size:
            raise ValueError(f"answer {i} is empty: it has no likelihood; leave it out")
        if forbidden in answer:
            raise ValueError(
                f'answer {i} holds the mask token {forbidden}: only times="official" counts it'
            )


@functools.partial(jax.jit, static_argnames=("mask_id", "cfg_scale", "batch_size", "plan", "width"))
def _estimate(
    key,
    logits_fn,
    rows: Rows,
    ids: Int[Array, "r s"] | np.ndarray,
    *,
    mask_id: int,
    cfg_scale: float,
    batch_size: int,
    plan: _Plan,
    width: int,
) -> Float32[Array, "r s"]:
    """The estimates of the requests of rows; `width` is the longest answer."""
    drawn = _draw(key, rows, ids, plan, width, mask_id)
    chunk = min(plan.draws, max(1, batch_size // rows.tokens.shape[0]))
    found = weighted(logits_fn, rows, drawn, mask_id=mask_id, cfg_scale=cfg_scale, chunk=chunk)
    return found.mean(0)


def _draw(key, rows: Rows, ids, plan: _Plan, width: int, mask_id: int) -> noise.Noise:
    """The draws [n, r, l] of rows: each request makes its own, as if it were alone."""
    scheme = plan.scheme

    def of_request(number, length):
        if scheme is None:
            return _every_subset(width)

        def draw(key):
            answer, segment = jnp.arange(width) < length, jnp.ones(width, jnp.int32)
            return noise.draw_row(key, answer, segment, num_segments=1, scheme=scheme)

        drawn = jax.vmap(draw)(jax.random.split(jax.random.fold_in(key, number), plan.groups))
        return jax.tree.map(lambda x: x.reshape(-1, width), drawn)

    def placed(x):  # [r, s, n, width] to [n, r, l]
        at = (jnp.maximum(rows.segment_ids - 1, 0), jnp.maximum(rows.places, 0))
        return jnp.moveaxis(jax.vmap(lambda x, s, place: x[s, :, place])(x, *at), -1, 0)

    drawn = jax.vmap(jax.vmap(of_request))(ids, rows.lengths)
    masked, weights = placed(drawn.masked) & (rows.places >= 0), drawn.weights
    if plan.published:  # every mask token of the request counts L / l, as those that are drawn
        masked |= (rows.tokens == mask_id) & (rows.segment_ids > 0)
        weights = jnp.broadcast_to(weights.max(-1, keepdims=True), weights.shape)
    return noise.Noise(masked, placed(weights))


def _every_subset(length: int) -> noise.Noise:
    """Draws [n, length] whose mean is the exact ELBO: each subset but the empty one, once."""
    subsets = np.arange(1, 2**length)
    masked = ((subsets[:, None] >> np.arange(length)) & 1).astype(bool)
    weights = subsets.size * elbo.subset_weights(length)[masked.sum(-1)]
    return noise.Noise(
        jnp.asarray(masked), jnp.asarray(np.where(masked, weights[:, None], 0), jnp.float32)
    )
