"""One estimate of scores, loss and gradient for a batch of preference pairs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llada_jax import elbo, losses, noise
from llada_jax.variance.gradients import EVERYTHING, Moments, squared_norms

# (params, batch, noise) -> terms [n, r, s] of all draws and segments of packed preference rows.
TermsFn = Callable[[Any, Any, noise.Noise], Array]


# Epochs of the truth and of the nested draws. Repeats are epochs 0, 1, ..., with other noise.
TRUTH_EPOCH, NESTED_EPOCH = 1_000_000, 2_000_000


@dataclasses.dataclass(frozen=True)
class Estimator:
    """One column of a table: a scheme, and whether the reference policy gets the policy's noise."""

    scheme: noise.Scheme
    share_noise: bool = True
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is estimated: preference scores of packed rows, and the gradient of their mean loss.

    `terms_fn` computes the ELBO terms. `parts` are the parts of the gradient to measure (see
    `squared_norms`).
    """

    terms_fn: TermsFn
    beta: float | Array = 0.2  # an array where it is an argument of a compiled program
    seed: int | Array = 0
    parts: tuple[str, ...] = (EVERYTHING,)
    gradient: bool = True
    # Every batch holds one pair. Then the gradient of its score is measured too, and `nested`
    # separates the gradients of winner and loser.
    one_pair: bool = False

    def zero(self, params: Any) -> tuple[Moments, ...] | None:
        """Empty moments for `repeat` and `nested`; None if no gradients are measured."""
        return (
            tuple(Moments.zero(params, self.parts) for _ in range(1 + self.one_pair))
            if self.gradient
            else None
        )

    def draw(self, batch: Any, scheme: noise.Scheme, epoch: Array, stream: str) -> noise.Noise:
        """The noise of repeat `epoch` of a batch: a function of seed, stream, row and repeat."""
        keys = noise.row_keys(
            noise.stream_key(self.seed, stream), batch.row_ids, jnp.full_like(batch.row_ids, epoch)
        )
        return noise.draw_rows(
            keys,
            batch.response_mask,
            batch.segment_ids,
            num_segments=batch.num_segments,
            scheme=scheme,
        )

    def is_pair(self, batch: Any) -> Array:
        """[r, p]: True where the row has its p-th pair."""
        winners = jnp.arange(1, batch.num_segments, 2)
        return jnp.any(
            (batch.segment_ids[..., None] == winners) & batch.response_mask[..., None], axis=1
        )

    def sums(self, params: Any, reference: Any, batch: Any, epoch: Array, estimator: Estimator):
        """(mean preference loss of the pairs, sum of their scores, ELBOs [2, r, s]).

        The ELBOs are those of the policy and of the reference.
        """
        drawn = self.draw(batch, estimator.scheme, epoch, "evaluate")
        other = (
            drawn
            if estimator.share_noise
            else self.draw(batch, estimator.scheme, epoch, "reference")
        )
        policy = self.terms_fn(params, batch, drawn).mean(0)
        frozen = jax.lax.stop_gradient(self.terms_fn(reference, batch, other).mean(0))
        loss, metrics = losses.preference_loss(
            policy[:, 0::2], policy[:, 1::2], frozen[:, 0::2], frozen[:, 1::2], beta=self.beta
        )
        pairs = self.is_pair(batch)
        loss, score = (jnp.sum(jnp.where(pairs, x, 0)) for x in (loss, metrics["rewards/margins"]))
        return loss / jnp.maximum(pairs.sum(), 1), score, jnp.stack([policy, frozen])

    def estimate(self, params: Any, reference: Any, batch: Any, epoch: Array, estimator: Estimator):
        """(gradients, ELBOs [2, r, s] of policy and reference).

        The gradients are a tuple: of the mean loss and, for one pair, of its score. They are None
        if no gradients are measured. For one pair the score is differentiated, and the gradient
        of the loss is -sigmoid(-score) times the gradient of the score. The other way round would
        divide by this factor, which is 0 if the score is large.
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

        The norms are "error", of the loss's gradient minus `truth`, and for one pair also
        "score gradient".
        """
        gradients, elbos = self.estimate(params, reference, batch, epoch, estimator)
        if gradients is None:
            return elbos, None, None
        errors = jax.tree.map(lambda g, t: g.astype(jnp.float32) - t, gradients[0], truth)
        norms = {"error": jnp.sqrt(squared_norms(errors, self.parts))}
        if self.one_pair:
            norms["score gradient"] = jnp.sqrt(squared_norms(gradients[1], self.parts))
        return (
            elbos,
            tuple(m.add(g, self.parts) for m, g in zip(moments, gradients, strict=True)),
            norms,
        )

    def nested(self, params, reference, batch, epoch, scores: Array, *, n_yt: int):
        """The nested draws at one time: (terms, masked shares, moments, squared norms).

        Shapes: terms [2 (policy, reference), y, r, s], shares l / L [y, r, s], squared norms of
        the gradients [y, k, p].

        The gradient is that of the loss linearised at `scores` [r, p]. It is then a mean of terms,
        so Lemma 5 holds for it, and V_t and V_yt predict the variance of the gradient if the error
        of the score is small. For one pair the gradient is kept as k = 2 independent summands,
        winner and loser, each with its own time. Otherwise k = 1.
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
            summands, pull, terms = jax.vjp(
                lambda params: linear(params, one), params, has_aux=True
            )
            grads = [pull(row)[0] for row in jnp.eye(len(summands))]
            squares = jnp.stack([squared_norms(g, self.parts) for g in grads])
            moments = tuple(m.add(g, self.parts) for m, g in zip(moments, grads, strict=True))
            return moments, (jnp.stack([terms, frozen]), squares)

        moments, (terms, squares) = jax.lax.scan(step, self.zero(params), drawn)
        inside = batch.segment_ids[..., None] == jnp.arange(1, batch.num_segments + 1)
        size = jnp.sum(inside & batch.response_mask[..., None], axis=1)
        masked = jnp.sum(inside & drawn.masked[..., None], axis=2)
        return jnp.moveaxis(terms, 0, 1), masked / jnp.maximum(size, 1), moments, squares


def terms_of(logits_fn: Callable[[Any, Array], Array], *, mask_id: int) -> TermsFn:
    """A TermsFn for `logits_fn(params, tokens [..., l]) -> logits`.

    `logits_fn` gets the tokens of whole rows, without segment ids and positions.
    """

    def terms_fn(params, batch, drawn):
        def logps_fn(tokens, targets):
            return elbo.token_logps(logits_fn(params, tokens), targets)

        return elbo.packed_terms(
            logps_fn,
            drawn,
            batch.tokens,
            batch.segment_ids,
            num_segments=batch.num_segments,
            mask_id=mask_id,
        )

    return terms_fn
