"""The training steps, pure: (state, batch, ...) -> (state, metrics). train.py jits, shards and donates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32

from llada_jax import elbo, losses, noise
from llada_jax.batch import Batch
from llada_jax.model import LLaDA
from llada_jax.state import TrainState

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Preference:
    """What VRPO computes: the loss, how its ELBOs are estimated, and how that is split."""

    beta: float = 0.2
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.05  # of the denoising loss on the winner, from the same terms
    share_noise: bool = True  # the paper's antithetic sampling
    scheme: noise.Scheme = noise.Scheme()
    mc_chunk: int = 0  # draws at a time, 0: all
    seed: int = 0
    stream: str = "policy"  # of the policy's noise

    def __post_init__(self):
        losses.check_preference(self.beta, self.kind, self.label_smoothing)
        if self.mc_chunk < 0 or (self.mc_chunk and self.scheme.n % self.mc_chunk):
            raise ValueError(f"mc_chunk={self.mc_chunk} does not divide n_t x n_yt = {self.scheme.n}: choose a divisor")


@dataclasses.dataclass(frozen=True)
class Denoising:
    """What SFT and pre-training compute: the published Bernoulli masks, and rows cut short for pre-training."""

    scheme: noise.Scheme = noise.Scheme(n_t=1, masks="bernoulli", eps=1e-3)
    crop_probability: float = 0.0  # of a row being cut to a uniformly random length
    mc_chunk: int = 0
    seed: int = 0


def model_terms(
    model: LLaDA, params: Any, batch: Batch, drawn: noise.Noise, *, num_segments: int, chunk: int = 0
) -> Float32[Array, "n r s"]:
    """The ELBO terms of every draw and segment of a batch under `params`."""

    def logps(params, *arrays):
        return model.apply({"params": params}, *arrays, method="token_logps")

    def draws_as_rows(count, batched, params, *arrays):
        if any(jax.tree.leaves(batched[0])):
            raise NotImplementedError("model_terms under a vmap over parameters: use jax.lax.map")
        # The vmapped draws of a row become neighbouring rows: one product has one axis of positions, where XLA's CPU
        # backend would transpose for the gradient of two. Rows stay outermost, as they are sharded.
        arrays = [
            jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) if by_draw else jnp.repeat(x, count, axis=0)
            for x, by_draw in zip(arrays, batched[1:], strict=True)
        ]
        found = logps(params, *arrays)
        return jnp.swapaxes(found.reshape(-1, count, *found.shape[1:]), 0, 1), True

    vmapped = jax.custom_batching.custom_vmap(logps)
    vmapped.def_vmap(draws_as_rows)

    def logps_fn(tokens, targets):
        return vmapped(params, tokens, targets, batch.segment_ids, batch.positions)

    return elbo.packed_terms(
        logps_fn,
        drawn,
        batch.tokens,
        batch.segment_ids,
        num_segments=num_segments,
        mask_id=model.config.mask_token_id,
        chunk=chunk,
    )


def draw(batch: Batch, scheme: noise.Scheme, *, seed: int, stream: str, num_segments: int) -> noise.Noise:
    """The noise of a batch: a function of seed, stream, row, epoch and draw alone."""
    keys = noise.row_keys(noise.stream_key(seed, stream), batch.row_ids, batch.epochs)
    return noise.draw_rows(keys, batch.response_mask, batch.segment_ids, num_segments=num_segments, scheme=scheme)


def reference_terms(
    params: Any, batch: Batch, *, model: LLaDA, settings: Preference, num_segments: int
) -> Float32[Array, "r n s"]:
    """The reference policy's terms at the masks that `vrpo_step` draws for this batch: what a cache stores by row."""
    stream = settings.stream if settings.share_noise else "reference"
    drawn = draw(batch, settings.scheme, seed=settings.seed, stream=stream, num_segments=num_segments)
    terms = model_terms(model, params, batch, drawn, num_segments=num_segments, chunk=settings.mc_chunk)
    return jax.lax.stop_gradient(jnp.moveaxis(terms, 0, 1))


def segment_lengths(batch: Batch, num_segments: int) -> Float32[Array, "r s"]:
    """Response tokens of each segment."""
    of_segment = batch.segment_ids[..., None] == jnp.arange(1, num_segments + 1)
    return jnp.sum(of_segment & batch.response_mask[..., None], axis=1).astype(jnp.float32)


def score_pairs(
    params: Any,
    batch: Batch,
    reference: Float32[Array, "r n s"],
    *,
    model: LLaDA,
    settings: Preference,
    num_segments: int,
) -> tuple[Metrics, Bool[Array, "r p"]]:
    """Loss and metrics of every pair, [r, p] each, and which of the p places of a row hold a pair (equations 6, 8).

    `reference` holds the terms of the reference policy for this batch (`reference_terms`). "score/mc_variance" is there
    where a scheme's own draws tell it (`elbo.error_is_known`).
    """
    scheme = settings.scheme
    drawn = draw(batch, scheme, seed=settings.seed, stream=settings.stream, num_segments=num_segments)
    terms = model_terms(model, params, batch, drawn, num_segments=num_segments, chunk=settings.mc_chunk)
    reference = jnp.moveaxis(reference, 1, 0)
    policy, frozen = terms.mean(0), reference.mean(0)
    lengths = segment_lengths(batch, num_segments)
    loss, metrics = losses.preference_loss(
        policy[:, 0::2],
        policy[:, 1::2],
        frozen[:, 0::2],
        frozen[:, 1::2],
        beta=settings.beta,
        kind=settings.kind,
        label_smoothing=settings.label_smoothing,
    )
    denoising = losses.denoising_loss(policy, lengths)
    metrics |= {
        "loss/preference": loss,
        "loss/sft": denoising[:, 0::2],
        "loss/sft_rejected": denoising[:, 1::2],
    }
    if elbo.error_is_known(scheme):
        # From the spread of each score's own draws: what winner and loser, policy and reference share is in it or not.
        ratio = terms - reference
        draws = settings.beta * (ratio[..., 0::2] - ratio[..., 1::2])
        errors = elbo.standard_error(draws.reshape(scheme.n_t, scheme.n_yt, *draws.shape[1:]))
        metrics["score/mc_variance"] = jnp.square(errors)
    return metrics, lengths[:, 0::2] > 0


def vrpo_step(
    state: TrainState,
    batch: Batch,
    reference: Any,
    *,
    model: LLaDA,
    tx: optax.GradientTransformation,
    settings: Preference,
    num_segments: int,
    cached: bool = False,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One VRPO update on packed preference rows.

    `reference` is the reference policy's parameters, or, where `cached`, its terms [r, n, s] for this batch
    (`reference_terms`); both give the same update. `accumulate` parts of the batch go through the model one after the
    other, which changes memory, not the result. `axis_name`: of a mapped axis that splits the rows of the batch; None
    where `batch` holds them all.
    """
    pairs = jnp.sum(segment_lengths(batch, num_segments)[:, 0::2] > 0).astype(jnp.float32)
    total_pairs = _over_devices(pairs, axis_name)
    kwargs = {"model": model, "settings": settings, "num_segments": num_segments}

    def loss_fn(params, part):
        rows, terms = part
        if not cached:
            terms = reference_terms(reference, rows, **kwargs)
        metrics, is_pair = score_pairs(params, rows, terms, **kwargs)
        # This part's share of each mean over all pairs of the batch.
        metrics = {
            name: jnp.sum(jnp.where(is_pair, x, 0)) / jnp.maximum(total_pairs, 1) for name, x in metrics.items()
        }
        loss = metrics["loss/preference"] + settings.sft_weight * metrics["loss/sft"]
        return loss, metrics | {"loss": loss}

    parts = (batch, reference if cached else None)
    grads, metrics = _over_devices(_gradient(loss_fn, state.params, parts, accumulate), axis_name)
    if "score/mc_variance" in metrics:
        metrics["score/mc_stderr"] = jnp.sqrt(metrics["score/mc_variance"])
    return _update(state, grads, metrics | {"pairs": total_pairs}, tx)


def sft_step(
    state: TrainState,
    batch: Batch,
    *,
    model: LLaDA,
    tx: optax.GradientTransformation,
    settings: Denoising,
    num_segments: int,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One denoising update: sum over masked of CE / p, divided by the answer length, mean over samples (spec).

    `accumulate` and `axis_name` as in `vrpo_step`.
    """
    batch = crop(batch, settings)
    total = _over_devices(jnp.sum(segment_lengths(batch, num_segments) > 0).astype(jnp.float32), axis_name)

    def loss_fn(params, rows):
        drawn = draw(rows, settings.scheme, seed=settings.seed, stream="policy", num_segments=num_segments)
        terms = model_terms(model, params, rows, drawn, num_segments=num_segments, chunk=settings.mc_chunk)
        loss = losses.denoising_loss(terms.mean(0), segment_lengths(rows, num_segments))
        loss = jnp.sum(loss) / jnp.maximum(total, 1)
        return loss, {"loss": loss}

    grads, metrics = _over_devices(_gradient(loss_fn, state.params, batch, accumulate), axis_name)
    return _update(state, grads, metrics, tx)


# Pre-training is the same step: a row is one segment that is all response, so that "divided by the answer length,
# mean over samples" is "divided by batch x length"; `settings.crop_probability` cuts some rows short.
pretrain_step = sft_step


def crop(batch: Batch, settings: Denoising) -> Batch:
    """Cuts a row to a random length with probability `crop_probability`: what is beyond becomes padding."""
    if not settings.crop_probability:
        return batch
    keys = noise.row_keys(noise.stream_key(settings.seed, "crop"), batch.row_ids, batch.epochs)
    length = batch.tokens.shape[1]

    def row_length(key):
        chance, where = jax.random.split(key)
        cut = jax.random.randint(where, (), 1, length + 1)
        return jnp.where(jax.random.uniform(chance) < settings.crop_probability, cut, length)

    kept = jnp.arange(length) < jax.vmap(row_length)(keys)[:, None]
    return batch.replace(
        segment_ids=jnp.where(kept, batch.segment_ids, 0), response_mask=batch.response_mask & kept
    )


def _over_devices(tree: Any, axis_name: str | None):
    """Sums over the devices of a mapped axis; without one, sums are over all rows already."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _gradient(loss_fn: Callable, params: Any, rows: Any, accumulate: int):
    """Gradient and metrics of a loss that adds up over rows (axis 0), in `accumulate` parts one after the other."""
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (_, metrics), grads = gradient(params, rows)
        return grads, metrics
    # Part k takes row k of every `accumulate` neighbours, so that each device keeps its own rows.
    pieces = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), rows)

    def add(total, piece):
        (_, metrics), grads = gradient(params, piece)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (grads, metrics)), None

    (_, metrics), grads = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], pieces))
    # Sums in float32, whatever the parameters' type.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), (grads, metrics))
    (summed, metrics), _ = jax.lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), summed, params), metrics


def _update(state: TrainState, grads: Any, metrics: Metrics, tx: optax.GradientTransformation):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = metrics | {"grad_norm": optax.global_norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics
