"""IFEval: the 25 kinds of instructions by hand, and against lm_eval's own process."""

import gzip
import json
import random
import subprocess
import sys

import pytest
from helpers import ROOT

from llada_jax.tasks import ifeval

for package in ("lm_eval", "langdetect", "nltk", "punkt"):
    pytest.importorskip(package)

_GERMAN = "Der Hund läuft jeden Morgen durch den Garten und sucht seinen alten Ball."
_ENGLISH = "The dog runs through the garden every morning and looks for its old ball."
# The library behind the check takes many a text in capitals for another language.
_CAPITALS = "THERE IS NOTHING LIKE THE SMELL OF FRESH BREAD WHEN THE WEATHER IS COLD."
# kind: arguments, a response that follows it, one that does not
KINDS = {
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "We saw a RED-HOT stove and a BIG dog.",
        "We saw a RED-HOT stove and a Big dog.",
    ),
    "change_case:english_capital": ({}, _CAPITALS, _CAPITALS.title()),
    "change_case:english_lowercase": ({}, _ENGLISH.lower(), _GERMAN.lower()),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Name a fish."},
        "name a fish. A trout.",
        "A trout. Name a fish.",
    ),
    "combination:two_responses": ({}, "A trout.\n******\nA carp.", "A trout.\n******\nA trout."),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        "Dear [name], I live in [town].",
        "Dear [name, I live in [town].",
    ),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        "Bye.\n\np. s. Call me.",
        "Bye.\n\nPS Call me.",
    ),
    "detectable_format:constrained_response": ({}, "Well. My answer is maybe.", "Maybe."),
    "detectable_format:json_format": ({}, '```json\n{"fish": ["trout"]}\n```', '{"fish": trout}'),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1\nWe swim.\nDay 2\nWe rest.",
        "Day one\nWe swim.\nDay 2\nWe rest.",
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        "Fish:\n* trout\n- carp",
        "Fish:\n* trout\n- carp\n- pike",
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "A *trout* and a **carp**.",
        "A *trout* and a carp*.",
    ),
    "detectable_format:title": ({}, "<<Fish>>\nA trout.", "<< >>\nA trout."),
    "keywords:existence": (
        {"keywords": ["trout", "lake"]},
        "A Trout swims in lakes.",
        "A trout swims in rivers.",
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["trout"]},
        "Troutlings swim.",
        "A TROUT swims.",
    ),
    "keywords:frequency": (
        {"keyword": "fish", "frequency": 2, "relation": "less than"},
        "A Fish swims.",
        "A fish eats a Fish.",
    ),
    "keywords:letter_frequency": (
        {"letter": "T", "let_frequency": 3, "let_relation": "at least"},
        "A trout, that is.",
        "A trout.",
    ),
    "language:response_language": ({"language": "de"}, _GERMAN, _ENGLISH),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Carp"},
        "Trout swim.\n\n'Carp', too.",
        "Trout swim.\n\nCarps, too.",
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        "Trout swim.\n***\nCarp rest.\n***",
        "Trout swim.\n\nCarp rest.",
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        "Dr. Fox of St. Ives, e.g., eats 3.5 trout. He lives in the U.S. now.",
        "Is it Dr. Fox? He eats trout. He rests.",
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "at least"},
        "Don't eat it.",
        "Eat the trout.",
    ),
    "punctuation:no_comma": ({}, "Trout; carp.", "Trout, carp."),
    "startend:end_checker": ({"end_phrase": "The End."}, 'So be it. the end."', "The end. Bye."),
    "startend:quotation": ({}, ' "Trout swim." ', '"Trout swim.'),
}


def record(*kinds, **changes):
    return {
        "key": 7,
        "prompt": "Name a fish.",
        "instruction_id_list": list(kinds),
        "kwargs": [{**KINDS[kind][0], **changes} for kind in kinds],
    }


def test_all_published_kinds_are_in_the_table():
    assert KINDS.keys() == ifeval._checkers().keys() and len(KINDS) == 25


@pytest.mark.parametrize("kind", KINDS)
def test_right_and_wrong(kind):
    _, right, wrong = KINDS[kind]
    assert ifeval.score(record(kind), right)["instruction_strict"] == [1.0]
    assert ifeval.score(record(kind), wrong)["instruction_strict"] == [0.0]
    assert set(ifeval.score(record(kind), " \n")["instruction_loose"]) == {0.0}


def test_strict_and_loose_by_prompt_and_instruction():
    both = record("punctuation:no_comma", "startend:quotation")
    found = ifeval.TASK.judge("here", both, 'Sure, here it is:\n"Trout swim."\nBye.')
    assert next(iter(found)) == "prompt_strict"
    assert found == {
        "prompt_strict": 0.0,
        "prompt_loose": 1.0,
        "instruction_strict": [0.0, 0.0],
        "instruction_loose": [1.0, 1.0],
    }
    found = ifeval.score(both, "Trout swim.")
    assert found["prompt_strict"] == 0.0 and found["instruction_strict"] == [1.0, 0.0]


def test_each_loose_verdict_alone():
    """One variant of the response each: first line, last line, both, and without asterisks."""
    quoted = record("startend:quotation")
    for text in (
        '*"A b."*',
        'x\n"A b."',
        '"A b."\nx',
        'x\n"A b."\nx',
        'x\n*"A b."',
        '*"A b."\nx',
        'x\n*"A b."*\nx',
    ):
        found = ifeval.score(quoted, text)
        assert (found["prompt_strict"], found["prompt_loose"]) == (0.0, 1.0), text
    assert ifeval.score(quoted, 'x\nx\n"A b."')["prompt_loose"] == 0.0


def test_kwargs_of_the_hugging_face_form():
    empty = {key: None for kwargs, *_ in KINDS.values() for key in kwargs}
    for kind, (_, right, wrong) in KINDS.items():
        full = record(kind)
        full["kwargs"] = [{**empty, **full["kwargs"][0]}]
        for text in (right, wrong):
            assert ifeval.score(full, text) == ifeval.score(record(kind), text)


def test_a_sign_is_counted_as_a_letter_is():
    hashes = record("keywords:letter_frequency", letter="#")
    assert ifeval.score(hashes, "# One\n## Two")["prompt_strict"] == 1.0
    assert ifeval.score(hashes, "# One\n# Two " + "abcdefghijklmnopqrstuvwxyz" * 9) == {
        "prompt_strict": 0.0, "prompt_loose": 0.0,
        "instruction_strict": [0.0], "instruction_loose": [0.0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("length_constraints:number_words", {"num_words": None}, "no valid num_words in"),
        ("length_constraints:number_words", {"num_words": -1}, "no valid num_words in"),
        ("length_constraints:number_words", {"relation": "about"}, "number_words.*about"),
        ("keywords:letter_frequency", {"letter": "ab"}, "no valid letter in"),
        ("keywords:existence", {"keywords": []}, "no valid keywords in"),
        ("punctuation:no_comma", {"num_words": 3}, "no_comma.*num_words"),
        ("length_constraints:nth_paragraph_first_word", {"nth_paragraph": 3}, "nth_paragraph in"),
    ],
)
def test_arguments_that_the_published_checks_would_draw_at_random(kind, changes, says):
    with pytest.raises(ValueError, match=says) as error:
        ifeval.score(record(kind, **changes), "Trout swim.")
    assert "\n" not in str(error.value)


def test_unknown_instruction_and_lists_of_two_lengths():
    bad = {**record("punctuation:no_comma"), "instruction_id_list": ["punctuation:no_dot"]}
    with pytest.raises(ValueError, match="'punctuation:no_dot' is none of IFEval's change_case"):
        ifeval.score(bad, "Trout")
    with pytest.raises(ValueError, match="1 instructions with kwargs for 0"):
        ifeval.score({**record("punctuation:no_comma"), "kwargs": []}, "Trout")


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "punkt", None)
    with pytest.raises(ImportError, match=r"pip install 'llada_jax\[evaluate\]'") as error:
        ifeval._checkers.__wrapped__()
    assert "\n" not in str(error.value)


def test_same_language_every_time_and_the_seed_of_others_stays(monkeypatch):
    from langdetect import DetectorFactory, detect

    mixed = "Otto mag Mops und Kaffee"
    found, alone = set(), set()
    for seed in range(20):
        monkeypatch.setattr(DetectorFactory, "seed", seed)
        alone.add(detect(mixed))
        found.add(ifeval.score(record("language:response_language"), mixed)["prompt_strict"])
        assert DetectorFactory.seed == seed
    assert len(alone) > 1 and len(found) == 1


@pytest.mark.slow
def test_no_network_and_no_trace_in_nltk():
    """In a process of its own, where a connection would raise."""
    code = """
import socket
def refuse(*_, **__): raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import nltk
paths = list(nltk.data.path)
from llada_jax.tasks import ifeval
record = {"instruction_id_list": ["length_constraints:number_sentences"],
          "kwargs": [{"num_sentences": 2, "relation": "at least"}]}
print(ifeval.score(record, "A b. C d.")["prompt_strict"], nltk.data.path == paths)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1.0 True\n" and "download" not in done.stdout + done.stderr, done


def _synthetic(record, others, rng):
    """Responses that follow some of the instructions: prompts of all records, changed."""
    texts = [record["prompt"], "", "  \n", '"' + record["prompt"] + '"', _GERMAN]
    for text in rng.sample(others, 4):
        texts += [
            text.upper(),
            text.lower().replace(",", ""),
            f"<<{text[:20]}>>\n\n* one\n* two *b* **c** [d] [e]\n***\n{text}\n******\nP.S. {text}",
            f"Sure:\nSection 1 {text}\n\nSECTION 2 {text} P.P.S. #!# My answer is yes.\nBye",
            f'```json\n"{len(text)}"\n```',
        ]
    for kwargs in record["kwargs"]:  # what is asked for, often enough
        words = [w for v in kwargs.values() for w in (v if isinstance(v, list) else [v])]
        words = [w for w in words if isinstance(w, str)]
        texts += [" ".join(words * k) + ". " + rng.choice(others) * k for k in (1, 3)]
        texts += [f"Well.\n{rng.choice(others)} " + "\n\n".join(words)]
        texts += ["\n\n".join([f"{words[0]} x"] * kwargs.get("num_paragraphs", 2))] if words else []
    return texts


@pytest.mark.slow
def test_against_lm_eval(shared):
    """All published records, the verdict of every instruction, strict and loose."""
    import langdetect

    ifeval._checkers()  # gives lm_eval its sentence model
    from lm_eval.tasks.ifeval import utils

    path = shared / "data" / "benchmarks" / "ifeval.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        records = [json.loads(line) for line in lines]
    prompts = [record["prompt"] for record in records]
    rng = random.Random(0)
    seen, differ, signs = {}, [], 0
    langdetect.DetectorFactory.seed = 0
    try:
        for record in records:
            for text in _synthetic(record, prompts, rng):
                ours, theirs = ifeval.score(record, text), utils.process_results(record, [text])
                for k, kind in enumerate(record["instruction_id_list"]):
                    if record["kwargs"][k].get("letter") in ("#", "!"):
                        signs += 1
                        continue
                    for level in ("strict", "loose"):
                        verdict = ours[f"instruction_{level}"][k]
                        if verdict != theirs[f"inst_level_{level}_acc"][k]:
                            differ.append((record["key"], kind, level, text))
                        seen.setdefault((kind, level), set()).add(verdict)
    finally:
        langdetect.DetectorFactory.seed = None
    assert not differ, (len(differ), differ[0])
    assert len(records) == 541 and signs
    assert {k for k, v in seen.items() if len(v) < 2} == set()  # each kind followed and not
