"""MBPP: prompts, programs taken from responses, and verdicts.

Truth: an invented record by hand; the benchmark's own reference solutions, and mutations of them
against their tests in plain Python.
"""

import concurrent.futures
import gzip
import json

import pytest
from mutants import mutants, plain_verdict

from llada_jax.tasks import mbpp, sandbox
from llada_jax.tasks.sandbox import choice

RECORD = {
    "task_id": 11,
    "text": "Write a function to double a number.",
    "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(2) == 4", "assert set([double(start)]) == {10}"],
    "test_setup_code": "start = 5",
    "challenge_test_list": [],
}
SHOT = RECORD | {
    "task_id": 2,
    "text": "Say one.",
    "code": "def one():\r\n  return 1",
    "test_list": ["assert one() == 1", "assert one() < 2"],
    "test_setup_code": "",
}
CODE = "def double(x):\n    return 2 * x\n"
RIGHT = {
    "code": CODE,
    "done": CODE + "[DONE]\n\nYou are an expert Python programmer",
    "begin and done": f"[BEGIN]\n{CODE}[DONE]",
    "fence": f"Sure:\n```python\n{CODE}```\nDone.",
    "fence between begin and done": f"[BEGIN]\n```python\n{CODE}```\n[DONE]",
    "fence closed only": CODE + "```\nThis doubles.",
    "fences": f"```python\ndef other():\n    pass\n```\nand\n```python\n{CODE}```",
    "indented": "    def double(x):\n        return 2 * x\n",
    "prose around": f"Here you are:\n{CODE}\nThat is all, I hope.",
    "half a function behind": CODE + "def more(",
    "its own tests": CODE + "assert double(1) == 2\nprint(double(3))",
    "class": "class Twice:\n    def __call__(self, x):\n        return x + x\ndouble = Twice()\n",
}
WRONG = {
    "nothing": "",
    "wrong": CODE.replace("2 *", "3 *"),
    "one test": "def double(x):\n    return 4\n",
    "name": CODE.replace("double", "twice"),
    "end": "import sys\nsys.exit(0)\n" + CODE,
    "end in the function": "def double(x):\n    import os\n    os._exit(0)\n",
    "done first": f"[DONE]\n{CODE}",
}


@pytest.fixture(autouse=True)
def _protected():
    if sandbox.protection() == "none":
        pytest.skip(choice._reasons())


@pytest.mark.parametrize("form", RIGHT)
def test_right(form):
    assert mbpp.score(RECORD, RIGHT[form]) == 1.0


@pytest.mark.parametrize("form", WRONG)
def test_wrong(form):
    assert mbpp.score(RECORD, WRONG[form]) == 0.0


def test_prompt():
    asked = (
        "You are an expert Python programmer, and here is your task: Say one. Your code should "
        "pass these tests:\n\nassert one() == 1\nassert one() < 2\n"
    )
    solved = "[BEGIN]\ndef one():\n  return 1\n[DONE]"
    last = (
        "You are an expert Python programmer, and here is your task: Write a function to double a "
        "number. Your code should pass these tests:\n\nassert double(2) == 4\n"
        "assert set([double(start)]) == {10}\n"
    )
    assert mbpp.TASK.prompt(RECORD, [SHOT], "chat") == [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": solved},
        {"role": "user", "content": last},
    ]
    assert mbpp.TASK.prompt(RECORD, [SHOT], "plain") == f"{asked}{solved}\n\n{last}"
    assert mbpp.TASK.begins == "[BEGIN]\n"


def test_records():
    task = mbpp.TASK
    ids = range(1, 975)
    assert [k for k in ids if task.keep({"task_id": k})] == list(range(11, 511))
    assert [k for k in ids if task.is_shot({"task_id": k})] == [2, 3, 4]


def test_settings_are_the_published_ones():
    """Truth: the authors' configuration files and tables."""
    found = {
        name: (dict(s.sampler), s.template, s.shots, s.stop, dict(s.published))
        for name, s in mbpp.TASK.settings.items()
    }
    assert found == {
        "llada15": (
            {"gen_length": 512, "block_length": 32, "confidence_eos_eot_inf": True},
            *("chat", 3, ("[DONE]",), {"LLaDA 1.5": 42.8}),
        ),
        "instruct": (
            {"gen_length": 256, "block_length": 256, "confidence_eos_eot_inf": True},
            *("chat", 3, ("[DONE]",), {"LLaDA 8B Instruct": 41.0}),
        ),
        "base": (
            {"gen_length": 1024, "block_length": 1024},
            *("plain", 3, ("[DONE]",), {"LLaDA 8B Base": 40.0}),
        ),
    }


@pytest.fixture
def records(shared):
    with gzip.open(shared / "data" / "benchmarks" / "mbpp.jsonl.gz") as f:
        return [r for r in map(json.loads, f) if mbpp.TASK.keep(r)]


def score_all(score, cases):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda case: score(*case), cases))


@pytest.mark.slow
def test_reference_solutions_pass_in_every_form(records):
    assert len(records) == 500
    cases = [
        (r, text)
        for r in records
        for text in (
            r["code"] + "\n[DONE]\nmore",
            f"Sure:\n```python\n{r['code']}\n```\nIt works because it is right.",
        )
    ]
    scores = score_all(mbpp.score, cases)
    assert not [r["task_id"] for (r, _), s in zip(cases, scores, strict=True) if s != 1.0]


@pytest.mark.slow
def test_mutations_are_judged_as_plain_python_judges_them(records, monkeypatch):
    seconds = 4.0
    monkeypatch.setattr(mbpp, "TIMEOUT", seconds)
    slow = {123}  # its own solution needs longer
    cases = [
        (r, text)
        for r in records[::2]
        if r["task_id"] not in slow
        for _, text in mutants(r["code"])
    ]

    def judge(record, text):
        tests = "\n".join(["", record["test_setup_code"], *record["test_list"]])
        return (
            record["task_id"],
            mbpp.score(record, f"{text}\n[DONE]"),
            float(plain_verdict(text + tests, seconds)),
        )

    verdicts = score_all(judge, cases)
    assert not [v for v in verdicts if v[1] != v[2]]
    wrong = sum(ours == 0.0 for _, ours, _ in verdicts)
    print(f"{len(verdicts)} mutations, {wrong} wrong by their tests")
    assert wrong >= 300
