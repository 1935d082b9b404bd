"""The laboratory: how much ELBO estimates, scores, losses and gradients vary, and why. `python -m llada_jax.variance`.

Everything here takes any model. For example, one whose log-probabilities depend on how many tokens are masked alone:
all variance then comes from the time (V_t), and none from which tokens are masked (V_yt).

    >>> import jax, jax.numpy as jnp
    >>> from llada_jax import elbo, variance
    >>> def logits_fn(tokens):  # three tokens and the mask, id 3
    ...     masks = jnp.sum(tokens == 3, -1)[..., None, None]
    ...     return jnp.broadcast_to(masks * jnp.array([1.0, 0.0, 0.0, -jnp.inf]), (*tokens.shape, 4))
    >>> tokens, response = jnp.zeros((1, 6), int), jnp.arange(6)[None] >= 2
    >>> estimate = elbo.estimate_elbo(jax.random.key(0), logits_fn, tokens, response, mask_id=3, n_t=512, n_yt=2)
    >>> found = variance.decompose(estimate.terms)
    >>> per_count = jnp.array([4 * (l - jnp.log(jnp.exp(l) + 2)) for l in range(1, 5)])  # the term at l masked tokens
    >>> bool(jnp.abs(found.v_t - per_count.var()) < 4 * found.v_t_stderr), bool(jnp.abs(found.v_yt) < 1e-6)
    (True, True)
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from llada_jax import elbo, losses, noise

# (params, batch, noise) -> terms [n, r, s] of every draw and segment of packed preference rows.
TermsFn = Callable[[Any, Any, noise.Noise], Array]
EVERYTHING = "all parameters"
TRUTH_EPOCH, NESTED_EPOCH = 1_000_000, 2_000_000  # passes over the data whose noise no repeat draws


# ---- law of total variance


@flax.struct.dataclass
class Decomposition:
    """Lemma 5: the variance of one term is V_t, of its mean given the time, plus V_yt, the mean of that given it."""

    v_t: Float[Array, "*b"]
    v_yt: Float[Array, "*b"]
    v_t_stderr: Float[Array, "*b"]
    v_yt_stderr: Float[Array, "*b"]


def decompose(terms: Float[Array, "t y *b"]) -> Decomposition:
    """V_t and V_yt from n_t x n_yt nested draws, unbiased, with jackknife standard errors over the times.

    Unbiased, V_t may come out below 0. ValueError for fewer than three times or two samples at each.
    """
    n_t, n_yt = terms.shape[:2]
    if n_t < 3 or n_yt < 2:
        raise ValueError(f"n_t={n_t}, n_yt={n_yt} nested draws: V_t and V_yt need at least 3 times and 2 samples")
    within, means = terms.var(1, ddof=1), terms.mean(1)
    deviation = jnp.square(means - means.mean(0))
    between = deviation.sum(0) / (n_t - 1)
    # Without one time each: what is left of the sum of squares.
    between_but = (deviation.sum(0) - n_t / (n_t - 1) * deviation) / (n_t - 2)
    within_but = (within.sum(0) - within) / (n_t - 1)

    def jackknife(values):
        return jnp.sqrt((n_t - 1) * jnp.square(values - values.mean(0)).mean(0))

    return Decomposition(
        between - within.mean(0) / n_yt,
        within.mean(0),
        jackknife(between_but - within_but / n_yt),
        jackknife(within_but),
    )


def predicted_variance(v_t: Array | float, v_yt: Array | float, n_t: int, n_yt: int) -> Array | float:
    """Lemma 5: the variance of the mean of n_t x n_yt terms with iid times and plain weights."""
    return v_t / n_t + v_yt / (n_t * n_yt)


def decompose_norms(squares: np.ndarray, of_times: np.ndarray, of_all: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Traces V_t and V_yt [p] of n_t x n_yt nested gradients, as `decompose` finds them, from squared norms of p parts.

    A gradient comes in k independent summands, whose variances add up: `squares` [t, y, k, p] of each, `of_times`
    [t, k, p] of the sum at each time, `of_all` [k, p] of the sum of all.
    """
    n_t, n_yt = squares.shape[:2]
    within = (squares.sum(1) - of_times / n_yt).mean(0) / (n_yt - 1)
    between = (of_times.sum(0) - of_all / n_t) / n_yt**2 / (n_t - 1)
    return (between - within / n_yt).sum(0), within.sum(0)


# ---- moments of gradients, streamed


@flax.struct.dataclass
class Moments:
    """The running sum of gradients, and of their squared norms, of every named part: never a second gradient.

    Fields are Any because a pytree of this shape may also hold shardings.
    """

    total: Any  # like a gradient, float32
    squares: Any  # float32 [p]
    count: Any  # float32 []

    @classmethod
    def zero(cls, params: Any, parts: tuple[str, ...]) -> "Moments":
        """No gradient so far; sums lie where the parameters lie."""
        total = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        return cls(total, jnp.zeros(len(parts)), jnp.zeros(()))

    def add(self, grads: Any, parts: tuple[str, ...]) -> "Moments":
        """One gradient more."""
        total = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), self.total, grads)
        return Moments(total, self.squares + squared_norms(grads, parts), self.count + 1)

    def trace(self, parts: tuple[str, ...]) -> Float32[Array, " p"]:
        """tr Var of one gradient, unbiased, of every part."""
        return (self.squares - squared_norms(self.total, parts) / self.count) / (self.count - 1)


def squared_norms(tree: Any, parts: tuple[str, ...]) -> Float32[Array, " p"]:
    """|gradient|^2 of every part: EVERYTHING, a path as "blocks/up_proj/kernel", or "...[0]", its first index (layer).

    ValueError for a part that is not there.
    """
    leaves = {"/".join(str(getattr(k, "key", k)) for k in path): x for path, x in jax.tree.leaves_with_path(tree)}

    def norm(part):
        if part == EVERYTHING:
            return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves.values())
        name, index = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", part).groups()
        if name not in leaves or (index and int(index) >= leaves[name].shape[0]):
            raise ValueError(f"the model has no parameter {part!r}; it has {', '.join(sorted(leaves))}")
        x = leaves[name][int(index)] if index else leaves[name]
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    return jnp.stack([norm(part) for part in parts])


# ---- one estimate of scores, loss and gradient of a batch


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One column of a table: a scheme, and whether the reference policy sees the policy's noise."""

    scheme: noise.Scheme
    share_noise: bool = True
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is estimated: preference scores of packed rows under `terms_fn`, and the gradient of their mean loss."""

    terms_fn: TermsFn
    num_segments: int
    beta: float = 0.2
    seed: int = 0
    parts: tuple[str, ...] = (EVERYTHING,)
    gradient: bool = True
    one_pair: bool = False  # every batch holds one: its score's gradient, and winner's and loser's apart, can be had

    def zero(self, params: Any) -> tuple[Moments, ...] | None:
        """Moments of no gradient so far, as `repeat` and `nested` count them; None where none are asked for."""
        return tuple(Moments.zero(params, self.parts) for _ in range(1 + self.one_pair)) if self.gradient else None

    def draw(self, batch: Any, scheme: noise.Scheme, epoch: Array, stream: str) -> noise.Noise:
        """Noise of repeat `epoch` of a batch: a function of seed, stream, row and repeat."""
        keys = noise.row_keys(noise.stream_key(self.seed, stream), batch.row_ids, jnp.full_like(batch.row_ids, epoch))
        return noise.draw_rows(
            keys, batch.response_mask, batch.segment_ids, num_segments=self.num_segments, scheme=scheme
        )

    def is_pair(self, batch: Any) -> Array:
        """[r, p]: which places of a row hold a pair."""
        winners = jnp.arange(1, self.num_segments, 2)
        return jnp.any((batch.segment_ids[..., None] == winners) & batch.response_mask[..., None], axis=1)

    def sums(self, params: Any, reference: Any, batch: Any, epoch: Array, estimator: Estimator):
        """The mean preference loss of the batch's pairs, the sum of their scores, ELBOs [2, r, s] of both models."""
        drawn = self.draw(batch, estimator.scheme, epoch, "evaluate")
        other = drawn if estimator.share_noise else self.draw(batch, estimator.scheme, epoch, "reference")
        policy = self.terms_fn(params, batch, drawn).mean(0)
        frozen = jax.lax.stop_gradient(self.terms_fn(reference, batch, other).mean(0))
        loss, metrics = losses.preference_loss(
            policy[:, 0::2], policy[:, 1::2], frozen[:, 0::2], frozen[:, 1::2], beta=self.beta
        )
        pairs = self.is_pair(batch)
        loss, score = (jnp.sum(jnp.where(pairs, x, 0)) for x in (loss, metrics["rewards/margins"]))
        return loss / jnp.maximum(pairs.sum(), 1), score, jnp.stack([policy, frozen])

    def estimate(self, params: Any, reference: Any, batch: Any, epoch: Array, estimator: Estimator):
        """(gradients, ELBOs of policy and reference [2, r, s]); None for gradients where none are asked for.

        Gradients are that of the mean loss and, for one pair, that of its score: the loss has it times
        -sigmoid(-score), which is 0 where the score is large.
        """
        if not self.gradient:
            return None, self.sums(params, reference, batch, epoch, estimator)[2]

        def differentiated(params):
            loss, score, elbos = self.sums(params, reference, batch, epoch, estimator)
            return (score if self.one_pair else loss), (score, elbos)

        grads, (score, elbos) = jax.grad(differentiated, has_aux=True)(params)
        if not self.one_pair:
            return (grads,), elbos
        slope = -jax.nn.sigmoid(-score)
        return (jax.tree.map(lambda g: slope.astype(g.dtype) * g, grads), grads), elbos

    def repeat(self, params, reference, batch, epoch, moments, truth: Any, *, estimator: Estimator):
        """One repeat: (ELBOs [2, r, s], moments of the gradients, norms of every part).

        Norms: "error", of the loss's gradient - truth; for one pair "score gradient" as well.
        """
        gradients, elbos = self.estimate(params, reference, batch, epoch, estimator)
        if gradients is None:
            return elbos, None, None
        errors = jax.tree.map(lambda g, t: g.astype(jnp.float32) - t, gradients[0], truth)
        norms = {"error": jnp.sqrt(squared_norms(errors, self.parts))}
        if self.one_pair:
            norms["score gradient"] = jnp.sqrt(squared_norms(gradients[1], self.parts))
        return elbos, tuple(m.add(g, self.parts) for m, g in zip(moments, gradients, strict=True)), norms

    def nested(self, params, reference, batch, epoch, scores: Array, *, n_yt: int):
        """One time of the nested draws: terms [2, y, r, s], shares l / L [y, r, s], moments and squares of gradients.

        The gradient is that of the loss made linear at `scores` [r, p], so that it is a mean of terms and Lemma 5
        holds for it: V_t and V_yt then predict the gradient's variance where the score's error is small. For one pair
        it comes in two independent summands, winner's and loser's, each with its time: squared norms [y, 2, p].
        """
        drawn = self.draw(batch, noise.Scheme(1, n_yt), epoch, "evaluate")
        slope = -jax.nn.sigmoid(-scores) * self.beta * self.is_pair(batch)
        slope = slope / jnp.maximum(self.is_pair(batch).sum(), 1)

        def linear(params, one):
            terms = self.terms_fn(params, batch, one)[0]
            winner, loser = jnp.sum(slope * terms[:, 0::2]), -jnp.sum(slope * terms[:, 1::2])
            return jnp.stack([winner, loser] if self.one_pair else [winner + loser]), terms

        def step(moments, one):
            one = jax.tree.map(lambda x: x[None], one)
            frozen = self.terms_fn(reference, batch, one)[0]
            if not self.gradient:
                return None, (jnp.stack([linear(params, one)[1], frozen]), None)
            summands, pull, terms = jax.vjp(lambda params: linear(params, one), params, has_aux=True)
            grads = [pull(row)[0] for row in jnp.eye(len(summands))]
            squares = jnp.stack([squared_norms(g, self.parts) for g in grads])
            moments = tuple(m.add(g, self.parts) for m, g in zip(moments, grads, strict=True))
            return moments, (jnp.stack([terms, frozen]), squares)

        moments, (terms, squares) = jax.lax.scan(step, self.zero(params), drawn)
        inside = batch.segment_ids[..., None] == jnp.arange(1, self.num_segments + 1)
        size = jnp.sum(inside & batch.response_mask[..., None], axis=1)
        masked = jnp.sum(inside & drawn.masked[..., None], axis=2)
        return jnp.moveaxis(terms, 0, 1), masked / jnp.maximum(size, 1), moments, squares


def terms_of(logits_fn: Callable[[Any, Array], Array], *, mask_id: int, num_segments: int) -> TermsFn:
    """A TermsFn for `logits_fn(params, tokens [..., l]) -> logits`, for rows that it takes as they are."""

    def terms_fn(params, batch, drawn):
        def logps_fn(tokens, targets):
            return elbo.token_logps(logits_fn(params, tokens), targets)

        return elbo.packed_terms(
            logps_fn, drawn, batch.tokens, batch.segment_ids, num_segments=num_segments, mask_id=mask_id
        )

    return terms_fn


# ---- statistics of repeats, in numpy; every function returns one number a pair, to average and to bootstrap


def scores_of(elbos: np.ndarray, beta: float) -> np.ndarray:
    """ELBOs [..., 2 (policy, reference), q, 2 (winner, loser)] to scores [..., q] (equation 8)."""
    ratio = elbos[..., 0, :, :] - elbos[..., 1, :, :]
    return beta * (ratio[..., 0] - ratio[..., 1])


def loss_of(scores: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -scores)


def pair_statistics(elbos: np.ndarray, truth: np.ndarray, beta: float) -> dict[str, np.ndarray]:
    """Of repeats [k, 2, q, 2] and true ELBOs [2, q, 2]: variances, biases and the terms of Eq. 9, [q] each."""
    scores, true_scores = scores_of(elbos, beta), scores_of(truth, beta)
    loss, true_loss = loss_of(scores), loss_of(true_scores)
    each = elbos.var(0, ddof=1)  # [2, q, 2]
    centred = elbos - elbos.mean(0)
    covariance = (centred[:, 0] * centred[:, 1]).sum(0) / (len(elbos) - 1)
    return {
        "score variance": scores.var(0, ddof=1),
        "score bias": scores.mean(0) - true_scores,
        "loss variance": loss.var(0, ddof=1),
        "loss bias": loss.mean(0) - true_loss,
        "loss error": np.abs(loss - true_loss).mean(0),  # Theorem 1, left-hand side
        "policy ELBO variance": each[0].mean(-1),
        "reference ELBO variance": each[1].mean(-1),
        "covariance": covariance.mean(-1),
        "Eq. 9": beta**2 * (each[0] + each[1] - 2 * covariance).sum(-1),
    }


def theorem_4(score_variance: np.ndarray, trace: np.ndarray, largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the mean error and of tr Var of the gradient of one pair's loss, `trace` being tr Var grad s_hat.

    C = `largest` bounds |grad s_hat|. The error: |sigma(-s_hat) - sigma(-s)| <= |s_hat - s| / 4 times |grad s| <= C,
    and sigma <= 1 times |grad s_hat - grad s|. The variance: it is half the mean over pairs of repeats of
    |sigma_1 g_1 - sigma_2 g_2|^2, each at most |g_1 - g_2|^2 + C^2 / 8 (s_1 - s_2)^2, so that the bound holds for the
    sample variances of repeats whose own largest norm is C, and not for a C that bounds the true |grad s| alone.
    """
    return (
        largest / 4 * np.sqrt(score_variance) + np.sqrt(trace),
        np.square(largest) / 8 * score_variance + trace,
    )


def best_times(squares: np.ndarray, shares: np.ndarray, variances: np.ndarray) -> Callable[[np.ndarray], float]:
    """The least variance of independent times of any one density over that of uniform times, a statistic of pairs.

    From squared (norms of) terms and masked shares l / L [t, y, q, 2 (winner, loser)] at uniform times, and the terms'
    variances [q], mean of the two. A draw counts 1 / density: the second moment E[square / density] is least at a
    density that goes as sqrt(E[square | l]), where it is (E_l sqrt(E[square | l]))^2. The density is alike for all
    pairs and constant on each of 20 even parts of sqrt(l / L), narrow where the square, about as 1 / l, changes most:
    for exactly 1 / l the second moment comes out 0.5 % too high at L = 1000. Few draws in a part let it come out too
    low.
    """
    part = np.minimum(np.sqrt(shares) * 20 - 1e-6, 19).astype(int)[..., None] == np.arange(20)
    counts, sums = part.sum((0, 1, 3)), (part * squares[..., None]).sum((0, 1, 3))  # [q, 20]

    def ratio(chosen):
        count, total = counts[chosen].sum(0), sums[chosen].sum(0)
        uniform, best = total.sum() / count.sum(), np.square(np.sqrt(count * total).sum() / count.sum())
        variance = variances[chosen].mean()
        return (best - (uniform - variance)) / variance

    return ratio


def neyman(variances: np.ndarray) -> Callable[[np.ndarray], float]:
    """The variance of a mean over pairs whose calls go as the roots of their `variances` [q], over an equal share each.

    A statistic of pairs, and a limit: calls are whole numbers, and variances estimated from k repeats differ more than
    the true ones, which lets it come out too low (by 1 / (2 k - 2) for one normal parameter, by less for many).
    """
    variances = np.maximum(variances, 0)
    return lambda chosen: np.square(np.sqrt(variances[chosen]).mean()) / variances[chosen].mean()


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, *, seed: int = 0, draws: int = 1000):
    """(value, 2.5 % and 97.5 % quantiles) of `statistic(indices)` over resampled 0..count-1 (pairs or batches)."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(draws)]
    return float(statistic(np.arange(count))), *(float(q) for q in np.quantile(values, (0.025, 0.975)))


if __name__ == "__main__":
    from llada_jax import variance_run

    variance_run.main()
