"""What a run would do, in a few lines: parameters, steps, FLOPs, memory."""

import jax.numpy as jnp

from llada_jax.models import llada
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.train.cost import forward_passes, pass_flops
from llada_jax.train.experiment import Plan


def describe(plan: Plan) -> str:
    """Parameters, tokens, steps, FLOPs by formula and memory per device, a line each."""
    c, model = plan.config, plan.model
    count = llada.num_params(model.config)
    total = sum(count.values())
    length, batch_rows = c.data.row_length, c.data.batch_rows
    hosts = len({device.process_index for device in plan.mesh.devices.flat})
    lines = [
        f"objective       {c.objective} on {len(plan.mesh.devices.flat)} x {plan.mesh.devices.flat[0].device_kind}"
        f"{f' of {hosts} hosts' if hosts > 1 else ''}, {c.parallelism} "
        f"{', '.join(f'{k}={v}' for k, v in plan.mesh.shape.items())}",
        f"parameters      {total:,} ({count['layers']:,} without embedding and head)",
    ]
    lines.append(f"attention       {': '.join(plan.attention())}")
    for name, rows in (("train rows", plan.rows), ("held-out rows", plan.heldout)):
        if rows is not None:
            lines.append(f"{name:<15} {rows.stats}")
    if plan.rows is None:
        lines.append("train rows      data.train is not set: pass --config.data.train=jsonl:FILE")
    if not c.init_from:
        lines.append(
            f"init_from       not set: {'pass --config.init_from=DIR' if c.objective == 'vrpo' else 'random'}"
        )
    passes, why = forward_passes(plan)
    flops = passes * pass_flops(plan)
    steps_text = f"{plan.num_steps:,}" if plan.num_steps else "unknown until data.train is set"
    if plan.rows is not None:
        steps_text += f" ({plan.num_steps * batch_rows / len(plan.rows):.2f} epochs)"
        if c.objective == "vrpo":
            steps_text += (
                f" of about {batch_rows * plan.rows.stats.samples / len(plan.rows):.0f} pairs"
            )
    lines += [
        f"steps           {steps_text}, each {batch_rows} rows x {length} = {batch_rows * length:,} positions, "
        f"{plan.settings.scheme.n} draws",
        f"FLOPs a step    {flops:.3g} by formula ({passes} forward passes' worth: {why})",
        *_memory(plan, total),
    ]
    return "\n".join(lines)


def _memory(plan: Plan, total: int) -> list[str]:
    """Bytes on a device by formula: exact for what the state holds, an estimate for activations."""
    c, model, shape = plan.config, plan.model, plan.mesh.shape
    width, chunk = model.config, plan.settings.mc_chunk or plan.settings.scheme.n
    weight, act = jnp.dtype(c.model.param_dtype).itemsize, jnp.dtype(c.model.dtype).itemsize
    shards = shape["fsdp"] * shape["tensor"]
    rows = c.data.batch_rows // mesh_lib.row_shards(plan.mesh) // c.optimizer.accumulate * chunk
    positions = rows * c.data.row_length
    boundary = positions * width.d_model * act  # what a layer gets from the one before
    inner = positions * act * (6 * width.d_model + 3 * width.mlp_hidden_size) // shape["tensor"]
    kept = {"none": inner, "dots": inner // 2, "full": 0}[model.remat]
    logits = positions * min(c.model.logps_chunk, width.embedding_size) * 4 // shape["tensor"]
    sizes = {
        "parameters": total * weight / shards,
        "Adam moments": 2 * total * weight / shards,
        "gradient": total * weight / shards * (2 if chunk < plan.settings.scheme.n else 1),
        "activations (estimate)": width.n_layers * (boundary + kept) + inner + 2 * logits,
    }
    if c.objective == "vrpo" and c.vrpo.reference == "model":
        sizes["reference"] = (
            total * jnp.dtype(c.vrpo.reference_dtype or c.model.param_dtype).itemsize / shards
        )
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
    return [f"GiB a device    {sum(sizes.values()) / 2**30:.2f}: {parts}"]
