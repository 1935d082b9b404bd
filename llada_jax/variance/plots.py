"""Plots of the table of the laboratory."""

import io

import numpy as np
from etils import epath

from llada_jax.files import write_whole


def plot(table: dict, out: epath.Path) -> None:
    """Writes variance.png, bias.png and terms.png to `out`."""
    from matplotlib import pyplot, ticker  # noqa: PLC0415  # only plots need matplotlib

    columns = table["columns"]
    panels = [
        k
        for k, v in next(iter(columns.values())).items()
        if "variance" in k and isinstance(v, list)
    ]
    panels = [k for k in panels if "VRPO" not in k]

    def save(figure, name):
        content = io.BytesIO()
        figure.savefig(content, dpi=90, format="png")
        write_whole(out / name, content.getvalue())
        pyplot.close(figure)

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2.6 * len(panels), 4), layout="constrained"
    )
    lines = {}
    for name, column in columns.items():  # one line for all n_t of the same other settings
        label = (
            ",".join(p for p in name.split(",") if not p.startswith("n_t="))
            if "=" in name
            else name
        )
        label = "VRPO" if label in ("", "1 x 1", "4 x 1", "8 x 1") else label
        lines.setdefault(label, []).append(column)
    colors = pyplot.get_cmap("turbo")(np.linspace(0.05, 0.95, len(lines)))
    for ax, panel in zip(np.atleast_1d(axes), panels, strict=True):
        for k, (label, members) in enumerate(lines.items()):
            in_order = sorted(members, key=lambda c: c["model calls"])
            calls = [c["model calls"] for c in in_order]
            values, low, high = np.array([c[panel] for c in in_order]).T
            style = {
                "color": colors[k],
                "marker": "osvD^"[k % 5],
                "ms": 3,
                "capsize": 2,
                "lw": 1,
                "label": label,
            }
            # Shift the markers of different lines, which may have the same n.
            shifted = np.array(calls) * 2 ** (0.02 * (k - len(lines) / 2))
            ax.errorbar(shifted, values, [values - low, high - values], **style)
        title = panel.replace(": ", "\n").replace("/kernel", "")
        ax.set(xscale="log", yscale="log", xlabel="model calls n", title=title)
        ax.set_xticks(sorted({c["model calls"] for c in columns.values()}), minor=False)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.tick_params(axis="y", which="both", labelsize=6)
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", fontsize=6, ncols=3)
    save(figure, "variance.png")

    figure, ax = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    for name, column in columns.items():
        ax.scatter(column["score variance"][0], abs(column["loss bias"][0]), s=14, label=name)
    ax.set(xscale="log", yscale="log", xlabel="variance of the score", ylabel="|bias of the loss|")
    ax.legend(fontsize=5)
    save(figure, "bias.png")

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    bins = table["decomposition"]["by masked share"]
    left.plot(
        [b["l / L"] for b in bins],
        [b["variance"] for b in bins],
        marker="o",
        ms=3,
        label="variance",
    )
    left.plot([b["l / L"] for b in bins], [b["mean"] for b in bins], marker="o", ms=3, label="mean")
    left.set(
        xlabel="share masked, l / L", yscale="symlog", title="terms, policy - reference, centred"
    )
    left.legend(fontsize=7)
    splits = {
        k: v
        for k, v in table["decomposition"].items()
        if isinstance(v, dict) and v["V_t"][0] + v["V_yt"][0]
    }
    for k, which in enumerate(("V_t", "V_yt")):
        share = [v[which][0] / (v["V_t"][0] + v["V_yt"][0]) for v in splits.values()]
        right.bar(np.arange(len(splits)) + 0.4 * k, share, 0.4, label=which)
    right.set_xticks(
        np.arange(len(splits)) + 0.2, [s.replace(": ", ":\n") for s in splits], fontsize=5
    )
    right.set(title="share of one term's variance")
    right.legend(fontsize=7)
    save(figure, "terms.png")
