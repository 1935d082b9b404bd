"""The trainer: python -m llada_jax.train --config=FILE [--config.x=y] --workdir=DIR [--dry_run].

The same command continues a run that was stopped. `plan.py` decides everything before the first array; `train` runs it.
On several hosts the same command runs on each (`distributed.initialize` says how they find each other).
"""

import functools
import json
import math
import os
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from llada_jax import checkpoint, convert, data, distributed, evaluate, metrics, noise, reference, state, steps
from llada_jax import mesh as mesh_lib
from llada_jax.plan import Plan, describe, make_plan

STOPPED = 143  # exit status after SIGTERM or SIGINT, the state being saved


def train(plan: Plan) -> int:
    """Runs a plan to its end, or to a signal; returns the exit status."""
    c = plan.config
    stop = distributed.Stop()
    try:
        with plan.parallel.use(), checkpoint.Checkpoints(plan.workdir / "checkpoints", c.checkpoint.keep) as saved:
            return _train(plan, saved, stop)
    except distributed.Stopped:  # before the first update: there is nothing new to save
        distributed.say("stopped in the reference's terms or the evaluation at the start; the same command continues")
        return STOPPED
    finally:
        stop.restore()


def _train(plan: Plan, saved: checkpoint.Checkpoints, stop: distributed.Stop) -> int:
    c = plan.config
    abstract = state.abstract_state(plan.model, plan.tx, plan.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    restored = saved.restore(abstract)
    if restored is None:
        if distributed.is_first():
            _write_model_folder(plan)
        params = None
        if c.init_from:
            params = convert.load(c.init_from, c.model.param_dtype, shardings.params)[1]
        key = noise.stream_key(c.seed, "init")
        current = state.init_state(plan.model, plan.tx, plan.mesh, key, params)
        history, next_index = [], 0
        del params
    else:
        current, extra = restored
        history, next_index = extra["evaluations"], extra["next_index"]
        distributed.say(f"continuing from step {int(current.step)} of {plan.num_steps} in {plan.workdir}")
    start = int(current.step)

    end_index = next_index + max(plan.num_steps - start, 0) * c.data.batch_rows
    policy_reference = _Reference(plan, shardings.params, stop, end_index) if c.objective == "vrpo" else None
    # What a run may not change in the middle.
    identity = {
        "data": plan.rows.fingerprint,
        "settings of the loss, its noise or the seed": f"{plan.settings}, noise {noise.FORMAT}",
        "reference policy": policy_reference.fingerprint if policy_reference else "",
    }
    if restored is not None and (changed := [k for k, v in identity.items() if extra["identity"].get(k) != v]):
        raise ValueError(
            f"{plan.workdir} was trained with other {' and '.join(changed)} up to step {start}: go on with the old "
            "config and files, or give another --workdir"
        )
    update = jit_update(plan, shardings)
    evaluations = _Evaluation(plan, policy_reference, stop)
    loader = _loader(plan, plan.rows, batch_rows=c.data.batch_rows, seed=c.seed, start=next_index)
    hosts = plan.parallel.shard[1]
    show = ("loss", "rewards/accuracies", "rewards/margins") if c.objective == "vrpo" else ("loss",)

    def save(step):
        extra = {"next_index": loader.next_index, "identity": identity, "evaluations": list(history)}
        writer.flush()
        saved.save(step, current, extra)

    def is_due(step):
        return step in (0, plan.num_steps) or (c.eval.every > 0 and step % c.eval.every == 0)

    # Unless it is in the history: a run that was stopped went without the evaluation of its last step.
    evaluates_first = is_due(start) and (not history or history[-1]["step"] < start)
    with (
        metrics.Writer(plan.workdir, start, evaluates_again=evaluates_first) as writer,
        metrics.Progress(plan.num_steps, start, show=show, every=c.eval.seconds_between_lines) as progress,
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
                distributed.say(f"evaluation at step {step}: {_shown(found)}")

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
                except distributed.Stopped:  # the run that continues begins with this evaluation
                    stopping = saving = True
            if saving:
                save(step)
            if stopping:
                saved.wait()
                distributed.say(f"stopped at step {step} of {plan.num_steps}; the same command continues")
                return STOPPED
    saved.wait()
    if distributed.is_first():
        _print_result(plan, history)
    return 0


def jit_update(plan: Plan, shardings):
    """The compiled step of a plan, (state, batch, ...) -> (state, metrics), its state donated."""
    c = plan.config
    extra_rows = ()
    common = {
        "model": plan.model,
        "tx": plan.tx,
        "settings": plan.settings,
        "num_segments": plan.num_segments,
        "accumulate": c.optimizer.accumulate,
        "axis_name": plan.parallel.axis_name,
    }
    if c.objective == "vrpo":
        cached = c.vrpo.reference == "cached"
        extra_rows = (cached,)  # terms of each row, or parameters
        step = functools.partial(steps.vrpo_step, cached=cached, **common)
    else:
        step = functools.partial({"sft": steps.sft_step, "pretrain": steps.pretrain_step}[c.objective], **common)
    out_shardings = (shardings, mesh_lib.replicated(plan.mesh))
    return plan.parallel.jit(step, (False, True, *extra_rows), out_rows=False, out_shardings=out_shardings, donate=0)


class _Reference:
    """The reference policy as `vrpo_step` and the evaluation want it: parameters, or cached terms of a batch.

    `end_index`: of the loader after the last step.
    """

    def __init__(self, plan: Plan, shardings, stop: distributed.Stop, end_index: int):
        c = plan.config
        self._plan, self._stop = plan, stop
        self._settings = {"train": plan.settings, "heldout": plan.eval_settings}
        dtype = c.vrpo.reference_dtype or c.model.param_dtype
        self._params = convert.load(c.vrpo.reference_from or c.init_from, dtype, shardings)[1]
        self.fingerprint = checkpoint.fingerprint(self._params)
        self._caches = {}
        if c.vrpo.reference == "cached":
            epochs = -(-end_index // len(plan.rows))
            self._caches["train"] = self._fill("train", plan.rows, epochs)
            if plan.heldout is not None:
                self._caches["heldout"] = self._fill("heldout", plan.heldout, 1)
            self._params = None

    def _fill(self, which: str, rows: data.Rows, epochs: int) -> reference.ReferenceCache:
        plan, settings = self._plan, self._settings[which]
        batch_rows = plan.rows_at_once
        noise_settings = (settings.scheme, settings.share_noise, settings.seed, settings.stream)
        terms_fn = self._terms_fn(which)
        gathered = plan.parallel.jit(
            lambda params, batch: (batch.row_ids, terms_fn(params, batch)),
            (False, True),
            out_rows=True,
            out_shardings=mesh_lib.replicated(plan.mesh),
        )

        def terms_of(batch):
            self._stop.check()
            return jax.device_get(gathered(self._params, plan.parallel.put(batch)))

        cache = reference.ReferenceCache(
            plan.workdir / "reference",
            {
                "reference": self.fingerprint,
                "rows": rows.fingerprint,
                "settings": repr((noise_settings, noise.FORMAT, plan.model, plan.num_segments)),
            },
            num_rows=len(rows),
            epochs=epochs,
            n=settings.scheme.n,
            segments=plan.num_segments,
        )

        def batches_of(epoch, start):
            index = epoch * len(rows) + start
            return _loader(
                plan, rows, batch_rows=batch_rows, seed=0, shuffle=False, epochs=epoch + 1, start=index, pad=True
            )

        with metrics.Progress(epochs * len(rows), unit="reference row", show=()) as progress:
            cache.fill(
                terms_of,
                batches_of,
                batch_rows=batch_rows,
                progress=lambda done, _: progress.update(done),
            )
        return cache

    def of(self, batch):
        """What `vrpo_step` takes beside a batch."""
        return self._cached("train", batch) if self._params is None else self._params

    def terms(self, batch) -> jax.Array:
        """Terms of the reference for a held-out batch, at the masks of the evaluation."""
        if self._params is None:
            return self._cached("heldout", batch)
        return self._heldout_terms(self._params, self._plan.parallel.put(batch))

    @functools.cached_property
    def _heldout_terms(self):
        sharding = mesh_lib.rows(self._plan.mesh)
        return self._plan.parallel.jit(
            self._terms_fn("heldout"), (False, True), out_rows=True, out_shardings=sharding
        )

    def _terms_fn(self, which: str):
        return functools.partial(
            steps.reference_terms,
            model=self._plan.model,
            settings=self._settings[which],
            num_segments=self._plan.num_segments,
        )

    def _cached(self, which: str, batch) -> jax.Array:
        return self._plan.parallel.put(self._caches[which][batch])


class _Evaluation:
    """The held-out metrics of a plan, compiled once."""

    def __init__(self, plan: Plan, policy_reference: _Reference | None, stop: distributed.Stop):
        self._plan, self._reference, self._stop = plan, policy_reference, stop
        c = plan.config
        kwargs = {"model": plan.model, "num_segments": plan.num_segments, "axis_name": plan.parallel.axis_name}
        jit = functools.partial(plan.parallel.jit, out_rows=False, out_shardings=mesh_lib.replicated(plan.mesh))
        if policy_reference is None:
            # One draw at a time: the memory of training may be that of one.
            kwargs |= {"scheme": noise.Scheme(c.eval.n_t or 8), "seed": c.seed, "chunk": 1}
            self._metrics = jit(functools.partial(evaluate.denoising_metrics, **kwargs), (False, True))
        else:
            function = functools.partial(evaluate.preference_metrics, settings=plan.eval_settings, **kwargs)
            self._metrics = jit(function, (False, True, True))
        self._variance = None
        if c.eval.variance_repeats:
            kwargs |= {"settings": plan.settings, "repeats": c.eval.variance_repeats}
            self._variance = jit(functools.partial(evaluate.score_variance, **kwargs), (False, True, False))

    def run(self, params) -> dict[str, float]:
        """The metrics of these parameters; raises Stopped where the run is asked to stop meanwhile."""
        plan = self._plan
        c = plan.config
        found = {}
        if plan.heldout is not None:
            batch_rows = c.eval.batch_rows or plan.rows_at_once

            def metrics_of(batch):
                self._stop.check()
                placed = plan.parallel.put(batch)
                extra = () if self._reference is None else (self._reference.terms(batch),)
                means = self._metrics(params, placed, *extra)
                return means | self._variance(params, placed, self._reference.of(batch)) if self._variance else means

            batches = _loader(
                plan, plan.heldout, batch_rows=batch_rows, seed=c.seed, shuffle=False, epochs=1, pad=True
            )
            found |= evaluate.over_batches(metrics_of, batches)
        if plan.prompts:
            found |= evaluate.solve_rate(
                jax.tree_util.Partial(plan.model.apply, {"params": params}),
                plan.prompts,
                plan.tokenizer,
                evaluate.load_scorer(c.solve.scorer),
                template=c.data.template,
                batch_size=c.solve.batch_size,
                progress=lambda done, count: self._stop.check(),
                gen_length=c.solve.gen_length,
                steps=c.solve.steps,
                block_length=c.solve.block_length,
                mask_id=plan.model.config.mask_token_id,
                pad_id=plan.tokenizer.eos_id,
                eos_id=plan.tokenizer.eos_id,
                eot_id=plan.tokenizer.eot_id,
            )
        return found


def _loader(plan: Plan, rows: data.Rows, **settings):
    """This host's share of every batch."""
    index, count = plan.parallel.shard
    return data.loader(rows, shard_index=index, shard_count=count, **settings)


def _count_pairs(batch) -> int:
    return int((batch.segment_ids.max(axis=1) // 2).sum())


def _write_model_folder(plan: Plan):
    """workdir/model: config.json and the tokenizer, so that the workdir is a checkpoint on its own."""
    folder = plan.workdir / "model"
    plan.tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(plan.model.config.to_dict(), indent=1) + "\n")


_SHOWN = (
    "solve/rate",
    "rewards/accuracies",
    "rewards/margins",
    "elbo_per_token",
    "loss/preference",
    "loss/sft",
    "loss/sft_rejected",
    "score/mc_variance",
    "score_variance",
)


def _shown(found: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {found[name]:.4f} +- {found.get(f'{name}_stderr', math.nan):.4f}" for name in _SHOWN if name in found
    )


def _print_result(plan: Plan, history: list[dict]):
    """The table at the end: every held-out metric before and after, with standard errors."""
    print(f"done: {plan.num_steps} steps, {plan.workdir}")
    before, after = history[0], history[-1]
    names = [name for name in _SHOWN if name in before and name in after]
    if not names:
        return
    print(f"{'held out':<22}{'step ' + str(before['step']):>20}{'step ' + str(after['step']):>20}")
    for name in names:
        cells = (f"{at[name]:.4f} +- {at.get(f'{name}_stderr', math.nan):.4f}" for at in (before, after))
        print(f"{name:<22}" + "".join(f"{cell:>20}" for cell in cells))
    if "solve/rate" in names and before["solve/rate"] < 1:
        removed = (after["solve/rate"] - before["solve/rate"]) / (1 - before["solve/rate"])
        print(f"{after['solve/count']} held-out prompts; share of the errors removed: {removed:.1%}")


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; settings are --config.name=value")
    try:
        given = flags.FLAGS
        distributed.initialize(given.coordinator_address, given.num_processes, given.process_id)
        given.config.lock()
        plan = make_plan(given.config, given.workdir, dry_run=given.dry_run)
        distributed.say(describe(plan))
        if given.dry_run:
            return
        status = train(plan)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _fail(error)
    except Exception:
        distributed.fail(traceback.format_exc())
    sys.exit(status)


def parse_flags(argv):
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, OSError, ImportError, ValueError) as error:
        # What ml_collections lets through of a wrong key or a wrong file.
        _fail(error)


def _fail(error: BaseException):
    """Ends with the error in one line, or, under LLADA_JAX_TRACEBACK=1, with all of it."""
    if os.environ.get("LLADA_JAX_TRACEBACK"):
        distributed.fail("".join(traceback.format_exception(error)))
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = f"the config has no key {error.args[0]}" if isinstance(error, KeyError) else error
    distributed.fail(f"error: {' '.join(str(text).split())}")


# The one flag that benchmark.py and compile.py share.
config_flags.DEFINE_config_file("config", None, "File with get_config().", lock_config=True)

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and packed data go; the run's identity.")
    flags.DEFINE_bool("dry_run", False, "Validate, print what would run, and end.")
    flags.DEFINE_string("coordinator_address", None, "Several processes: HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "Several processes: how many.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Several processes: which one this is.", lower_bound=0)
    flags.mark_flags_as_required(["config", "workdir"])
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse_flags)
