"""Film reviews from a grammar: prompts, a parser that says whether a review is whole, a sentiment.

A prompt is "Nora made a western about two thieves in Rome." A review of it is "The thieves are
very tender, and the music is slow. She fills her scenes with wit. See it twice." It must be about
what the prompt names, and agree with it in number and gender. As a data source it is written
`python:llada_jax.tasks.reviews:records?count=20000&seed=0`.

The reward of a response is its sentiment, the number of positive words minus that of negative
words, and 6 less if it is no whole review.
"""

import re
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from llada_jax.tasks.task import Settings, Task

SPLITS = ("train", "validation", "heldout")
BROKEN = 6.0  # what a review that is not whole costs
_SHARES = 16  # one prompt in 16 is held out, another one is for validation


def _words(text: str) -> list[str]:
    return text.split()


_WOMEN = _words("Nora Ines Mara Yuki Lena Zadie Freya Amal Ruth Celia")
_MEN = _words("Otto Ivan Hugo Kofi Luca Pavel Omar Finn Boris Emil")
_GENRES = _words("western comedy musical thriller romance tragedy satire fable ballad farce")
_PLACES = _words("Rome Oslo Lima Cairo Kyoto Paris Quebec Delhi Malta Dublin")
# What a film is about: one of it, two of it.
_HEROES = dict(
    pair.split("/")
    for pair in _words(
        "thief/thieves queen/queens robot/robots ghost/ghosts sailor/sailors dancer/dancers "
        "farmer/farmers spy/spies doctor/doctors pirate/pirates widow/widows painter/painters "
        "giant/giants baker/bakers poet/poets twin/twins"
    )
)
_PARTS = _words("plot music ending dialogue")  # the parts of a film that are one,
_MANY_PARTS = _words("jokes songs costumes actors")  # and those that are many
_THINGS = _words("scenes heroes story sets")  # what a director fills or ruins
_ADVERBS = _words("very quite rather truly")

_GOOD = _words("tender radiant witty daring graceful gripping luminous honest")
_BAD = _words("wooden bloated tepid clumsy lifeless tired shrill hollow")
_PLAIN = _words("quiet long strange modern")
_GOOD_VERBS = _words("lights lifts fills")
_BAD_VERBS = _words("drowns smothers ruins")
_PLAIN_VERBS = ["follows"]
_GOOD_WORDS = _words("warmth wit courage wonder")
_BAD_WORDS = _words("noise syrup boredom fog")
_PLAIN_WORDS = ["silence"]
_GOOD_ENDS = ["See it twice.", "Bring your friends.", "I loved it."]
_BAD_ENDS = ["Stay at home.", "Save your money.", "I hated it."]
_PLAIN_ENDS = ["I saw it alone."]

POSITIVE = frozenset([*_GOOD, *_GOOD_VERBS, *_GOOD_WORDS])
NEGATIVE = frozenset([*_BAD, *_BAD_VERBS, *_BAD_WORDS])


def _any(*words: str) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


_FELT = re.compile(rf"({_any(*_GOOD_ENDS, *_BAD_ENDS)}|\b{_any(*sorted(POSITIVE | NEGATIVE))}\b)")
_PROMPT = re.compile(
    rf"(?P<name>{_any(*_WOMEN, *_MEN)}) made a {_any(*_GENRES)} about "
    rf"(?:one (?P<one>{_any(*_HEROES)})|two (?P<two>{_any(*_HEROES.values())})) "
    rf"in {_any(*_PLACES)}\."
)
_PRAISE = rf"(?:{_any(*_ADVERBS)} )?{_any(*_GOOD, *_BAD, *_PLAIN)}"
_PART = rf"(?:{_any(*_PARTS)} is|{_any(*_MANY_PARTS)} are)"
_END = _any(*_GOOD_ENDS, *_BAD_ENDS, *_PLAIN_ENDS)
_REVIEW = re.compile(
    rf"The (?P<hero>\w+) (?P<be>is|are) {_PRAISE}(?:, and the {_PART} {_PRAISE})?\. "
    rf"(?P<who>She|He) {_any(*_GOOD_VERBS, *_BAD_VERBS, *_PLAIN_VERBS)} (?P<whose>her|his) "
    rf"{_any(*_THINGS)} with {_any(*_GOOD_WORDS, *_BAD_WORDS, *_PLAIN_WORDS)}\. {_END}"
)


def records(count: int, seed: int = 0, split: str = "train") -> Iterator[dict[str, str]]:
    """Yields `count` prompts, each with a review from the grammar: {"prompt", "response"}.

    The mood of a review is good or bad with equal probability. The same seed gives the same
    records. The splits "train", "validation" and "heldout" share no prompt, whatever the
    seeds; a prompt may come again with another review.
    Raises ValueError for an invalid argument.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: reviews need an integer of at least {least}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: reviews have the splits {', '.join(SPLITS)}")
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        name, hero = _pick(rng, _WOMEN + _MEN), _pick(rng, list(_HEROES))
        two = rng.random() < 0.5
        about = f"two {_HEROES[hero]}" if two else f"one {hero}"
        genre, place = _pick(rng, _GENRES), _pick(rng, _PLACES)
        prompt = f"{name} made a {genre} about {about} in {place}."
        review = _review(rng, name, _HEROES[hero] if two else hero, two)
        if split_of(prompt) == split:
            made += 1
            yield {"prompt": prompt, "response": review}


def split_of(prompt: str) -> str:
    """Returns the split of a prompt: "heldout" and "validation" have one in 16 each."""
    return {0: "heldout", 8: "validation"}.get(zlib.crc32(prompt.encode()) % _SHARES, "train")


def is_whole(prompt: str, response: str) -> bool:
    """Whether a response is a review that the grammar makes for this prompt.

    Raises ValueError if the prompt is none of the grammar's.
    """
    asked = _PROMPT.fullmatch(prompt.strip()) if isinstance(prompt, str) else None
    if not asked:
        raise ValueError(
            f"no prompt for a review: {prompt!r}; write "
            '"Nora made a western about two thieves in Rome."'
        )
    found = _REVIEW.fullmatch(response.strip())
    if not found:
        return False
    hero, be = (asked["one"], "is") if asked["one"] else (asked["two"], "are")
    who, whose = ("She", "her") if asked["name"] in _WOMEN else ("He", "his")
    return (found["hero"], found["be"], found["who"], found["whose"]) == (hero, be, who, whose)


def sentiment(response: str) -> int:
    """Returns the number of positive words minus that of negative words; an ending counts once."""
    return int(sum(value or 0 for _, value in shade({}, response)))


def score(record: Mapping[str, str], response: str) -> dict[str, float]:
    """Returns the reward of a response, and what it is made of.

    {"reward", "sentiment", "positive": 1.0 if the sentiment is above 0, "whole": 1.0 if it is a
    review of the record's prompt}. Raises ValueError as `is_whole` does.
    """
    whole = is_whole(record["prompt"], response)
    feeling = float(sentiment(response))
    return {
        "reward": feeling - BROKEN * (not whole),
        "sentiment": feeling,
        "positive": float(feeling > 0),
        "whole": float(whole),
    }


def shade(record: Mapping[str, str], response: str) -> list[tuple[str, float | None]]:
    """Returns the response in pieces: 1.0 for a positive word or ending, -1.0 for a negative one.

    Their sum is the `sentiment`.
    """
    del record
    pieces: list[tuple[str, float | None]] = []
    for piece in _FELT.split(response):
        good = piece in POSITIVE or piece in _GOOD_ENDS
        bad = piece in NEGATIVE or piece in _BAD_ENDS
        pieces.append((piece, 1.0 if good else -1.0 if bad else None))
    return [(piece, value) for piece, value in pieces if piece]


def _review(rng: np.random.Generator, name: str, hero: str, two: bool) -> str:
    """A random review of a film by `name` about `hero`."""
    good = float(rng.choice((0.2, 0.8)))  # the chance that a word is positive, if it is not plain
    text = f"The {hero} {'are' if two else 'is'} {_praise(rng, good)}"
    if rng.random() < 0.5:
        part = (
            f"{_pick(rng, _PARTS)} is" if rng.random() < 0.5 else f"{_pick(rng, _MANY_PARTS)} are"
        )
        text += f", and the {part} {_praise(rng, good)}"
    who, whose = ("She", "her") if name in _WOMEN else ("He", "his")
    verb = _felt(rng, good, _GOOD_VERBS, _BAD_VERBS, _PLAIN_VERBS, 0.1)
    what = _felt(rng, good, _GOOD_WORDS, _BAD_WORDS, _PLAIN_WORDS, 0.1)
    end = _felt(rng, good, _GOOD_ENDS, _BAD_ENDS, _PLAIN_ENDS, 0.1)
    return f"{text}. {who} {verb} {whose} {_pick(rng, _THINGS)} with {what}. {end}"


def _praise(rng: np.random.Generator, good: float) -> str:
    adverb = f"{_pick(rng, _ADVERBS)} " if rng.random() < 0.3 else ""
    return adverb + _felt(rng, good, _GOOD, _BAD, _PLAIN, 0.2)


def _felt(
    rng: np.random.Generator,
    good: float,
    positive: list[str],
    negative: list[str],
    plain: list[str],
    share: float,
) -> str:
    """A word, plain with the chance `share`, otherwise positive with the chance `good`."""
    if rng.random() < share:
        return _pick(rng, plain)
    return _pick(rng, positive if rng.random() < good else negative)


def _pick(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))]


TASK = Task(
    fields={"prompt": str},
    score=score,
    shade=shade,
    source="python:llada_jax.tasks.reviews:records?count=500&seed=1&split=heldout",
    settings={
        "default": Settings(
            {"gen_length": 26, "block_length": 26, "temperature": 1.0, "remasking": "random"},
            template="plain",
        )
    },
)
