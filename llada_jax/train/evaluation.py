"""The held-out evaluation of a run."""

import functools
import math

import jax

from llada_jax import noise, variance
from llada_jax.evaluate import heldout, responses
from llada_jax.parallel import mesh
from llada_jax.parallel.stop import Stop
from llada_jax.tasks import scorer
from llada_jax.train.experiment import Plan
from llada_jax.train.loop import host_loader
from llada_jax.train.reference import Reference


class Evaluation:
    """The held-out metrics of a plan, compiled once."""

    def __init__(self, plan: Plan, policy_reference: Reference | None, stop: Stop):
        self._plan, self._reference, self._stop = plan, policy_reference, stop
        c = plan.config
        kwargs = {
            "model": plan.model,
            "num_segments": plan.num_segments,
            "axis_name": plan.parallel.axis_name,
        }
        jit = functools.partial(
            plan.parallel.jit, out_rows=False, out_shardings=mesh.replicated(plan.mesh)
        )
        if policy_reference is None:
            # One draw at a time: the memory of training may be that of one.
            kwargs |= {"scheme": noise.Scheme(c.eval.n_t or 8), "seed": c.seed, "chunk": 1}
            self._metrics = jit(
                functools.partial(heldout.denoising_metrics, **kwargs), (False, True)
            )
        else:
            function = functools.partial(
                heldout.preference_metrics, settings=plan.eval_settings, **kwargs
            )
            self._metrics = jit(function, (False, True, True))
        self._variance = None
        if c.eval.variance_repeats:
            kwargs |= {"settings": plan.settings, "repeats": c.eval.variance_repeats}
            self._variance = jit(
                functools.partial(variance.score_variance, **kwargs), (False, True, False)
            )

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
                return (
                    means | self._variance(params, placed, self._reference.of(batch))
                    if self._variance
                    else means
                )

            batches = host_loader(
                plan,
                plan.heldout,
                batch_rows=batch_rows,
                seed=c.seed,
                shuffle=False,
                epochs=1,
                pad=True,
            )
            found |= heldout.over_batches(metrics_of, batches)
        if plan.prompts:
            found |= responses.solve_rate(
                jax.tree_util.Partial(plan.model.apply, {"params": params}),
                plan.prompts,
                plan.tokenizer,
                scorer.load_scorer(c.solve.scorer),
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


def shown(found: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {found[name]:.4f} +- {found.get(f'{name}_stderr', math.nan):.4f}"
        for name in _SHOWN
        if name in found
    )


def print_result(plan: Plan, history: list[dict]):
    """The table at the end: every held-out metric before and after, with standard errors."""
    print(f"done: {plan.num_steps} steps, {plan.workdir}")
    before, after = history[0], history[-1]
    names = [name for name in _SHOWN if name in before and name in after]
    if not names:
        return
    print(f"{'held out':<22}{'step ' + str(before['step']):>20}{'step ' + str(after['step']):>20}")
    for name in names:
        cells = (
            f"{at[name]:.4f} +- {at.get(f'{name}_stderr', math.nan):.4f}" for at in (before, after)
        )
        print(f"{name:<22}" + "".join(f"{cell:>20}" for cell in cells))
    if "solve/rate" in names and before["solve/rate"] < 1:
        removed = (after["solve/rate"] - before["solve/rate"]) / (1 - before["solve/rate"])
        print(
            f"{after['solve/count']} held-out prompts; share of the errors removed: {removed:.1%}"
        )
