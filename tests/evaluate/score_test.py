"""Responses made elsewhere, and two results compared question by question."""

import json

import numpy as np
import pytest
from helpers import refusal, run_command

from llada_jax.evaluate import __main__ as command
from llada_jax.evaluate import compare

RECORDS = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def score(tmp_path):
    data = write(tmp_path / "data.jsonl", RECORDS)

    def flags(responses, *more):
        file = write(tmp_path / "responses.jsonl", responses)
        argv = ["score", "--task=gsm8k", f"--data=jsonl:{data}", f"--responses={file}"]
        return [*argv, f"--out={tmp_path}/score.json", *more]

    return flags


def test_responses_are_scored(score, tmp_path, capsys):
    said = ["It is 1.", "It is 3", "3 no, 2", "It is 4"]
    rows = [{"id": i, "response": text} for i, text in enumerate(said)]
    assert run_command(command, *score([rows[3], *rows[:2]])) == 0
    found = json.loads((tmp_path / "score.json").read_text())
    assert found["verdicts"] == {"3": 1.0, "0": 1.0, "1": 0.0} and found["n"] == 3
    assert found["mean"] == pytest.approx(2 / 3) and found["missing"] == 1
    assert found["stderr"] == pytest.approx(np.std([1, 1, 0], ddof=1) / 3**0.5)
    shown = capsys.readouterr().out
    assert "score 66.7 +- 33.3 % of 3 questions" in shown
    assert "1 of 4 questions have no response: left out" in shown


def test_several_lines_are_samples(score, tmp_path):
    rows = [{"id": str(i), "response": str(k)} for i in range(4) for k in (1, 2)]
    assert run_command(command, *score(rows)) == 0
    found = json.loads((tmp_path / "score.json").read_text())
    assert found["samples"] == {"0": [1, 0], "1": [0, 1], "2": [0, 0], "3": [0, 0]}
    assert found["mean"] == 0.25 and found["metrics"]["pass@2"]["mean"] == 0.5


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"id": 4, "response": ""}], "responses.jsonl:1: the id 4 is that of no record"),
        (
            [{"id": 1, "response": 2}],
            'responses.jsonl:1: a line is {"id": ..., "response": "text"}',
        ),
        ([{"response": "1"}], "responses.jsonl:1: a line is"),
        ([], "holds no line"),
    ],
)
def test_bad_responses_are_named(score, capsys, rows, message):
    assert message in refusal(capsys, command, *score(rows))


def result(path, verdicts, **about):
    value = {"task": "t", "n": len(verdicts), "verdicts": verdicts, "about": about, "published": {}}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    return path.parent


def test_differences_are_paired(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib (the extra plot) is not installed")
    rng = np.random.default_rng(0)
    a = {str(i): float(x) for i, x in enumerate(rng.random(200) < 0.5)}
    b = {key: float(rng.random() < 0.2 or value) for key, value in a.items()}
    b["new"] = 1.0
    first = result(tmp_path / "a" / "t.json", a, model="A", seed=0)
    second = result(tmp_path / "b" / "t.json", b, model="B", seed=1)
    assert run_command(command, "compare", str(first), f"{second}/t.json", f"--out={tmp_path}") == 0
    found = json.loads((tmp_path / "compare.json").read_text())["tasks"]["t"]
    gaps = np.array([b[key] - a[key] for key in a])
    assert found["difference"] == pytest.approx(gaps.mean()) and found["n"] == 200
    assert found["stderr"] == pytest.approx(gaps.std(ddof=1) / 200**0.5)
    assert (found["better"], found["worse"]) == (int(gaps.sum()), 0)
    shown = capsys.readouterr().out
    assert "t: seed differs: 0 and 1" in shown and "model differs" not in shown
    assert "t: 1 questions are in one of the two only: left out" in shown
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_number_of_questions_needed_gives_that_power():
    """Truth: simulated tests at the number, of which 80 % see the difference."""
    rng = np.random.default_rng(1)
    gaps = rng.choice([-1.0, 0.0, 1.0], 4000, p=[0.1, 0.7, 0.2])
    pair = compare.paired(
        dict.fromkeys(map(str, range(4000)), 0.0),
        dict(zip(map(str, range(4000)), gaps, strict=True)),
    )
    drawn = rng.choice(gaps, (2000, pair["needed"]))
    z = drawn.mean(1) / (drawn.std(1, ddof=1) / pair["needed"] ** 0.5)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.04)
    same = compare.paired({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 0.0})
    assert same["difference"] == 0 and same["needed"] is None


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    one = result(tmp_path / "a" / "t.json", {"1": 1.0})
    other = result(tmp_path / "b" / "t.json", {"2": 1.0})
    assert "the two have no question in common" in refusal(
        capsys, command, "compare", str(one), str(other)
    )
    assert "does not exist" in refusal(capsys, command, "compare", str(one), f"{one}/no.json")
    (tmp_path / "c").mkdir()
    assert "holds no result" in refusal(capsys, command, "compare", str(one), str(tmp_path / "c"))
    bad = write(tmp_path / "c" / "x.json", [[1]])
    assert "is no result of" in refusal(capsys, command, "compare", str(one), str(bad))
