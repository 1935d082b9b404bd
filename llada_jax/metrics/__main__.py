r"""Plots one metric of several runs against the step, with its standard error if it is logged.

    python -m llada_jax.metrics --metric=eval/solve/rate --out=curve.png \
        vrpo=runs/vrpo naive=runs/naive

It needs matplotlib: pip install 'llada_jax[plot]'.
"""

import argparse
import io
import json
import math
import sys

from etils import epath

from llada_jax import cli
from llada_jax.files import write_whole
from llada_jax.metrics.writer import lines_until


def read(workdir: epath.PathLike, metric: str) -> tuple[list[int], list[float], list[float]]:
    """Returns (steps, values, standard errors) of a metric in workdir/metrics.jsonl.

    A standard error that was not logged is nan. Raises FileNotFoundError if there is no such file,
    and ValueError if it does not have the metric.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {workdir} is not the workdir of a run")
    found = [
        line
        for line in map(json.loads, lines_until(path, math.inf))
        if line.get(metric) is not None
    ]
    if not found:
        raise ValueError(f"{path} has no {metric!r}: see its lines for the names that it has")
    errors = [line.get(f"{metric}_stderr") for line in found]
    return (
        [line["step"] for line in found],
        [line[metric] for line in found],
        [math.nan if error is None else error for error in errors],
    )


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("metrics", __doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
    parser.add_argument("--metric", default="loss", help="a name in metrics.jsonl; default: loss")
    parser.add_argument("--out", required=True, help="a PNG, SVG or PDF file")
    return parser


def main(args: argparse.Namespace):
    """Runs the command."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415 (only plots need matplotlib)
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'llada_jax[plot]'") from None
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for run in args.runs:
        name, _, workdir = run.rpartition("=")
        steps, values, errors = read(workdir, args.metric)
        axes.errorbar(
            steps, values, errors, label=name or workdir, capsize=2, marker="o", markersize=3
        )
    axes.set(xlabel="step", ylabel=args.metric)
    axes.grid(alpha=0.3)
    axes.legend()
    kind = epath.Path(args.out).suffix.removeprefix(".") or "png"
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format=kind)
    write_whole(args.out, content.getvalue())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
