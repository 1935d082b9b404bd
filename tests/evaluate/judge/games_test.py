"""Games against stand-ins: continued files, threads, judges that fail on the way."""

import collections
import json
import os
import threading

import pytest

from llada_jax.evaluate.judge import games, judges
from llada_jax.evaluate.judge.answers import Question
from llada_jax.evaluate.judge.client import NoAnswerError, WrongAddressError
from llada_jax.evaluate.judge.judges import ORDERS, Judge, Ruling


def questions(n, response="m"):
    return [Question(f"u{k}", {"prompt": f"p{k}"}, f"p{k}", response, "b") for k in range(n)]


def judge(rule=lambda question, order: "A>B", workers=1, **settings):
    """A judge whose rule gives a verdict or raises; `played` counts its games."""
    played, lock = collections.Counter(), threading.Lock()

    def ruled(question, order):
        with lock:
            played[question.id, order] += 1
        return Ruling(rule(question, order), ["words"])

    found = Judge(ruled, {"judge": "mine"} | settings, workers=workers)
    return found, played


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "games.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 4])
def test_every_game_is_played_once(path, workers):
    mine, played = judge(lambda q, o: "A>B" if o == ORDERS[0] else None, workers)
    found = games.play(mine, questions(25), path)
    assert set(played.values()) == {1} and len(played) == 50
    assert found == {
        (f"u{k}", o): v for k in range(25) for o, v in zip(ORDERS, ("A>B", None), strict=True)
    }
    head, *rest = lines(path)
    assert head == {"settings": {"judge": "mine"}}
    assert {(r["id"], r["order"]): r["verdict"] for r in rest} == found
    assert rest[0]["replies"] == ["words"]
    again, played = judge(workers=workers)
    assert games.play(again, questions(25), path) == found and not played


def test_games_run_at_the_same_time(path):
    """With three workers three games meet; with two they would wait for ever."""
    barrier = threading.Barrier(3, timeout=5)
    mine, _ = judge(lambda q, o: barrier.wait() * 0 or "A=B", workers=3)
    assert len(games.play(mine, questions(3), path)) == 6


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupted_run_goes_on(path, workers):
    class Killed(Exception):
        pass

    done = []

    def rule(question, order):
        if len(done) >= 7:
            raise Killed
        done.append(question.id)
        return "B>A"

    with pytest.raises(Killed):
        games.play(judge(rule, workers)[0], questions(10), path)
    kept = path.read_bytes()
    assert 5 <= len(lines(path)) - 1 <= 7
    path.write_bytes(kept + b'{"id": "u9", "ord')  # the last line was not written to its end
    mine, played = judge(workers=workers)
    found = games.play(mine, questions(10), path)
    assert len(found) == 20 and len(played) == 21 - len(kept.splitlines())
    assert path.read_bytes().startswith(kept) and len(lines(path)) == 21


@pytest.mark.parametrize("part", [b"", b"{", b'{"settings": {"judge": "mine"}}'])
def test_a_run_that_was_killed_at_its_start(path, part):
    path.parent.mkdir()
    path.write_bytes(part)
    assert len(games.play(judge()[0], questions(2), path)) == 4
    assert len(lines(path)) == 5


def test_a_file_of_others_is_kept(path):
    games.play(judge()[0], questions(2), path)
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=r"is of \{'seed': None\}, not of \{'seed': 1\}: give ano"):
        games.play(judge(seed=1)[0], questions(2), path)
    with pytest.raises(ValueError, match="another text of the question 'u0' or its answers"):
        games.play(judge()[0], questions(2, response="other"), path)
    assert path.read_bytes() == kept
    for foreign in (b"my notes", b"my notes\n", b"[]\n", b'{"settings": 3}\n', kept + b"{}\n"):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="is not a file of this command"):
            games.play(judge()[0], questions(2), path)
        assert path.read_bytes() == foreign


def test_fewer_and_more_questions(path):
    games.play(judge()[0], questions(2), path)
    assert len(games.play(judge()[0], questions(1), path)) == 2
    mine, played = judge()
    assert len(games.play(mine, questions(3), path)) == 6 and set(played) == {
        ("u2", order) for order in ORDERS
    }


def test_two_runs_at_once(path):
    def rule(question, order):
        with pytest.raises(ValueError, match="another process writes it"):
            games.play(judge()[0], questions(1), path)
        return "A>B"

    assert len(games.play(judge(rule)[0], questions(1), path)) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_game_without_an_answer_is_played_by_the_next_run(path, workers):
    def rule(question, order):
        if question.id in ("u1", "u4"):
            raise NoAnswerError("silence")
        return "A>B"

    found = games.play(judge(rule, workers)[0], questions(6), path)
    assert {i for i, _ in found} == {"u0", "u2", "u3", "u5"}
    mine, played = judge()
    assert len(games.play(mine, questions(6), path)) == 12
    assert {i for i, _ in played} == {"u1", "u4"}


@pytest.mark.parametrize("workers", [1, 4])
def test_a_judge_that_goes_down_ends_the_run(path, workers):
    def rule(question, order):
        if int(question.id[1:]) >= 10:
            raise NoAnswerError("silence")
        return "A>B"

    mine, played = judge(rule, workers)
    with pytest.raises(ValueError, match=r"silence; 20 of 200 games are in .*, the same"):
        games.play(mine, questions(100), path)
    assert len(lines(path)) == 21 and sum(played.values()) <= 20 + 3 + workers


def test_a_wrong_address_ends_the_run(path):
    def rule(question, order):
        raise WrongAddressError("no such model")

    mine, played = judge(rule, workers=2)
    with pytest.raises(WrongAddressError):
        games.play(mine, questions(100), path)
    assert sum(played.values()) <= 3


def test_the_check_comes_before_the_first_game_only(path):
    def check():
        raise ValueError("nothing is there")

    mine, played = judge()
    with pytest.raises(ValueError, match="nothing is there"):
        games.play(Judge(mine.rule, mine.settings, check), questions(2), path)
    assert not played
    games.play(mine, questions(2), path)
    games.play(Judge(mine.rule, mine.settings, check), questions(2), path)  # nothing is missing


def test_the_two_games_of_a_question():
    (question,) = questions(1)
    assert judges.in_order(question, "model_first") == ("m", "b")
    assert judges.in_order(question, "baseline_first") == ("b", "m")


def test_lines_are_whole_at_any_time(path):
    """What a kill after any game would leave behind: every line complete."""
    mine, _ = judge()
    seen = []

    def rule(question, order):
        if path.exists():
            content = path.read_bytes()
            seen.append(content.endswith(b"\n") and len(lines(path)) == 1 + len(seen))
        return Ruling("A>B", [])

    games.play(Judge(rule, mine.settings), questions(5), path)
    assert seen == [True] * 10 and os.path.exists(path)
