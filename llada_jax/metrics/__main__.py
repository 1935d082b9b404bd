"""Curves of runs.

    python -m llada_jax.metrics --metric=eval/solve/rate --out=curve.png vrpo=runs/vrpo naive=runs/naive

plots one metric of several runs against the step, with its standard error where one is logged (needs matplotlib)."""

import argparse
import json
import math
import sys
from collections.abc import Sequence

from etils import epath

from llada_jax.metrics.writer import lines_until


def read(workdir: epath.PathLike, metric: str) -> tuple[list[int], list[float], list[float]]:
    """(steps, values, standard errors) of a metric in workdir/metrics.jsonl; nan where no standard error was logged."""
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


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m llada_jax.metrics", description="Plots a metric of several runs."
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
    parser.add_argument("--metric", default="loss")
    parser.add_argument("--out", required=True, help="a PNG, SVG or PDF file")
    args = parser.parse_args(argv)
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("error: plots need matplotlib: pip install 'llada_jax[plot]'")
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    try:
        for run in args.runs:
            name, _, workdir = run.rpartition("=")
            steps, values, errors = read(workdir, args.metric)
            axes.errorbar(
                steps, values, errors, label=name or workdir, capsize=2, marker="o", markersize=3
            )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    axes.set(xlabel="step", ylabel=args.metric)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
