"""What a run may not change in the middle, and runs of earlier versions."""

import dataclasses
import json
import shutil
import tarfile

import jax
import pytest
from helpers import ROOT, config_of

from llada_jax import config, noise
from llada_jax.objectives.preference import Preference
from llada_jax.train import identity, make_plan, train

SETTINGS = Preference(beta=0.3, scheme=noise.Scheme(n_t=4), seed=1)


@pytest.fixture(scope="module")
def old_runs(tmp_path_factory):
    """Runs of version 0.1.0, stopped at step 4 of 6, and the losses of the whole runs."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ROOT / "tests" / "train" / "run_of_0_1_0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run_of_0_1_0"


def changes_of(objective, old_runs):
    """The config of the old runs, in today's names."""
    shared = {
        "objective": objective,
        "num_steps": 6,
        "data.template": "plain",
        "data.append_eos": False,
        "data.batch_rows": 8,
        "optimizer.warmup_steps": 1,
        "optimizer.peak": 5e-3,
        "checkpoint.every": 4,
    }
    if objective == "sft":
        sizes = {"d_model": 8, "n_heads": 1, "n_layers": 1, "mlp_hidden_size": 8}
        return shared | {
            "model.arch": sizes | {"embedding_size": 16, "max_sequence_length": 66},
            "data.train": "python:llada_jax.tasks.sudoku:records?count=40",
            "data.tokenizer": str(ROOT / "llada_jax" / "assets" / "sudoku" / "tokenizer.json"),
            "data.row_length": 33,
        }
    return shared | {
        "init_from": str(old_runs / "sft"),
        "data.train": f"jsonl:{old_runs / 'pairs.jsonl'}",
        "data.row_length": 66,
        "vrpo.n_t": 2,
        "vrpo.mc_chunk": 1,
    }


@pytest.mark.parametrize("objective", [pytest.param("sft", marks=pytest.mark.slow), "vrpo"])
def test_a_run_of_version_0_1_0_continues(old_runs, tmp_path, capsys, objective):
    """Truth: the losses that the old version logged for its last two steps."""
    workdir = shutil.copytree(old_runs / objective, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6", ignore_errors=True)
    changes = changes_of(objective, old_runs)
    assert train(make_plan(config_of(changes), workdir)) == 0
    printed = capsys.readouterr().out
    assert "continuing from step 4 of 6" in printed and "of an earlier version" in printed
    logged = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = {str(line["step"]): line["loss"] for line in logged if "loss" in line}
    expected = json.loads((old_runs / "losses.json").read_text())[objective]
    assert losses == pytest.approx({step: expected[step] for step in ("5", "6")}, rel=1e-5)
    # The data are compared, whatever the version.
    other = changes | {"data.limit": 16}
    with pytest.raises(ValueError, match=r"trained with other settings: data \("):
        train(make_plan(config_of(other), shutil.copytree(workdir, tmp_path / "other")))


def check(mine, recorded):
    return identity.check(mine, recorded, settings=Preference, workdir="WORKDIR")


def recorded(**changes):
    return {
        "data": "rows",
        "noise format": noise.FORMAT,
        "objective": "vrpo",
        "reference policy": "weights",
        "settings": config.identity(SETTINGS),
    } | changes


def test_what_moves_memory_alone_may_change():
    chunked = dataclasses.replace(SETTINGS, mc_chunk=2)
    mine = recorded(settings=config.identity(chunked))
    assert check(mine, recorded()) == ""


def test_a_setting_that_the_checkpoint_does_not_name_had_its_default_then():
    settings = config.identity(SETTINGS)
    before = {name: value for name, value in settings.items() if name != "label_smoothing"}
    assert check(recorded(), recorded(settings=before)) == ""
    mine = recorded(settings=settings | {"label_smoothing": 0.1})
    with pytest.raises(ValueError, match=r"label_smoothing=0.0, which is 0.1 now"):
        check(mine, recorded(settings=before))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"settings": config.identity(SETTINGS) | {"beta": 0.2}}, "beta=0.2, which is 0.3 now"),
        ({"settings": config.identity(SETTINGS) | {"n_t": 8}}, "n_t=8, which is 4 now"),
        ({"settings": config.identity(SETTINGS) | {"gone": 1}}, "gone=1, which is None now"),
        ({"objective": "sft"}, r"objective \(sft then, vrpo now\)"),
        ({"data": "others"}, r"data \(others then, rows now\)"),
        ({"noise format": 1}, r"noise format \(1 then, 2 now\)"),
        ({"reference policy": ""}, r"reference policy \(none then, weights now\)"),
    ],
)
def test_what_changes_the_result_is_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        check(recorded(), recorded(**changes))
    assert "\n" not in str(error.value) and "--workdir" in str(error.value)


def test_a_checkpoint_without_an_identity_is_one_line():
    note = check(recorded(), None)
    assert "records no settings" in note and "\n" not in note


def test_an_identity_survives_json():
    mine = recorded()
    assert json.loads(json.dumps(mine)) == mine and jax.tree.leaves(mine)
