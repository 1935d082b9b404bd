"""Whether a judge looks at the answers: the pull of a place, and the agreement of both orders."""

import math
from typing import NamedTuple

import numpy as np

from llada_jax.evaluate.judge.verdict import VERDICTS

_SIGN = dict(zip(VERDICTS, (1, 1, 0, -1, -1), strict=True))  # 1: the first answer wins


class Bias(NamedTuple):
    """How a judge treats the two orders of a question.

    first_place: wins of the first answer in per cent of all games, a tie is half.
    p_value: of a two-sided sign test that no place is preferred, over questions.
    disagree: questions in per cent whose two games have different winners (or one a tie).
    disagree_by_chance: what two verdicts that know nothing of each other would have.
    """

    first_place: float
    p_value: float
    disagree: float
    disagree_by_chance: float
    agree_z: float  # standard errors by which they agree more than by chance


def judge_bias(pairs: list[tuple[str, str]]) -> Bias:
    """The bias in pairs of verdicts: with the model first, with the baseline first."""
    first = np.array([[_SIGN[v] for v in pair] for pair in pairs])
    pulled = first.sum(1)  # above 0: the first place got more than half of the question
    winner = first * [1, -1]  # 1: the model
    shares = np.array([(winner == w).mean(0) for w in (1, 0, -1)])
    chance, agree = float(shares.prod(1).sum()), float((winner[:, 0] == winner[:, 1]).mean())
    spread = math.sqrt(chance * (1 - chance) / len(pairs))
    return Bias(
        first_place=50 + 50 * float(first.mean()),
        p_value=sign_test(int((pulled > 0).sum()), int((pulled < 0).sum())),
        disagree=100 * (1 - agree),
        disagree_by_chance=100 * (1 - chance),
        agree_z=(agree - chance) / spread if spread else 0.0,
    )


def sign_test(ups: int, downs: int) -> float:
    """The exact two-sided p-value of `ups` and `downs` under equal chances."""
    n, most = ups + downs, max(ups, downs)
    tail = sum(math.comb(n, k) for k in range(most, n + 1))
    return min(1.0, 2 * tail / 2**n)
