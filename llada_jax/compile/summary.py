"""Summaries of a compiled step: its memory, traffic and FLOPs, and a bound on its time."""

import re

from llada_jax.chips import Chip
from llada_jax.compile.hlo import Program
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.train.cost import computes_reference, forward_passes, pass_flops
from llada_jax.train.experiment import Experiment

GIB = 2**30


def too_large(plan: Experiment, message: str) -> str:
    """Returns the compiler's out-of-memory error in one line, with the first possible remedy."""
    chunk, accumulate = plan.settings.mc_chunk or plan.settings.scheme.n, plan.optimizer.accumulate
    section, remat = plan.objective.section, plan.model.remat
    remedies = [
        (chunk > 1, f"{section}.mc_chunk=1 (now {chunk} draws at a time)"),
        (remat != "full", f'model.remat="full" (now "{remat}")'),
        (
            plan.data.batch_rows > mesh_lib.row_shards(plan.mesh) * accumulate,
            f"a larger optimizer.accumulate (now {accumulate}) or mesh.fsdp",
        ),
        (
            computes_reference(plan),
            f'{section}.reference="cached" (now the reference policy is beside the policy)',
        ),
        (
            plan.mesh.shape["data"] > 1,
            f"mesh.data=1 and a larger mesh.fsdp (now {plan.mesh.shape['fsdp']})",
        ),
        (True, "more chips"),
    ]
    advice = next(text for applies, text in remedies if applies)
    if "vmem" in message.lower():  # VMEM: the memory that a kernel uses inside the chip
        advice = 'model.attention="xla"'
    return out_of_memory("the step", message, advice)


def out_of_memory(what: str, message: str, advice: str) -> str:
    """Returns the compiler's out-of-memory error in one line, with an advice."""
    short = " ".join(message.split())[:200]
    if "vmem" in message.lower():
        return f"a kernel does not fit the chip ({short}): try {advice}"
    # In the message "The total memory required for HLO temporaries (18.21G)" the number includes
    # the arguments. We saw this by compiling programs that consist of arguments only.
    sizes = re.findall(r"([\d.]+)([GM])", message)
    gib = [float(number) / (1024 if unit == "M" else 1) for number, unit in sizes]
    if len(gib) < 2:
        return f"{what} does not fit a chip's memory ({short}): try {advice}"
    return (
        f"{what} needs {gib[0]:.2f} GiB on a chip that has {gib[1]:.2f}, "
        f"{gib[0] - gib[1]:.2f} too many: try {advice}"
    )


def report(plan: Experiment, name: str, chip: Chip, compiled, seconds: float) -> dict:
    """Returns what the compiled step needs, and the time that the chip's peak rates allow.

    Sizes are in bytes and times in seconds, for one chip. `flops` are those of all chips.
    """
    chips, rows, length = plan.mesh.devices.size, plan.data.batch_rows, plan.row_length
    program = Program(compiled.as_text())
    memory = compiled.memory_analysis()
    # The peak includes arguments (a donated one counts once) and temporaries. The compiler compares
    # it with the chip's memory.
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
        "objective": plan.objective.name,
        "batch_rows": rows,
        "row_length": length,
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
        "collectives": {
            kind: {"calls": calls, "bytes": sent} for kind, (calls, sent) in collectives.items()
        },
        "between_slices": {"calls": crossings, "bytes": crossed},
        "flops": flops,
        "passes": f"{passes}: {why}",
        "implied_seconds": times,
        "binds": binds,
        "tokens_per_second": rows * length / times[binds],
    }


def as_text(found: dict) -> str:
    """Formats a report for a terminal."""
    memory, times = found["memory"], found["implied_seconds"]
    collectives = "; ".join(
        f"{kind} {x['calls']:,} times, {x['bytes'] / GIB:.2f} GiB"
        for kind, x in found["collectives"].items()
    )
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    slices, between = "", []
    if found["slices"] > 1:
        crossing, slices = found["between_slices"], f"{found['slices']} slices of "
        took = (
            f"{times['between slices']:.2f} s"
            if "between slices" in times
            else "at a rate that is not published"
        )
        between = [
            f"between slices  {crossing['calls']:,} times, {crossing['bytes'] / GIB:.2f} GiB, "
            f"{took}"
        ]
    return "\n".join(
        [
            f"chips           {found['chips']} x {found['chip']} ({slices}{found['topology']}), "
            f"{mesh}",
            f"work            {found['objective']}, "
            f"{found['batch_rows']} rows x {found['row_length']}, "
            f"{found['draws']} draws, {found['mc_chunk']} at a time, "
            f"{found['attention']} attention",
            f"compile         {found['compile_seconds']:.0f} s",
            f"memory a chip   {memory['total'] / GIB:.2f} GiB, "
            f"{memory['share']:.0%} of its HBM: "
            f"arguments {memory['arguments'] / GIB:.2f}, "
            f"temporaries {memory['temporaries'] / GIB:.2f}",
            f"collectives     {collectives or 'none'} (sent by a chip in a step)",
            *between,
            f"FLOPs a step    {found['flops']:.3g} by formula ({found['passes']})",
            f"step time       at peak rates: compute {times['compute']:.2f} s, "
            f"memory {times['memory']:.2f} s, "
            f"interconnect {times['interconnect']:.2f} s; {found['binds']} binds, "
            f"{found['tokens_per_second']:,.0f} positions/s at most",
        ]
    )
