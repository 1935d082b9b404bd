"""Arena-Hard's records and prompt; no score but a judge's."""

import json

import pytest

from llada_jax.files import read_lines
from llada_jax.tasks.arena_hard import TASK


def test_it_has_no_score_of_its_own():
    record = {"uid": "invented", "prompt": "Name three colours of the sea."}
    assert TASK.prompt is None and TASK.id_field == "uid"  # the record's own prompt
    with pytest.raises(ValueError, match=r"q\.jsonl:1: only a judge can compare these responses"):
        TASK.judge("q.jsonl:1", record, "Blue, green, grey.")


def test_settings():
    (name, settings), *others = TASK.settings.items()
    assert name == "ours" and not others and not settings.published
    assert settings.sampler["gen_length"] % settings.sampler["block_length"] == 0


def test_the_public_questions_have_its_fields(shared):
    path = shared / "data" / "benchmarks" / "arena_hard_v0.1_questions.jsonl.gz"
    records = [json.loads(line) for _, line in read_lines(path)]
    assert len(records) == len({record["uid"] for record in records}) == 500
    for record in records:
        assert all(isinstance(record[name], kind) for name, kind in TASK.fields.items())
        assert record["prompt"].strip()
