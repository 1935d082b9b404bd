"""The training loop: from the newest checkpoint or the start, to the last step or a signal."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax

from llada_jax import metrics, noise
from llada_jax.batch import Batch
from llada_jax.checkpoints import loading
from llada_jax.checkpoints.orbax import Checkpoints
from llada_jax.files import write_whole
from llada_jax.parallel import hosts
from llada_jax.parallel.stop import Stop, Stopped
from llada_jax.train import identity, result
from llada_jax.train import state as state_lib
from llada_jax.train.evaluation import Evaluation
from llada_jax.train.experiment import Experiment
from llada_jax.train.reference import Policy
from llada_jax.train.state import TrainState
from llada_jax.train.step import jit_update

Watch = Callable[[int, dict[str, float]], object]  # (step, values)
STOPPED = 143  # exit status after SIGTERM or SIGINT, when the state has been saved


def train(
    plan: Experiment,
    watch: Watch | None = None,
    *,
    stop: Stop | None = None,
    table: bool = True,
) -> int:
    """Runs an experiment to its end or until a signal; returns the exit status.

    SIGTERM or SIGINT (Ctrl-C) saves the state and returns 143; a second signal ends the process at
    once.

    watch: is called as watch(step, values) after each step and each evaluation, on every host.
        `values` are those of the line in metrics.jsonl, as floats: the metrics of the step, or
        those of the evaluation with "eval/" before their names. What it raises ends the run.
    stop: the signal handlers of a caller that runs several experiments; None: new ones.
    table: if False, the table at the end is not printed.
    """
    handlers = stop or Stop()
    keep = plan.checkpoint.keep
    try:
        with plan.parallel.use(), Checkpoints(plan.workdir / "checkpoints", keep) as saved:
            run = Run(plan, saved, handlers, watch)
            status = run.to_the_end()
        if table and not status and hosts.is_first():
            result.print_result(plan, run.history)
        return status
    except Stopped:  # raised before the first update, so there is nothing new to save
        hosts.say(
            "stopped in the reference's terms or the evaluation at the start; "
            "the same command continues"
        )
        return STOPPED
    finally:
        if stop is None:
            handlers.restore()


class Run:
    """One run on this host: its state, its loader and its history."""

    def __init__(
        self, plan: Experiment, saved: Checkpoints, stop: Stop, watch: Watch | None = None
    ):
        self.plan, self.saved, self.stop = plan, saved, stop
        self.watch = watch or (lambda step, values: None)
        abstract = state_lib.abstract_state(plan.model, plan.tx, plan.mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        restored = saved.restore(abstract)
        if restored is None:
            self.state, extra = self._first_state(shardings), {}
        else:
            self.state, extra = restored
            hosts.say(
                f"continuing from step {int(self.state.step)} of {plan.num_steps} in {plan.workdir}"
            )
        self.start = int(self.state.step)
        self.history: list[dict] = extra.get("evaluations", [])  # all evaluations so far
        self.loader = plan.batches(
            plan.rows,
            batch_rows=plan.data.batch_rows,
            seed=plan.seed,
            start=extra.get("next_index", 0),
        )
        self.reference = Policy(plan, shardings.params, stop)
        self.identity = identity.of(plan, self.reference.fingerprint)
        if restored is not None:
            note = identity.check(
                self.identity,
                extra.get("identity"),
                settings=plan.objective.Settings,
                workdir=plan.workdir,
            )
            if note:
                hosts.say(note)
        steps_left = max(plan.num_steps - self.start, 0)
        self.reference.compute_terms(self.loader.next_index + steps_left * plan.data.batch_rows)
        self.update = jit_update(plan, shardings)
        self.evaluation = Evaluation(plan, self.reference, stop)

    def to_the_end(self) -> int:
        """Runs all remaining steps, logs, evaluations and saves; returns the exit status."""
        plan = self.plan
        # A run that was stopped may have skipped the evaluation of its last step.
        evaluates_first = self._is_due(self.start) and (
            not self.history or self.history[-1]["step"] < self.start
        )
        with (
            metrics.Writer(
                plan.workdir, self.start, evaluates_again=evaluates_first
            ) as self.writer,
            metrics.Progress(
                plan.num_steps,
                self.start,
                show=plan.objective.shown,
                every=plan.eval.seconds_between_lines,
            ) as self.progress,
        ):
            if evaluates_first:
                self.evaluate(self.start)
            # Read the metrics of a step while the next step runs.
            unread = None
            for step in range(self.start + 1, plan.num_steps + 1):
                values = self.step()
                if unread:
                    self.log(*unread)
                unread = (step, *values)
                stopping = self.stop.agreed()  # call it once: a signal may come between two lines
                saving = stopping or step == plan.num_steps or step % plan.checkpoint.every == 0
                # Log before saving: `log` raises an error if the metrics are not finite.
                if self._is_due(step) or saving:
                    self.log(*unread)
                    unread = None
                if self._is_due(step) and not stopping:
                    try:
                        self.evaluate(step)
                    except Stopped:  # the resumed run repeats this evaluation first
                        stopping = saving = True
                if saving:
                    self.save(step)
                if stopping:
                    self.saved.wait()
                    hosts.say(
                        f"stopped at step {step} of {plan.num_steps}; the same command continues"
                    )
                    return STOPPED
        self.saved.wait()
        return 0

    def step(self) -> tuple[dict[str, Any], int]:
        """Updates the state on the next batch; returns (metrics on devices, tokens of the batch).

        The caller reads the metrics later, so that this call need not wait for the devices.
        """
        batch: Batch = next(self.loader)
        # The number is for the rates only. Assume that the other hosts have as many tokens.
        tokens = self.plan.parallel.shard[1] * int((batch.segment_ids > 0).sum())
        batch = self.reference.place(batch)
        self.state, values = self.update(
            self.state, batch, self.reference.frozen, self.plan.arguments
        )
        return values, tokens

    def log(self, step: int, values: dict[str, Any], tokens: int):
        """Writes and shows the metrics of a step.

        Raises FloatingPointError if the loss or the gradient norm is not finite.
        """
        values = metrics.floats(values)
        unit = self.plan.objective.unit
        rates = self.progress.update(step, values, **{"tokens": tokens, unit: values[unit]})
        # The learning rate of this update. optax counts steps from 0.
        rate = self.plan.schedule(step - 1)
        self.write(step, values | {"learning_rate": rate} | rates)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(
                    f"the {name} at step {step} is {values[name]}: lower optimizer.peak or "
                    f"optimizer.clip_norm; the checkpoints in {self.plan.workdir} are from before"
                )

    def evaluate(self, step: int):
        """Evaluates the current parameters and adds the result to the history."""
        found, examples = self.evaluation.run(self.state.params, step)
        shown = {result.EXAMPLES: examples} if examples else {}
        self.history.append({"step": step, **found, **shown})
        if found:
            self.write(step, {f"eval/{name}": value for name, value in found.items()})
            hosts.say(f"evaluation at step {step}: {result.one_line(self.plan, found)}")

    def write(self, step: int, values: dict[str, Any]):
        """Writes a line of metrics, and shows it to the caller's `watch`."""
        values = metrics.floats(values)
        self.writer.write(step, values)
        self.watch(step, values)

    def save(self, step: int):
        """Starts to save the state and everything else that a resume needs."""
        extra = {
            "next_index": self.loader.next_index,
            "identity": self.identity,
            "evaluations": list(self.history),
        }
        self.writer.flush()
        self.saved.save(step, self.state, extra)

    def _is_due(self, step: int) -> bool:
        """Whether an evaluation follows this step."""
        every = self.plan.eval.every
        return step in (0, self.plan.num_steps) or (every > 0 and step % every == 0)

    def _first_state(self, shardings: TrainState) -> TrainState:
        plan = self.plan
        if hosts.is_first():
            _write_model_folder(plan)
        params = None
        if plan.init_from:
            params = loading.load(plan.init_from, plan.model.param_dtype, shardings.params)[1]
        key = noise.stream_key(plan.seed, "init")
        return state_lib.init_state(plan.model, plan.tx, plan.mesh, key, params)


def _write_model_folder(plan: Experiment):
    """Writes config.json and the tokenizer to workdir/model, so that the workdir can be loaded."""
    folder = plan.workdir / "model"
    plan.tokenizer.save(folder)
    content = json.dumps(plan.model.config.to_dict(), indent=1) + "\n"
    write_whole(folder / "config.json", content)
