"""Plots of the table of the laboratory."""

import io

import numpy as np
from etils import epath

from llada_jax.files import write_whole


def plot(table: dict, out: epath.Path) -> None:
    """Writes variance.png, bias.png and terms.png to `out`."""
    from matplotlib import pyplot  # noqa: PLC0415  # only plots need matplotlib

    for name, draw in (("variance", _variance), ("bias", _bias), ("terms", _terms)):
        figure = draw(pyplot, table)
        content = io.BytesIO()
        figure.savefig(content, dpi=90, format="png")
        write_whole(out / f"{name}.png", content.getvalue())
        pyplot.close(figure)


def _variance(pyplot, table: dict):
    """Each variance against the model calls, one line for the settings that differ in n_t only."""
    columns = table["columns"]
    first = next(iter(columns.values()))
    panels = [
        k for k, v in first.items() if "variance" in k and "VRPO" not in k and isinstance(v, list)
    ]
    size = (2.6 * len(panels), 4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained")
    lines: dict[str, list] = {}
    for name, column in columns.items():
        lines.setdefault(_label(name), []).append(column)
    colors = pyplot.get_cmap("turbo")(np.linspace(0.05, 0.95, len(lines)))
    for ax, panel in zip(np.atleast_1d(axes), panels, strict=True):
        for k, (label, members) in enumerate(lines.items()):
            in_order = sorted(members, key=lambda c: c["model calls"])
            calls = np.array([c["model calls"] for c in in_order])
            values, low, high = np.array([c[panel] for c in in_order]).T
            style = {"color": colors[k], "marker": "osvD^"[k % 5], "label": label}
            # Shift the markers of different lines, which may have the same n.
            shifted = calls * 2 ** (0.02 * (k - len(lines) / 2))
            errors = [values - low, high - values]
            ax.errorbar(shifted, values, errors, ms=3, capsize=2, lw=1, **style)
        title = panel.replace(": ", "\n").replace("/kernel", "")
        ax.set(xscale="log", yscale="log", xlabel="model calls n", title=title)
        ax.set_xticks(sorted({c["model calls"] for c in columns.values()}), minor=False)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.xaxis.set_minor_formatter("")
        ax.tick_params(axis="x", which="minor", length=0)
        ax.tick_params(axis="y", which="both", labelsize=6)
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", fontsize=6, ncols=3)
    return figure


def _label(name: str) -> str:
    """The settings of an estimator without n_t; the published one by its name."""
    if "=" in name:
        name = ",".join(p for p in name.split(",") if not p.startswith("n_t="))
    return "VRPO" if name in ("", "1 x 1", "4 x 1", "8 x 1") else name


def _bias(pyplot, table: dict):
    """The bias of the loss against the variance of the score."""
    figure, ax = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
    for name, column in table["columns"].items():
        ax.scatter(column["score variance"][0], abs(column["loss bias"][0]), s=14, label=name)
    ax.set(xscale="log", yscale="log", xlabel="variance of the score", ylabel="|bias of the loss|")
    ax.legend(fontsize=5)
    return figure


def _terms(pyplot, table: dict):
    """The terms by masked share, and the shares of V_t and V_yt."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    bins = table["decomposition"]["by masked share"]
    for name in ("variance", "mean"):
        shares = [b["l / L"] for b in bins]
        left.plot(shares, [b[name] for b in bins], marker="o", ms=3, label=name)
    title = "terms, policy - reference, centred"
    left.set(xlabel="share masked, l / L", yscale="symlog", title=title)
    left.legend(fontsize=7)
    splits = {
        k: v
        for k, v in table["decomposition"].items()
        if isinstance(v, dict) and v["V_t"][0] + v["V_yt"][0]
    }
    for k, which in enumerate(("V_t", "V_yt")):
        share = [v[which][0] / (v["V_t"][0] + v["V_yt"][0]) for v in splits.values()]
        right.bar(np.arange(len(splits)) + 0.4 * k, share, 0.4, label=which)
    names = [name.replace(": ", ":\n") for name in splits]
    right.set_xticks(np.arange(len(splits)) + 0.2, names, fontsize=5)
    right.set(title="share of one term's variance")
    right.legend(fontsize=7)
    return figure
