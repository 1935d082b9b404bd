"""Compiles the step of an experiment for devices that this machine does not have."""

import functools
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llada_jax.batch import Batch
from llada_jax.compile.summary import too_large
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.train import state, step
from llada_jax.train.cost import computes_reference
from llada_jax.train.experiment import Experiment, make_plan, with_synthetic_rows


def make_abstract(plan: Experiment):
    """Returns the arguments of the step of `jit_update` as shapes, types and shardings."""
    current = state.abstract_state(plan.model, plan.tx, plan.mesh)
    rows, length = plan.data.batch_rows, plan.row_length
    sharding = mesh_lib.rows(plan.mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    numbers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=mesh_lib.replicated(plan.mesh)),
        plan.arguments,
    )
    terms = (rows, plan.settings.scheme.n, plan.num_segments)
    batch = Batch(
        tokens=array(jnp.int32, rows, length),
        segment_ids=array(jnp.int32, rows, length),
        positions=array(jnp.int32, rows, length),
        response_mask=array(jnp.bool_, rows, length),
        row_ids=array(jnp.int32, rows),
        epochs=array(jnp.int32, rows),
        reference=array(jnp.float32, *terms)
        if plan.reference and plan.reference.is_cached
        else None,
        num_segments=plan.num_segments,
    )
    if not computes_reference(plan):
        return current, batch, None, numbers
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, plan.reference_dtype, sharding=x.sharding),
        current.params,
    )
    return current, batch, frozen, numbers


def plan_for(config, devices) -> Experiment:
    """Makes the experiment of a config on given devices, with synthetic rows.

    It needs no data and no weights.
    """
    config = config.copy_and_resolve_references()
    config.data.train = config.data.heldout = config.solve.prompts = ""
    config.eval.variance_repeats = 0  # any other value needs held-out pairs
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(config, folder, dry_run=True, devices=devices)
    return with_synthetic_rows(plan)


def compile_step(plan: Experiment):
    """Compiles the step; returns (compiled step, seconds).

    Raises MemoryError, in one line with a remedy, if a chip's memory is too small.
    """
    arguments = make_abstract(plan)
    shardings = jax.tree.map(lambda x: x.sharding, arguments[0])
    with plan.parallel.use():
        lowered = step.jit_update(plan, shardings).lower(*arguments)
    return compile_lowered(lowered, functools.partial(too_large, plan))


def compile_lowered(lowered: jax.stages.Lowered, too_large: Callable[[str], str]):
    """Compiles a program; returns (compiled program, seconds).

    If a chip's memory is too small, it raises a MemoryError with the line that `too_large` makes of
    the compiler's message.
    """
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(too_large(str(error))) from None
    return compiled, time.perf_counter() - start
