"""The evaluation of a run: held-out metrics, and responses that a scorer judges."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from llada_jax import config, tasks
from llada_jax.evaluate import heldout, responses
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.parallel.split import Parallel
from llada_jax.parallel.stop import Stop
from llada_jax.train.experiment import Experiment
from llada_jax.train.reference import Policy
from llada_jax.variance.heldout import score_variance

SOLVE_RATE = "solve/rate"


class Evaluation:
    """The evaluation of an experiment. It compiles its functions once."""

    def __init__(self, plan: Experiment, reference: Policy, stop: Stop):
        self._plan, self._reference, self._stop = plan, reference, stop
        self._metrics = _jit_metrics(
            heldout.heldout_metrics,
            plan.parallel,
            config.without_arguments(plan.heldout_settings),
            model=plan.model,
            objective=plan.objective,
        )
        self._variance = None
        if repeats := plan.eval.variance_repeats:
            settings = config.without_arguments(plan.settings)
            self._variance = _jit_metrics(
                score_variance, plan.parallel, settings, model=plan.model, repeats=repeats
            )

    def run(self, params) -> dict[str, float | int]:
        """Returns the metrics of these parameters. Raises Stopped if a signal asks to stop."""
        found = {}
        if self._plan.heldout is not None:
            found |= self._heldout(params)
        if self._plan.prompts:
            found |= self._solve(params)
        return found

    def _heldout(self, params) -> dict[str, float | int]:
        plan = self._plan

        def metrics_of(batch):
            self._stop.check()
            batch = self._reference.place(batch, "heldout")
            given = (params, batch, self._reference.frozen, plan.arguments["settings"])
            means = self._metrics(*given)
            if self._variance is not None:
                means |= self._variance(*given)
            return means

        batches = plan.batches(
            plan.heldout,
            batch_rows=plan.eval.batch_rows or plan.rows_at_once,
            seed=plan.seed,
            shuffle=False,
            epochs=1,
            pad=True,
        )
        return heldout.over_batches(metrics_of, batches)

    def _solve(self, params) -> dict[str, float | int]:
        plan, tokenizer = self._plan, self._plan.tokenizer
        return responses.solve_rate(
            jax.tree_util.Partial(plan.model.apply, {"params": params}),
            tasks.find(plan.solve.scorer),
            plan.prompts,
            tokenizer,
            template=plan.data.packing.template,
            batch_size=plan.solve.batch_size,
            progress=lambda done, count: self._stop.check(),
            gen_length=plan.solve.gen_length,
            steps=plan.solve.steps,
            block_length=plan.solve.block_length,
            mask_id=plan.model.config.mask_token_id,
            pad_id=tokenizer.eos_id,
            eos_id=tokenizer.eos_id,
            eot_id=tokenizer.eot_id,
        )


@functools.lru_cache(maxsize=32)
def _jit_metrics(function: Callable, parallel: Parallel, settings: Any, **kwargs):
    """Returns the jitted (params, batch, frozen, numbers) -> Means of a function.

    `numbers` are the `config.arguments` of the settings, which are missing in `settings`.
    """

    def metrics(params, batch, frozen, numbers):
        given = config.with_arguments(settings, numbers)
        axis = parallel.axis_name
        return function(params, batch, frozen, settings=given, axis_name=axis, **kwargs)

    return parallel.jit(
        metrics,
        (False, True, False, False),
        out_rows=False,
        out_shardings=mesh_lib.replicated(parallel.mesh),
    )


def shown(plan: Experiment, found: dict[str, float | int]) -> str:
    """Returns the main metrics of an evaluation in one line."""
    return ", ".join(f"{name} {_cell(found, name)}" for name in _names(plan) if name in found)


def print_result(plan: Experiment, history: list[dict]):
    """Prints the final table: every held-out metric before and after, with standard errors."""
    print(f"done: {plan.num_steps} steps, {plan.workdir}")
    before, after = history[0], history[-1]
    names = [name for name in _names(plan) if name in before and name in after]
    if not names:
        return
    first, last = (f"step {at['step']}" for at in (before, after))
    print(f"{'held out':<22}{first:>20}{last:>20}")
    for name in names:
        print(f"{name:<22}{_cell(before, name):>20}{_cell(after, name):>20}")
    # A score that is no share has no share of errors.
    if SOLVE_RATE in names and 0 <= before[SOLVE_RATE] < 1 and 0 <= after[SOLVE_RATE] <= 1:
        removed = (after[SOLVE_RATE] - before[SOLVE_RATE]) / (1 - before[SOLVE_RATE])
        count = after["solve/count"]
        print(f"{count} held-out prompts; share of the errors removed: {removed:.1%}")


def _names(plan: Experiment) -> tuple[str, ...]:
    return (SOLVE_RATE, *plan.objective.heldout)


def _cell(found: dict[str, float | int], name: str) -> str:
    return f"{found[name]:.4f} +- {found.get(f'{name}_stderr', math.nan):.4f}"
