"""The command that answers and scores: it goes on after a kill, and records what it did."""

import json
import random
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT, refusal, run_command

from llada_jax import sampling
from llada_jax.checkpoints import loading
from llada_jax.evaluate import __main__ as command
from llada_jax.evaluate import answers, lines, plan, run
from llada_jax.tasks import Settings, Task
from llada_jax.tokenizer import Tokenizer

SUDOKU = f"{ROOT}/llada_jax/assets/sudoku"
MASK, EOS = 12, 11
SPECIAL = {"mask_id": MASK, "pad_id": EOS, "eos_id": EOS, "eot_id": None}


class Digits(Tokenizer):
    bos_id = None

    def __init__(self):
        pass

    def encode(self, text):
        return [int(c) for c in text]

    def decode(self, ids):
        return "".join(str(i) for i in ids)


def copying(tokens, attention_mask):
    """Writes the four tokens before a mask again and again."""
    return 9.0 * jax.nn.one_hot(jnp.roll(tokens, 4, axis=1), 13) - 20.0 * jax.nn.one_hot(MASK, 13)


def score(record, response):
    """Two numbers: whether the response repeats the prompt, and which digits do."""
    same = [float(a == b) for a, b in zip(response, record["prompt"], strict=False)]
    return {"whole": float(response == record["prompt"]), "digits": same}


TASK = Task(
    fields={"prompt": str},
    score=score,
    settings={"ours": Settings({"gen_length": 4, "block_length": 4}, template="plain")},
)
NAME = "evaluate.run_test_task"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """(flags -> plan and model) of a task of a stranger's file."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "{k}234"}}\n' for k in range(7)))
    monkeypatch.setattr("llada_jax.tasks.find", lambda name: TASK)
    heard = []

    def logits_fn(tokens, attention_mask):
        heard.append(tokens.shape)
        return copying(tokens, attention_mask)

    def open_task(*flags):
        argv = [f"--tasks={NAME}", f"--data=jsonl:{data}", f"--out={tmp_path}/out", "--model=x"]
        args = command.parser().parse([*argv, "--batch_size=3", *flags])
        return args, plan.plans(args), answers.Model(logits_fn, Digits(), SPECIAL, 8)

    return open_task, heard


def test_a_run_goes_on_after_a_kill(mine, tmp_path, monkeypatch, capsys):
    open_task, heard = mine
    args, plans, model = open_task()
    out = tmp_path / "out"
    append, calls = lines.Parts.append, []

    def killed(self, line):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(line["id"])
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(lines.Parts, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            run.run(args, plans, model, {"fingerprint": "f"})
    assert not (out / f"{NAME}.json").exists()
    with (out / f"{NAME}.responses.jsonl").open("a") as file:
        file.write('{"id": "6", "sam')
    run.run(args, plans, model, {"fingerprint": "f"})
    found = [json.loads(line) for line in (out / f"{NAME}.responses.jsonl").open()]
    assert [line["id"] for line in found] == list("0123456")
    assert [line["response"] for line in found] == [f"{k}234" for k in range(7)]
    assert all(line["passes"] == line["tokens"] == 4 for line in found)
    result = json.loads((out / f"{NAME}.json").read_text())
    assert result["mean"] == 1.0 and result["stderr"] == 0.0 and result["n"] == 7
    assert result["verdicts"] == dict.fromkeys("0123456", 1.0)
    assert list(result["metrics"]) == ["whole", "digits"] and result["tokens_per_pass"] == 1
    assert result["about"]["fingerprint"] == "f" and result["about"]["sampler"]["steps"] == 4
    assert "jax" in result["environment"]["versions"]
    shown = capsys.readouterr().out
    assert f"| {NAME} | ours     | 7         | 100.0 +- 0.0 |" in shown
    assert (out / "table.md").read_text() in shown
    # Nothing is answered twice, and other settings are refused.
    before = len(heard)
    run.run(args, plans, model, {"fingerprint": "f"})
    assert len(heard) == before
    with pytest.raises(ValueError, match="is of {'fingerprint': 'f'}, not of {'fingerprint': 'g'}"):
        run.run(args, plans, model, {"fingerprint": "g"})
    args, plans, model = open_task("--limit=3")
    with pytest.raises(ValueError, match="not of {'questions': .*'limit': 3}: give another --out"):
        run.run(args, plans, model, {"fingerprint": "f"})


def test_hosts_share_the_questions(mine, tmp_path):
    _, [asked], model = mine[0]()
    out = lines.folder(str(tmp_path / "out"))
    parts = [lines.Parts(out, NAME, k, 3) for k in range(3)]
    prompts = answers.prompts_of(asked, model)
    for k in (0, 2):
        answers.answer(asked, prompts, model, parts[k], 2, (k, 3))
    assert [line["id"] for line in parts[0].read()] == list("03625")
    # Two go on where three were stopped.
    parts = [lines.Parts(out, NAME, k, 2) for k in range(2)]
    for k in range(2):
        answers.answer(asked, prompts, model, parts[k], 2, (k, 2))
    found = parts[0].merge(lambda line: line["id"])
    assert [(line["id"], line["response"]) for line in found] == [
        (str(k), f"{k}234") for k in range(7)
    ]
    assert len(list(out.iterdir())) == 1


def test_a_prompt_is_encoded_once(mine, monkeypatch):
    args, plans, model = mine[0]()
    encoded, encode = [], Digits.encode
    monkeypatch.setattr(Digits, "encode", lambda self, x: encoded.append(x) or encode(self, x))
    run.run(args, plans, model, {})
    assert encoded == [f"{k}234" for k in range(7)]


def test_samples_have_draws_of_their_own_that_stay(mine, tmp_path):
    """A response depends on its question and sample alone."""
    flags = ["--samples=3", "--temperature=3", "--seed=5"]
    _, [asked], model = mine[0](*flags)
    whole = lines.Parts(lines.folder(str(tmp_path / "a")), NAME)
    prompts = answers.prompts_of(asked, model)
    answers.answer(asked, prompts, model, whole, 21)
    texts = {(line["id"], line["sample"]): line["response"] for line in whole.read()}
    assert len(texts) == 21 and len(set(texts.values())) > 7
    some = lines.Parts(lines.folder(str(tmp_path / "b")), NAME)
    for key in (("2", 0), ("5", 1)):
        some.append({"id": key[0], "sample": key[1], "response": texts[key]})
    answers.answer(asked, prompts, model, some, 2)
    assert {(line["id"], line["sample"]): line["response"] for line in some.read()} == texts


def test_a_prompt_without_room_is_named_before_anything_is_written(mine, tmp_path):
    args, plans, model = mine[0]("--gen_length=8")
    with pytest.raises(ValueError, match=r"data.jsonl:1: a prompt of 4 tokens and gen_length=8 ex"):
        run.run(args, plans, model, {})
    assert not list((tmp_path / "out").iterdir())


def test_the_command_on_the_shipped_model(tmp_path, capsys):
    """Truth: the sampler called directly, and the verifier of the puzzles."""
    flags = [
        f"--model={SUDOKU}", "--tasks=sudoku", f"--out={tmp_path}", "--limit=10", "--batch_size=8",
        "--dtype=float32",
    ]  # fmt: skip
    assert run_command(command, *flags) == 0  # rows are split over eight devices
    result = json.loads((tmp_path / "sudoku.json").read_text())
    logits_fn, config, words = loading.open_model(SUDOKU, "float32")
    asked = plan.plans(command.parser().parse(flags))[0]
    special = loading.special_ids(config, words)
    model = answers.Model(logits_fn, words, special, 128)
    prompts = answers.prompts_of(asked, model)
    tokens = sampling.sample_responses(
        logits_fn, prompts, batch_size=10, gen_length=16, block_length=16, steps=16, **special
    )
    truth = [
        asked.task.score(question.record, words.decode(row.tolist()))
        for question, row in zip(asked.questions, tokens, strict=True)
    ]
    assert list(result["verdicts"].values()) == truth and 0 < sum(truth) < 10
    assert result["about"]["model"] == SUDOKU and len(result["about"]["fingerprint"]) == 32
    capsys.readouterr()
    said = refusal(capsys, command, *flags, "--batch_size=9")
    assert "batch_size=9 is no multiple of the 8 parts of the rows" in said
    said = refusal(capsys, command, *flags, "--data_parallel=9")
    assert "data_parallel=9 fsdp=1 tensor=1 do not fit the 8 devices: change them" in said
    assert "lines are appended" in refusal(capsys, command, *flags, "--out=gs://bucket/x")


@pytest.mark.slow
def test_a_split_model_answers_as_one_device_does(tmp_path):
    flags = [f"--model={SUDOKU}", "--tasks=sudoku", "--limit=10", "--dtype=float32"]
    found = []
    for split in ("--data_parallel=1", "--fsdp=2 --tensor=2", "--data_parallel=1 --fsdp=4"):
        out = tmp_path / str(len(found))
        assert run_command(command, *flags, *split.split(), "--batch_size=8", f"--out={out}") == 0
        written = map(json.loads, (out / "sudoku.responses.jsonl").open())
        found.append([(line["id"], line["response"], line["passes"]) for line in written])
    assert len(found[0]) == 10 and found[0] == found[1] == found[2]


@pytest.mark.slow
def test_two_hosts_answer_as_one(tmp_path):
    """Each answers half, the first scores; a second run on one host finds all done."""
    flags = ["--tasks=sudoku", "--limit=9", "--batch_size=4", f"--model={SUDOKU}"]
    evaluate = [sys.executable, "-m", "llada_jax.evaluate", *flags, "--dtype=float32"]
    cluster = [sys.executable, "launch/local_cluster.py", "--processes=2", "--devices=2", "--"]
    shown = subprocess.run(
        [*cluster, *evaluate, f"--out={tmp_path}/two"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert shown.stdout.count("| sudoku |") == 1
    subprocess.run([*evaluate, "--data_parallel=1", f"--out={tmp_path}/one"], cwd=ROOT, check=True)
    two, one = (json.loads((tmp_path / n / "sudoku.json").read_text()) for n in ("two", "one"))
    assert two["verdicts"] == one["verdicts"] and two["passes"] == one["passes"]
    assert two["environment"]["hosts"] == 2 and one["environment"]["hosts"] == 1
    responses = [tmp_path / n / "sudoku.responses.jsonl" for n in ("two", "one")]
    texts = [[json.loads(line)["response"] for line in path.open()] for path in responses]
    assert texts[0] == texts[1]
    assert len(list((tmp_path / "two").iterdir())) == 4  # no part is left


@pytest.mark.slow
def test_kills_at_random_lose_nothing(tmp_path):
    """Killed three times at random, and started again, it gives the undisturbed responses."""
    flags = ["--tasks=sudoku", "--limit=100", "--batch_size=10", f"--model={SUDOKU}"]
    evaluate = [sys.executable, "-m", "llada_jax.evaluate", *flags, "--samples=2"]
    evaluate += ["--temperature=0.7", "--data_parallel=1"]
    subprocess.run([*evaluate, f"--out={tmp_path}/quiet"], cwd=ROOT, check=True)
    again = [*evaluate, f"--out={tmp_path}/killed"]
    file = tmp_path / "killed" / "sudoku.responses.jsonl"
    rng = random.Random(0)
    for least in sorted(rng.sample(range(150), 3)):
        with subprocess.Popen(again, cwd=ROOT) as child:
            while not file.exists() or file.read_bytes().count(b"\n") < least:
                assert child.poll() is None
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            child.kill()
    subprocess.run(again, cwd=ROOT, check=True)
    found = []
    for name in ("quiet", "killed"):
        lines_of = map(json.loads, (tmp_path / name / "sudoku.responses.jsonl").open())
        found.append([(line["id"], line["sample"], line["response"]) for line in lines_of])
    assert found[0] == found[1] and len(set(found[1])) == 200
    results = [json.loads((tmp_path / n / "sudoku.json").read_text()) for n in ("quiet", "killed")]
    assert results[0]["metrics"] == results[1]["metrics"]
