"""Compiles the very step of a config for a TPU pod that is not there: python -m llada_jax.compile --config=FILE
--topology=v5p:2x2x4 [--config.x=y] [--slices=2] [--json].

Needs the TPU compiler (`pip install libtpu`, or the extra `tpu`), no TPU. Memory is what the compiler allots on a chip,
FLOPs are by formula, and the step time is what the chip's peak rates would allow: a bound, not a forecast.
"""

import dataclasses
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from llada_jax import cli
from llada_jax.batch import Batch
from llada_jax.compile.__main__ import main
from llada_jax.compile.summary import too_large
from llada_jax.data.synthetic import SyntheticRows
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.train import state, step
from llada_jax.train.experiment import KIND, Plan, make_plan


def make_abstract(plan: Plan):
    """(state, batch, ...) of the plan's step as shapes, types and shardings: what to compile for."""
    c = plan.config
    current = state.abstract_state(plan.model, plan.tx, plan.mesh)
    rows, length = c.data.batch_rows, c.data.row_length
    sharding = mesh_lib.rows(plan.mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = Batch(
        tokens=array(jnp.int32, rows, length),
        segment_ids=array(jnp.int32, rows, length),
        positions=array(jnp.int32, rows, length),
        response_mask=array(jnp.bool_, rows, length),
        row_ids=array(jnp.int32, rows),
        epochs=array(jnp.int32, rows),
    )
    if c.objective != "vrpo":
        return current, batch
    if c.vrpo.reference == "cached":
        return current, batch, array(jnp.float32, rows, plan.settings.scheme.n, plan.num_segments)
    dtype = jnp.dtype(c.vrpo.reference_dtype or c.model.param_dtype)
    reference = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), current.params
    )
    return current, batch, reference


def plan_for(config, devices) -> Plan:
    """The plan of a config on given devices, with synthetic rows of its shape: data and weights are not read."""
    config = config.copy_and_resolve_references()
    config.data.train = config.data.heldout = config.solve.prompts = ""
    config.eval.variance_repeats = 0  # it would ask for the held-out pairs
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(config, folder, dry_run=True, devices=devices)
    d = config.data
    rows = SyntheticRows(
        KIND[config.objective], d.row_length, plan.model.config.vocab_size, d.batch_rows
    )
    # A schedule needs a number of steps; the program is the same for any.
    return dataclasses.replace(
        plan, rows=rows, num_steps=plan.num_steps or config.optimizer.warmup_steps + 1000
    )


def compile_step(plan: Plan):
    """(compiled step, seconds). Raises MemoryError, in one line, where a chip's memory is too small."""
    arguments = make_abstract(plan)
    shardings = jax.tree.map(lambda x: x.sharding, arguments[0])
    start = time.perf_counter()
    with plan.parallel.use():
        lowered = step.jit_update(plan, shardings).lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(too_large(plan, str(error))) from None
    return compiled, time.perf_counter() - start


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    flags.mark_flags_as_required(["config", "topology"])
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=cli.parse_flags)
