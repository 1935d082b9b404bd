"""The step benchmark: times the training step itself, on the devices of this machine."""

import collections
import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from llada_jax import noise
from llada_jax.batch import Batch
from llada_jax.checkpoints import loading
from llada_jax.chips import CHIPS
from llada_jax.parallel import hosts, mesh
from llada_jax.train import state as state_lib
from llada_jax.train.cost import forward_passes, pass_flops
from llada_jax.train.experiment import Experiment, make_plan, with_synthetic_rows
from llada_jax.train.state import TrainState
from llada_jax.train.step import jit_update
from llada_jax.train.summary import describe


@dataclasses.dataclass
class Work:
    """The arguments of one training step. A step donates the state only."""

    state: TrainState
    batch: Batch  # with the reference policy's terms, if the config wants them cached
    frozen: Any  # the reference policy's parameters, if steps take them
    numbers: dict  # those settings that are arguments of the step

    @property
    def arguments(self) -> tuple:
        """All arguments, in the order of the step."""
        return self.state, self.batch, self.frozen, self.numbers


def prepare(config, workdir: str) -> Experiment:
    """The experiment of a config, with synthetic rows if data.train is not set.

    Raises ValueError or FileNotFoundError.
    """
    return with_synthetic_rows(make_plan(config, workdir, dry_run=True))


def make_work(plan: Experiment) -> Work:
    """Parameters (random, or those of init_from), one batch, and the reference policy."""
    abstract = state_lib.abstract_state(plan.model, plan.tx, plan.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract.params)
    params = None
    if plan.init_from:
        params = loading.load(plan.init_from, plan.model.param_dtype, shardings)[1]
    key = noise.stream_key(plan.seed, "init")
    current = state_lib.init_state(plan.model, plan.tx, plan.mesh, key, params)
    del params
    host = next(plan.batches(plan.rows, batch_rows=plan.data.batch_rows, seed=plan.seed))
    batch = plan.parallel.put(host)
    if plan.reference is None:
        return Work(current, batch, None, plan.arguments)
    # A copy in any case: the state is donated.
    copy = jax.jit(
        lambda p: jax.tree.map(lambda x: jnp.array(x, plan.reference_dtype), p),
        out_shardings=shardings,
    )
    frozen = copy(current.params)
    if not plan.reference.is_cached:
        return Work(current, batch, frozen, plan.arguments)
    terms_of = functools.partial(
        plan.objective.reference_terms, model=plan.model, settings=plan.settings
    )
    terms = jax.jit(terms_of, out_shardings=mesh.rows(plan.mesh))(frozen, batch)
    return Work(current, batch.replace(reference=terms), None, plan.arguments)


def compile_step(plan: Experiment, work: Work):
    """Compiles the training step. Returns (compiled step, seconds it took)."""
    shardings = jax.tree.map(lambda x: x.sharding, work.state)
    start = time.perf_counter()
    compiled = jit_update(plan, shardings).lower(*work.arguments).compile()
    return compiled, time.perf_counter() - start


def time_steps(
    update, work: Work, count: int, warmup: int = 2
) -> tuple[list[float], dict[str, float]]:
    """Times `count` steps after `warmup` steps. Returns (seconds of each, metrics of the last).

    It waits for the end of each step before the next one starts.
    """
    seconds = []
    for _ in range(warmup + count):
        start = time.perf_counter()
        work.state, found = update(*work.arguments)
        jax.block_until_ready((work.state, found))
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:], {name: float(value) for name, value in found.items()}


def rates(plan: Experiment, seconds: float) -> dict:
    """Tokens/s, FLOP/s and their share of the peak (None where CHIPS does not know the device).

    `mfu` counts the FLOPs of forward, backward and reference passes; `hfu` also counts what remat
    and chunks of draws recompute. The fractions are None if CHIPS does not list the device.
    """
    devices = plan.mesh.devices.flat
    chip = CHIPS.get(devices[0].device_kind)
    result = {"tokens_per_second": plan.data.batch_rows * plan.row_length / seconds}
    for name, recomputed in (("mfu", False), ("hfu", True)):
        flops = pass_flops(plan) * forward_passes(plan, recomputed)[0] / seconds
        result[f"{name}_flops_per_second"] = flops
        result[name] = flops / (chip.bf16_flops * len(devices)) if chip else None
    return result


def planned_bytes(compiled) -> int:
    """Returns the memory, in bytes per device, that the compiler planned for a program."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )


def peak_bytes(devices: list, compiled) -> tuple[int, int | None]:
    """Returns the peak memory, in bytes per device, of (the step, this process).

    The first is what the compiler planned for the step. The second is the largest peak that a
    device counted; it includes the making of parameters and reference, and is None on devices that
    do not count (CPU).
    """
    counted = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in devices]
    return planned_bytes(compiled), None if None in counted else max(counted)


def top_costs(folder: str, count: int = 5) -> list[tuple[str, float]]:
    """Returns (name, fraction of busy time) of the kernels of a profile that take the most time.

    The result is [] if the profile has no accelerator.
    """
    file = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    spent = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if plane.name.startswith("/device:"):
            lines = list(plane.lines)
            # A TPU has a line "XLA Ops" and other lines that summarise it. A GPU has one line for
            # each stream.
            for line in [x for x in lines if x.name == "XLA Ops"] or [
                x for x in lines if x.name.startswith("Stream")
            ]:
                for event in line.events:
                    spent[event.name] += event.duration_ns
    total = sum(spent.values())
    return [(name, time / total) for name, time in spent.most_common(count)]


def run(config, workdir: str, count: int, profile: str) -> dict:
    """Benchmarks the step of a config: prints a summary and returns the results for the JSON file.

    count: number of timed steps.
    profile: folder for a profile of 3 more steps; "" makes none.
    """
    plan = prepare(config, workdir)
    hosts.say(describe(plan))
    with plan.parallel.use():
        work = make_work(plan)
        compiled, compile_seconds = compile_step(plan, work)
        seconds, found = time_steps(compiled, work, count)
        if profile:
            with jax.profiler.trace(profile):
                time_steps(compiled, work, 3, warmup=0)
    of_step, of_process = peak_bytes(plan.mesh.local_devices, compiled)
    counted = (
        ""
        if of_process is None
        else f"; this process had {of_process / 2**30:.2f} at its peak, says the device"
    )
    device = plan.mesh.devices.flat[0]
    used, why = plan.attention()
    median = statistics.median(seconds)
    result = {
        "config": config.to_dict(),
        "device": device.device_kind,
        "devices": plan.mesh.size,
        "attention": used,
        "compile_seconds": compile_seconds,
        "step_seconds": median,
        "step_seconds_all": seconds,
        **rates(plan, median),
        "passes": forward_passes(plan)[1],
        "step_peak_bytes": of_step,
        "process_peak_bytes": of_process,
        "loss": found["loss"],
    }
    lines = [
        f"compile         {compile_seconds:.1f} s",
        f"step            {median:.4g} s"
        f" (median of {count}, {min(seconds):.4g} to {max(seconds):.4g})",
        f"tokens          {result['tokens_per_second']:,.0f} a second",
        f"memory          {of_step / 2**30:.2f} GiB a device for the step,"
        f" says the compiler{counted}",
        f"attention       {used}: {why}",
    ]
    if result["mfu"] is None:
        rate = result["mfu_flops_per_second"]
        lines.append(
            f"MFU             {rate:.3g} FLOP/s;"
            f" the peak of {device.device_kind!r} is not in chips.py"
        )
    else:
        mfu, hfu = result["mfu"], result["hfu"]
        lines.append(
            f"MFU             {mfu:.1%} of the bf16 peak; {hfu:.1%} with what is computed again"
        )
    if profile:
        result["top_costs"] = costs = top_costs(profile)
        lines.append(
            f"profile         {profile}"
            + ("" if costs else ": no accelerator in it, hence no list of costs")
        )
        lines += [f"  {share:6.1%}  {name}" for name, share in costs]
    hosts.say("\n".join(lines))
    return result
