"""The picture of accuracy against tokens per forward pass."""

import io

import numpy as np


def draw(curves: dict[tuple[str, str], list[dict]], areas: dict[tuple[str, str], float]) -> bytes:
    """Returns a PNG: one panel for each cache, one curve for each rule, named at its end.

    If there are more caches than rules, the panels are rules and the curves caches.

    curves: the points of each (cache, rule) in the order of their tokens per pass, with
        `tokens_per_pass`, `accuracy` and `accuracy_stderr`. areas: the number beside each name.
    Raises ImportError if there is no matplotlib.
    """
    try:
        from matplotlib import colormaps, figure  # noqa: PLC0415 (only pictures need matplotlib)
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'llada_jax[plot]'") from None
    names = [list(dict.fromkeys(key[k] for key in curves)) for k in (0, 1)]
    swap = len(names[0]) > len(names[1])
    shown, drawn = names[::-1] if swap else names
    colors = colormaps["tab10"].colors
    color = {name: colors[k % len(colors)] for k, name in enumerate(drawn)}
    plot = figure.Figure(figsize=(0.5 + 5.2 * len(shown), 4.6), layout="constrained")
    panels = plot.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    points = [point for curve in curves.values() for point in curve]
    least, most = (f(point["tokens_per_pass"] for point in points) for f in (min, max))
    top = 100 * max(point["accuracy"] for point in points)
    for panel, title in zip(panels, shown, strict=True):
        keys = {name: (name, title) if swap else (title, name) for name in drawn}
        ends = {}
        for name, key in keys.items():
            if key not in curves:
                continue
            curve = curves[key]
            x = [point["tokens_per_pass"] for point in curve]
            y = [100 * point["accuracy"] for point in curve]
            error = [100 * (point["accuracy_stderr"] or 0) for point in curve]
            panel.errorbar(x, y, error, color=color[name], marker="o", ms=3, lw=1.3, elinewidth=0.6)
            ends[name] = (x[-1], y[-1])
        places = apart({name: y for name, (_, y) in ends.items()}, 0.056 * top, 1.05 * top)
        for name, (x, y) in ends.items():
            panel.annotate(
                f"{name} {areas[keys[name]]:.0f}",
                (x, y),
                (1.12 * most, places[name]),
                color=color[name],
                fontsize=7.5,
                va="center",
                arrowprops={"arrowstyle": "-", "color": color[name], "lw": 0.5, "alpha": 0.6},
            )
        kind = "rule" if swap else "cache"
        panel.set(title=f"{kind}: {title}", xlabel="tokens per forward pass", xscale="log")
        ticks = [2.0**k for k in range(int(np.ceil(np.log2(least))), int(np.log2(most)) + 1)]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xlim(0.9 * least, 3.2 * most)
        panel.set_ylim(-0.03 * top, 1.08 * top)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (%)")
    plot.suptitle("Accuracy against parallelism; the number beside a name is its AUP", fontsize=10)
    content = io.BytesIO()
    plot.savefig(content, dpi=110, format="png")
    return content.getvalue()


def apart(heights: dict[str, float], gap: float, top: float) -> dict[str, float]:
    """Heights near the given ones, in the same order, at least `gap` apart, from 0 to `top`.

    If there are too many for that, the lowest are below 0.
    """
    order = sorted(heights, key=heights.__getitem__)
    placed: dict[str, float] = {}
    floor = 0.0
    for name in order:
        placed[name] = max(heights[name], floor)
        floor = placed[name] + gap
    for name in reversed(order):
        placed[name] = min(placed[name], top)
        top = placed[name] - gap
    return placed
