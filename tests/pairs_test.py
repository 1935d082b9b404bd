"""Pairs: sampled responses, scored, and written as winners and losers."""

import gzip
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refusal, run_command

from llada_jax import convert, pairs, sampling, tokenizer
from llada_jax.checkpoints import published
from llada_jax.data.records import read_records
from llada_jax.evaluate.questions import Question
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.sampling import __main__ as sampling_command
from llada_jax.tasks import Task, sudoku
from llada_jax.tokenizer import Tokenizer

DIGITS, EOS, MASK, BOS = 10, 10, 11, 12  # ids 0 to 9 are the digits


class DigitTokenizer(Tokenizer):
    def __init__(self):
        pass

    bos_id, eos_id, eot_id = BOS, EOS, None

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(str(int(i)) for i in ids if i < DIGITS)


def random_digits(tokens, attention_mask):
    """All digits and EOS are equally likely, but the last token of the prompt (at 2) more so."""
    base = jnp.where(jnp.arange(13) < MASK, 0.0, -jnp.inf)
    return base + 1.0 * jax.nn.one_hot(tokens[:, 2:3], 13) + jnp.zeros((*tokens.shape, 1))


SETTINGS = dict(
    mask_id=MASK, pad_id=EOS, eos_id=EOS, steps=4, gen_length=4, block_length=4, temperature=1.0
)


def make(scorer, questions=None, **changes):
    if questions is None:
        records = [{"answer": i, "prompt": f"1{i}"} for i in range(6)]
        questions = [Question(str(i), f"file:{i}", r, r["prompt"]) for i, r in enumerate(records)]
    task = Task(fields={}, score=scorer, settings={})
    arguments = dict(template="plain", samples=8, batch_size=10, seed=0, **SETTINGS)
    return pairs.make_pairs(
        random_digits, DigitTokenizer(), task, questions, **{**arguments, **changes}
    )


def digit_sum(record, response):
    return sum(int(c) for c in response)


def test_pairs_hold_winner_and_loser_of_one_prompt():
    seen = {}

    def scorer(record, response):
        assert record["prompt"] == f"1{record['answer']}" and response not in seen.get(
            record["answer"], {}
        )
        return seen.setdefault(record["answer"], {}).setdefault(
            response, digit_sum(record, response)
        )

    found, counts = make(scorer, pairs_per_prompt=3)
    assert (
        len(found) == counts["pairs"] == 18 and counts["prompts"] == 6 and counts["samples"] == 48
    )
    for pair in found:
        scores = seen[int(pair["prompt"][1])]
        assert set(pair) == {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}
        assert (
            pair["chosen_score"]
            == scores[pair["chosen"]]
            > pair["rejected_score"]
            == scores[pair["rejected"]]
        )
        assert pair["chosen"] and pair["rejected"]
    assert len({tuple(pair.values()) for pair in found}) == 18  # distinct combinations
    assert make(digit_sum, pairs_per_prompt=3) == (found, counts)  # the seed decides
    assert make(digit_sum, pairs_per_prompt=3, seed=1)[0] != found


def test_counts_agree_with_the_samples():
    # Truth: the same prompts sampled directly and scored here. Responses have one token, so many
    # are equal.
    prompts = [[BOS, 1, i] for i in range(6) for _ in range(8)]
    settings = {**SETTINGS, **dict(gen_length=1, block_length=1, steps=1)}
    tokens = sampling.sample_responses(
        random_digits, prompts, batch_size=10, key=jax.random.key(0), **settings
    )
    texts = ["".join(map(str, sampling.trim(row, EOS))) for row in tokens]
    found, counts = make(digit_sum, **settings)
    assert counts["mean_score"] == pytest.approx(np.mean([digit_sum({}, t) for t in texts]))
    assert counts["empty"] == sum(not t for t in texts) > 0  # the seed gives some
    assert counts["pairs"] == len(found) == 6 and counts["without_contrast"] == 0


def test_prompts_without_contrast_make_no_pair():
    found, counts = make(
        lambda record, response: float(record["answer"] < 2 and response.startswith("1"))
    )
    assert {pair["prompt"] for pair in found} <= {"10", "11"}
    assert counts["without_contrast"] == 1 - len(found) / 6 and counts["pairs"] == len(found)
    found, counts = make(lambda record, response: 3)
    assert found == [] and counts["without_contrast"] == 1.0 and counts["mean_score"] == 3.0


def test_choose_pairs_takes_all_combinations_and_no_more():
    scores = {"a": 2.0, "b": 1.0, "c": 1.0, "d": 0.0}
    chosen = pairs.choose_pairs(scores, 100, np.random.default_rng(0))
    assert sorted(chosen) == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    # All 5 combinations are equally likely: each is within 4.5 standard errors of 400 in 2000.
    rng = np.random.default_rng(0)
    first = [pairs.choose_pairs(scores, 1, rng)[0] for _ in range(2000)]
    assert all(abs(first.count(pair) - 400) < 4.5 * (2000 * 0.2 * 0.8) ** 0.5 for pair in chosen)


@pytest.mark.parametrize(
    "scorer, message",
    [
        (
            lambda record, response: 1 / 0,
            "file:0: the scorer raised ZeroDivisionError: division by zero",
        ),
        (lambda record, response: "0.5", "file:0: the scorer returned score='0.5', not a"),
        (lambda record, response: None, "file:0: the scorer returned score=None"),
        (lambda record, response: float("nan"), "file:0: the scorer returned score=nan"),
        (sudoku.score, "file:0: the scorer raised ValueError: not a 4x4 Sudoku puzzle: '10'"),
    ],
)
def test_a_bad_scorer_is_named_with_its_record(scorer, message):
    with pytest.raises(ValueError, match=message) as e:
        make(scorer)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", [True, 1, np.float32(0.5), np.bool_(True), 0.25])
def test_numbers_are_scores(value):
    task = Task(fields={}, score=lambda record, response: value, settings={})
    assert task.judge("x", {}, "") == {"score": float(value)}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(samples=1), "samples=1 must be at least 2"),
        (dict(pairs_per_prompt=0), "pairs_per_prompt=0"),
        (dict(questions=[]), "there are no prompts"),
        (dict(max_length=6), "file:0: a prompt of 3 tokens and gen_length=4 exceed the 6 that"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(digit_sum, **changes)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random tiny model in the published layout, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tok = tokenizer.train(
        [f"the puzzle number {i * 7919} was solved" for i in range(500)],
        folder / "tokenizer",
        vocab_size=300,
    )
    config = ModelConfig(
        d_model=16,
        n_heads=2,
        n_layers=1,
        vocab_size=tok.vocab_size,
        mask_token_id=tok.mask_id,
        eos_token_id=tok.eos_id,
        max_sequence_length=64,
    )
    model = LLaDA(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    published.export(model, nn.unbox(params), folder / "model", tokenizer_from=folder / "tokenizer")
    return folder / "model"


def length_score(record, response):
    return len(response)


@pytest.mark.slow
def test_cli_writes_a_preference_source(model_folder, tmp_path, capsys):
    flags = [
        f"--model={model_folder}",
        "--prompts=python:llada_jax.tasks.sudoku:records?count=20&seed=1",
        f"--scorer={__name__}:length_score",
        "--template=plain",
        "--samples=3",
        "--limit=5",
        "--steps=4",
        "--gen_length=8",
        "--block_length=8",
        "--batch_size=4",
        "--pairs_per_prompt=2",
    ]
    assert run_command(pairs, *flags, f"--out={tmp_path / 'new' / 'pairs.jsonl.gz'}") == 0
    out = capsys.readouterr().out
    assert "5 prompts, 15 responses" in out and "mean score" in out and "sample 15/15" in out
    with gzip.open(tmp_path / "new" / "pairs.jsonl.gz", "rt") as lines:
        found = [json.loads(line) for line in lines]
    assert found and {pair["prompt"] for pair in found} <= {
        r["prompt"] for r in sudoku.records(5, seed=1)
    }
    assert all(
        len(pair["chosen"]) == pair["chosen_score"] > pair["rejected_score"] for pair in found
    )
    read = read_records(f"jsonl:{tmp_path / 'new' / 'pairs.jsonl.gz'}", "preference")
    assert [normal["chosen"] for _, _, normal in read] == [pair["chosen"] for pair in found]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["pairs.jsonl.gz"]

    # A random model solves nothing: no contrast, no file.
    flags[2] = "--scorer=llada_jax.tasks.sudoku:score"
    for change, message in (
        ([], "100.0% of prompts without contrast, 0 pairs: nothing to prefer"),
        (["--temperature=0"], "--temperature=0 gives every sample"),
        (["--gen_length=64", "--block_length=64"], "exceed the 64 that the model takes"),
        (["--prompts=jsonl:nowhere.jsonl"], "nowhere.jsonl"),
        (["--model=nowhere"], "nowhere does not exist"),
    ):
        words = [*flags, *change, f"--out={tmp_path / 'none.jsonl'}"]
        assert message in refusal(capsys, pairs, *words)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    "template",
    ["chat", *(pytest.param(t, marks=pytest.mark.slow) for t in ("plain", "raw"))],
)
def test_sampling_cli_prints_a_response(model_folder, tmp_path, capsys, template):
    ours = tmp_path / "ours"
    convert.import_folder(model_folder, ours)
    # A checkpoint of ours keeps its tokenizer in model/.
    path = {"chat": ours, "plain": model_folder, "raw": ours / "checkpoints" / "0"}[template]
    flags = ["--steps=1", "--gen_length=8", "--block_length=8", f"--template={template}"]
    flags += [f"--model={path}", "--prompt=123", "--prompt=4", "--logits_eos_inf"]
    assert run_command(sampling_command, *flags) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    error = refusal(capsys, sampling_command, *flags, "--block_length=4", "--steps=3")
    assert error.startswith("error: steps=3 is not a positive multiple")
