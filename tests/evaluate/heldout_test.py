"""Held-out evaluation against numpy, exact enumeration and toy models. Scorers: pairs_test.py."""

import functools
import json
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, config_of, make_batch

from llada_jax import elbo, metrics, noise
from llada_jax.evaluate import heldout, responses
from llada_jax.evaluate.questions import Question
from llada_jax.metrics import Mean
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.objectives import OBJECTIVES, preference
from llada_jax.objectives import terms as terms_lib
from llada_jax.objectives.denoising import Denoising
from llada_jax.objectives.preference import Preference
from llada_jax.tasks import Task, sudoku
from llada_jax.tokenizer import Tokenizer
from llada_jax.train import STOPPED, make_plan, train
from llada_jax.variance.heldout import score_variance
from llada_jax.variance.problem import NESTED_EPOCH

MASK = 7
MODEL = LLaDA(
    ModelConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=8, mask_token_id=MASK, init_std=0.3)
)
# (prompt, response) of each segment of each row.
LAYOUT = [[(2, 3), (1, 4)], [(3, 2), (2, 5)], []]


@pytest.fixture(scope="module")
def params():
    return nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


@pytest.fixture(scope="module")
def batch():
    """Two rows of two segments, and one of padding."""
    return make_batch(LAYOUT, 12, vocab=MASK)


def test_batches_merge_as_numpy_says(batch):
    rng = np.random.default_rng(0)
    values, kept = rng.normal(5, 2, (4, 10)), rng.random((4, 10)) < 0.7
    kept[2] = False  # a batch of padding

    def metrics_of(batch):
        k = batch.row_ids[0]
        return {"a": Mean.of(values[k], kept[k]), "b": Mean.of(values[k] ** 2)}

    found = heldout.over_batches(
        metrics_of, [batch.replace(row_ids=np.full(3, k)) for k in range(4)]
    )
    truth = {}
    for name, x in (("a", values[kept]), ("b", values.ravel() ** 2)):
        truth |= {name: x.mean(), f"{name}_stderr": x.std(ddof=1) / len(x) ** 0.5}
    assert found == pytest.approx(truth, rel=1e-5)
    assert heldout.over_batches(metrics_of, []) == {}


def test_elbo_per_token_approaches_the_exact_one(params, batch):
    alone = np.zeros(
        (3, 4, 7), np.int32
    )  # tokens, response and attention mask of each sample by itself
    for number, (row, place) in enumerate([(0, 1), (0, 2), (1, 1), (1, 2)]):
        here = np.asarray(batch.segment_ids[row]) == place
        for array, of in zip(
            alone, (batch.tokens, batch.response_mask, batch.segment_ids > 0), strict=True
        ):
            array[number, : here.sum()] = of[row][here]
    tokens, response, attended = map(jnp.asarray, alone)

    def logits_fn(tokens):
        mask = jnp.tile(attended, (len(tokens) // len(attended), 1))
        return MODEL.apply({"params": params}, tokens, mask)

    exact = np.asarray(
        elbo.exact_elbo(logits_fn, tokens, response > 0, mask_id=MASK) / response.sum(-1)
    )

    def metric(epoch):  # another pass draws other noise
        here = batch.replace(epochs=jnp.full(3, epoch))
        settings = Denoising(noise.Scheme(64), mc_chunk=32, stream="evaluate")
        kwargs = {"objective": OBJECTIVES["sft"], "model": MODEL, "settings": settings}
        return heldout.heldout_metrics(params, here, None, **kwargs)["elbo_per_token"]

    found = list(map(jax.jit(metric), range(16)))
    values = np.array([mean.value for mean in found])
    assert {float(mean.count) for mean in found} == {4.0}  # the row of padding counts nothing
    error = values.std(ddof=1) / 4
    assert abs(values.mean() - np.mean(exact)) < 4 * error and error < 0.01 * abs(np.mean(exact))
    # Its standard error is that between samples.
    assert float(found[0].stderr) == pytest.approx(np.std(exact, ddof=1) / 2, rel=0.3)


def test_preference_metrics_are_means_over_pairs(params, batch):
    settings = Preference(beta=0.5, scheme=noise.Scheme(4))
    kwargs = {"model": MODEL, "settings": settings}
    # Every term of the reference is lower: winner and loser of row 0 by 2 and 1 nats, of row 1 by
    # 1 and 4.
    lower = np.array([[2, 1], [1, 4], [0, 0]], np.float32)

    @jax.jit
    def metrics(params, batch):
        same = preference.reference_terms(params, batch, **kwargs)
        batch = batch.replace(reference=same - lower[:, None])
        return heldout.heldout_metrics(params, batch, None, objective=OBJECTIVES["vrpo"], **kwargs)

    found = metrics(params, batch)
    truth = {
        "chosen": (1.0 + 0.5) / 2,
        "rejected": (0.5 + 2.0) / 2,
        "margins": (0.5 - 1.5) / 2,
        "accuracies": 0.5,
    }
    assert {name: float(found[f"rewards/{name}"].value) for name in truth} == pytest.approx(
        truth, abs=1e-4
    )
    assert float(found["rewards/accuracies"].stderr) == pytest.approx(0.5)  # of 0 and 1
    assert float(found["loss/preference"].value) == pytest.approx(
        np.log1p(np.exp([-0.5, 1.5])).mean(), rel=1e-4
    )
    assert float(found["score/mc_variance"].value) == pytest.approx(
        0, abs=1e-6
    )  # the same noise in both


@pytest.mark.slow
@pytest.mark.parametrize("share_noise", [True, False])
def test_score_variance_is_that_of_repeats_and_of_nested_draws(params, batch, share_noise):
    scheme = noise.Scheme(2, times="stratified", share_in_pair="masks")
    settings = Preference(beta=0.5, scheme=scheme, share_noise=share_noise, seed=3)
    reference = jax.tree.map(lambda x: 1.3 * x, params)
    compiled = jax.jit(functools.partial(score_variance, model=MODEL, settings=settings, repeats=5))
    found = compiled(params, batch, reference)

    def scores(scheme, epoch, share_noise):  # [n, pairs]
        rows = batch.replace(epochs=jnp.full(3, epoch))
        drawn = [terms_lib.draw(rows, scheme, seed=3, stream=s) for s in ("evaluate", "reference")]
        terms = [
            terms_lib.model_terms(MODEL, p, rows, d)
            for p, d in ((params, drawn[0]), (reference, drawn[0 if share_noise else 1]))
        ]
        ratio = np.asarray(terms[0] - terms[1], np.float64)
        return 0.5 * ratio[:, :2]

    repeats = np.stack([scores(scheme, k, share_noise).mean(0) for k in range(5)])
    truth = (repeats[..., 0] - repeats[..., 1]).var(0, ddof=1)
    nested = np.stack(
        [scores(noise.Scheme(1, 2), NESTED_EPOCH + k, True) for k in range(5)]
    )  # [t, y, q, 2]
    v_yt = nested.var(1, ddof=1).mean(0)
    v_t = nested.mean(1).var(0, ddof=1) - v_yt / 2
    expected = {"score_variance": truth, "score_v_t": v_t.sum(-1), "score_v_yt": v_yt.sum(-1)}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert float(found[name].value) == pytest.approx(values.mean(), rel=1e-3), name
        assert float(found[name].stderr) == pytest.approx(values.std(ddof=1) / 2**0.5, rel=1e-3), (
            name
        )


VRPO = {
    "init_from": str(ROOT / "llada_jax" / "assets" / "sudoku"),
    "num_steps": 2,
    "data.holdout": 0.2,
    "data.template": "plain",
    "data.append_eos": False,
    "data.row_length": 66,
    "data.batch_rows": 8,
    "vrpo.n_t": 2,
    "vrpo.times": "stratified",
    "optimizer.warmup_steps": 1,
    "eval.n_t": 2,
    "eval.variance_repeats": 3,
}


def plan_of(write, workdir, **changes):
    wrong = str.maketrans("1234", "2341")
    records = [
        {
            "prompt": r["prompt"],
            "chosen": r["response"],
            "rejected": r["response"].translate(wrong),
        }
        for r in sudoku.records(40, seed=2)
    ]
    config = config_of(VRPO | {"data.train": write(records), **changes})
    return make_plan(config, workdir)


@pytest.mark.slow
def test_training_logs_the_variance_of_its_score_where_asked_and_resumed(
    write, tmp_path, monkeypatch
):
    def evaluations(workdir):
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert not any(
            "score/mc_variance" in line for line in lines
        )  # stratified times: not known from one estimate
        return [line for line in lines if "eval/loss/preference" in line]

    names = [
        f"eval/score_{name}{end}" for name in ("variance", "v_t", "v_yt") for end in ("", "_stderr")
    ]
    assert train(plan_of(write, tmp_path / "whole")) == 0
    before, after = evaluations(tmp_path / "whole")
    assert all(abs(before[name]) < 1e-9 for name in names)  # the policy is its reference yet
    assert (
        after["eval/score_variance"] > 0
        and after["eval/score_v_yt"] > 0
        and set(names) <= after.keys()
    )

    writing = metrics.Writer.write

    def stopping(self, step, values):
        writing(self, step, values)
        if step == 1 and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, "write", stopping)
        assert train(plan_of(write, tmp_path / "stopped")) == STOPPED
    assert train(plan_of(write, tmp_path / "stopped")) == 0
    assert evaluations(tmp_path / "stopped") == [before, after]
    # Where it is no longer asked for, it is not measured, and the table at the end does without.
    assert (
        train(plan_of(write, tmp_path / "stopped", **{"eval.variance_repeats": 0, "num_steps": 3}))
        == 0
    )
    assert not set(names) & evaluations(tmp_path / "stopped")[-1].keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval.variance_repeats": 2}, "=2 is too few: at least 3, or 0"),
        ({"eval.variance_repeats": -1}, "=-1 must be at least 0"),
        ({"vrpo.reference": "cached"}, "no terms are cached: set vrpo.reference='model'"),
        ({"data.holdout": 0.0}, "needs held-out pairs: set data.holdout"),
    ],
)
def test_variance_repeats_that_cannot_be_are_one_line(write, tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"config.eval.variance_repeats.*{message}"):
        plan_of(write, tmp_path, **changes)


def test_an_objective_without_scores_has_no_variance_of_them(tmp_path):
    config = config_of({"objective": "sft", "eval.variance_repeats": 3, "data.holdout": 0.1})
    with pytest.raises(ValueError, match="objective='sft' does not have: set it to 0"):
        make_plan(config, tmp_path)


class Digits(Tokenizer):
    """Ids 0 to 4 are the digits, 5 begins, 6 ends."""

    def __init__(self):
        pass

    bos_id, eos_id, eot_id = 5, 6, None

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(str(int(i)) for i in ids if i < 5)


def copying(tokens, attention_mask):
    """A model that repeats the four digits of the prompt, whatever else is there."""
    return 9.0 * jax.nn.one_hot(jnp.roll(tokens, 4, axis=1), 8)


def solve(scorer, prompts=("1234", "4321", "2222", "0110", "3003"), logits_fn=copying):
    questions = [
        Question(str(i), f"file:{i}", {"number": i, "prompt": p}, p)
        for i, p in enumerate(prompts, 1)
    ]
    found = responses.solve(
        logits_fn,
        Task(fields={}, score=scorer, settings={}),
        questions,
        Digits(),
        template="plain",
        batch_size=2,
        mask_id=MASK,
        pad_id=6,
        eos_id=6,
        gen_length=4,
        steps=4,
        block_length=4,
    )
    return found.metrics


def test_the_solve_rate_of_a_model_that_is_right_and_of_one_that_is_wrong():
    def is_copy(record, response):
        return float(response == record["prompt"])

    assert solve(is_copy) == {"solve/rate": 1.0, "solve/rate_stderr": 0.0, "solve/count": 5}
    wrong = solve(is_copy, logits_fn=lambda tokens, mask: copying(tokens, mask)[..., ::-1])
    assert wrong == {"solve/rate": 0.0, "solve/rate_stderr": 0.0, "solve/count": 5}


def test_the_solve_rate_averages_scores_and_cuts_at_eos():
    scores = np.array([0.5, 1.0, 1.5, 2.0, 2.5])
    found = solve(lambda record, response: record["number"] / 2)
    assert found["solve/rate"] == pytest.approx(scores.mean())
    assert found["solve/rate_stderr"] == pytest.approx(scores.std(ddof=1) / 5**0.5)
    assert np.isnan(solve(lambda record, response: 1, prompts=["1234"])["solve/rate_stderr"])
    seen = []
    ends = lambda tokens, mask: copying(tokens, mask).at[:, 7].set(jax.nn.one_hot(6, 8))
    solve(lambda record, response: seen.append(response) or 1, logits_fn=ends)
    assert seen == ["12", "43", "22", "01", "30"]


def test_the_numbers_of_a_scorer_keep_their_names():
    numbers = np.arange(1, 6)
    found = solve(lambda record, _: {"b": record["number"], "a": [0.0] * record["number"]})
    assert list(found) == ["solve/b", "solve/b_stderr", "solve/a", "solve/a_stderr", "solve/count"]
    assert found["solve/b"] == numbers.mean() and found["solve/a"] == 0
    assert found["solve/b_stderr"] == pytest.approx(numbers.std(ddof=1) / 5**0.5)
    for name in ("kl", "count"):
        with pytest.raises(ValueError, match=f"'{name}' would be solve/{name}: give it another"):
            solve(lambda record, response, name=name: {"a": 1.0, name: 2.0})


def test_a_failing_scorer_is_named_with_its_record():
    def scorer(record, response):
        raise KeyError(record["number"]) if record["number"] == 3 else ValueError

    with pytest.raises(ValueError, match="file:1: the scorer raised ValueError"):
        solve(scorer)
