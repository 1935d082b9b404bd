"""Film reviews: those of the grammar are whole, broken ones are not; words have a feeling."""

import itertools
import re

import numpy as np
import pytest
from helpers import ROOT

from llada_jax import tokenizer
from llada_jax.tasks import reviews

ASSET = ROOT / "llada_jax" / "assets" / "reviews" / "tokenizer.json"
PROMPT = "Nora made a western about two thieves in Rome."
REVIEW = "The thieves are very tender, and the music is slow. She fills her scenes with wit."


@pytest.fixture(scope="module")
def found():
    """Records of both splits."""
    return [r for split in reviews.SPLITS for r in reviews.records(1500, seed=5, split=split)]


# ---- a second parser: word by word over classes, without a regular expression


def classes():
    """Each word of a review with its class; an ending is one word."""
    heroes = {**reviews._HEROES}
    table = {
        "one": heroes,
        "two": heroes.values(),
        "part": reviews._PARTS,
        "parts": reviews._MANY_PARTS,
        "adverb": reviews._ADVERBS,
        "praise": [*reviews._GOOD, *reviews._BAD, *reviews._PLAIN],
        "verb": [*reviews._GOOD_VERBS, *reviews._BAD_VERBS, *reviews._PLAIN_VERBS],
        "thing": reviews._THINGS,
        "what": [*reviews._GOOD_WORDS, *reviews._BAD_WORDS, *reviews._PLAIN_WORDS],
    }
    return {word: name for name, words in table.items() for word in words}


CLASSES = classes()
ENDS = [*reviews._GOOD_ENDS, *reviews._BAD_ENDS, *reviews._PLAIN_ENDS]


def parses(prompt, response):
    """Whether a response is a review, by a walk over its words; the truth for `is_whole`."""
    end = next((end for end in ENDS if response.endswith(f". {end}")), None)
    if end is None:
        return False
    words = re.findall(r"\w+|[.,]", response.removesuffix(end).strip())
    spaced = re.sub(r" ([.,])", r"\1", " ".join(words))
    if f"{spaced} {end}" != response:  # other spaces than the grammar writes
        return False
    asked = re.findall(r"\w+", prompt)
    name, number, hero = asked[0], asked[5], asked[6]
    her = name in reviews._WOMEN
    rest = iter([*words, "stop"])
    word = next(rest)

    def take(*wanted):
        nonlocal word
        right = word in wanted or CLASSES.get(word) in wanted
        word = next(rest, "stop") if right else word
        return right

    def praise():
        take("adverb")
        return take("praise")

    if not (take("The") and take(hero) and take("is" if number == "one" else "are") and praise()):
        return False
    if take(","):
        both = take("and") and take("the")
        if not (both and ((take("part") and take("is")) or (take("parts") and take("are")))):
            return False
        if not praise():
            return False
    middle = (".", "She" if her else "He", "verb", "her" if her else "his", "thing", "with", "what")
    return all(take(each) for each in (*middle, ".")) and word == "stop"


def test_every_record_is_whole_and_its_sentiment_counts(found):
    moods = []
    for record in found:
        verdict = reviews.score(record, record["response"])
        assert list(verdict) == ["reward", "sentiment", "positive", "whole"]
        assert verdict["whole"] == 1.0 and verdict["reward"] == verdict["sentiment"]
        assert verdict["positive"] == (verdict["sentiment"] > 0)
        assert parses(record["prompt"], record["response"])
        moods.append(verdict["sentiment"])
    assert abs(np.mean(moods)) < 0.2 and min(moods) <= -4 and max(moods) >= 4
    assert len({record["response"] for record in found}) > 0.95 * len(found)


def test_the_splits_share_no_prompt_and_a_seed_is_a_beginning():
    sets = {
        split: {r["prompt"] for seed in (0, 1) for r in reviews.records(400, seed, split)}
        for split in reviews.SPLITS
    }
    assert len(set.union(*sets.values())) == sum(map(len, sets.values()))
    assert min(map(len, sets.values())) > 500
    assert all(reviews.split_of(prompt) == split for split in sets for prompt in sets[split])
    few = list(reviews.records(5, seed=3))
    assert few == list(itertools.islice(reviews.records(50, seed=3), 5))
    assert few != list(reviews.records(5, seed=4))


@pytest.mark.parametrize(
    "change, rule",
    [
        (("thieves are", "thieves is"), "number of the verb"),
        (("The thieves", "The thief"), "number of the hero"),
        (("The thieves", "The pirates"), "another hero"),
        (("She", "He"), "gender"),
        (("her scenes", "his scenes"), "gender of the second word"),
        (("music is", "music are"), "number of a part"),
        (("music is", "jokes is"), "number of parts"),
        ((" She fills her scenes with wit.", ""), "a missing sentence"),
        ((" See it twice.", ""), "a missing end"),
        ((" with wit", ""), "a missing clause"),
        (("very tender", "very"), "a missing word"),
        (("very tender", "very very tender"), "a word twice"),
        (("See it twice.", "See it twice. See it twice."), "an end twice"),
        (("very tender", "tender very"), "order of words"),
        (("fills her scenes", "her scenes fills"), "order of a clause"),
        ((", and", " and"), "a missing comma"),
        (("scenes with", "wit with"), "a word of another class"),
        (("wit.", "wit,"), "punctuation"),
        (("The", "the"), "a small letter"),
        ((" She", "  She"), "spaces"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_broken_review_is_not_whole(change, rule):
    whole = f"{REVIEW} See it twice.".replace("slow", "long")
    record = {"prompt": PROMPT}
    assert reviews.score(record, whole) == reviews.score(record, f" {whole}\n")
    broken = whole.replace(*change)
    assert broken != whole
    verdict = reviews.score(record, broken)
    assert verdict["whole"] == 0.0 and not parses(PROMPT, broken), rule
    assert verdict["reward"] == verdict["sentiment"] - reviews.BROKEN


def test_an_unknown_word_and_no_review_are_not_whole():
    for text in ("", "See it twice.", f"{REVIEW} See it twice.", PROMPT):
        assert not reviews.is_whole(PROMPT, text)


def test_two_parsers_agree_on_mutations(found):
    """One to two words of a review become others, of the same class or of any."""
    rng = np.random.default_rng(0)
    words = [*CLASSES, "The", "the", "is", "are", "and", "with", "She", "He", "her", "his"]
    counts = {True: 0, False: 0}
    for record in found[::2]:
        parts = re.split(r"(\w+)", record["response"])
        for _ in range(rng.integers(1, 3)):
            at = 2 * rng.integers(len(parts) // 2) + 1
            same = [w for w in CLASSES if CLASSES[w] == CLASSES.get(parts[at])]
            choice = rng.random()
            if choice < 0.5 and same:
                parts[at] = same[rng.integers(len(same))]
            elif choice < 0.8:
                parts[at] = words[rng.integers(len(words))]
            else:  # a neighbour
                other = max(at - 2, 1)
                parts[at], parts[other] = parts[other], parts[at]
        text = "".join(parts)
        whole = reviews.is_whole(record["prompt"], text)
        assert whole == parses(record["prompt"], text), text
        counts[whole] += 1
    assert min(counts.values()) > 150, counts


def test_a_review_of_another_prompt_is_whole_only_if_it_agrees(found):
    fits = 0
    for record, other in itertools.pairwise(found):
        whole = reviews.is_whole(other["prompt"], record["response"])
        assert whole == parses(other["prompt"], record["response"])
        fits += whole
    assert fits < 0.1 * len(found)  # 16 heroes, two numbers, two genders


@pytest.mark.parametrize(
    "text, feeling",
    [
        ("", 0),
        ("witty witty wooden", 1),
        ("She drowns her story with noise. I hated it.", -3),
        ("He lights his sets with wonder. Bring your friends.", 3),
        ("He follows his sets with silence. I saw it alone.", 0),
        ("hollowed unwitty lightsome", 0),
        ("Stay at home. Stay at home.", -2),
    ],
)
def test_the_sentiment_counts_words_and_ends(text, feeling):
    assert reviews.sentiment(text) == feeling


def test_the_shades_keep_the_text(found):
    broken = [{**r, "response": r["response"].replace(" is", " is is")} for r in found[:50]]
    for record in [*found[:200], *broken, {"response": "unwitty, witty. I loved it.I hated it."}]:
        pieces = reviews.TASK.shaded(record, record["response"])
        assert "".join(piece for piece, _ in pieces) == record["response"]
    assert reviews.shade({}, "a witty plot. I hated it.") == [
        ("a ", None),
        ("witty", 1.0),
        (" plot. ", None),
        ("I hated it.", -1.0),
    ]


def test_the_tokenizer_has_a_word_for_each_word(found):
    """Every text is decoded as it was; a word is one token, as is a mark of punctuation."""
    words = tokenizer.load(str(ASSET))
    grammar = set()
    for record in found:
        for text in (record["prompt"], record["response"]):
            ids = words.encode(text)
            assert words.decode(ids) == text
            assert len(ids) == len(re.findall(r"\w+|[.,]", text)) <= 25
            grammar.update(re.findall(r"\w+", text))
    every = {*CLASSES, *reviews._WOMEN, *reviews._MEN, *reviews._GENRES, *reviews._PLACES}
    every |= {word for end in ENDS for word in re.findall(r"\w+", end)}
    assert every <= grammar  # so every word of the grammar was tried
    assert words.mask_id == 161 and words.eos_id == 160


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(count=0), "count=0: reviews need an integer of at least 1"),
        (dict(count=1, seed=-1), "seed=-1: reviews need an integer of at least 0"),
        (
            dict(count=1, split="test"),
            "split='test': reviews have the splits train, validation, heldout",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        list(reviews.records(**arguments))


def test_a_prompt_of_another_task_is_named():
    with pytest.raises(ValueError, match='no prompt for a review: .*write "Nora made a western'):
        reviews.score({"prompt": "Nora made a western."}, REVIEW)
