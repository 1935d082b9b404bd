"""Compiles the very step of a config for a TPU pod that is not there: python -m llada_jax.compile --config=FILE
--topology=v5p:2x2x4 [--config.x=y] [--slices=2] [--json].

Needs the TPU compiler (`pip install libtpu`, or the extra `tpu`), no TPU. Memory is what the compiler allots on a chip,
FLOPs are by formula, and the step time is what the chip's peak rates would allow: a bound, not a forecast.
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.experimental import topologies

from llada_jax import hlo, state, train
from llada_jax import mesh as mesh_lib
from llada_jax.batch import Batch
from llada_jax.benchmark_step import SyntheticRows
from llada_jax.chips import CHIPS, Chip
from llada_jax.plan import KIND, Plan, forward_passes, make_plan, pass_flops

GIB = 2**30


def topology(name: str, slices: int = 1) -> tuple[list, Chip]:
    """Devices of a TPU topology such as "v5p:2x2x4" (chips along each axis of a slice), and what one chip can do.

    Raises ValueError for an unknown topology and ImportError without the TPU compiler.
    """
    generation, _, sides = name.partition(":")
    known = sorted(prefix for prefix, chip in CHIPS.items() if prefix[0] == "v" and chip.name.startswith("TPU"))
    if generation not in known or not re.fullmatch(r"\d+(x\d+)+", sides):
        raise ValueError(
            f"--topology={name!r} is not GENERATION:AxB or AxBxC, like v5p:2x2x4; known: {', '.join(known)}"
        )
    if slices < 1:
        raise ValueError(f"--slices={slices}: at least one")
    # Neither ask the metadata server of a TPU machine nor claim its chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    kwargs = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **kwargs)
    except Exception as error:
        if "libtpu" in str(error).lower() and "not found" in str(error).lower() or isinstance(error, ImportError):
            raise ImportError("the TPU compiler is missing: pip install libtpu") from error
        raise ValueError(f"--topology={name}: {error}") from error
    return found.devices, CHIPS[generation]


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
    reference = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), current.params)
    return current, batch, reference


def plan_for(config, devices) -> Plan:
    """The plan of a config on given devices, with synthetic rows of its shape: data and weights are not read."""
    config = config.copy_and_resolve_references()
    config.data.train = config.data.heldout = config.solve.prompts = ""
    config.eval.variance_repeats = 0  # it would ask for the held-out pairs
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(config, folder, dry_run=True, devices=devices)
    d = config.data
    rows = SyntheticRows(KIND[config.objective], d.row_length, plan.model.config.vocab_size, d.batch_rows)
    # A schedule needs a number of steps; the program is the same for any.
    return dataclasses.replace(plan, rows=rows, num_steps=plan.num_steps or config.optimizer.warmup_steps + 1000)


def compile_step(plan: Plan):
    """(compiled step, seconds). Raises MemoryError, in one line, where a chip's memory is too small."""
    arguments = make_abstract(plan)
    shardings = jax.tree.map(lambda x: x.sharding, arguments[0])
    start = time.perf_counter()
    with plan.parallel.use():
        lowered = train.jit_update(plan, shardings).lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(_too_large(plan, str(error))) from None
    return compiled, time.perf_counter() - start


def _too_large(plan: Plan, message: str) -> str:
    c, chunk = plan.config, plan.settings.mc_chunk or plan.settings.scheme.n
    section = "vrpo" if c.objective == "vrpo" else "denoising"
    remedies = [
        (chunk > 1, f"{section}.mc_chunk=1 (now {chunk} draws at a time)"),
        (c.model.remat != "full", f'model.remat="full" (now "{c.model.remat}")'),
        (
            c.data.batch_rows > mesh_lib.row_shards(plan.mesh) * c.optimizer.accumulate,
            f"a larger optimizer.accumulate (now {c.optimizer.accumulate}) or mesh.fsdp",
        ),
        (
            c.objective == "vrpo" and c.vrpo.reference == "model",
            'vrpo.reference="cached" (now the reference policy is beside the policy)',
        ),
        (plan.mesh.shape["data"] > 1, f"mesh.data=1 and a larger mesh.fsdp (now {plan.mesh.shape['fsdp']})"),
        (True, "more chips"),
    ]
    advice = next(text for applies, text in remedies if applies)
    if "vmem" in message.lower():  # a kernel's own memory on the chip
        return f'a kernel does not fit the chip ({" ".join(message.split())[:200]}): try model.attention="xla"'
    # "The total memory required for HLO temporaries (18.21G)": arguments are in it, whatever the words say (found by
    # compiling programs that are all arguments).
    sizes = re.findall(r"([\d.]+)([GM])", message)
    gib = [float(number) / (1024 if unit == "M" else 1) for number, unit in sizes]
    if len(gib) < 2:
        return f"the step does not fit a chip's memory ({' '.join(message.split())[:200]}): try {advice}"
    return (
        f"the step needs {gib[0]:.2f} GiB on a chip that has {gib[1]:.2f}, {gib[0] - gib[1]:.2f} too many: try {advice}"
    )


def report(plan: Plan, name: str, chip: Chip, compiled, seconds: float) -> dict:
    """What the compiled step needs and what the chip's peak rates imply."""
    c, chips = plan.config, plan.mesh.devices.size
    program = hlo.Program(compiled.as_text())
    memory = compiled.memory_analysis()
    # The peak counts arguments (a donated one once) and temporaries; it is what the compiler holds against the chip.
    total, arguments = memory.peak_memory_in_bytes, memory.argument_size_in_bytes
    passes, why = forward_passes(plan)
    flops = passes * pass_flops(plan)
    collectives = program.collective_bytes()
    slices = chips // program.num_partitions  # the program is that of one slice
    crossings, crossed = program.between_slices(slices)
    times = {
        "compute": flops / chips / chip.bf16_flops,
        "memory": program.hbm_bytes() / chip.hbm_bandwidth,
        "interconnect": sum(sent for _, sent in collectives.values()) / chip.ici_bandwidth,
    }
    if slices > 1 and chip.dcn_bandwidth:
        times["between slices"] = crossed / chip.dcn_bandwidth
    binds = max(times, key=times.get)
    return {
        "topology": name,
        "chip": chip.name,
        "chips": chips,
        "slices": slices,
        "mesh": dict(plan.mesh.shape),
        "objective": c.objective,
        "batch_rows": c.data.batch_rows,
        "row_length": c.data.row_length,
        "draws": plan.settings.scheme.n,
        "mc_chunk": plan.settings.mc_chunk or plan.settings.scheme.n,
        "attention": plan.attention()[0],
        "compile_seconds": seconds,
        "memory": {
            "arguments": arguments,
            "temporaries": total - arguments,
            "total": total,
            "share": total / chip.hbm_bytes,
        },
        "collectives": {kind: {"calls": calls, "bytes": sent} for kind, (calls, sent) in collectives.items()},
        "between_slices": {"calls": crossings, "bytes": crossed},
        "flops": flops,
        "passes": f"{passes}: {why}",
        "implied_seconds": times,
        "binds": binds,
        "tokens_per_second": c.data.batch_rows * c.data.row_length / times[binds],
    }


def _lines(found: dict) -> str:
    memory, times = found["memory"], found["implied_seconds"]
    collectives = "; ".join(
        f"{kind} {x['calls']:,} times, {x['bytes'] / GIB:.2f} GiB" for kind, x in found["collectives"].items()
    )
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    slices, between = "", []
    if found["slices"] > 1:
        crossing, slices = found["between_slices"], f"{found['slices']} slices of "
        took = f"{times['between slices']:.2f} s" if "between slices" in times else "at a rate that is not published"
        between = [f"between slices  {crossing['calls']:,} times, {crossing['bytes'] / GIB:.2f} GiB, {took}"]
    return "\n".join(
        [
            f"chips           {found['chips']} x {found['chip']} ({slices}{found['topology']}), {mesh}",
            f"work            {found['objective']}, {found['batch_rows']} rows x {found['row_length']}, "
            f"{found['draws']} draws, {found['mc_chunk']} at a time, {found['attention']} attention",
            f"compile         {found['compile_seconds']:.0f} s",
            f"memory a chip   {memory['total'] / GIB:.2f} GiB, {memory['share']:.0%} of its HBM: arguments "
            f"{memory['arguments'] / GIB:.2f}, temporaries {memory['temporaries'] / GIB:.2f}",
            f"collectives     {collectives or 'none'} (sent by a chip in a step)",
            *between,
            f"FLOPs a step    {found['flops']:.3g} by formula ({found['passes']})",
            f"step time       at peak rates: compute {times['compute']:.2f} s, memory {times['memory']:.2f} s, "
            f"interconnect {times['interconnect']:.2f} s; {found['binds']} binds, "
            f"{found['tokens_per_second']:,.0f} positions/s at most",
        ]
    )


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; settings are --config.name=value")
    try:
        devices, chip = topology(_TOPOLOGY.value, _SLICES.value)
        config = flags.FLAGS.config
        plan = plan_for(config, devices)
        compiled, seconds = compile_step(plan)
        found = report(plan, _TOPOLOGY.value, chip, compiled, seconds)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(json.dumps(found, indent=1) if _JSON.value else _lines(found))


_TOPOLOGY = flags.DEFINE_string("topology", None, "GENERATION:AxB[xC] of one slice, e.g. v5p:2x2x4, v6e:4x4, v5e:8x8.")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology, with the data-center network between them.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    flags.mark_flags_as_required(["config", "topology"])
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=train.parse_flags)
