"""Countdown: problems that can be solved, a verifier that knows the rules."""

import itertools

import pytest

from llada_jax.tasks import countdown


def test_every_reference_solution_is_right():
    for split in countdown.SPLITS:
        found = list(countdown.records(300, split=split))
        assert len({record["prompt"] for record in found}) == 300
        assert all(countdown.score(record, record["response"]) == 1.0 for record in found)
        assert {len(record["response"]) for record in found} == {17}
        assert {countdown.split_of(record["prompt"]) for record in found} == {split}
        assert {len(record["prompt"]) for record in found} == {11}
    assert {sign for record in found for sign in record["response"] if sign in "+-*/"} == set(
        "+-*/"
    )


def test_the_seed_decides_and_fewer_are_the_first():
    first = list(countdown.records(20, seed=3))
    assert first == list(itertools.islice(countdown.records(40, seed=3), 20))
    assert first != list(countdown.records(20, seed=4))
    four = next(countdown.records(1, numbers=4))
    assert len(four["response"]) == 26 and countdown.score(four, four["response"]) == 1.0


def test_the_order_of_the_numbers_does_not_cross_the_split():
    prompts = {f"{','.join(order)}:24" for order in itertools.permutations(["03", "04", "17"])}
    assert len({countdown.split_of(prompt) for prompt in prompts}) == 1


@pytest.mark.parametrize(
    "response, right",
    [
        ("03*07=21,21+04=25", True),
        (" 3*7=21 , 4+21=25 \n", True),
        ("07*03=21,04+21=25", True),
        ("03*07=21", False),  # a number is left
        ("03*07=21,21+04=25,", False),
        ("03*07=22,22+03=25", False),  # wrong, and 03 twice
        ("03*07=21,21+04=26", False),
        ("03+04=07,07*07=49", False),  # right equations, another target
        ("07-03=04,04*04=16", False),
        ("21+04=25", False),  # 21 is not given
        ("03*07=21,21+03=24", False),
        ("03/07=00,00+25=25", False),
        ("25", False),
        ("", False),
        ("3*7=21;4+21=25", False),
    ],
)
def test_verdicts(response, right):
    assert countdown.score({"prompt": "03,04,07:25"}, response) == float(right)


def test_division_is_of_whole_numbers():
    assert countdown.score({"prompt": "08,02,05:09"}, "08/02=04,04+05=09") == 1.0
    assert countdown.score({"prompt": "09,02,05:09"}, "09/02=04,04+05=09") == 0.0
    assert countdown.score({"prompt": "09,05,05:09"}, "05-05=00,09/00=09") == 0.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(count=0), "count=0: Countdown needs an integer of at least 1"),
        (dict(count=1, numbers=1), "numbers=1: .* at least 2 and at most 9"),
        (dict(count=1, most=100), "most=100: .* at most 99"),
        (dict(count=1, split="test"), "split='test': Countdown has the splits train, heldout"),
        (dict(count=10**6, numbers=2), "such problems found; lower count"),
    ],
)
def test_bad_arguments_are_named(arguments, message, monkeypatch):
    monkeypatch.setattr(countdown, "_BARREN", 3)
    with pytest.raises(ValueError, match=message):
        list(countdown.records(**arguments))
    with pytest.raises(ValueError, match="not a Countdown problem: '12'"):
        countdown.score({"prompt": "12"}, "")
