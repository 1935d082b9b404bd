"""A summary of a run in a few lines: parameters, rows, steps, FLOPs, memory."""

from llada_jax import models
from llada_jax.train import cost
from llada_jax.train.experiment import Experiment


def describe(plan: Experiment) -> str:
    """Returns lines for parameters, rows, steps, FLOPs by formula and memory per device."""
    config, devices = plan.model.config, plan.mesh.devices
    count = models.family_of(config).num_params(config)
    hosts = len({device.process_index for device in devices.flat})
    axes = ", ".join(f"{k}={v}" for k, v in plan.mesh.shape.items())
    lines = [
        f"objective       {plan.objective.name} on {devices.size} x {devices.flat[0].device_kind}"
        f"{f' of {hosts} hosts' if hosts > 1 else ''}, {plan.parallel.kind} {axes}",
        f"parameters      {sum(count.values()):,} ({count['layers']:,} without embedding and head)",
        f"attention       {': '.join(plan.attention())}",
    ]
    for name, rows in (("train rows", plan.rows), ("held-out rows", plan.heldout)):
        if rows is not None:
            lines.append(f"{name:<15} {rows.stats}")
    if plan.rows is None:
        lines.append("train rows      data.train is not set: pass --config.data.train=jsonl:FILE")
    if not plan.init_from:
        needed = plan.objective.needs_reference
        remedy = "pass --config.init_from=DIR" if needed else "random"
        lines.append(f"init_from       not set: {remedy}")
    passes, why = cost.forward_passes(plan)
    batch_rows, length = plan.data.batch_rows, plan.row_length
    sizes = cost.device_bytes(plan)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
    lines += [
        f"steps           {_steps(plan)}, each {batch_rows} rows x {length} = "
        f"{batch_rows * length:,} positions, {plan.settings.scheme.n} draws",
        f"FLOPs a step    {passes * cost.pass_flops(plan):.3g} by formula "
        f"({passes} forward passes' worth: {why})",
        f"GiB a device    {sum(sizes.values()) / 2**30:.2f}: {parts}",
    ]
    return "\n".join(lines)


def _steps(plan: Experiment) -> str:
    if plan.rows is None:
        return f"{plan.num_steps:,}" if plan.num_steps else "unknown until data.train is set"
    rows, batch_rows = plan.rows, plan.data.batch_rows
    text = f"{plan.num_steps:,} ({plan.num_steps * batch_rows / len(rows):.2f} epochs)"
    if plan.objective.segments_per_example > 1:
        each = batch_rows * rows.stats.samples / len(rows)
        text += f" of about {each:.0f} {plan.objective.unit}"
    return text
