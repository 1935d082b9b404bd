"""Confidence and commit rules: which predictions of a pass become tokens.

A confidence is one function and one entry of CONFIDENCES. A commit rule is one function and one
entry of COMMITS. Both work on the arrays of one row. Anyone may add entries, also from outside the
package, before the first call of `generate` that uses them.

Scores. A confidence function returns a score [l], higher is more confident. "low_confidence" is the
probability from a float32 softmax, as in LLaDA's code. Near 1 it rounds to exactly 1, and the order
of confident predictions is lost. The score of any other probability p is its log-odds
log p - log(1 - p), computed from the logits without the difference 1 - p. Log-odds keep the order
that other published code gets from a float64 softmax.
`CONFIDENCES[...].limit` maps a threshold to the scale of the score, `value` maps a score back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# A probability above 1 - 2^-53 rounds to 1 in float64, so a threshold of 1 asks for that.
_MOST = 53 * float(np.log(2))


def probability(
    logits: Float[Array, "l v"], candidates: Int[Array, " l"], noise: Any
) -> Float[Array, " l"]:
    """The log-odds of the candidate's probability: its logit - logsumexp of all other logits."""
    del noise
    is_candidate = jnp.arange(logits.shape[-1]) == candidates[:, None]
    own = jnp.max(jnp.where(is_candidate, logits, -jnp.inf), -1)
    return _difference(own, _logsumexp(jnp.where(is_candidate, -jnp.inf, logits)))


def low_confidence(
    logits: Float[Array, "l v"], candidates: Int[Array, " l"], noise: Any
) -> Float[Array, " l"]:
    """The candidate's probability, from a float32 softmax: rounds to exactly 1 near 1.

    `generate.py` of LLaDA and dLLM-Cache compute it like this.
    """
    del noise
    return jnp.take_along_axis(jax.nn.softmax(logits, -1), candidates[:, None], -1)[:, 0]


def random(
    logits: Float[Array, "l v"], candidates: Int[Array, " l"], noise: Float[Array, " l"]
) -> Float[Array, " l"]:
    """Uniform noise: predictions are committed in random order."""
    del logits, candidates
    return noise


def margin(
    logits: Float[Array, "l v"], candidates: Int[Array, " l"], noise: Any
) -> Float[Array, " l"]:
    """The log-odds of p1 - p2, the probabilities of the two most probable tokens.

    With z1 >= z2 the two highest logits and R = logsumexp of the others:
    (p1 - p2) / (1 - (p1 - p2)) = (e^z1 - e^z2) / (2 e^z2 + e^R).
    """
    del candidates, noise
    (first, second), places = (jnp.moveaxis(x, -1, 0) for x in jax.lax.top_k(logits, 2))
    top = (jnp.arange(logits.shape[-1]) == places[..., None]).any(0)
    rest = _logsumexp(jnp.where(top, -jnp.inf, logits))
    gap = _difference(first, second)
    above = first + jnp.log(-jnp.expm1(-gap))
    return _difference(above, jnp.logaddexp(second + jnp.log(2.0), rest))


def negative_entropy(
    logits: Float[Array, "l v"], candidates: Int[Array, " l"], noise: Any
) -> Float[Array, " l"]:
    """Minus the entropy of the softmax, in nats."""
    del candidates, noise
    return -entropy(logits)


def entropy(logits: Float[Array, "l v"]) -> Float[Array, " l"]:
    """The entropy of the softmax, in nats.

    The term of the most probable token is computed from the sum of the others, so that a small
    entropy keeps its relative precision.
    """
    best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, -1)[:, None]
    peak = jnp.max(logits, -1, keepdims=True)
    shifted = jnp.where(jnp.isneginf(logits), -jnp.inf, logits - peak)
    others = jnp.where(best, 0.0, jnp.exp(shifted))
    rest = jnp.sum(others, -1)
    # H = log Z - sum p z, with z = 0 for the best and Z = 1 + rest.
    weighted = jnp.sum(jnp.where(others > 0, others * shifted, 0.0), -1)
    return jnp.log1p(rest) - weighted / (1 + rest)


@dataclasses.dataclass(frozen=True)
class Confidence:
    """An entry of CONFIDENCES: the function, and what must be known of its score."""

    # (logits [l, v], candidates [l], noise [l] or None) -> score [l]
    score: Callable[[Array, Array, Any], Array]
    limit: Callable[[Any], Any]  # thresholds, float64 -> on the scale of the score
    value: Callable[[Array], Array]  # a score -> on the scale of thresholds
    random: bool = False  # needs noise, which is uniform on (0, 1)
    probability: bool = True  # values are in [0, 1]; the factor rules need that


def logit(p: Any) -> Any:
    """The log-odds of thresholds; -inf up to 0, and the most that float64 tells from 1 from there.

    With `Confidence.limit`, equality passes for 0 and for 1 as it does in float64.
    """
    p = np.asarray(p, np.float64)
    inside = np.clip(p, 1e-300, 1 - 2.0**-53)
    return np.where(p <= 0, -np.inf, np.minimum(np.log(inside) - np.log1p(-inside), _MOST))


def _same(x):
    return x


CONFIDENCES = {
    "low_confidence": Confidence(low_confidence, _same, _same),
    "random": Confidence(random, _same, _same, random=True),
    "probability": Confidence(probability, logit, jax.nn.sigmoid),
    "margin": Confidence(margin, logit, jax.nn.sigmoid),
    "entropy": Confidence(negative_entropy, _same, _same, probability=False),
}


class Row(NamedTuple):
    """What a commit rule sees of one row in one pass."""

    open: Bool[Array, " l"]  # the masks that compete in this pass
    score: Float[Array, " l"]
    rank: Int[Array, " l"]  # 0 for the most confident open position; l and more where not open
    quota: Int[Array, ""]  # how many the schedule commits; for a rule without steps no meaning
    entropy: Float[Array, " l"]  # of the softmax, in nats; zeros unless the rule asks for it
    stable: Int[Array, " l"]  # passes in a row that hardly changed the prediction (KLASS), else 0


Limit = Callable[[Any], Any]


def schedule(row: Row, numbers: Any, limit: Limit) -> Bool[Array, " l"]:
    """Commits the `quota` most confident: a block of m masks has s steps of m // s or one more."""
    del numbers, limit
    return row.open & (row.rank < row.quota)


def threshold(row: Row, numbers: Any, limit: Limit) -> Bool[Array, " l"]:
    """Commits all with confidence >= threshold, and at least the most confident.

    Source: Fast-dLLM, arXiv:2505.22618.
    """
    enough = row.score >= np.float32(limit(numbers.threshold))
    return row.open & (enough | (row.rank == 0))


def factor(row: Row, numbers: Any, limit: Limit) -> Bool[Array, " l"]:
    """Commits the j most confident, for the largest j with (j + 1)(1 - c_j) < factor.

    c_1 >= c_2 >= ... are the confidences of the open positions. At least one is committed.
    Source: Fast-dLLM (arXiv:2505.22618), equation of the factor strategy.
    """
    j = np.arange(1, row.score.shape[0] + 1)
    least = 1 - np.float64(numbers.factor) / (j + 1)
    passes = (least < 0) | (_sorted(row) > np.asarray(limit(least), np.float32))
    passes &= j <= jnp.sum(row.open)
    return row.open & (row.rank < jnp.maximum(jnp.max(jnp.where(passes, j, 0)), 1))


def factor_published(row: Row, numbers: Any, limit: Limit) -> Bool[Array, " l"]:
    """Commits up to the first j with c_j < 1 - factor / (j + 1), as the published code does.

    Two slips of that code are kept: it looks at the first failure only, and if that is the last
    open position, commits it as well. The first position always passes.
    Source: Fast-dLLM `v1/llada/generate.py`.
    """
    j = np.arange(1, row.score.shape[0] + 1)
    least = np.where(j == 1, -1.0, 1 - np.float64(numbers.factor) / (j + 1))
    count = jnp.sum(row.open)
    fails = (j <= count) & (_sorted(row) < np.asarray(limit(least), np.float32))
    before = jnp.where(jnp.any(fails), jnp.argmax(fails), count)
    return row.open & (row.rank < jnp.where(before == count - 1, count, before))


def entropy_bounded(row: Row, numbers: Any, limit: Limit) -> Bool[Array, " l"]:
    """Commits the k most confident, for the largest k with sum H - max H <= entropy_budget.

    H are the entropies of the k predictions in nats; sum H - max H bounds the mutual information
    that sampling them independently ignores. At least one is committed.
    Source: EB-Sampler (arXiv:2505.24857), equation 2.
    """
    del limit
    count = jnp.sum(row.open)
    h = jnp.where(jnp.arange(row.score.shape[0]) < count, _sorted(row, row.entropy), 0.0)
    most = jax.lax.cummax(h)
    # sum H - max H grows by min(H_k, the largest before): a sum without a difference.
    lost = jnp.cumsum(jnp.minimum(h, jnp.concatenate([jnp.zeros(1), most[:-1]])))
    k = jnp.sum(lost <= np.float32(numbers.entropy_budget))
    return row.open & (row.rank < k)


# KLASS: the last so many KL divergences must be small (the published scripts' value).
STABLE_PASSES = 2


def klass(row: Row, numbers: Any, limit: Limit) -> Bool[Array, " l"]:
    """Commits all that are confident (>= threshold) and stable, and at least the most confident.

    A position is stable after two passes of the block whose prediction p has KL(p || p of the pass
    before) < kl_threshold, in nats. The published code looks beyond the block's first pass.
    Source: KLASS (arXiv:2511.05664).
    """
    confident = row.score >= np.float32(limit(numbers.threshold))
    return row.open & confident & (row.stable >= STABLE_PASSES)


def divergence(logits: Float[Array, "l v"], before: Float[Array, "l v"]) -> Float[Array, " l"]:
    """KL(softmax(logits) || softmax(before)), in nats."""
    now, then = jax.nn.log_softmax(logits, -1), jax.nn.log_softmax(before, -1)
    # Where p = 0 a token adds nothing, though the difference may be nan.
    return jnp.sum(jnp.where(jnp.isneginf(now), 0.0, jnp.exp(now) * (now - then)), -1)


def wino(row: Row, numbers: Any, limit: Limit) -> Bool[Array, " l"]:
    """Commits all with confidence > threshold, the most confident first, up to a number.

    The number is 0.7 of the open positions, at least 5 and at most 20. At least one is committed.
    Source: WINO (arXiv:2507.18578), as published in `decoding_wino`.
    """
    most = jnp.clip((0.7 * jnp.sum(row.open)).astype(jnp.int32), 5, 20)
    enough = row.score > np.float32(limit(numbers.threshold))
    return row.open & ((enough & (row.rank < most)) | (row.rank == 0))


@dataclasses.dataclass(frozen=True)
class Commit:
    """An entry of COMMITS: the function, and what `generate` must know of it."""

    # (row, numbers, limit) -> the positions to commit [l]. `numbers` are the Settings, for those
    # that the rule needs; `limit` is that of the confidence.
    choose: Callable[[Row, Any, Limit], Array]
    needs: tuple[str, ...] = ()  # the settings that must be given
    entropy: bool = False  # reads row.entropy
    probability: bool = False  # only for a confidence with values in [0, 1]
    scheduled: bool = False  # a block ends after its steps: `steps` must divide over the blocks
    stable: bool = False  # reads row.stable; the logits of the pass before are kept


COMMITS = {
    "schedule": Commit(schedule, scheduled=True),
    "threshold": Commit(threshold, needs=("threshold",)),
    "factor": Commit(factor, needs=("factor",), probability=True),
    "factor_published": Commit(factor_published, needs=("factor",), probability=True),
    "entropy": Commit(entropy_bounded, needs=("entropy_budget",), entropy=True),
    "klass": Commit(klass, needs=("threshold", "kl_threshold"), stable=True),
    "wino": Commit(wino, needs=("threshold",)),
}


def _sorted(row: Row, values=None) -> Float[Array, " l"]:
    """The values (by default the scores) of the open positions, most confident first."""
    values = row.score if values is None else values
    length = row.score.shape[0]
    return jnp.full(length, -jnp.inf).at[row.rank].set(values, mode="drop")


def _logsumexp(x: Float[Array, "l v"]) -> Float[Array, " l"]:
    """The logsumexp over the last axis; -inf where all are -inf."""
    peak = jnp.max(x, -1)
    finite = jnp.where(jnp.isneginf(peak), 0.0, peak)
    return finite + jnp.log(jnp.sum(jnp.exp(x - finite[:, None]), -1))


def _difference(a: Array, b: Array) -> Array:
    """The difference a - b, where -inf minus anything is -inf."""
    return jnp.where(jnp.isneginf(a), -jnp.inf, a - b)
