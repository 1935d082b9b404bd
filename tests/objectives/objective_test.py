"""An objective of one's own: one record, one entry, and all that serves the others serves it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import ROOT, config_of

from llada_jax.config import key
from llada_jax.objectives import OBJECTIVES, denoising
from llada_jax.objectives.denoising import SFT, Denoising
from llada_jax.train import describe, make_plan, settings, train

TOKENIZER = ROOT / "llada_jax" / "assets" / "sudoku" / "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Focal(Denoising):
    """The denoising loss of a sample to some power."""

    power: float = 2.0  # of the loss of a sample
    quiet: bool = key(False, changes_result=False)

    def __post_init__(self):
        super().__post_init__()
        if self.power <= 0:
            raise ValueError(f"power={self.power} must be above 0")

    def for_heldout(self, n_t):
        return dataclasses.replace(super().for_heldout(n_t), seed=self.seed)


def focal_samples(params, batch, frozen, *, model, settings):
    examples = denoising.score_samples(params, batch, frozen, model=model, settings=settings)
    return examples | {"loss": examples["loss"] ** getattr(settings, "power", 1.0)}


FOCAL = dataclasses.replace(
    SFT, name="focal", section="focal", Settings=Focal, examples=focal_samples
)
CHANGES = {
    "objective": "focal",
    "num_steps": 2,
    "model.arch": {
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 1,
        "mlp_hidden_size": 16,
        "embedding_size": 16,
        "max_sequence_length": 66,
    },
    "data.train": "python:llada_jax.tasks.sudoku:records?count=40",
    "data.holdout": 0.2,
    "data.tokenizer": str(TOKENIZER),
    "data.template": "plain",
    "data.append_eos": False,
    "data.row_length": 33,
    "data.batch_rows": 8,
    "optimizer.warmup_steps": 1,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "focal", FOCAL)


def logged(workdir, name):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
def test_it_trains_evaluates_and_resumes(tmp_path):
    """Truth: at power 1 it is SFT; at power 2 the first loss is the mean of squares, not SFT's."""
    runs = {}
    for name, changes in {
        "sft": {"objective": "sft"},
        "one": {"focal.power": 1.0},
        "two": {"focal.power": 2.0},
    }.items():
        plan = make_plan(config_of(CHANGES | changes), tmp_path / name)
        assert train(plan) == 0
        runs[name] = logged(tmp_path / name, "loss")
        assert len(logged(tmp_path / name, "eval/elbo_per_token")) == 2
    assert "objective       focal" in describe(plan)
    np.testing.assert_allclose(runs["one"], runs["sft"], rtol=1e-6)
    assert runs["two"][0] > 1.5 * runs["sft"][0] ** 2 / 2
    assert train(plan) == 0
    with pytest.raises(ValueError, match="power=2.0, which is 3.0 now"):
        train(make_plan(config_of(CHANGES | {"focal.power": 3.0}), tmp_path / "two"))


def test_its_keys_are_a_section_with_comments_and_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"config.focal.power=-1.0 must be above 0"):
        make_plan(config_of(CHANGES | {"focal.power": -1.0}), tmp_path)
    keys = settings.describe_keys()
    assert "focal.power=2.0" in keys and "of the loss of a sample" in keys
    assert "denoising.power" not in keys


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_names_its_examples_and_its_metrics(name):
    """What the trainer reads of a record is there: shapes alone, nothing is computed."""
    from helpers import make_batch

    from llada_jax.models.llada import LLaDA, ModelConfig

    objective = OBJECTIVES[name]
    model = LLaDA(ModelConfig(d_model=8, n_heads=1, n_layers=1, vocab_size=40, mask_token_id=39))
    batch = make_batch([[(3, 5), (3, 7)], [(2, 4), (2, 6)]], 24)
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "value"))
    chosen = objective.Settings()
    frozen = params if objective.needs_reference else None
    examples = jax.eval_shape(
        lambda p, f: objective.examples(p, batch, f, model=model, settings=chosen), params, frozen
    )
    places = jax.eval_shape(objective.is_example, batch).shape
    assert {x.shape for x in examples.values()} == {places}
    means = {name: jax.ShapeDtypeStruct((), np.float32) for name in examples}
    loss = jax.eval_shape(lambda m: objective.loss(m, chosen), means)
    assert loss.shape == ()
    score_variance = {"score_variance"}  # measured beside the examples
    assert set(objective.heldout) - score_variance <= examples.keys()
    assert set(objective.shown) <= examples.keys() | {"loss"}
