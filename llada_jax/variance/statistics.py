"""Statistics of repeats, in numpy, and their bootstrap intervals.

Arrays of ELBOs end in [2 (policy, reference), q pairs, 2 (winner, loser)]. Statistics have one
number for each pair, or are a function of the chosen pairs, for `bootstrap`.
"""

from collections.abc import Callable

import numpy as np


def scores_of(elbos: np.ndarray, beta: float) -> np.ndarray:
    """Scores [..., q] from ELBOs [..., 2, q, 2] (equation 8)."""
    ratio = elbos[..., 0, :, :] - elbos[..., 1, :, :]
    return beta * (ratio[..., 0] - ratio[..., 1])


def loss_of(scores: np.ndarray) -> np.ndarray:
    """-log sigmoid(scores)."""
    return np.logaddexp(0, -scores)


def pair_statistics(elbos: np.ndarray, truth: np.ndarray, beta: float) -> dict[str, np.ndarray]:
    """Variances, biases and the terms of Eq. 9 for every pair, [q] each.

    `elbos` [k, 2, q, 2] are k repeats, `truth` [2, q, 2] the true ELBOs.
    """
    scores, true_scores = scores_of(elbos, beta), scores_of(truth, beta)
    loss, true_loss = loss_of(scores), loss_of(true_scores)
    each = elbos.var(0, ddof=1)  # [2, q, 2]
    centred = elbos - elbos.mean(0)
    covariance = (centred[:, 0] * centred[:, 1]).sum(0) / (len(elbos) - 1)
    return {
        "score variance": scores.var(0, ddof=1),
        "score bias": scores.mean(0) - true_scores,
        "loss variance": loss.var(0, ddof=1),
        "loss bias": loss.mean(0) - true_loss,
        "loss error": np.abs(loss - true_loss).mean(0),  # Theorem 1, left-hand side
        "policy ELBO variance": each[0].mean(-1),
        "reference ELBO variance": each[1].mean(-1),
        "covariance": covariance.mean(-1),
        "Eq. 9": beta**2 * (each[0] + each[1] - 2 * covariance).sum(-1),
    }


def theorem_4(
    score_variance: np.ndarray, trace: np.ndarray, largest: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of Theorem 4 for the gradient of one pair's loss: (mean error, tr Var).

    `score_variance` is Var s_hat, `trace` is tr Var grad s_hat, and C = `largest` bounds
    |grad s_hat|. sigma is the sigmoid function.

    For the error: the factor of grad s, at most C in norm, differs by
    |sigma(-s_hat) - sigma(-s)| <= |s_hat - s| / 4. The factor of grad s_hat - grad s is at most 1.

    For the variance: tr Var = 1/2 mean over pairs of repeats |sigma_1 g_1 - sigma_2 g_2|^2, and
    each term is at most |g_1 - g_2|^2 + C^2/8 (s_1 - s_2)^2. C must therefore bound the gradient
    norm of every repeat, not only of the true score.
    """
    return (
        largest / 4 * np.sqrt(score_variance) + np.sqrt(trace),
        np.square(largest) / 8 * score_variance + trace,
    )


def best_times(
    squares: np.ndarray, shares: np.ndarray, variances: np.ndarray
) -> Callable[[np.ndarray], float]:
    """The variance under the best density of the times, divided by that under uniform times.

    This is the lowest variance that independent times from any single density could reach.
    Returns a function of the chosen pairs, for `bootstrap`.

    `squares` [t, y, q, 2 (winner, loser)] are squared terms, or squared norms, at uniform times.
    `shares` are their masked shares l / L, of the same shape. `variances` [q] are the variances of
    the terms, averaged over winner and loser.

    The weight of a draw is 1 / density. The second moment E[square / density] is lowest if the
    density is proportional to sqrt(E[square | l]). It is then (E_l sqrt(E[square | l]))^2.

    One density serves all pairs. It is constant on each of 20 equal parts of sqrt(l / L). The
    parts are narrow at small l, where the square changes most: it is about proportional to 1 / l.
    If it is exactly 1 / l, the second moment comes out 0.5 % too high at L = 1000. With few draws
    in a part it comes out too low.
    """
    part = np.minimum(np.sqrt(shares) * 20 - 1e-6, 19).astype(int)[..., None] == np.arange(20)
    counts, sums = part.sum((0, 1, 3)), (part * squares[..., None]).sum((0, 1, 3))  # [q, 20]

    def ratio(chosen):
        count, total = counts[chosen].sum(0), sums[chosen].sum(0)
        uniform, best = (
            total.sum() / count.sum(),
            np.square(np.sqrt(count * total).sum() / count.sum()),
        )
        variance = variances[chosen].mean()
        return (best - (uniform - variance)) / variance

    return ratio


def neyman(variances: np.ndarray) -> Callable[[np.ndarray], float]:
    """The variance of a batch mean under Neyman allocation, divided by that under equal allocation.

    Neyman allocation gives each pair model calls in proportion to its standard deviation, the
    square root of `variances` [q]. Returns a function of the chosen pairs, for `bootstrap`.

    A lower bound: calls must be whole numbers, and noisy variance estimates make it look better
    than it is. With k repeats it comes out too low by 1 / (2 k - 2) for one normal parameter, and
    by less for many.
    """
    variances = np.maximum(variances, 0)
    return lambda chosen: np.square(np.sqrt(variances[chosen]).mean()) / variances[chosen].mean()


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, seed: int = 0, draws: int = 1000
):
    """(value, 2.5 % quantile, 97.5 % quantile) of a statistic, by the bootstrap.

    `statistic(indices)` takes indices of pairs or batches: 0..count-1 for the value, and `draws`
    resamples of them with replacement for the quantiles.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(draws)]
    return float(statistic(np.arange(count))), *(
        float(q) for q in np.quantile(values, (0.025, 0.975))
    )
