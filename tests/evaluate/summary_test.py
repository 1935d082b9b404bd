"""Means, standard errors and pass@k of verdicts, by hand and by enumeration."""

import itertools
import threading

import numpy as np
import pytest

from llada_jax.evaluate.summary import judge_all, pass_at_k, summarise
from llada_jax.evaluate.table import percent
from llada_jax.tasks import Task


def test_one_sample_has_the_usual_standard_error():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = summarise({str(i): [{"score": v}] for i, v in enumerate(values)})
    assert found["mean"] == pytest.approx(0.6) and found["n"] == 5
    assert found["stderr"] == pytest.approx(np.std(values, ddof=1) / 5**0.5)
    assert found["verdicts"] == {str(i): v for i, v in enumerate(values)}
    assert "samples" not in found and list(found["metrics"]) == ["score"]
    assert summarise({"a": [{"score": 0.5}]})["stderr"] is None


def test_samples_are_averaged_within_a_question():
    verdicts = {"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0, 1.0]}
    found = summarise({key: [{"score": v} for v in vs] for key, vs in verdicts.items()})
    assert found["mean"] == pytest.approx((0.25 + 1.0) / 2)
    assert found["verdicts"] == {"a": 0.25, "b": 1.0} and found["samples"] == verdicts
    assert found["metrics"]["pass@1"]["mean"] == pytest.approx(found["mean"])
    assert found["metrics"]["pass@2"]["mean"] == pytest.approx((0.5 + 1.0) / 2)
    assert "pass@4" not in found["metrics"]  # b has two samples


def test_pass_at_k_is_the_mean_over_all_choices():
    for n, c in ((5, 0), (5, 2), (5, 5), (4, 3)):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            chosen = [any(choice) for choice in itertools.combinations(right, k)]
            assert pass_at_k(n, c, k) == pytest.approx(np.mean(chosen))


def test_no_pass_at_k_of_scores_that_are_no_verdicts():
    found = summarise({"a": [{"score": 0.5}, {"score": 1.0}]})
    assert list(found["metrics"]) == ["score"] and found["samples"] == {"a": [0.5, 1.0]}


def test_lists_count_alike_and_questions_are_clusters():
    """The standard error is that of a ratio of sums over questions."""
    lists = [[1.0, 1.0, 0.0], [0.0], [1.0, 0.0]]
    found = summarise({str(i): [{"whole": 1.0, "parts": v}] for i, v in enumerate(lists)})
    sums, counts = np.array([2, 0, 1]), np.array([3, 1, 2])
    mean = 3 / 6
    error = np.sqrt(((sums - mean * counts) ** 2).sum() * 3 / 2) / 6
    expected = {"mean": mean, "stderr": pytest.approx(error), "share": True}
    assert found["metrics"]["parts"] == expected
    assert found["mean"] == 1.0 and found["verdicts"] == dict.fromkeys("012", 1.0)


def test_only_a_share_is_shown_in_per_cent():
    found = summarise(
        {k: [{"reward": r, "whole": 1.0}] for k, r in zip("ab", (0.5, -3.0), strict=True)}
    )
    assert "share" not in found  # one for each number
    shown = {name: percent(**value) for name, value in found["metrics"].items()}
    assert shown == {"reward": "-1.25 +- 1.75 points", "whole": "100.0 +- 0.0"}


def test_programs_are_judged_beside_each_other_in_order():
    both = threading.Barrier(2, timeout=20)  # breaks unless two run at once

    def score(record, response, unsafe):
        both.wait()
        return float(record["i"]) if unsafe else -1.0

    task = Task(fields={}, score=score, settings={}, runs_code=True)
    seen = []
    responses = [(f"f:{i}", {"i": i}, "") for i in range(4)]
    found = judge_all(task, responses, unsafe=True, progress=seen.append)
    assert found == [{"score": float(i)} for i in range(4)] and seen == [1, 2, 3, 4]


def test_a_score_that_is_none_is_named():
    task = Task(
        fields={}, score=lambda record, response: {"a": 1.0, "b": [float("nan")]}, settings={}
    )
    with pytest.raises(ValueError, match=r"f:1: the scorer returned b=nan, not a finite number \("):
        judge_all(task, [("f:1", {}, "x")])
    with pytest.raises(ValueError, match="f:1: only a judge can compare"):
        judge_all(Task(fields={}, score=None, settings={}), [("f:1", {}, "x")])
