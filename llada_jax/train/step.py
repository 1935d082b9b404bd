"""The training step of every objective: a pure function of state, batch and frozen parameters."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from llada_jax import config
from llada_jax.batch import Batch
from llada_jax.objectives import Objective
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.train import optim
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
    """Updates the state by the gradient of the mean loss over the examples of the batch.

    frozen: the reference policy's parameters. None if the objective has no reference policy, or if
        `batch.reference` has its terms. Parameters and terms give the same update.
    accumulate: the batch is computed in so many parts, one after the other. This saves memory and
        does not change the result.
    axis_name: a mapped axis that splits the rows of the batch. None if `batch` has all rows.
    """
    batch = objective.prepare(batch, settings)
    total = _over_devices(objective.is_example(batch).sum().astype(jnp.float32), axis_name)

    def loss_fn(params, rows):
        examples = objective.examples(params, rows, frozen, model=model, settings=settings)
        mask = objective.is_example(rows)
        # Divide by the number of examples in the whole batch, so that the parts add up to means.
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
    """Returns the jitted step (state, batch, frozen, arguments) -> (state, metrics).

    It donates the state. `arguments` are `experiment.arguments`. Experiments that differ in these
    only get the same function, which is traced and compiled once.
    """
    leaves, structure = jax.tree.flatten(shardings)
    return _jit_update(
        experiment.objective,
        experiment.model,
        config.without_arguments(experiment.settings),
        config.without_arguments(experiment.optimizer),
        experiment.num_steps,
        experiment.parallel,
        structure,
        *leaves,
    )


@functools.lru_cache(maxsize=32)
def _jit_update(objective, model, settings, optimizer, num_steps, parallel, structure, *leaves):
    def step(state, batch, frozen, arguments):
        given = config.with_arguments(optimizer, arguments["optimizer"])
        return train_step(
            state,
            batch,
            frozen,
            objective=objective,
            model=model,
            tx=optim.make(given, num_steps)[1],
            settings=config.with_arguments(settings, arguments["settings"]),
            accumulate=optimizer.accumulate,
            axis_name=parallel.axis_name,
        )

    shardings = jax.tree.unflatten(structure, leaves)
    return parallel.jit(
        step,
        (False, True, False, False),
        out_rows=False,
        out_shardings=(shardings, mesh_lib.replicated(parallel.mesh)),
        donate=0,
    )


def _over_devices(tree: Any, axis_name: str | None):
    """Sums over the devices of a mapped axis. Without one, the sums are over all rows already."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _gradient(loss_fn: Callable, params: Any, rows: Batch, accumulate: int):
    """Returns the gradient and metrics of a loss that is a sum over rows, in `accumulate` parts."""
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (_, metrics), grads = gradient(params, rows)
        return grads, metrics
    # Part k takes every `accumulate`-th row from row k on, so that each device keeps its own rows.
    pieces = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), rows
    )

    def add(total, piece):
        (_, metrics), grads = gradient(params, piece)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (grads, metrics)), None

    (_, metrics), grads = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], pieces))
    # Sum in float32 even if the parameters have another type.
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), (grads, metrics)
    )
    (summed, metrics), _ = jax.lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), summed, params), metrics
