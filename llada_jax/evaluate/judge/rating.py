"""The win rate against a baseline by Bradley-Terry, plain and with style controlled.

Bradley-Terry says P(the model wins) = sigma(theta - theta_baseline). For two players its maximum
likelihood has a closed form: sigma of the difference is the model's share of all wins, where a tie
is half a win of both and a strong win is three wins. Both orders of a question count alike, so
the place of an answer cancels from the share as long as every question has both.

Source of the conventions: the public code of Arena-Hard-Auto and the style control of LMArena.
"""

from typing import NamedTuple

import numpy as np

STRONG = 3  # wins that a strong win counts
RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
PENALTY = 0.5  # LMArena's, of the coefficients of style: finite even if style alone decides

# Wins of (A, B).
WINS = {"A>>B": (STRONG, 0), "A>B": (1, 0), "A=B": (0.5, 0.5), "B>A": (0, 1), "B>>A": (0, STRONG)}


class Rate(NamedTuple):
    """A win rate in per cent; standard error and interval are of resampled questions."""

    win_rate: float
    stderr: float | None  # None for one question
    interval: list[float] | None


def tally(pairs: list[tuple[str, str]]) -> np.ndarray:
    """Returns `[n, 2]`: wins of the model and of the baseline in both games of each question.

    A pair has the verdicts of the game in which the model is A and of that in which it is B.
    """
    return np.array([np.add(WINS[first], WINS[second][::-1]) for first, second in pairs], float)


def resamples(n: int, seed: int) -> np.ndarray:
    """Returns `[RESAMPLES, n]`: how often each of n questions is drawn, with replacement."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)


def win_rate(wins: np.ndarray, counts: np.ndarray) -> Rate:
    """The plain win rate of `wins` [n, 2]; `counts` are those of `resamples`."""
    sums = counts @ wins
    return _rate(wins[:, 0].sum() / wins.sum(), sums[:, 0] / sums.sum(1), len(wins))


def controlled(
    wins: np.ndarray, style: np.ndarray, counts: np.ndarray
) -> tuple[Rate, list[float | None]]:
    """The win rate at equal style, and the coefficients of the styles.

    style: `[n, s]`, differences of `style.differences`.

    The model is P(the model wins) = sigma(theta + sum_k b_k x_k / sd(x_k)). The rate is sigma of
    theta: what is expected of answers that do not differ in style. A coefficient is the gain in
    log odds by one standard deviation, None where all differences are the same.

    Arena-Hard also subtracts the mean of each x_k over all models of its table. With one model
    that would take its own mean style out of the control, so we do not.
    """
    spread = style.std(0)
    varies = spread > 1e-12
    x = np.concatenate([np.ones((len(wins), 1)), style[:, varies] / spread[varies]], axis=1)
    (fitted,) = fit(x, wins[None])
    drawn = fit(x, counts[..., None] * wins, fitted)[:, 0]
    coefficients: list[float | None] = [None] * style.shape[1]
    for k, value in zip(np.flatnonzero(varies), fitted[1:], strict=True):
        coefficients[k] = float(value)
    return _rate(sigmoid(fitted[0]), sigmoid(drawn), len(wins)), coefficients


def fit(x: np.ndarray, wins: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """Coefficients `[r, k]` of r logistic regressions on `x` [n, k], by Newton's method.

    wins: `[r, n, 2]`. start: `[k]`.

    It minimises -sum log-likelihood + PENALTY / 2 sum_k b_k^2, where k leaves out the first column
    of `x`, the constant.
    """
    (r, n, _), k = wins.shape, x.shape[1]
    won, weight, total = wins[..., 0], wins.sum(2), wins.sum((1, 2))[:, None]
    ridge = np.where(np.arange(k) > 0, PENALTY / total, 1e-12)  # [r, k]
    products = (x[:, :, None] * x[:, None]).reshape(n, k * k)

    def loss(b):  # [r]
        eta = b @ x.T
        nll = won * np.logaddexp(0, -eta) + (weight - won) * np.logaddexp(0, eta)
        return nll.sum(1) / total[:, 0] + (ridge * b**2).sum(1) / 2

    b = np.tile(np.zeros(k) if start is None else start, (r, 1))
    for _ in range(100):
        p = sigmoid(b @ x.T)
        slope = (weight * p - won) @ x / total + ridge * b
        bend = ((weight * p * (1 - p)) @ products / total).reshape(r, k, k)
        bend += ridge[:, None] * np.eye(k)
        step = np.linalg.solve(bend, slope[..., None])[..., 0]
        gain = (slope * step).sum(1)
        size = (gain > 1e-13).astype(float)  # twice what is left to gain, near rounding
        if not size.any():
            break
        before = loss(b)
        for _ in range(20):
            worse = loss(b - size[:, None] * step) > before - 1e-4 * size * gain
            if not worse.any():
                break
            size[worse] /= 2
        b = b - size[:, None] * step
    return b


def sigmoid(x):
    """1 / (1 + exp(-x)) of numbers or arrays, without overflow."""
    return (1 + np.tanh(np.asarray(x) / 2)) / 2


def _rate(value, drawn: np.ndarray, n: int) -> Rate:
    if n == 1:  # every resample is the same
        return Rate(100 * float(value), None, None)
    interval = [100 * float(x) for x in np.percentile(drawn, INTERVAL)]
    return Rate(100 * float(value), 100 * float(np.std(drawn, ddof=1)), interval)
