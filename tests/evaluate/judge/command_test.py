"""The command with judges of every kind: honest, biased, random, lying, silent."""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT

from llada_jax.evaluate.judge import client as clients
from llada_jax.evaluate.judge import command, judges, verdict

N = 40


def numbers(n=N):
    """Invented questions; the model's answer is the better one where it has the larger number."""
    rng = random.Random(0)
    return [(f"u{k}", rng.randrange(100), rng.randrange(100)) for k in range(n)]


@pytest.fixture
def files(write):
    data = write([{"uid": name, "prompt": f"question {name}"} for name, *_ in numbers()])
    paths = []
    for side in (1, 2):
        answers = [{"id": row[0], "response": f"number {row[side]}."} for row in numbers()]
        paths.append(write(answers, f"{side}.jsonl").partition(":")[2])
    return [f"--data={data}", f"--responses={paths[0]}", f"--baseline={paths[1]}"]


def run(files, out, judge, *flags):
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    command.run(parser.parse_args([*files, f"--out={out}", f"--judge={judge}", *flags]))
    return json.loads((pathlib.Path(out) / "judge.json").read_text())


def compare(a, b):
    """The true verdict on two numbers; a strong win is one by more than 50."""
    if a == b:
        return "A=B"
    winner = "A" if a > b else "B"
    return f"{winner}{'>>' if abs(a - b) > 50 else '>'}{'B' if winner == 'A' else 'A'}"


def read_numbers(user):
    return [int(n) for n in re.findall(r"number (\d+)\.", user)]


def expected_rate():
    wins, games = 0.0, 0
    for _, ours, theirs in numbers():
        weight = 3 if abs(ours - theirs) > 50 else 1
        wins += weight * (0.5 if ours == theirs else ours > theirs)
        games += weight
    return 100 * wins / games


# Judges as Python functions.
def honest(question, a, b):
    return compare(*read_numbers(a + b))


def random_verdict(question, a, b):
    return random.Random(question + a + b).choice(verdict.VERDICTS)


def first(question, a, b):
    return "A>>B"


def second(question, a, b):
    return "B>>A"


def tie(question, a, b):
    return "A=B"


def nothing(question, a, b):
    return None


def mostly_nothing(question, a, b):
    return honest(question, a, b) if question[-1] in "0123" else None


def nonsense(question, a, b):
    return "A is better"


def broken(question, a, b):
    raise KeyError("oops")


def reward(record, response):
    assert record["uid"] in record["prompt"]
    return float(read_numbers(response)[0])


def here(name, kind="python"):
    return f"{kind}:{__name__}:{name}"


def test_an_honest_function(files, tmp_path, capsys):
    found = run(files, tmp_path / "out", here("honest"))
    assert found["win_rate"] == pytest.approx(expected_rate())
    assert found["interval"][0] < found["win_rate"] < found["interval"][1] and found["stderr"] > 0
    assert found["n"] == N and found["warnings"] == []
    assert found["bias"]["first_place"] == 50 and found["bias"]["disagree"] == 0
    name, ours, theirs = numbers()[3]
    assert found["verdicts"][name] == {
        "model_first": compare(ours, theirs),
        "baseline_first": compare(theirs, ours),
    }
    assert found["settings"] == {"judge": here("honest"), "seed": 0, "limit": 0}
    said = capsys.readouterr().out
    assert f"win rate            {found['win_rate']:.1f} % +- {found['stderr']:.1f}" in said
    assert f"({N} questions, both orders)" in said and "warning" not in said


def test_a_reward(files, tmp_path):
    found = run(files, tmp_path / "out", here("reward", "reward"))
    plain = [0.5 if ours == theirs else ours > theirs for _, ours, theirs in numbers()]
    assert found["win_rate"] == pytest.approx(100 * sum(plain) / N)
    assert set(found["verdict_counts"]) <= {"A>B", "A=B", "B>A"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("first", "prefers the first place: the first one wins 100.0 %"),
        ("first", "the verdict is A>>B in 100.0 % of the games"),
        ("second", "prefers the second place: the first one wins 0.0 %"),
        ("tie", "the verdict is A=B in 100.0 % of the games"),
        ("random_verdict", "nothing shows that the judge compares the answers"),
        ("mostly_nothing", "games have no verdict; the questions that are left out may"),
    ],
)
def test_a_bad_judge_is_seen(files, tmp_path, capsys, name, words):
    found = run(files, tmp_path / "out", here(name))
    assert any(words in line for line in found["warnings"])
    assert f"warning: {next(w for w in found['warnings'] if words in w)}" in capsys.readouterr().out


def test_a_judge_without_verdicts(files, tmp_path, capsys):
    with pytest.raises(ValueError, match="no question has both verdicts"):
        run(files, tmp_path / "out", here("nothing"))
    found = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert found["n"] == 0 and found["missing_games"] == 2 * N and "win_rate" not in found
    assert f"{2 * N} games have no verdict" in found["warnings"][0]
    assert "verdicts           none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        (here("nonsense"), "'u0', model_first: the judge returned 'A is better', none of A>>B"),
        (here("broken"), "question 'u0', model_first: the judge raised KeyError: 'oops'"),
        (here("absent"), "has no function absent"),
        ("python:honest", "not of the form module:function"),
        ("reward:honest", "is none of the tasks"),
        ("gpt-4", "--judge=gpt-4 is none of http://HOST:PORT/v1"),
        ("http://127.0.0.1:9/v1", "needs --judge_model"),
    ],
)
def test_judges_that_are_none(files, tmp_path, judge, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        run(files, tmp_path / "out", judge)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out=gs://bucket/out"], "it must be a local folder"),
        (["--limit=-1"], "--limit=-1 must be at least 0"),
        (["--judge_model=x"], "--judge_model=x is for a judge at an address"),
        (["--judge_request=[]"], "is no JSON object of fields"),
        (["--judge_request={"], "is no JSON object of fields"),
        (['--judge_request={"model": "y"}'], "is no JSON object of fields"),
    ],
)
def test_flags_that_are_wrong(files, tmp_path, flags, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        run(files, tmp_path / "out", here("honest"), *flags)


@pytest.mark.parametrize(
    "flag", ["--judge_workers=0", "--judge_attempts=0", "--judge_timeout=0", "--judge_total=-1"]
)
def test_numbers_of_an_address_that_are_wrong(files, tmp_path, flag):
    with pytest.raises(ValueError, match=re.escape(flag)):
        run(files, tmp_path / "out", "http://127.0.0.1:9/v1", "--judge_model=tiny", flag)


# Judges at an address.
def answer(body):
    """The true verdict; the probe has no numbers."""
    found = read_numbers(body["messages"][1]["content"]) if len(body["messages"]) > 1 else []
    return f"I compared them. [[{compare(*found)}]]" if found else "ready"


@pytest.fixture
def quick(monkeypatch):
    """No waits between attempts."""
    monkeypatch.setattr(clients, "_LONGEST_WAIT", 0.001)


FLAGS = ["--judge_model=tiny", "--judge_timeout=0.5", "--judge_total=20"]


def test_a_judge_at_an_address(files, tmp_path, server, monkeypatch):
    monkeypatch.setenv("MY_KEY", " sk-invented \n")
    there = server(lambda n, body, handler: answer(body) + " sk-invented")
    out = tmp_path / "out"
    found = run(files, out, there.address + "/", *FLAGS, "--judge_key=MY_KEY")
    assert found["win_rate"] == pytest.approx(expected_rate())
    assert len(there.seen) == 1 + 2 * N  # one to see whether anything is there
    assert {s.headers["Authorization"] for s in there.seen} == {"Bearer sk-invented"}
    assert there.seen[-1].body["messages"][0]["content"] == verdict.INSTRUCTIONS
    settings = found["settings"]
    assert settings["judge"] == there.address and settings["judge_model"] == "tiny"
    assert settings["request"] == {"temperature": 0, "max_tokens": 4096}
    assert not any("sk-invented" in path.read_text() for path in out.iterdir())
    replies = json.loads((out / "games.jsonl").read_text().splitlines()[1])["replies"]
    assert replies[0].startswith("I compared them. [[") and replies[0].endswith("***")
    assert run(files, out, there.address, *FLAGS) == found and len(there.seen) == 1 + 2 * N


def test_a_server_that_fails_in_all_ways(files, tmp_path, server, quick):
    """Every second request fails, each time in another way; the result is the same."""
    failures = [
        lambda h: (429, {"Retry-After": "0"}, b""),
        lambda h: (500, {}, b"broken"),
        lambda h: (200, {}, b"no JSON"),
        lambda h: h.connection.close(),
        lambda h: (503, {}, b"\xff\xfe"),
        lambda h: (200, {}, b'{"choices": [{"message": {}}]}'),
    ]

    def reply(n, body, handler):
        return failures[n // 2 % len(failures)](handler) if n % 2 and n > 1 else answer(body)

    there = server(reply)
    found = run(files, tmp_path / "out", there.address, *FLAGS)
    assert found["win_rate"] == pytest.approx(expected_rate()) and found["n"] == N
    assert len(there.seen) > 3 * N


def test_a_reply_without_a_verdict_is_asked_again(files, tmp_path, server):
    def reply(n, body, handler):
        turns = len(body["messages"])
        if turns == 1:
            return "ready"
        return {2: "Hm.", 4: "[[A>B]] or [[B>A]]"}.get(turns) or answer(body)

    there = server(reply)
    found = run(files, tmp_path / "out", there.address, *FLAGS, "--limit=5")
    assert found["n"] == 5 and found["missing_games"] == 0 and len(there.seen) == 1 + 3 * 10
    line = json.loads((tmp_path / "out" / "games.jsonl").read_text().splitlines()[1])
    assert line["replies"][:2] == ["Hm.", "[[A>B]] or [[B>A]]"] and len(line["replies"]) == 3
    last = there.seen[-1].body["messages"]
    assert [m["content"] for m in last[3::2]] == [verdict.AGAIN] * 2
    with pytest.raises(ValueError, match="no question has both verdicts"):
        run(files, tmp_path / "two", there.address, *FLAGS, "--limit=5", "--judge_attempts=2")
    assert len(there.seen) == 31 + 1 + 2 * 10


def test_a_request_that_is_refused_is_one_missing_game(files, tmp_path, server):
    def reply(n, body, handler):
        found = read_numbers(str(body["messages"]))
        if found == [numbers()[0][1], numbers()[0][2]]:
            return 400, {}, b'{"error": {"message": "the context is too long"}}'
        return answer(body)

    there = server(reply)
    found = run(files, tmp_path / "out", there.address, *FLAGS, "--limit=5")
    assert (found["n"], found["missing_games"], found["missing_questions"]) == (4, 1, 1)
    assert found["verdicts"]["u0"]["model_first"] is None
    assert "the context is too long" in (tmp_path / "out" / "games.jsonl").read_text()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "it wants a key and none is set"),
        (404, "it has no chat/completions, or no model 'tiny'"),
        (400, "the request was refused: bad field"),
    ],
)
def test_a_wrong_address_costs_one_request(files, tmp_path, server, monkeypatch, status, words):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    there = server(lambda *_: (status, {}, b'{"error": {"message": "bad field"}}'))
    with pytest.raises(ValueError, match=re.escape(words)):
        run(files, tmp_path / "out", there.address, *FLAGS)
    assert len(there.seen) == 1


def test_a_server_that_goes_down(files, tmp_path, server, quick):
    down = threading.Event()

    def reply(n, body, handler):
        if n == 30:
            down.set()
        return (503, {}, b"") if down.is_set() else answer(body)

    there = server(reply)
    flags = [*FLAGS, "--judge_total=0.2", "--judge_workers=2"]
    with pytest.raises(ValueError, match="status 503.*games are in .*the same command goes on"):
        run(files, tmp_path / "out", there.address, *flags)
    kept = len((tmp_path / "out" / "games.jsonl").read_text().splitlines()) - 1
    assert 28 <= kept <= 29
    time.sleep(0.3)  # until the game that was on its way has given up
    before = len(there.seen)
    down.clear()
    # Request 30 has been; the server stays up.
    found = run(files, tmp_path / "out", there.address, *flags, "--judge_total=20")
    assert found["win_rate"] == pytest.approx(expected_rate())
    assert len(there.seen) - before == 1 + 2 * N - kept


def test_another_judge_wants_another_folder(files, tmp_path, server):
    there = server(lambda n, body, handler: answer(body))
    run(files, tmp_path / "out", there.address, *FLAGS, "--limit=2")
    for change in (
        ["--judge_model=other"],
        ["--judge_attempts=1"],
        ['--judge_request={"temperature": 1}'],
    ):
        with pytest.raises(ValueError, match="give another --out"):
            run(files, tmp_path / "out", there.address, *FLAGS, "--limit=2", *change)
    # Waits and workers may change.
    run(files, tmp_path / "out", there.address, *FLAGS, "--limit=2", "--judge_workers=1")


def test_a_judge_that_lies_about_length(files, tmp_path, server, write):
    """It takes the longer answer. At equal style nothing is left of the model's win rate."""
    rng = random.Random(1)
    more = {name: rng.gauss(0.15, 0.2) for name, *_ in numbers()}
    for side, sign in ((1, 1), (2, -1)):
        lengths = {name: round(200 * (1 + sign * x)) for name, x in more.items()}
        write([{"id": k, "response": "w" * n} for k, n in lengths.items()], f"{side}.jsonl")

    def reply(n, body, handler):
        if len(body["messages"]) == 1:
            return "ready"
        a, b = (len(x) for x in re.findall(r"\n(w*)\n</answer", body["messages"][1]["content"]))
        return f"[[{'A=B' if a == b else 'A>B' if a > b else 'B>A'}]]"

    found = run(files, tmp_path / "out", server(reply).address, *FLAGS)
    assert found["win_rate"] > 60
    low, high = found["style_controlled"]["interval"]
    assert low < 50 < high and found["style_controlled"]["coefficients"]["length"] > 3


def test_questions_without_an_answer_of_the_model_are_told(files, tmp_path, capsys):
    path = files[1].partition("=")[2]
    text = pathlib.Path(path).read_text().splitlines(keepends=True)
    pathlib.Path(path).write_text("".join(text[:30]))
    found = run(files, tmp_path / "out", here("honest"))
    assert found["n"] == 30 and found["unanswered_questions"] == 10
    assert "warning: the model has no answer to 10 more questions" in capsys.readouterr().out


CHILD = """
import argparse
from llada_jax.evaluate.judge import command
parser = argparse.ArgumentParser()
command.add_flags(parser)
command.run(parser.parse_args())
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(files, tmp_path, server):
    """Killed three times at random moments; no verdict is lost, and none is given twice."""
    there = server(lambda n, body, handler: time.sleep(0.02) or answer(body))
    argv = [*files, f"--out={tmp_path / 'out'}", f"--judge={there.address}", *FLAGS]
    argv += ["--judge_workers=2", "--judge_timeout=20"]
    path = tmp_path / "out" / "games.jsonl"
    for until in (5, 20, 50):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, *argv], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}
        )
        deadline = time.monotonic() + 120
        while not path.exists() or len(path.read_bytes().splitlines()) < until:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
    time.sleep(0.1)
    found = run(files, tmp_path / "out", there.address, *FLAGS)
    assert found["win_rate"] == pytest.approx(expected_rate()) and found["n"] == N
    names = [(line["id"], line["order"]) for line in map(json.loads, path.open()) if "id" in line]
    assert len(names) == len(set(names)) == 2 * N
    # Only games on their way at a kill are asked again, and there are four probes.
    assert len(there.seen) <= 2 * N + 3 * 2 + 4


@pytest.mark.slow
def test_five_hundred_questions(tmp_path, server, write):
    rows = numbers(500)
    data = write([{"uid": name, "prompt": f"question {name}"} for name, *_ in rows])
    paths = [
        write([{"id": r[0], "response": f"number {r[side]}."} for r in rows], f"{side}.jsonl")
        for side in (1, 2)
    ]
    flags = [f"--data={data}", f"--responses={paths[0][6:]}", f"--baseline={paths[1][6:]}"]
    there = server(lambda n, body, handler: time.sleep(0.02) or answer(body))
    began = time.monotonic()
    found = run(flags, tmp_path / "out", there.address, *FLAGS[:1], "--judge_workers=16")
    assert found["n"] == 500 and len(there.seen) == 1001 and found["warnings"] == []
    assert time.monotonic() - began < 0.02 * 1000  # less than one after another


def test_judges_are_in_their_table():
    assert set(judges.JUDGES) == {"http", "https", "python", "reward"}
