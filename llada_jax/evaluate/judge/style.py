"""How two answers differ in style: length and the marks of Markdown, as LMArena counts them."""

import re

import numpy as np

NAMES = ("length", "headers", "lists", "bold")
_CODE = re.compile(r"```[^`]*```")
_MARKS = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),
    re.compile(r"^[^\S\n]*(?:\d+\.|[-*+])\s", re.MULTILINE),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)


def counts(answer: str) -> np.ndarray:
    """Returns `[4]`: characters, headers, items of lists, bold texts; marks in code do not count.

    LMArena counts tokens of one model's tokenizer instead of characters.
    """
    prose = _CODE.sub("", answer)
    return np.array([len(answer), *(len(mark.findall(prose)) for mark in _MARKS)], float)


def differences(response: str, baseline: str) -> np.ndarray:
    """Returns `[4]`, the style of a response less that of the baseline's, in relative terms.

    Of length (a - b) / (a + b). Of a mark with densities a, b per character
    (a - b) / (a + b + 1). 0 if both are empty.
    """
    ours, theirs = counts(response), counts(baseline)
    length = (ours[0] - theirs[0]) / max(ours[0] + theirs[0], 1)
    a, b = ours[1:] / max(ours[0], 1), theirs[1:] / max(theirs[0], 1)
    return np.concatenate([[length], (a - b) / (a + b + 1)])
