"""The training steps, pure: (state, batch, ...) -> (state, metrics). train.py jits, shards and donates."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llada_jax import losses
from llada_jax.batch import Batch
from llada_jax.models.llada import LLaDA
from llada_jax.objectives.denoising import Denoising, crop
from llada_jax.objectives.preference import Preference, reference_terms, score_pairs
from llada_jax.objectives.terms import Metrics, draw, model_terms, segment_lengths
from llada_jax.parallel import mesh
from llada_jax.train.experiment import Plan
from llada_jax.train.state import TrainState


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
            name: jnp.sum(jnp.where(is_pair, x, 0)) / jnp.maximum(total_pairs, 1)
            for name, x in metrics.items()
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
    total = _over_devices(
        jnp.sum(segment_lengths(batch, num_segments) > 0).astype(jnp.float32), axis_name
    )

    def loss_fn(params, rows):
        drawn = draw(
            rows, settings.scheme, seed=settings.seed, stream="policy", num_segments=num_segments
        )
        terms = model_terms(
            model, params, rows, drawn, num_segments=num_segments, chunk=settings.mc_chunk
        )
        loss = losses.denoising_loss(terms.mean(0), segment_lengths(rows, num_segments))
        loss = jnp.sum(loss) / jnp.maximum(total, 1)
        return loss, {"loss": loss}

    grads, metrics = _over_devices(_gradient(loss_fn, state.params, batch, accumulate), axis_name)
    return _update(state, grads, metrics, tx)


# Pre-training is the same step: a row is one segment that is all response, so that "divided by the answer length,
# mean over samples" is "divided by batch x length"; `settings.crop_probability` cuts some rows short.
pretrain_step = sft_step


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
    pieces = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), rows
    )

    def add(total, piece):
        (_, metrics), grads = gradient(params, piece)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (grads, metrics)), None

    (_, metrics), grads = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], pieces))
    # Sums in float32, whatever the parameters' type.
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), (grads, metrics)
    )
    (summed, metrics), _ = jax.lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), summed, params), metrics


def _update(state: TrainState, grads: Any, metrics: Metrics, tx: optax.GradientTransformation):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = metrics | {"grad_norm": optax.global_norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics


def jit_update(plan: Plan, shardings):
    """The compiled step of a plan, (state, batch, ...) -> (state, metrics), its state donated."""
    c = plan.config
    extra_rows = ()
    common = {
        "model": plan.model,
        "tx": plan.tx,
        "settings": plan.settings,
        "num_segments": plan.num_segments,
        "accumulate": c.optimizer.accumulate,
        "axis_name": plan.parallel.axis_name,
    }
    if c.objective == "vrpo":
        cached = c.vrpo.reference == "cached"
        extra_rows = (cached,)  # terms of each row, or parameters
        step = functools.partial(vrpo_step, cached=cached, **common)
    else:
        step = functools.partial(
            {"sft": sft_step, "pretrain": pretrain_step}[c.objective], **common
        )
    out_shardings = (shardings, mesh.replicated(plan.mesh))
    return plan.parallel.jit(
        step, (False, True, *extra_rows), out_rows=False, out_shardings=out_shardings, donate=0
    )
