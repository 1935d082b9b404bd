"""The evaluation of a run: held-out metrics, and responses that a scorer judges."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from llada_jax import config, noise, tasks
from llada_jax.evaluate import divergence, heldout, responses
from llada_jax.files import write_whole
from llada_jax.parallel import hosts
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.parallel.split import Parallel
from llada_jax.parallel.stop import Stop
from llada_jax.sampling import picture, replay
from llada_jax.train.experiment import Experiment
from llada_jax.train.reference import Policy
from llada_jax.train.result import PICTURES
from llada_jax.variance.heldout import score_variance


class Evaluation:
    """The evaluation of an experiment. It compiles its functions once."""

    def __init__(self, plan: Experiment, reference: Policy, stop: Stop):
        self._plan, self._reference, self._stop = plan, reference, stop
        self._task = tasks.find(plan.solve.scorer) if plan.prompts else None
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

    def run(self, params, step: int) -> tuple[dict[str, float | int], list[dict]]:
        """Returns the metrics of these parameters, and the examples that people are shown.

        At the last step it also draws the un-masking of the first example. Raises Stopped if a
        signal asks to stop.
        """
        found, examples = {}, []
        if self._plan.heldout is not None:
            found |= self._heldout(params)
        if self._plan.prompts:
            solved, examples = self._solve(params, step == self._plan.num_steps)
            found |= solved
        return found, examples

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

    def _solve(self, params, last: bool) -> tuple[dict[str, float | int], list[dict]]:
        plan, tokenizer = self._plan, self._plan.tokenizer
        policy = self._logits_fn(params)
        sampler = dataclasses.asdict(plan.solve.sampler)
        solved = responses.solve(
            policy,
            self._task,
            plan.prompts,
            tokenizer,
            template=plan.data.packing.template,
            batch_size=plan.solve.batch_size,
            progress=lambda done, count: self._stop.check(),
            # The same key at each evaluation: a prompt has the same draws before and after.
            key=noise.stream_key(plan.seed, "solve"),
            mask_id=plan.model.config.mask_token_id,
            pad_id=tokenizer.eos_id,
            eos_id=tokenizer.eos_id,
            eot_id=tokenizer.eot_id,
            **sampler,
        )
        found = solved.metrics
        if plan.solve.kl_draws:
            found |= self._divergence(policy, solved)
        if plan.solve.show and last:
            self._draw(policy, solved)
        return found, self._examples(solved)

    def _logits_fn(self, params) -> jax.tree_util.Partial:
        return jax.tree_util.Partial(self._plan.model.apply, {"params": params})

    def _divergence(self, policy, solved: responses.Solved) -> dict[str, float]:
        plan = self._plan
        answers = [
            divergence.answer_ids(
                response.tokens,
                eos_id=plan.tokenizer.eos_id,
                append_eos=plan.data.packing.append_eos,
                multiple=plan.data.packing.answer_multiple,
                room=plan.scored_length - len(prompt),
            )
            for prompt, response in zip(solved.prompts, solved.responses, strict=True)
        ]
        return divergence.kl_from_reference(
            noise.stream_key(plan.seed, "divergence"),
            policy,
            self._logits_fn(self._reference.frozen),
            solved.prompts,
            answers,
            draws=plan.solve.kl_draws,
            mask_id=plan.model.config.mask_token_id,
            batch_size=plan.solve.batch_size,
            row_length=plan.scored_length,
            progress=self._stop.check,
        )

    def _examples(self, solved: responses.Solved) -> list[dict]:
        """The first responses, as JSON: the prompt, the pieces of the response, and its score."""
        plan = self._plan
        # A named number that is 0 or 1 for every response is a verdict.
        verdicts = {
            name
            for name in solved.verdicts[0]
            if name != "score" and all(v[name] in (0, 1) for v in solved.verdicts)
        }
        shown = list(zip(plan.prompts, solved.texts, solved.verdicts, strict=True))
        return [
            {
                "prompt": _text_of(question.prompt),
                "pieces": self._task.shaded(question.record, text),
                "score": ", ".join(_said(*item, verdicts) for item in verdict.items()),
            }
            for question, text, verdict in shown[: plan.solve.show]
        ]

    def _draw(self, policy, solved: responses.Solved):
        plan = self._plan
        response = replay.with_confidence(
            policy,
            solved.prompts[0],
            solved.responses[0],
            remasking=plan.solve.sampler.remasking,
            mask_id=plan.model.config.mask_token_id,
        )
        if not hosts.is_first():
            return
        for name in PICTURES:
            with contextlib.suppress(ImportError):  # a PNG needs matplotlib
                content = picture.of_response(
                    picture.renderer(name),
                    response,
                    plan.tokenizer,
                    plan.prompts[0].prompt,
                    plan.tokenizer.eos_id,
                    plan.tokenizer.eot_id,
                )
                write_whole(plan.workdir / name, content)


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


def _said(name: str, value, verdicts: set[str]) -> str:
    if name in verdicts:
        return name if value else f"not {name}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _text_of(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
