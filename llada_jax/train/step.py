"""One training step, pure, for every objective: (state, batch, frozen) -> (state, metrics)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from llada_jax.batch import Batch
from llada_jax.objectives import Objective
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.train.experiment import Experiment
from llada_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Any,
    *,
    objective: Objective,
    model: nn.Module,
    tx: optax.GradientTransformation,
    settings: Any,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update: the gradient of the mean loss over the examples of the batch.

    `frozen` holds the reference policy's parameters; it is None if the objective has no reference,
    or if `batch.reference` has its terms. Both give the same update. `accumulate` parts of the batch
    go through the model one after the other, which changes memory, not the result. `axis_name` is a
    mapped axis that splits the rows of the batch; it is None if `batch` holds all rows.
    """
    batch = objective.prepare(batch, settings)
    total = _over_devices(objective.is_example(batch).sum().astype(jnp.float32), axis_name)

    def loss_fn(params, rows):
        examples = objective.examples(params, rows, frozen, model=model, settings=settings)
        mask = objective.is_example(rows)
        # This part's share of each mean over all examples of the batch.
        means = {
            name: jnp.sum(jnp.where(mask, x, 0)) / jnp.maximum(total, 1)
            for name, x in examples.items()
        }
        loss = objective.loss(means, settings)
        return loss, means | {"loss": loss}

    grads, metrics = _over_devices(_gradient(loss_fn, state.params, batch, accumulate), axis_name)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
        **objective.summary(metrics),
        objective.unit: total,
        "grad_norm": optax.global_norm(grads),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def jit_update(experiment: Experiment, shardings: TrainState):
    """The compiled step, (state, batch, frozen) -> (state, metrics); the state is donated."""
    step = functools.partial(
        train_step,
        objective=experiment.objective,
        model=experiment.model,
        tx=experiment.tx,
        settings=experiment.settings,
        accumulate=experiment.optimizer.accumulate,
        axis_name=experiment.parallel.axis_name,
    )
    return experiment.parallel.jit(
        step,
        (False, True, False),
        out_rows=False,
        out_shardings=(shardings, mesh_lib.replicated(experiment.mesh)),
        donate=0,
    )


def _over_devices(tree: Any, axis_name: str | None):
    """Sums over the devices of a mapped axis; without one, sums are over all rows already."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _gradient(loss_fn: Callable, params: Any, rows: Batch, accumulate: int):
    """Gradient and metrics of a loss that adds up over rows, in `accumulate` parts."""
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
