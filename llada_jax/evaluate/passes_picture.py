"""The picture of accuracy against tokens per forward pass."""

import io

import numpy as np


def draw(curves: dict[tuple[str, str], list[dict]], areas: dict[tuple[str, str], float]) -> bytes:
    """Returns a PNG: one panel for each cache, one curve for each rule, named at its end.

    curves: the points of each (cache, rule) in the order of their tokens per pass, with
        `tokens_per_pass`, `accuracy` and `accuracy_stderr`. areas: the number beside each name.
    Raises ImportError if there is no matplotlib.
    """
    try:
        from matplotlib import colormaps, figure  # noqa: PLC0415 (only pictures need matplotlib)
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'llada_jax[plot]'") from None
    caches = list(dict.fromkeys(cache for cache, _ in curves))
    rules = list(dict.fromkeys(rule for _, rule in curves))
    colors = colormaps["tab10"].colors
    color = {rule: colors[k % len(colors)] for k, rule in enumerate(rules)}
    plot = figure.Figure(figsize=(0.5 + 5.2 * len(caches), 4.6), layout="constrained")
    panels = plot.subplots(1, len(caches), sharey=True, squeeze=False)[0]
    points = [point for curve in curves.values() for point in curve]
    least, most = (f(point["tokens_per_pass"] for point in points) for f in (min, max))
    top = 100 * max(point["accuracy"] for point in points)
    for panel, cache in zip(panels, caches, strict=True):
        ends = {}
        for rule in rules:
            if (cache, rule) not in curves:
                continue
            curve = curves[cache, rule]
            x = [point["tokens_per_pass"] for point in curve]
            y = [100 * point["accuracy"] for point in curve]
            error = [100 * (point["accuracy_stderr"] or 0) for point in curve]
            panel.errorbar(x, y, error, color=color[rule], marker="o", ms=3, lw=1.3, elinewidth=0.6)
            ends[rule] = (x[-1], y[-1])
        places = _apart({rule: y for rule, (_, y) in ends.items()}, 0.052 * 1.08 * top)
        for rule, (x, y) in ends.items():
            panel.annotate(
                f"{rule} {areas[cache, rule]:.0f}",
                (x, y),
                (1.12 * most, places[rule]),
                color=color[rule],
                fontsize=7.5,
                va="center",
                arrowprops={"arrowstyle": "-", "color": color[rule], "lw": 0.5, "alpha": 0.6},
            )
        panel.set(title=f"cache: {cache}", xlabel="tokens per forward pass", xscale="log")
        ticks = [2.0**k for k in range(int(np.ceil(np.log2(least))), int(np.log2(most)) + 1)]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xlim(0.9 * least, 3.2 * most)
        panel.set_ylim(-0.03 * top, 1.08 * top)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy (%)")
    plot.suptitle("Accuracy against parallelism; the number beside a rule is its AUP", fontsize=10)
    content = io.BytesIO()
    plot.savefig(content, dpi=110, format="png")
    return content.getvalue()


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights near the given ones, in the same order, at least `gap` apart and from 0 on."""
    placed: dict[str, float] = {}
    floor = 0.0
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max(height, floor)
        floor = placed[name] + gap
    return placed
