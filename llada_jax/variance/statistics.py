"""Statistics of repeats, in numpy; every function returns one number a pair, to average and to bootstrap."""

from collections.abc import Callable

import numpy as np


def scores_of(elbos: np.ndarray, beta: float) -> np.ndarray:
    """ELBOs [..., 2 (policy, reference), q, 2 (winner, loser)] to scores [..., q] (equation 8)."""
    ratio = elbos[..., 0, :, :] - elbos[..., 1, :, :]
    return beta * (ratio[..., 0] - ratio[..., 1])


def loss_of(scores: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -scores)


def pair_statistics(elbos: np.ndarray, truth: np.ndarray, beta: float) -> dict[str, np.ndarray]:
    """Of repeats [k, 2, q, 2] and true ELBOs [2, q, 2]: variances, biases and the terms of Eq. 9, [q] each."""
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
    """Bounds of the mean error and of tr Var of the gradient of one pair's loss, `trace` being tr Var grad s_hat.

    C = `largest` bounds |grad s_hat|. The error: |sigma(-s_hat) - sigma(-s)| <= |s_hat - s| / 4 times |grad s| <= C,
    and sigma <= 1 times |grad s_hat - grad s|. The variance: it is half the mean over pairs of repeats of
    |sigma_1 g_1 - sigma_2 g_2|^2, each at most |g_1 - g_2|^2 + C^2 / 8 (s_1 - s_2)^2, so that the bound holds for the
    sample variances of repeats whose own largest norm is C, and not for a C that bounds the true |grad s| alone.
    """
    return (
        largest / 4 * np.sqrt(score_variance) + np.sqrt(trace),
        np.square(largest) / 8 * score_variance + trace,
    )


def best_times(
    squares: np.ndarray, shares: np.ndarray, variances: np.ndarray
) -> Callable[[np.ndarray], float]:
    """The least variance of independent times of any one density over that of uniform times, a statistic of pairs.

    From squared (norms of) terms and masked shares l / L [t, y, q, 2 (winner, loser)] at uniform times, and the terms'
    variances [q], mean of the two. A draw counts 1 / density: the second moment E[square / density] is least at a
    density that goes as sqrt(E[square | l]), where it is (E_l sqrt(E[square | l]))^2. The density is alike for all
    pairs and constant on each of 20 even parts of sqrt(l / L), narrow where the square, about as 1 / l, changes most:
    for exactly 1 / l the second moment comes out 0.5 % too high at L = 1000. Few draws in a part let it come out too
    low.
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
    """The variance of a mean over pairs whose calls go as the roots of their `variances` [q], over an equal share each.

    A statistic of pairs, and a limit: calls are whole numbers, and variances estimated from k repeats differ more than
    the true ones, which lets it come out too low (by 1 / (2 k - 2) for one normal parameter, by less for many).
    """
    variances = np.maximum(variances, 0)
    return lambda chosen: np.square(np.sqrt(variances[chosen]).mean()) / variances[chosen].mean()


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, seed: int = 0, draws: int = 1000
):
    """(value, 2.5 % and 97.5 % quantiles) of `statistic(indices)` over resampled 0..count-1 (pairs or batches)."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(draws)]
    return float(statistic(np.arange(count))), *(
        float(q) for q in np.quantile(values, (0.025, 0.975))
    )
