"""GSM8K: the last number by hand, and all reference answers against lm_eval's own filters."""

import gzip
import json
import pathlib

import pytest

from llada_jax.tasks.gsm8k import TASK, last_number, score

RECORD = {
    "question": "How many legs have 300 cats?",
    "answer": "300*4 = <<300*4=1200>>\n#### 1,200",
}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 18.", 18),
        ("It is $1,234,567.50!", 1234567.5),
        ("5, 6, 7", 7),
        ("1,2345", 2345),
        ("12, 345", 345),
        ("5-3", 3),
        ("5 - -3", -3),
        ("x=-3.", -3),
        ("+4", 4),
        (".5 or -.25", -0.25),
        ("3.0", 3),
        ("18...", 18),
        ("**18** eggs", 18),
        (r"\boxed{18}", 18),
        ("18%", 18),
        ("007", 7),
        ("none", None),
        ("", None),
        ("-", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("So 1200.", 1.0),
        ("So $1,200.00 a day", 1.0),
        ("#### 1200\n\nQuestion: How many legs have 7 cats?\nAnswer: 28", 1.0),
        ("So 1201.", 0.0),
        ("So -1200.", 0.0),
        ("1200 legs of 300 cats", 0.0),
        ("No idea", 0.0),
        ("", 0.0),
    ],
)
def test_score(response, verdict):
    assert score(RECORD, response) == verdict


def test_a_reference_without_a_number():
    with pytest.raises(ValueError, match="'It is many.' has no number after ####"):
        score({"question": "How many?", "answer": "It is many."}, "7")


def test_prompts():
    shot = {"question": "1+1?", "answer": "#### 2"}
    plain = TASK.prompt(RECORD, [shot], "plain")
    ask = "Question: {}\nLet's think step by step\nAnswer:".format
    assert plain == f"{ask('1+1?')} #### 2\n\n{ask(RECORD['question'])}"
    assert TASK.prompt(RECORD, [shot], "chat") == [
        {"role": "user", "content": ask("1+1?")},
        {"role": "assistant", "content": "#### 2"},
        {"role": "user", "content": ask(RECORD["question"])},
    ]


# How a response may end, and the verdicts of ours and of lm_eval's flexible-extract.
ENDINGS = {
    "The answer is {n}.": (1, 1),
    "So she pays ${n}": (1, 1),
    "{n} = **{n}** km/h": (1, 1),
    "100-5={n}": (1, 1),
    "#### {n}": (1, 1),
    "{n} and 1 is {wrong}": (0, 0),
    "So ${wrong}.": (0, 0),
    "{n}{n}": (0, 0),
    "-{n}": (0, 0),
    # lm_eval compares texts, not numbers, takes dots and commas alone for a number, and reads a
    # difference as a negative number.
    "So she pays ${n}.00.": (1, 0),
    "It is {n}...": (1, 0),
    "{n} , that is it ..": (1, 0),
    "1000-{n}": (1, 0),
}


def _flexible_extract():
    """lm_eval's verdict (record, response), from the settings of its own task."""
    import lm_eval
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    path = pathlib.Path(lm_eval.__path__[0]) / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.safe_load(path.read_text())
    filters = {f["name"]: f["filter"][0] for f in task["filter_list"]}
    options = {k: v for k, v in filters["flexible-extract"].items() if k != "function"}
    keys = ("regexes_to_ignore", "ignore_case", "ignore_punctuation")
    ignore = {key: task["metric_list"][0][key] for key in keys}
    extract = RegexFilter(**options)

    def verdict(record, response):
        found = extract.apply([[response]], [record])[0]
        return float(exact_match_hf_evaluate(found, [record["answer"]], **ignore)["exact_match"])

    return verdict


@pytest.mark.slow
def test_all_reference_answers(shared):
    pytest.importorskip("lm_eval")
    theirs = _flexible_extract()
    with gzip.open(shared / "data" / "benchmarks" / "gsm8k_test.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    assert len(records) == 1319
    for record in records:
        worked, _, number = record["answer"].rpartition("#### ")
        wrong = int(number.replace(",", "")) + 1
        assert score(record, record["answer"]) == theirs(record, record["answer"]) == 1.0
        assert score(record, f"{worked}#### {wrong}") == 0.0
        for ending, verdicts in ENDINGS.items():
            if int(number.replace(",", "")) <= 0 and ending[0] in "1-{":
                continue  # a sign before the sign, or -0
            text = worked + ending.format(n=number, wrong=wrong)
            found = score(record, text), theirs(record, text)
            assert found == verdicts, (record["question"], text, found)
