"""The pictures of a study: how training goes on, and how the choice depends on what is tuned."""

import io
import math
from collections.abc import Sequence
from typing import Any

from llada_jax.study.definition import Study
from llada_jax.study.summary import Estimate, Row, estimate


def draw(study: Study, runs: list[Row]) -> bytes | None:
    """Returns a PNG of the final runs in `summary.curves`; None if there are none.

    Each arm is a line through its means over the seeds. Its band is one standard error over the
    seeds to both sides. The last step has a marker, with the errors of both metrics. Raises
    ImportError if there is no matplotlib.
    """
    y, x = study.y or next(iter(study.metrics)), study.x
    lines = {arm: found for arm in study.arms if (found := _line(study, runs, arm, x, y))}
    if not lines:
        return None
    plot, panel = _panel()
    for k, (arm, points) in enumerate(lines.items()):
        color, dashes = _look(k)
        across, up = zip(*points, strict=True)
        xs, ys = [e.mean for e in across], [e.mean for e in up]
        low, high = ([e.mean + sign * _width(e) for e in up] for sign in (-1, 1))
        # A polygon, since the line may turn back.
        panel.fill(xs + xs[::-1], low + high[::-1], color=color, alpha=0.15, lw=0)
        panel.plot(xs, ys, color=color, ls=dashes, lw=1.6)
        errors = {"xerr": _width(across[-1]), "yerr": _width(up[-1])}
        style = {"color": color, "marker": "o", "ms": 5, "capsize": 2}
        panel.errorbar(xs[-1], ys[-1], **errors, **style, label=study.label(arm))
    starts = [points[0] for points in lines.values()]
    if x and study.before and len({(a.mean, b.mean) for a, b in starts}) == 1:
        (start, up) = starts[0]
        panel.plot(start.mean, up.mean, "k*", ms=10, label=study.label(study.before), zorder=3)
    panel.set_xlabel(_named(study, x) if x else "step")
    panel.set_ylabel(_named(study, y))
    return _png(plot, panel)


def draw_grid(study: Study, grids: dict[str, Sequence[Sequence[float]]]) -> bytes | None:
    """Returns a PNG of the metric that chooses against the key that grid points change.

    grids: the metric at each grid point of an arm, one value a seed; nan: the run failed, and its
        point is left out.

    Returns None if the points change several keys, or one that is no number. Raises ImportError if
    there is no matplotlib.
    """
    points = [point for arm in grids for point in study.grid(arm)]
    keys = {key for point in points for key in point}
    if len(keys) != 1 or any(type(point.get(*keys)) not in (int, float) for point in points):
        return None
    (key,) = keys
    plot, panel = _panel()
    for k, (arm, values) in enumerate(grids.items()):
        color, dashes = _look(k)
        found = [
            (point[key], estimate(dict(enumerate(of_seeds))))
            for point, of_seeds in zip(study.grid(arm), values, strict=True)
            if all(map(math.isfinite, of_seeds))
        ]
        if found:
            xs, ys = zip(*sorted(found, key=lambda at: at[0]), strict=True)
            errors = [_width(e) for e in ys]
            style = {"color": color, "ls": dashes, "marker": "o", "ms": 5, "capsize": 2}
            panel.errorbar(xs, [e.mean for e in ys], errors, **style, label=study.label(arm))
    if all(point[key] > 0 for point in points):
        panel.set_xscale("log")
    panel.set_xlabel(key)
    panel.set_ylabel(_named(study, study.tune.metric))
    return _png(plot, panel)


def _panel() -> tuple[Any, Any]:
    try:
        from matplotlib import figure  # noqa: PLC0415 (only pictures need matplotlib)
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'llada_jax[plot]'") from None
    # A page shows it 800 pixels wide: a point of text is then a pixel and a half.
    plot = figure.Figure(figsize=(7.4, 4.6), layout="constrained")
    return plot, plot.subplots()


def _png(plot: Any, panel: Any) -> bytes:
    panel.grid(alpha=0.3)
    plot.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    content = io.BytesIO()
    plot.savefig(content, dpi=160, format="png")
    return content.getvalue()


def _look(k: int) -> tuple[str, str]:
    return f"C{k % 10}", ("-", "--", ":")[k // 10 % 3]


def _named(study: Study, metric: str) -> str:
    name = study.name_of(metric)
    return metric if name.endswith(metric) else f"{metric} ({name})"


def _width(e: Estimate) -> float:
    return 0.0 if math.isnan(e.stderr) else e.stderr


def _line(study, runs, arm, x, y) -> list[tuple[Estimate, Estimate]]:
    """(x, y) of an arm at each step that all its finished seeds have evaluated."""
    own = [r["evaluations"] for r in runs if r["arm"] == arm and r["point"] is None]
    by_step = [
        {at["step"]: {m: _value(at, study.metrics[m]) for m in (x, y) if m} for at in of_run}
        for of_run in own
        if of_run
    ]
    steps = sorted(set.intersection(*map(set, by_step))) if by_step else []
    found = []
    for step in steps:
        across = estimate({k: of[step][x] if x else float(step) for k, of in enumerate(by_step)})
        up = estimate({k: of[step][y] for k, of in enumerate(by_step)})
        if across.count and up.count:
            found.append((across, up))
    return found


def _value(evaluation: Row, name: str) -> float:
    return math.nan if evaluation[name] is None else float(evaluation[name])
