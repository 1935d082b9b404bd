"""Accuracy against passes: areas and counts by hand, rules from the tables, a file that goes on."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, refusal, run_command

from llada_jax import sampling
from llada_jax.checkpoints import loading
from llada_jax.evaluate import __main__ as command
from llada_jax.evaluate import passes, responses
from llada_jax.evaluate.answers import Model
from llada_jax.evaluate.passes_picture import apart, draw
from llada_jax.evaluate.questions import Question, encode, read_questions
from llada_jax.sampling.unmasking import COMMITS, Commit
from llada_jax.tasks import Task, sudoku
from llada_jax.tokenizer import Tokenizer

SUDOKU = f"{ROOT}/llada_jax/assets/sudoku"
FOUR = "python:llada_jax.tasks.sudoku:records?count=4"
SHAPE = {"gen_length": 16, "block_length": 8}


def test_the_area_is_that_of_the_paper():
    """By hand, from the formula of d3LLM."""
    w = lambda y: np.exp(-3 * (1 - y / 60))
    level = passes.aup([(1.0, 60.0), (4.0, 60.0)], 60.0)
    assert level == pytest.approx(60 + 3 * 60)
    # The order does not matter, and 20 is more than 5 below the first.
    points = [(4.0, 45.0), (2.0, 50.0), (8.0, 20.0), (6.0, 48.0)]
    expected = 2 * 50 + 2 * (50 * w(50) + 45 * w(45)) / 2 + 2 * (45 * w(45) + 48 * w(48)) / 2
    assert passes.aup(points, 60.0) == pytest.approx(expected)
    assert passes.aup([(1.0, 0.0), (2.0, 0.0)], 60.0) == 0


def test_all_rules_and_caches_have_points():
    names = list(passes.rules())
    assert set(COMMITS) <= set(names) and {"wino+wino", "schedule+remdm"} <= set(names)
    found = list(passes.points(names, list(sampling.CACHES), SHAPE))
    assert {(p.cache, p.rule) for p in found} == {(c, r) for c in sampling.CACHES for r in names}
    for point in found:
        # Every number that is needed is there, and no other.
        settings = sampling.Settings(mask_id=0, **point.settings)
        tables = ((COMMITS, "commit"), (sampling.REVOKES, "revoke"), (sampling.CACHES, "cache"))
        for table, name in tables:
            for need in table[getattr(settings, name)].needs:
                assert getattr(settings, need) is not None, (point, need)
    steps = [p.settings["steps"] for p in found if (p.rule, p.cache) == ("schedule", "none")]
    assert steps == [16, 8, 4, 2]  # 8, 4, 2 and 1 passes in each of two blocks


def test_a_rule_from_outside_joins(monkeypatch):
    def rule(row, numbers, limit):
        return row.open

    monkeypatch.setitem(COMMITS, "mine", Commit(rule, needs=("novel", "kl_threshold")))
    monkeypatch.setitem(COMMITS, "all", Commit(rule))
    mine = [p.settings for p in passes.points(["mine"], ["none"], SHAPE)]
    assert [s["novel"] for s in mine] == list(passes.ANY)
    assert {s["kl_threshold"] for s in mine} == {passes.FIXED["kl_threshold"]}
    assert [p.settings["commit"] for p in passes.points(["all"], ["dual"], SHAPE)] == ["all"]


class Numbers(Tokenizer):
    bos_id = None

    def __init__(self):
        pass

    def encode(self, text):
        return [1, 2]

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_counts_of_a_sure_model():
    """Two blocks of four tokens take a pass each, and the text ends with its fifth token."""

    def logits(tokens, attention_mask):
        best = jnp.where(jnp.arange(tokens.shape[1]) == 2 + 5, 9, 3)
        return jnp.broadcast_to(20.0 * jax.nn.one_hot(best, 12), (*tokens.shape, 12))

    heard = {}
    judge = lambda record, text: heard.setdefault(record["i"], text) and float(record["i"] % 2)
    task = Task(fields={}, score=judge, settings={})
    questions = [Question(str(i), f"file:{i}", {"i": i}, "?") for i in range(4)]
    special = {"mask_id": 11, "pad_id": 0, "eos_id": 9, "eot_id": None}
    settings = {"gen_length": 8, "block_length": 4, "commit": "threshold", "threshold": 0.9}
    point = passes.Point("threshold", "none", settings)
    model = Model(logits, Numbers(), special, 99)
    found = passes.measure(point, task, questions, [[1, 2]] * 4, model, batch_size=4)
    assert heard == dict.fromkeys(range(4), "3 3 3 3 3")
    assert found["passes"] == 4 * 2 and found["tokens_per_pass"] == 5 / 2
    assert found["accuracy"] == 0.5
    assert found["accuracy_stderr"] == pytest.approx(np.sqrt(1 / 3) / 2)


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib (the extra plot) is not installed")
    measured = []

    def measure(point, *_):
        measured.append(point)
        careful = point.settings.get("threshold", 0.4)
        return dict(accuracy=careful / 2, accuracy_stderr=0.01, tokens_per_pass=2 - careful)

    monkeypatch.setattr(passes, "measure", measure)
    flags = [
        "passes",
        f"--model={SUDOKU}",
        f"--out={tmp_path}",
        f"--data={FOUR}",
        "--cache=none",
    ]
    run_command(command, *flags, "--rule=threshold")
    first, file = len(measured), tmp_path / "passes.jsonl"
    assert first == len(passes.SWEEPS["threshold"]) == len(file.read_text().splitlines())
    assert (tmp_path / "passes.png").read_bytes().startswith(b"\x89PNG")
    # One line is lost, and of the last only a part was written.
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]) + lines[0][:30])
    run_command(command, *flags, "--rule=threshold,schedule")
    assert [p.settings.get("threshold") for p in measured[first:]] == [0.99, *[None] * 4]
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == first + 4 and found[0]["about"]["gen_length"] == 16
    best = 100 * 0.99 / 2
    curve = [(2 - t, 100 * t / 2) for t in passes.SWEEPS["threshold"]]
    assert f"AUP {passes.aup(curve, best):6.1f}  threshold, cache none" in capsys.readouterr().out
    said = refusal(capsys, command, *flags, "--block_length=4")
    assert "is of {'block_length': 8}, not of {'block_length': 4}: give another --out" in said
    file.write_text("[1]\n")
    assert "is no line of this command" in refusal(capsys, command, *flags)


def test_the_picture_has_few_panels_and_many_curves():
    pytest.importorskip("matplotlib", reason="matplotlib (the extra plot) is not installed")
    line = {"tokens_per_pass": 2.0, "accuracy": 0.5, "accuracy_stderr": 0.1}

    def width(caches, rules):
        keys = list(itertools.product(caches, rules))
        content = draw({key: [line] for key in keys}, dict.fromkeys(keys, 1.0))
        return int.from_bytes(content[16:20], "big")  # of a PNG

    assert width("abcde", "xy") == width("xy", "abcde") == width("xy", "ab")
    assert width("x", "abc") == width("abc", "x") < width("xy", "ab")


def test_names_in_the_picture_stay_apart_and_inside():
    found = apart({"a": 1.0, "b": 1.1, "c": 9.9, "d": 9.8, "e": 10.0}, 1.0, 10.0)
    assert found == {"a": 1.0, "b": 2.0, "d": 8.0, "c": 9.0, "e": 10.0}


def test_refusals(tmp_path, capsys):
    for flag, text in (
        ("--rule=guess", "--rule=guess is not one of schedule, threshold, "),
        ("--cache=disk", "--cache=disk is not one of none, "),
        ("--block_length=5", "gen_length=16 is not a positive multiple of block_length=5"),
        ("--task=chess", "'chess' is none of the tasks "),
        ("--gen_length=128", "of 17 tokens and gen_length=128 exceed the 128 that the model takes"),
    ):
        flags = ["passes", f"--model={SUDOKU}", f"--out={tmp_path}", f"--data={FOUR}", flag]
        assert text in refusal(capsys, command, *flags)
    assert not (tmp_path / "passes.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_point_is_what_the_sampler_and_the_scorer_say(cache):
    """Truth: `generate` in one batch, and `solve`."""
    logits_fn, config, words = loading.open_model(SUDOKU, "float32")  # the file is bfloat16
    special = loading.special_ids(config, words)
    source = "python:llada_jax.tasks.sudoku:records?count=40&seed=1&split=heldout"
    questions = read_questions(sudoku.TASK, source, "plain")
    prompts = encode(words, sudoku.TASK, questions, "plain", 16, None)
    model = Model(logits_fn, words, special, 128)
    point = next(p for p in passes.points(["threshold"], [cache], SHAPE))
    found = passes.measure(point, sudoku.TASK, questions, prompts, model, batch_size=16)
    written = sampling.generate(
        logits_fn, np.array(prompts), trace=True, mask_id=special["mask_id"], **point.settings
    )
    scores = [
        sudoku.score(question.record, words.decode(row[17:].tolist()))
        for question, row in zip(questions, np.asarray(written.tokens), strict=True)
    ]
    assert found["accuracy"] == np.mean(scores)
    if cache == "none":  # with a cache a row waits for others, which batches change
        assert found["passes"] == int(written.row_passes.sum())
        assert found["tokens_per_pass"] == 40 * 16 / found["passes"]
    solved = responses.solve(
        logits_fn,
        sudoku.TASK,
        questions,
        words,
        template="plain",
        batch_size=16,
        **special,
        **point.settings,
    )
    rate = solved.metrics
    assert rate["solve/rate"] == pytest.approx(found["accuracy"])
    assert rate["solve/rate_stderr"] == pytest.approx(found["accuracy_stderr"])
