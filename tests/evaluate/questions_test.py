"""Questions: records that are checked, prompts, worked examples, ids."""

import json

import pytest

from llada_jax import tasks
from llada_jax.evaluate import questions as lib
from llada_jax.evaluate.__main__ import parser
from llada_jax.evaluate.plan import plans
from llada_jax.tasks import Task, gsm8k

RECORDS = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}. #### {i + 1}"} for i in range(6)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return f"jsonl:{path}"


def planned(*flags):
    return plans(parser().parse(["--model=x", "--out=x", *flags]))[0]


def test_gsm8k_as_a_chat_and_as_a_text(data):
    question = lib.read_questions(gsm8k.TASK, data, "chat", shots=RECORDS[:2])[5]
    step = "Let's think step by step\nAnswer:"
    assert question.id == "5" and question.record == RECORDS[5]
    assert [m["role"] for m in question.prompt] == ["user", "assistant"] * 2 + ["user"]
    assert question.prompt[0]["content"] == f"Question: 0 + 1?\n{step}"
    assert question.prompt[1]["content"] == RECORDS[0]["answer"]
    assert question.prompt[-1]["content"] == f"Question: 5 + 1?\n{step}"
    text = lib.read_questions(gsm8k.TASK, data, "plain", shots=RECORDS[:1], limit=1)
    assert [q.prompt for q in text] == [
        f"Question: 0 + 1?\n{step} It is 1. #### 1\n\nQuestion: 0 + 1?\n{step}"
    ]


def test_ids_and_records_that_are_left_out(data):
    task = Task(
        fields={"question": str},
        score=None,
        settings={},
        prompt=lambda record, shots, template: record["question"],
        id_field="question",
        keep=lambda record: record["question"][0] in "135",
        is_shot=lambda record: record["question"][0] in "24",
    )
    assert [q.id for q in lib.read_questions(task, data, "plain")] == ["1 + 1?", "3 + 1?", "5 + 1?"]
    assert [q.id for q in lib.read_questions(task, data, "plain", limit=1)] == ["1 + 1?"]
    assert len(lib.read_questions(task, data, "plain", keep_all=True)) == 6
    assert lib.read_shots(task, data, 2, own=True) == [RECORDS[2], RECORDS[4]]
    assert lib.read_shots(task, data, 1, own=False) == RECORDS[:1]
    with pytest.raises(ValueError, match="holds 2 worked examples, the settings take 3"):
        lib.read_shots(task, data, 3, own=True)


@pytest.mark.parametrize(
    "line, message",
    [
        ({"question": "1"}, "data.jsonl:7: the field answer is missing, the task needs str"),
        ({"question": 1, "answer": "2"}, "data.jsonl:7: the field question is int, the task needs"),
        ("[]", "data.jsonl:7: a record is an object with fields, this is list; repair it"),
        ("{", "data.jsonl:7: no JSON"),
    ],
)
def test_bad_records_are_named(data, line, message):
    path = data.removeprefix("jsonl:")
    with open(path, "a") as file:
        file.write(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(ValueError, match=message):
        lib.read_questions(gsm8k.TASK, data, "chat")


def test_two_records_of_one_id_are_refused(data):
    task = Task(fields={}, score=None, settings={}, id_field="kind")
    with open(data.removeprefix("jsonl:"), "w") as file:
        file.write('{"kind": 1, "prompt": "a"}\n{"kind": "1", "prompt": "b"}\n')
    with pytest.raises(ValueError, match="data.jsonl:2: the id 1 is that of .*data.jsonl:1, too"):
        lib.read_questions(task, data, "plain")


def test_settings_and_flags(data):
    plan = planned("--tasks=gsm8k", f"--data={data}", f"--shots={data}")
    assert plan.about["settings"] == "llada15" and plan.about["num_shots"] == 4
    assert plan.sampler == {
        "gen_length": 256,
        "block_length": 16,
        "steps": 256,
        "confidence_eos_eot_inf": True,
    }
    assert plan.published == {"LLaDA 1.5": 83.8} and plan.template == "chat"
    plan = planned(
        "--tasks=gsm8k",
        f"--data=gsm8k={data}",
        "--num_shots=0",
        "--settings=base",
        "--gen_length=64",
        "--block_length=8",
        "--steps=32",
        "--commit=threshold",
        "--threshold=0.9",
        "--stop=xyz",
        "--limit=3",
        "--initial_length=16",
    )
    assert plan.template == "plain" and plan.stop == ("Question:", "xyz")
    assert len(plan.questions) == 3 and len(plan.questions[0].prompt) < 60
    recorded = {k: v for k, v in plan.about["sampler"].items() if k != "growth"}
    assert recorded == {
        "gen_length": 64, "block_length": 8, "steps": 32, "commit": "threshold", "threshold": 0.9,
    }  # fmt: skip
    assert plan.about["sampler"]["growth"]["initial_length"] == 16
    assert plan.sampler["growth"].initial_length == 16
    off = planned("--tasks=gsm8k", f"--data={data}", "--num_shots=0", "--no-confidence_eos_eot_inf")
    assert off.sampler["confidence_eos_eot_inf"] is False


def test_the_digest_is_of_all_that_is_asked(data):
    flags = ["--tasks=gsm8k", f"--data={data}", "--settings=llada15"]
    none = "--num_shots=0"
    variants = ([none], ["--num_shots=1", f"--shots={data}"], [none, "--limit=2"])
    digests = {planned(*flags, *more).about["questions"] for more in variants}
    assert len(digests) == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks=chess"], "'chess' is none of the tasks arena_hard, countdown, "),
        (["--tasks=json"], "'json' is none of the tasks"),
        (["--tasks=llada_jax.nothing"], "No module named 'llada_jax.nothing'"),
        (["--tasks=llada_jax.elbo"], "has no TASK"),
        (
            ["--tasks=gsm8k,sudoku", "--data=x.jsonl"],
            "--data=x.jsonl is not TASK=SOURCE with one of",
        ),
        (
            ["--tasks=gsm8k", "--data=jsonl:nothing.jsonl", "--num_shots=0"],
            "no file matches 'nothing.jsonl'",
        ),
        (
            ["--tasks=gsm8k", "--data=DATA"],
            "takes 4 worked examples: give --shots=gsm8k=jsonl:FILE",
        ),
        (
            ["--tasks=sudoku", "--settings=llada15"],
            "sudoku has no settings of this name; it has ours",
        ),
        (["--tasks=sudoku", "--samples=2"], "at temperature 0 are all the same"),
        (["--tasks=sudoku", "--samples=0"], "--samples=0"),
        (["--tasks=sudoku", "--block_length=5"], "is not a positive multiple of block_length=5"),
        (["--tasks=sudoku", "--commit=threshold"], "threshold"),
        (["--tasks=json:dumps"], "json:dumps has no records of its own"),
        (["--tasks=sudoku", "--data=a:b", "--data=sudoku=c:d"], "there is one for sudoku already"),
    ],
)
def test_bad_flags_are_one_line(data, flags, message):
    flags = [flag.replace("DATA", data) for flag in flags]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        planned(*flags)
    assert "\n" not in str(error.value)


def test_every_task_has_settings_that_the_sampler_takes(tmp_path):
    for name, task in tasks.TASKS.items():
        assert task.settings, name
        for settings in task.settings.values():
            assert {"gen_length", "block_length"} <= settings.sampler.keys()
            assert settings.template in ("chat", "plain")
