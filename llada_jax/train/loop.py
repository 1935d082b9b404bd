"""The trainer: python -m llada_jax.train --config=FILE [--config.x=y] --workdir=DIR [--dry_run].

The same command continues a run that was stopped. `plan.py` decides everything before the first array; `train` runs it.
On several hosts the same command runs on each (`distributed.initialize` says how they find each other).
"""

import json
import math

import jax

from llada_jax import metrics, noise
from llada_jax.checkpoints import loading
from llada_jax.checkpoints.orbax import Checkpoints
from llada_jax.data import batches as batches_lib
from llada_jax.data.rows import Rows
from llada_jax.parallel import hosts as hosts_lib
from llada_jax.parallel.stop import Stop, Stopped
from llada_jax.train import state
from llada_jax.train.evaluation import Evaluation, print_result, shown
from llada_jax.train.experiment import Plan
from llada_jax.train.reference import Reference
from llada_jax.train.step import jit_update

STOPPED = 143  # exit status after SIGTERM or SIGINT, the state being saved


def train(plan: Plan) -> int:
    """Runs a plan to its end, or to a signal; returns the exit status."""
    c = plan.config
    stop = Stop()
    try:
        with (
            plan.parallel.use(),
            Checkpoints(plan.workdir / "checkpoints", c.checkpoint.keep) as saved,
        ):
            return _train(plan, saved, stop)
    except Stopped:  # before the first update: there is nothing new to save
        hosts_lib.say(
            "stopped in the reference's terms or the evaluation at the start; the same command continues"
        )
        return STOPPED
    finally:
        stop.restore()


def _train(plan: Plan, saved: Checkpoints, stop: Stop) -> int:
    c = plan.config
    abstract = state.abstract_state(plan.model, plan.tx, plan.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    restored = saved.restore(abstract)
    if restored is None:
        if hosts_lib.is_first():
            _write_model_folder(plan)
        params = None
        if c.init_from:
            params = loading.load(c.init_from, c.model.param_dtype, shardings.params)[1]
        key = noise.stream_key(c.seed, "init")
        current = state.init_state(plan.model, plan.tx, plan.mesh, key, params)
        history, next_index = [], 0
        del params
    else:
        current, extra = restored
        history, next_index = extra["evaluations"], extra["next_index"]
        hosts_lib.say(
            f"continuing from step {int(current.step)} of {plan.num_steps} in {plan.workdir}"
        )
    start = int(current.step)

    end_index = next_index + max(plan.num_steps - start, 0) * c.data.batch_rows
    policy_reference = (
        Reference(plan, shardings.params, stop, end_index) if c.objective == "vrpo" else None
    )
    # What a run may not change in the middle.
    identity = {
        "data": plan.rows.fingerprint,
        "settings of the loss, its noise or the seed": f"{plan.settings}, noise {noise.FORMAT}",
        "reference policy": policy_reference.fingerprint if policy_reference else "",
    }
    if restored is not None and (
        changed := [k for k, v in identity.items() if extra["identity"].get(k) != v]
    ):
        raise ValueError(
            f"{plan.workdir} was trained with other {' and '.join(changed)} up to step {start}: go on with the old "
            "config and files, or give another --workdir"
        )
    update = jit_update(plan, shardings)
    evaluations = Evaluation(plan, policy_reference, stop)
    loader = host_loader(
        plan, plan.rows, batch_rows=c.data.batch_rows, seed=c.seed, start=next_index
    )
    hosts = plan.parallel.shard[1]
    show = ("loss", "rewards/accuracies", "rewards/margins") if c.objective == "vrpo" else ("loss",)

    def save(step):
        extra = {
            "next_index": loader.next_index,
            "identity": identity,
            "evaluations": list(history),
        }
        writer.flush()
        saved.save(step, current, extra)

    def is_due(step):
        return step in (0, plan.num_steps) or (c.eval.every > 0 and step % c.eval.every == 0)

    # Unless it is in the history: a run that was stopped went without the evaluation of its last step.
    evaluates_first = is_due(start) and (not history or history[-1]["step"] < start)
    with (
        metrics.Writer(plan.workdir, start, evaluates_again=evaluates_first) as writer,
        metrics.Progress(
            plan.num_steps, start, show=show, every=c.eval.seconds_between_lines
        ) as progress,
    ):

        def log(step, values, counts):
            values = metrics.floats(values)
            rates = progress.update(step, values, **counts)
            # The rate that this update was computed with: optax counts from 0.
            writer.write(step, values | {"learning_rate": plan.schedule(step - 1)} | rates)
            for name in ("loss", "grad_norm"):
                if not math.isfinite(values[name]):
                    raise FloatingPointError(
                        f"the {name} at step {step} is {values[name]}: lower optimizer.peak or optimizer.clip_norm; "
                        f"the checkpoints in {plan.workdir} are from before"
                    )

        def run_evaluations(step):
            found = evaluations.run(current.params)
            history.append({"step": step, **found})
            if found:
                writer.write(step, {f"eval/{name}": value for name, value in found.items()})
                hosts_lib.say(f"evaluation at step {step}: {shown(found)}")

        if evaluates_first:
            run_evaluations(start)
        pending = None
        for step in range(start + 1, plan.num_steps + 1):
            batch = next(loader)
            # For the rates alone, so this host's share speaks for the others.
            counts = {"tokens": hosts * int((batch.segment_ids > 0).sum())}
            extra_input = () if policy_reference is None else (policy_reference.of(batch),)
            current, values = update(current, plan.parallel.put(batch), *extra_input)
            if c.objective == "vrpo":
                counts["pairs"] = hosts * _count_pairs(batch)
            # House rule 4: the metrics of the step before are read while this one runs.
            if pending:
                log(*pending)
            pending = (step, values, counts)
            stopping = stop.agreed()  # read once: the signal may come between two lines
            saving = step == plan.num_steps or stopping or step % c.checkpoint.every == 0
            if is_due(step) or saving:  # what a checkpoint holds is logged and finite
                log(*pending)
                pending = None
            if is_due(step) and not stopping:
                try:
                    run_evaluations(step)
                except Stopped:  # the run that continues begins with this evaluation
                    stopping = saving = True
            if saving:
                save(step)
            if stopping:
                saved.wait()
                hosts_lib.say(
                    f"stopped at step {step} of {plan.num_steps}; the same command continues"
                )
                return STOPPED
    saved.wait()
    if hosts_lib.is_first():
        print_result(plan, history)
    return 0


def host_loader(plan: Plan, rows: Rows, **settings):
    """This host's share of every batch."""
    index, count = plan.parallel.shard
    return batches_lib.loader(rows, shard_index=index, shard_count=count, **settings)


def _count_pairs(batch) -> int:
    return int((batch.segment_ids.max(axis=1) // 2).sum())


def _write_model_folder(plan: Plan):
    """workdir/model: config.json and the tokenizer, so that the workdir is a checkpoint on its own."""
    folder = plan.workdir / "model"
    plan.tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(plan.model.config.to_dict(), indent=1) + "\n")
