"""Tables of the results of `measure`: as a dict, as text, and as files."""

import csv
import io
import json
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath

from llada_jax.files import write_whole
from llada_jax.variance import decomposition
from llada_jax.variance import statistics as statistics_lib
from llada_jax.variance.plots import plot
from llada_jax.variance.problem import Estimator

# The cost of one draw in forward passes: one of the policy and one of the reference. The backward
# pass of the policy costs two more.
COST_OF_VALUE = 2
COST_OF_GRADIENT = 4


def tabulate(
    found: Sequence[dict],
    estimators: Sequence[Estimator],
    *,
    parts: Sequence[str],
    beta: float,
    flops: float,
) -> dict:
    """The results of all batches as one dict of plain numbers, the contents of table.json.

    `found` has one dict for each batch: arrays under "truth", "nested" and the estimator names.
    `flops` is the cost of one forward pass of a pair. Confidence intervals (2.5 %, 97.5 %)
    resample pairs or, for gradients, batches.
    """
    kept = [batch["truth"]["is_pair"] for batch in found]
    truths = [batch["truth"]["elbos"].mean(0) for batch in found]
    truth = _by_pair(truths, kept)
    statistics, gradients = {}, {}
    for e in estimators:
        elbos = _by_pair([batch[e.name]["elbos"] for batch in found], kept)
        statistics[e.name] = statistics_lib.pair_statistics(elbos, truth, beta)
        if parts:
            gradients[e.name] = {
                key: np.stack([batch[e.name][key] for batch in found])
                for key in found[0][e.name]
                if key != "elbos" and all(key in batch[e.name] for batch in found)
            }
    columns = {}
    for e in estimators:
        baseline = _vrpo(estimators, e.scheme.n)
        columns[e.name] = {
            "n_t": e.scheme.n_t,
            "n_yt": e.scheme.n_yt,
            "biased": e.scheme.biased,
            "model calls": e.scheme.n,
            "FLOPs a pair": e.scheme.n * flops * (COST_OF_GRADIENT if parts else COST_OF_VALUE),
            **_of_scores(e, baseline, statistics, truth.shape[-2]),
        }
        for k, part in enumerate(parts):
            columns[e.name] |= _of_gradients(e, baseline, found, gradients, k, part)
            if "score trace" in gradients[e.name]:  # one pair a batch
                score_variance = statistics[e.name]["score variance"]
                columns[e.name] |= _of_one_pair(gradients[e.name], found, score_variance, k, part)
    return {
        "columns": columns,
        "decomposition": _decomposition(found, kept, estimators, columns, parts, beta),
    }


def _by_pair(elbos: Sequence[np.ndarray], kept: Sequence[np.ndarray]) -> np.ndarray:
    """The ELBOs [..., r, s] of each batch as those [..., q, 2] of the pairs of all batches."""
    pairs = [
        x.reshape(*x.shape[:-1], -1, 2)[..., is_pair, :]
        for x, is_pair in zip(elbos, kept, strict=True)
    ]
    return np.concatenate(pairs, axis=-2)


def _of_scores(e: Estimator, baseline: Estimator | None, statistics: dict, pairs: int) -> dict:
    """Variance and bias of ELBO, score and loss, and the bounds of Theorem 1."""
    mine = statistics[e.name]
    names = ("score variance", "score bias", "loss variance", "loss bias", "policy ELBO variance")
    column = {name: _interval(_mean_of(mine[name]), pairs) for name in names}
    product = mine["policy ELBO variance"] * mine["reference ELBO variance"]
    column |= {
        "correlation": float(mine["covariance"].sum() / max(np.sqrt(product).sum(), 1e-30)),
        "score variance by Eq. 9": float(mine["Eq. 9"].mean()),
        "Theorem 1: loss error": float(mine["loss error"].mean()),
        "Theorem 1: its bound": float(np.sqrt(mine["score variance"]).mean()),
        "Theorem 1: bound of loss variance": float(4 * mine["score variance"].mean()),
    }
    if baseline is None:
        return column
    # Variance x cost, divided by that of VRPO. If VRPO was measured at another n only, this takes
    # its variance as proportional to 1 / n.
    cost = e.scheme.n / baseline.scheme.n
    for name in ("score variance", "policy ELBO variance"):
        other = statistics[baseline.name][name]
        # If the policy equals its reference, the variances are rounding errors.
        if other.mean() > 1e-9:
            ratio = _ratio_of(mine[name], other, cost)
            column[f"{name} x cost / VRPO"] = _interval(ratio, pairs)
    return column


def _of_gradients(
    e: Estimator, baseline: Estimator | None, found, gradients: dict, k: int, part: str
) -> dict:
    """Variance, bias and error of the gradient of one part of the parameters."""
    mine = gradients[e.name]
    traces, repeats = mine["trace"][:, k], len(found[0][e.name]["elbos"])
    # |mean error|^2 also contains the variance of the mean of the repeats, and that of the truth.
    # Subtract both.
    noise = np.stack([batch["truth"]["variance"][k] for batch in found]) + traces / repeats
    column = {
        f"gradient variance: {part}": _interval(_mean_of(traces), len(found)),
        f"gradient bias^2: {part}": _interval(
            _mean_of(mine["mean_error"][:, k] - noise), len(found)
        ),
        f"gradient error: {part}": float(mine["error"][..., k].mean()),
    }
    if baseline is not None:
        other = gradients[baseline.name]["trace"][:, k]
        ratio = _ratio_of(traces, other, e.scheme.n / baseline.scheme.n)
        column[f"gradient variance: {part} x cost / VRPO"] = _interval(ratio, len(found))
    return column


def _of_one_pair(gradients: dict, found, score_variance: np.ndarray, k: int, part: str) -> dict:
    """Theorem 4 and the gain of a budget by pair, for batches of one pair.

    C is the largest norm of the gradient of the pair's score, over the repeats and the truth.
    """
    true = np.sqrt([batch["truth"]["score norm"][k] for batch in found])
    largest = np.maximum(gradients["score gradient"][..., k].max(1), true)
    error, trace = statistics_lib.theorem_4(
        score_variance, np.maximum(gradients["score trace"][:, k], 0), largest
    )
    return {
        f"Theorem 4: C: {part}": float(largest.mean()),
        f"Theorem 4: bound of gradient error: {part}": float(error.mean()),
        f"Theorem 4: bound of gradient variance: {part}": float(trace.mean()),
        f"budget by pair / equal: {part}": _interval(
            statistics_lib.neyman(gradients["trace"][:, k]), len(found)
        ),
    }


def _vrpo(estimators: Sequence[Estimator], n: int) -> Estimator | None:
    """The published estimator at n draws if it was measured there, else at the largest n measured.

    It has n_t = n iid times, exact masks, plain weights and shared noise. None if it was not
    measured at all.
    """
    plain = [e for e in estimators if e.share_noise and e.scheme == type(e.scheme)(e.scheme.n_t)]
    return max(plain, key=lambda e: (e.scheme.n == n, e.scheme.n), default=None)


def _mean_of(values: np.ndarray) -> Callable:
    return lambda chosen: values[chosen].mean()


def _ratio_of(values: np.ndarray, others: np.ndarray, cost: float) -> Callable:
    return lambda chosen: cost * values[chosen].mean() / others[chosen].mean()


def _interval(statistic: Callable, count: int) -> list[float]:
    """[value, low, high], the 95 % bootstrap interval."""
    return list(statistics_lib.bootstrap(statistic, count))


def _decomposition(found, kept, estimators, columns, parts, beta: float) -> dict:
    """V_t and V_yt of the policy's ELBO, of the score and of the gradient.

    For each, the result also has the variances that Lemma 5 predicts, and the measured ones.
    """

    def by_pair(values, is_pair):
        return values.reshape(*values.shape[:-2], -1, 2)[..., is_pair.ravel(), :]

    both = [(batch["nested"]["terms"], pairs) for batch, pairs in zip(found, kept, strict=True)]
    policy = np.concatenate([by_pair(t[:, :, 0], p) for t, p in both], axis=-2)  # [t, y, q, 2]
    ratio = np.concatenate([by_pair(t[:, :, 0] - t[:, :, 1], p) for t, p in both], axis=-2)
    shares = np.concatenate(
        [by_pair(b["nested"]["shares"], p) for b, p in zip(found, kept, strict=True)], axis=-2
    )

    out, times = {}, "best independent times / iid"
    for name, terms, factor in (("policy ELBO", policy, 1.0), ("score", ratio, 2 * beta**2)):
        split = decomposition.decompose(jnp.asarray(terms))
        # Winner and loser draw independently. So the score's variance is beta^2 times the sum of
        # the two variances, or 2 beta^2 times their mean.
        v_t, v_yt = (factor * np.asarray(v).mean(-1) for v in (split.v_t, split.v_yt))
        out[name] = {
            "V_t": _interval(_mean_of(v_t), len(v_t)),
            "V_yt": _interval(_mean_of(v_yt), len(v_yt)),
        }
        if (v_t + v_yt).mean() > 1e-9:
            out[name][times] = _interval(
                statistics_lib.best_times(terms**2, shares, (v_t + v_yt) / factor), len(v_t)
            )
    for k, part in enumerate(parts):
        v_t, v_yt = (
            np.stack([batch["nested"][name][k] for batch in found]) for name in ("v_t", "v_yt")
        )
        out[f"gradient: {part}"] = {
            "V_t": _interval(_mean_of(v_t), len(v_t)),
            "V_yt": _interval(_mean_of(v_yt), len(v_yt)),
        }
        # Batches of one pair: each squared norm belongs to one time.
        if all("squares" in batch["nested"] for batch in found):
            squares = np.stack([batch["nested"]["squares"][..., k] for batch in found], axis=2)
            out[f"gradient: {part}"][times] = _interval(
                statistics_lib.best_times(squares, shares, (v_t + v_yt) / 2), len(v_t)
            )
    for name, values in out.items():
        measured = {"policy ELBO": "policy ELBO variance", "score": "score variance"}.get(
            name, name.replace("gradient:", "gradient variance:")
        )
        values["predicted, measured"] = {
            e.name: [
                decomposition.predicted_variance(
                    values["V_t"][0], values["V_yt"][0], e.scheme.n_t, e.scheme.n_yt
                ),
                columns[e.name][measured][0],
            ]
            for e in estimators
            if e.share_noise and e.scheme == type(e.scheme)(e.scheme.n_t, e.scheme.n_yt)
        }
    bins = np.minimum((shares.ravel() * 10 - 1e-6).astype(int), 9)
    # Subtract from each term its mean over the nested draws. The spread within a response remains.
    centred = (ratio - ratio.mean((0, 1))).ravel()
    out["by masked share"] = [
        {
            "l / L": (b + 0.5) / 10,
            "count": int((bins == b).sum()),
            "mean": float(centred[bins == b].mean()),
            "variance": float(centred[bins == b].var()),
        }
        for b in np.unique(bins).tolist()
    ]
    return out


def as_text(table: dict) -> str:
    """The table as text, one row for each estimator; +- is half the width of the 95 % interval."""
    columns = table["columns"]
    first = next(iter(columns.values()))
    shown = [k for k in first if isinstance(first[k], list) and not k.startswith("gradient bias")]
    short = {
        k: k.replace("variance", "Var")
        .replace("gradient Var:", "Var grad")
        .replace("all parameters", "all")
        for k in shown
    }
    width = max(map(len, columns)) + 2
    cells = {k: max(18, len(short[k])) for k in shown}
    lines = [
        f"{'estimator':<{width}}{'n':>3}{'FLOPs':>10}"
        + "".join(f"  {short[k]:>{cells[k]}}" for k in shown)
    ]
    for name, column in columns.items():
        row = "".join(f"  {_cell(column[k]) if k in column else '':>{cells[k]}}" for k in shown)
        cost = f"{column['model calls']:>3}{column['FLOPs a pair']:>10.3g}"
        lines.append(f"{name:<{width}}{cost}{row}{'  biased' if column['biased'] else ''}")
    for name, values in table["decomposition"].items():
        if isinstance(values, dict):
            shown = [k for k, v in values.items() if isinstance(v, list)]
            lines.append(f"{name}: " + ", ".join(f"{k} {_cell(values[k])}" for k in shown))
            for column, (predicted, measured) in values["predicted, measured"].items():
                lines.append(
                    f"    {column:<{width}} predicted {predicted:.3g}, measured {measured:.3g}"
                )
    return "\n".join(lines)


def _cell(value: list[float]) -> str:
    return f"{value[0]:.3g} +- {(value[2] - value[1]) / 2:.2g}"


def write(table: dict, out: epath.Path, *, plots: bool = True) -> None:
    """Writes table.json and table.csv to `out`, and with `plots` also the pictures of `plot`."""
    write_whole(out / "table.json", json.dumps(table, indent=1) + "\n")
    text = io.StringIO()
    names = list(dict.fromkeys(k for column in table["columns"].values() for k in column))
    writer = csv.writer(text)
    writer.writerow(["estimator", *(x for k in names for x in _headings(k))])
    for name, column in table["columns"].items():
        writer.writerow([name, *(x for k in names for x in _cells(k, column.get(k, "")))])
    write_whole(out / "table.csv", text.getvalue())
    if plots:
        plot(table, out)


# Columns without an interval.
_PLAIN = ("n_t", "n_yt", "biased", "model calls", "FLOPs a pair", "correlation")


def _headings(name: str) -> list[str]:
    return [name] if name in _PLAIN else [name, "low", "high"]


def _cells(name: str, value) -> list:
    """A value, or a value with its interval, as wide as the headings of its column."""
    if isinstance(value, list):
        return value
    return [value] if name in _PLAIN else [value, "", ""]
