"""The lm-evaluation-harness on local tasks: its scores are those of our own code.

Truth: the functions of `likelihood` and `sampling` on ids that the tests make themselves, on one
device. The harness's model runs on all eight.
"""
# ruff: noqa: E402 (imports of an extra come after it is known to be there)

import itertools
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import ROOT

import llada_jax
from llada_jax import cli, likelihood, sampling, tokenizer
from llada_jax.checkpoints import published
from llada_jax.evaluate import harness
from llada_jax.files import read_lines
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.tasks import gsm8k, sudoku

lm_eval = pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from llada_jax.evaluate.lm_eval import LladaJax, generation
from llada_jax.evaluate.lm_eval.engine import ESTIMATORS, draws_of
from llada_jax.evaluate.lm_eval.texts import Texts

LINES = ["the cat sat on the mat and the dog ran", "a red fox and a hen met on the road"] * 3
PAIRS = [
    ("The cat sat on", ["the mat and slept there", "mat the and there slept"], 0),
    ("A hen", ["road the on", "met the red fox on the road"], 1),
    ("The dog", ["ran", "red"], 0),
]
TALES = ["the cat ran and the hen sat " * 6, "a fox met a dog"]
SUDOKU = str(ROOT / "llada_jax" / "assets" / "sudoku")
LONGEST = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights with a tokenizer of its own."""
    home = tmp_path_factory.mktemp("model")
    words = tokenizer.train(LINES, home / "words", vocab_size=310)
    config = ModelConfig(
        d_model=16,
        n_heads=2,
        n_layers=1,
        vocab_size=words.vocab_size,
        mask_token_id=words.mask_id,
        eos_token_id=words.eos_id,
        mlp_hidden_size=16,
        max_sequence_length=LONGEST,
    )
    module = LLaDA(config)
    params = module.init(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 4 * x, nn.meta.unbox(params))  # sharper than random
    published.export(module, params, home / "out", tokenizer_from=home / "words")
    return str(home / "out")


@pytest.fixture(scope="module")
def model(folder):
    return LladaJax(folder)


@pytest.fixture(scope="module")
def words(folder):
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def logits_fn(folder):
    module, params = llada_jax.load(folder)
    return jax.tree_util.Partial(module.apply, {"params": params})


@pytest.fixture
def task(tmp_path, write, monkeypatch):
    """Writes a task file with its records; returns its name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def task(name, records, output_type, metric, **fields):
        source = write(records, f"{name}.jsonl").removeprefix("jsonl:")
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": source}},
            "test_split": "test",
            "output_type": output_type,
            "metric_list": [{"metric": metric}],
            **fields,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.dump(content))
        return name

    return task


def evaluate(model, folder, *tasks, **settings):
    """(scores by task, {task: answers of each document})"""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **settings
    )
    answers = {
        name: [[answer[0] for answer in sample["resps"]] for sample in samples]
        for name, samples in found["samples"].items()
    }
    return found["results"], answers


def own(words, logits_fn, name, pairs, estimator="unbiased"):
    """Our log-likelihoods of (document, context, continuation) of a task."""
    return likelihood.log_likelihoods(
        jax.random.key(0),
        logits_fn,
        [words.encode(context) for _, context, _ in pairs],
        [words.encode(text) for *_, text in pairs],
        mask_id=words.mask_id,
        request_ids=[draws_of([name, document], 0) for document, *_ in pairs],
        **ESTIMATORS[estimator],
    )


def test_the_model_is_registered():
    assert get_model("llada_jax") is LladaJax


@pytest.mark.parametrize(
    "estimator",
    ["unbiased", *(pytest.param(e, marks=pytest.mark.slow) for e in ("few", "published"))],
)
def test_multiple_choice(task, tmp_path, folder, model, words, logits_fn, estimator):
    records = [{"q": q, "choices": choices, "gold": gold} for q, choices, gold in PAIRS]
    template = dict(doc_to_text="{{q}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}")
    name = task("choice", records, "multiple_choice", "acc", **template)
    ours = model if estimator == "unbiased" else LladaJax(folder, estimator=estimator)
    scores, answers = evaluate(ours, tmp_path, name)
    pairs = [(i, q, f" {text}") for i, (q, texts, _) in enumerate(PAIRS) for text in texts]
    values = own(words, logits_fn, name, pairs, estimator).reshape(-1, 2)
    np.testing.assert_allclose(
        [[value for value, _ in of] for of in answers[name]], values, rtol=1e-4
    )
    chosen = values.argmax(1) == [gold for *_, gold in PAIRS]
    assert scores[name]["acc,none"] == chosen.mean()


def test_likelihood_and_greedy(task, tmp_path, model, words, logits_fn):
    """The continuation of the second record is what greedy decoding writes."""
    prompt = words.encode("the dog")
    best = sampling.generate(
        logits_fn,
        np.array([prompt]),
        mask_id=words.mask_id,
        gen_length=2,
        block_length=2,
        steps=2,
    )[0, len(prompt) :].tolist()
    greedy = words.decode(best)
    if words.encode("the dog" + greedy) != [*prompt, *best]:
        pytest.skip("the random model writes what is no text")
    records = [{"q": "the cat", "a": " sat"}, {"q": "the dog", "a": greedy}]
    fields = dict(doc_to_text="{{q}}", doc_to_target="{{a}}", target_delimiter="")
    name = task("greedy", records, "loglikelihood", "acc", **fields)
    scores, answers = evaluate(model, tmp_path, name)
    values = own(words, logits_fn, name, [(i, r["q"], r["a"]) for i, r in enumerate(records)])
    np.testing.assert_allclose([of[0][0] for of in answers[name]], values, rtol=1e-4)
    assert [of[0][1] for of in answers[name]] == [False, True]
    assert scores[name]["acc,none"] == 0.5
    unchecked = LladaJax(model.get_model_info()["settings"]["model"], check_greedy=False)
    assert evaluate(unchecked, tmp_path, name)[0][name]["acc,none"] == 0


def test_rolling(task, tmp_path, model, words, logits_fn):
    records = [{"text": text} for text in TALES]
    fields = dict(doc_to_text="", doc_to_target="{{text}}")
    name = task("rolling", records, "loglikelihood_rolling", "bits_per_byte", **fields)
    scores, answers = evaluate(model, tmp_path, name)
    half = LONGEST // 2
    values = []
    for i, text in enumerate(TALES):
        tokens = words.encode(text)
        numbers = [draws_of([draws_of([name, i], 0)], k) for k in range(-(-len(tokens) // half))]
        values.append(
            likelihood.rolling_log_likelihood(
                jax.random.key(0),
                logits_fn,
                tokens,
                window=half,
                context=half,
                mask_id=words.mask_id,
                request_ids=numbers,
            )
        )
    assert len(words.encode(TALES[0])) > LONGEST
    np.testing.assert_allclose([of[0] for of in answers[name]], values, rtol=1e-4)
    bits = likelihood.bits_per_byte(sum(values), sum(map(len, TALES)))
    assert scores[name]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


def test_generation_solves_what_our_own_code_solves(task, tmp_path):
    records = list(sudoku.records(12, seed=3, clues_max=5))
    words = tokenizer.load(SUDOKU)
    fields = dict(doc_to_text="{{prompt}}", doc_to_target="{{response}}")
    settings = {"until": ["zz"], "max_gen_toks": 16, "do_sample": False}
    name = task(
        "puzzle",
        records,
        "generate_until",
        "exact_match",
        **fields,
        generation_kwargs=settings,
    )
    model = LladaJax(SUDOKU, dtype="float32", add_bos_token=True, block_length=16, batch_size=8)
    scores, answers = evaluate(model, tmp_path, name)
    module, params = llada_jax.load(SUDOKU, "float32")
    tokens = sampling.sample_responses(
        jax.tree_util.Partial(module.apply, {"params": params}),
        [[words.bos_id, *words.encode(record["prompt"])] for record in records],
        batch_size=12,
        mask_id=words.mask_id,
        pad_id=words.eos_id,
        gen_length=16,
        block_length=16,
        steps=16,
    )
    texts = [words.decode(sampling.trim(row, words.eos_id, words.eot_id)) for row in tokens]
    assert [of[0] for of in answers[name]] == texts
    solved = [sudoku.score(r, text) for r, text in zip(records, texts, strict=True)]
    assert scores[name]["exact_match,none"] == np.mean(solved)
    assert 0 < np.mean(solved) < 1


def test_repeats_draw_anew_and_the_same_again(model):
    kwargs = {"until": [], "max_gen_toks": 6, "do_sample": True}
    requests = [Instance("generate_until", {}, ("the cat", kwargs), 0, metadata=("t", 0, 2))] * 2
    first, second = model.generate_until(requests)
    assert first != second
    assert model.generate_until(requests) == [first, second]


def test_long_prompts_are_cut_from_the_left(model, words, caplog):
    text = " ".join(LINES)
    requests = [
        Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 4}), 0)
        for context in (text, "x y " + text, "the cat")
    ]
    before = model.get_model_info()["prompts_cut"]
    first, second, _ = model.generate_until(requests)
    assert first == second
    assert model.get_model_info()["prompts_cut"] == before + 2
    assert sum("2 of 3 prompts are cut" in line for line in caplog.messages) == 1
    prompt, answer = Texts(words, LONGEST, words.eos_id).pair(text, " red")
    whole = words.encode(text + " red")
    assert prompt + answer == whole[-LONGEST:] and len(whole) > LONGEST


@pytest.mark.parametrize("context", ["the", "the ca", " the cat \n", "", "\n", "the c<|eot_id|>"])
@pytest.mark.parametrize("text", ["t sat", " sat", "\n\nsat", "é", "<|mdm_mask|>"])
def test_no_letter_is_lost(words, context, text):
    prompt, answer = Texts(words, LONGEST, words.eos_id).pair(context, text)
    assert words.mask_id not in answer
    assert "".join(run for run, _ in words.runs(prompt + answer)) == context + text
    assert len(words.decode(answer)) >= len(text)


def test_the_header_of_a_turn_stays_in_the_prompt(model, words):
    messages = [{"role": "user", "content": "<|eot_id|> the cat <|mdm_mask|>"}]
    text = model.apply_chat_template(messages)
    assert model.chat_template(True).startswith("<|startoftext|>")
    prompt, answer = Texts(words, 99, words.eos_id).pair(text, "sat")
    assert prompt == words.chat_prompt(messages)
    assert answer == words.encode("sat")
    begun = [*messages, {"role": "assistant", "content": "the "}]
    begun = Texts(words, 99, words.eos_id).encode(model.apply_chat_template(begun, False))
    assert begun == [*words.chat_prompt(messages)[:-2], *words.encode("\n\nthe ")]


def test_chat_prompts_reach_the_model(task, tmp_path, folder, words, logits_fn):
    records = [{"q": "cat", "choices": ["sat", "ran"], "gold": 0}] * 2
    template = dict(doc_to_text="{{q}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}")
    name = task("chat", records, "multiple_choice", "acc", num_fewshot=1, **template)
    model = LladaJax(folder)
    shape = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    _, answers = evaluate(model, tmp_path, name, system_instruction="on", **shape)
    turns = [("system", "on"), ("user", "cat"), ("assistant", "sat"), ("user", "cat")]
    prompt = words.chat_prompt([{"role": role, "content": text} for role, text in turns])
    values = likelihood.log_likelihoods(
        jax.random.key(0),
        logits_fn,
        [prompt[-(LONGEST - len(words.encode(text))) :] for text in ("sat", "ran")],
        [words.encode("sat"), words.encode("ran")],
        mask_id=words.mask_id,
    )
    found = [value for value, _ in answers[name][0]]
    assert max(len(words.encode(t)) for t in ("sat", "ran")) < 8  # exact: every subset is drawn
    np.testing.assert_allclose(found, values, rtol=1e-4)


@pytest.mark.parametrize(
    "given, own, until, expected",
    [
        ({}, {}, [], (256, 32, 256, None)),
        ({"until": "a", "max_gen_toks": 40}, {}, ["a"], (64, 32, 64, None)),
        ({"until": ["", "b"], "max_gen_toks": 5}, {}, ["b"], (5, 5, 5, None)),
        ({"max_new_tokens": 9}, {"block_length": 4, "steps": 6}, [], (12, 4, 6, None)),
        ({"max_gen_toks": 9}, {"gen_length": 64, "temperature": 0.5}, [], (64, 32, 64, 0.5)),
        ({"gen_length": 8, "max_gen_toks": 9}, {"gen_length": 64}, [], (8, 8, 8, None)),
        ({"do_sample": True}, {}, [], (256, 32, 256, 1.0)),
        ({"do_sample": True, "temperature": 0.2}, {}, [], (256, 32, 256, 0.2)),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 1}, [], (256, 32, 256, None)),
        ({"temperature": 0.0, "num_beams": 1}, {}, [], (256, 32, 256, None)),
    ],
)
def test_settings_of_a_task(given, own, until, expected):
    stops, found = generation.settings_of(given, own)
    assert stops == until
    names = ("gen_length", "block_length", "steps", "temperature")
    assert tuple(found.get(name) for name in names) == expected


def test_answers_are_kept_as_they_come(task, tmp_path, folder, monkeypatch):
    """A run that ends in the middle goes on where it stopped."""
    records = [{"q": LINES[0][: 9 + i], "choices": ["a", "b"], "gold": 0} for i in range(5)]
    template = dict(doc_to_text="{{q}}", doc_to_choice="{{choices}}", doc_to_target="{{gold}}")
    name = task("kept", records, "multiple_choice", "acc", **template)
    cache = str(tmp_path / "cache")
    model = LladaJax(folder)
    whole = evaluate(model, tmp_path, name)[1]
    compute, asked = model._engine.loglikelihood, []

    def ends(work, report):
        asked.append(len(work))

        def stops(index, result):
            report(index, result)
            if len(asked) == 1 and index == 3:
                raise KeyboardInterrupt

        compute(work, stops)

    monkeypatch.setattr(model._engine, "loglikelihood", ends)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tmp_path, name, use_cache=cache)
    again = evaluate(model, tmp_path, name, use_cache=cache)[1]
    np.testing.assert_allclose(again[name], whole[name], rtol=1e-5)  # packed otherwise
    assert asked[0] == 10 and 0 < asked[1] < 10
    assert evaluate(model, tmp_path, name, use_cache=cache)[1] == again
    assert len(asked) == 2


def parser():
    parser = cli.Parser("evaluate lm_eval")
    harness.add_flags(parser)
    return parser


def command(*argv):
    return cli.run(harness.run, parser(), argv)


@pytest.fixture
def puzzles(task):
    fields = dict(doc_to_text="{{prompt}}", doc_to_target="{{response}}")
    settings = {"until": [], "max_gen_toks": 16}
    records = list(sudoku.records(4, seed=3))
    name = "puzzles_of_this_test"
    return task(
        name, records, "generate_until", "exact_match", **fields, generation_kwargs=settings
    )


@pytest.fixture
def few_tasks(monkeypatch):
    """The harness reads its own task files for many seconds."""
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path: TaskManager(include_path=include_path, include_defaults=False),
    )


FLAGS = ("--add_bos_token", "--batch_size=8", "--block_length=16", "--dtype=float32")


def test_the_command(puzzles, few_tasks, tmp_path, capsys):
    flags = (f"--model={SUDOKU}", f"--tasks={puzzles}", f"--include_path={tmp_path}", *FLAGS)
    assert command(*flags, "--limit=3", f"--out={tmp_path}/out") == 0
    assert f"|{puzzles}|" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    score = results["results"][puzzles]["exact_match,none"]
    lines = (tmp_path / "out" / f"samples_{puzzles}.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 3
    right = [sudoku.score(s["doc"], s["resps"][0][0]) for s in samples]
    assert score == np.mean(right) and sum(right) >= 1
    settings = results["config"]["settings"]
    assert settings["block_length"] == 16 and settings["add_bos_token"]
    assert results["config"]["model_fingerprint"]


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--tasks=puzzles_of_this", "no task of the harness"),
        ("--include_path=nowhere", "is no folder"),
        ("--batch_size=5", "is no multiple of the 8 parts"),
        ("--max_length=9999", "is not between 1 and"),
        ("--out=gs://bucket/x", "give a local folder"),
        ("--steps=7", "steps=7"),
        ("--gen_kwargs=num_beams=4", "num_beams is not 1"),
        ("--gen_kwargs=beam=4", "beam=4 is no setting of the sampler"),
        ("--gen_kwargs=max_gen_toks=9999", "gen_length=10000"),
    ],
)
def test_refusals_of_the_command(puzzles, few_tasks, tmp_path, capsys, flag, message):
    flags = (f"--model={SUDOKU}", f"--tasks={puzzles}", f"--include_path={tmp_path}", *FLAGS)
    with pytest.raises(SystemExit) as error:
        command(*flags, flag)
    assert error.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and message in said[0]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"device": "cuda"}, "device=cuda"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"estimator": "exact"}, "is not one of published, unbiased, few"),
        ({"estimator": "published", "mc_num": 100}, "no multiple of batch_size=16"),
        ({"treshold": 0.9}, "did you mean threshold"),
    ],
)
def test_refusals_of_the_model(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        LladaJax(folder, **settings)


@pytest.fixture(scope="module")
def of_golden(shared, tmp_path_factory):
    """(folder, tokenizer, logits_fn) of the golden model with the tokenizer of its requests."""
    home = tmp_path_factory.mktemp("golden")
    files = [*(shared / "golden" / "llada_mha" / "policy").iterdir()]
    files.append(shared / "golden" / "samplers" / "llada_mha" / "tokenizer.json")
    for file in files:
        (home / file.name).write_bytes(file.read_bytes())
    module, params = llada_jax.load(home)
    return str(home), tokenizer.load(home), jax.tree_util.Partial(module.apply, {"params": params})


def benchmark(shared, name, count):
    path = shared / "data" / "benchmarks" / f"{name}.jsonl.gz"
    return [json.loads(line) for _, line in itertools.islice(read_lines(path), count)]


@pytest.mark.slow
def test_blimp(shared, task, tmp_path, of_golden):
    folder, words, logits_fn = of_golden
    records = benchmark(shared, "blimp", 200)
    choices = "{{[sentence_good, sentence_bad]}}"
    template = dict(doc_to_text="", doc_to_choice=choices, doc_to_target=0, target_delimiter="")
    name = task("blimp_here", records, "multiple_choice", "acc", **template)
    scores, answers = evaluate(LladaJax(folder, estimator="few"), tmp_path, name)
    fields = ("sentence_good", "sentence_bad")
    pairs = [(i, "", record[field]) for i, record in enumerate(records) for field in fields]
    values = own(words, logits_fn, name, pairs, "few").reshape(-1, 2)
    found = np.array([[value for value, _ in of] for of in answers[name]])
    np.testing.assert_allclose(found, values, rtol=1e-4)
    assert scores[name]["acc,none"] == (values[:, 0] > values[:, 1]).mean()


@pytest.mark.slow
def test_gsm8k(shared, task, tmp_path, of_golden):
    """Of the shortest questions, so that none is cut; the last number counts."""
    folder, words, logits_fn = of_golden
    records = benchmark(shared, "gsm8k_test", 1319)
    texts = [gsm8k.prompt(record, [], "plain") for record in records]
    order = np.argsort([len(words.encode(text)) for text in texts])[:20]
    kept = [{**records[i], "text": texts[i]} for i in order]
    # What the random model writes, so that there are right answers too.
    written = sampling.sample_responses(
        logits_fn,
        [words.encode(record["text"]) for record in kept],
        batch_size=8,
        mask_id=words.mask_id,
        pad_id=words.eos_id,
        gen_length=8,
        block_length=8,
        steps=8,
    )
    said = [words.decode(sampling.trim(row, words.eos_id, words.eot_id)) for row in written]
    said = [text.partition("s")[0] for text in said]
    for record, text in list(zip(kept, said, strict=True))[::2]:
        record["answer"] = text
    fields = dict(doc_to_text="{{text}}", doc_to_target="{{answer}}")
    settings = {"until": ["s"], "max_gen_toks": 8}
    name = task("gsm", kept, "generate_until", "exact_match", **fields, generation_kwargs=settings)
    scores, answers = evaluate(LladaJax(folder), tmp_path, name)
    assert [of[0] for of in answers[name]] == said
    right = [text == record["answer"] for record, text in zip(kept, said, strict=True)]
    assert scores[name]["exact_match,none"] == np.mean(right)


@pytest.mark.slow
def test_two_processes_answer_as_one(puzzles, tmp_path):
    """Split over two hosts of two devices; the parameters too."""
    code = (
        "import sys; from llada_jax import cli; from llada_jax.evaluate import harness; "
        "parser = cli.Parser(); harness.add_flags(parser); sys.exit(cli.run(harness.run, parser))"
    )
    flags = [f"--model={SUDOKU}", f"--tasks={puzzles}", f"--include_path={tmp_path}", *FLAGS]

    def start(out, devices, *extra, **variables):
        xla = f"--xla_force_host_platform_device_count={devices}"
        given = [sys.executable, "-c", code, *flags, f"--out={tmp_path}/{out}", *extra]
        environment = os.environ | {"XLA_FLAGS": xla} | variables
        return subprocess.Popen(given, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def two(process):
        variables = {"COORDINATOR_ADDRESS": "127.0.0.1:12399", "NUM_PROCESSES": "2"}
        variables = {f"JAX_{k}": v for k, v in variables.items()} | {"JAX_PROCESS_ID": process}
        return start("two", 2, "--fsdp=4", **variables)

    said = [
        process.communicate(timeout=300)[0] for process in (start("one", 1), two("0"), two("1"))
    ]
    assert "exact_match" in said[0] and "exact_match" in said[1] and "exact_match" not in said[2]
    name = f"samples_{puzzles}.jsonl"
    assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
