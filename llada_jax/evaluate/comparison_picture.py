"""The picture of paired differences between two models."""

import io
from typing import Any


def draw(found: dict[str, dict[str, Any]], a: str, b: str) -> bytes:
    """Returns a PNG: the difference of each task with its 95 % interval, and both scores.

    found: what `compare.paired` returns, by task. Raises ImportError if there is no matplotlib.
    """
    try:
        from matplotlib import figure  # noqa: PLC0415 (only pictures need matplotlib)
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'llada_jax[plot]'") from None
    plot = figure.Figure(figsize=(7.2, 1.4 + 0.45 * len(found)), layout="constrained")
    panel = plot.subplots()
    for place, pair in enumerate(reversed(found.values())):
        scale = 100 if pair["share"] else 1
        mean, error = scale * pair["difference"], 1.96 * scale * (pair["stderr"] or 0)
        clear = abs(mean) > error > 0
        color = "tab:gray" if not clear else "tab:green" if mean > 0 else "tab:red"
        panel.errorbar(mean, place, xerr=error, color=color, marker="o", capsize=3, lw=1.8)
        panel.text(
            1.02,
            place,
            f"{scale * pair['mean_a']:.1f} to {scale * pair['mean_b']:.1f}, n = {pair['n']}",
            transform=panel.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
        )
    panel.axvline(0, color="black", lw=0.8)
    panel.set_yticks(range(len(found)), list(reversed(found)))
    panel.set_ylim(-0.6, len(found) - 0.4)
    panel.set_xlabel("difference of the scores in points, with 95 % intervals (paired)")
    panel.set_title(f"A: {_short(a)}    B: {_short(b)}", fontsize=9, loc="left")
    panel.grid(axis="x", alpha=0.3)
    content = io.BytesIO()
    plot.savefig(content, dpi=110, format="png")
    return content.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"...{name[-37:]}"
