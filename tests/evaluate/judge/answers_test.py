"""Files of answers in their public forms, and how they meet the questions."""

import pytest

from llada_jax.evaluate.judge.answers import read_answers, read_questions


@pytest.fixture
def path(write):
    return lambda records, name: write(records, name).partition(":")[2]


FORMS = {
    "ours": {"id": "u1", "response": "yes", "sample": 0},
    "v0.1": {
        "question_id": "u1",
        "model_id": "m",
        "choices": [{"index": 0, "turns": [{"content": "yes", "token_len": 1}]}],
    },
    "later": {
        "uid": "u1",
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": {"answer": "yes"}},
        ],
    },
    "plain messages": {"uid": "u1", "messages": [{"role": "assistant", "content": "yes"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(path, form):
    assert read_answers(path([FORMS[form], "\n"], "a.jsonl")) == {"u1": "yes"}


def test_numbers_are_ids(path):
    lines = [{"id": 0, "response": ""}, {"id": "1", "response": "b"}]
    assert read_answers(path(lines, "a.jsonl")) == {"0": "", "1": "b"}


@pytest.mark.parametrize(
    "line",
    [
        {"id": "u1"},
        {"response": "yes"},
        {"id": None, "response": "yes"},
        {"id": "u1", "response": None},
        {"question_id": "u1", "choices": []},
        {"uid": "u1", "messages": [{"content": {"text": "yes"}}]},
        ["u1", "yes"],
        "{\n",
        "[" * 50_000 + "\n",
    ],
)
def test_what_is_no_answer(path, line):
    line = line if isinstance(line, str | dict) else f"{line}\n".replace("'", '"')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: no answer; a line is"):
        read_answers(path([{"id": "u0", "response": "x"}, line], "a.jsonl"))


def test_two_answers_to_one_question(path):
    lines = [{"id": 3, "response": "x"}, {"id": "3", "response": "y"}]
    with pytest.raises(ValueError, match=r"a.jsonl:2: a second answer to '3'"):
        read_answers(path(lines, "a.jsonl"))


def test_questions(write, path):
    data = write([{"uid": f"u{k}", "prompt": f"p{k}", "level": k} for k in range(4)])
    model = path([{"id": f"u{k}", "response": f"m{k}"} for k in (2, 0)], "m.jsonl")
    base = path([{"id": f"u{k}", "response": f"b{k}"} for k in range(4)], "b.jsonl")
    found, unanswered = read_questions(data, model, base)
    assert [(q.id, q.text, q.response, q.baseline) for q in found] == [
        ("u0", "p0", "m0", "b0"),
        ("u2", "p2", "m2", "b2"),
    ]
    assert unanswered == 2 and found[1].record["level"] == 2
    found, unanswered = read_questions(data, model, base, limit=2)
    assert [q.id for q in found] == ["u0"] and unanswered == 1


def test_records_without_the_field_are_numbered(write, path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write([{"prompt": "p0"}, {"prompt": [*turns, {"role": "user", "content": "c"}]}])
    answers = path([{"id": k, "response": f"m{k}"} for k in range(2)], "m.jsonl")
    found, _ = read_questions(data, answers, answers)
    assert [q.id for q in found] == ["0", "1"]
    assert found[1].text == "user: a\n\nassistant: b\n\nuser: c"


def test_what_does_not_meet(write, path):
    data = write([{"uid": f"u{k}", "prompt": f"p{k}"} for k in range(2)])
    one = path([{"id": "u0", "response": "x"}], "one.jsonl")
    both = path([{"id": f"u{k}", "response": "x"} for k in range(2)], "both.jsonl")
    other = path([{"id": "u7", "response": "x"}], "other.jsonl")
    with pytest.raises(ValueError, match=r"one\.jsonl has no answer to 'u1'.*both\.jsonl has one"):
        read_questions(data, both, one)
    with pytest.raises(ValueError, match="1 of its ids are in no record.*the first is 'u7'"):
        read_questions(data, other, both)
    with pytest.raises(ValueError, match="answers none of the 1 questions"):
        read_questions(data, other, both, limit=1)
    twice = write([{"uid": "u0", "prompt": "p"}] * 2, "twice.jsonl")
    with pytest.raises(ValueError, match=r"twice\.jsonl:2: a second record 'u0'"):
        read_questions(twice, one, one)


def test_the_digest_is_of_all_three_texts(write, path):
    data = write([{"uid": "u", "prompt": "p"}])
    other = write([{"uid": "u", "prompt": "q"}], "other.jsonl")
    a, b = (path([{"id": "u", "response": r}], f"{r}.jsonl") for r in "ab")
    digests = [
        read_questions(*files)[0][0].digest
        for files in [(data, a, b), (data, b, a), (data, a, a), (other, a, b)]
    ]
    assert len(set(digests)) == 4
