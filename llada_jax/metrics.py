"""Means that merge across batches, metrics written to disk, progress shown to whoever watches, and curves of runs.

    python -m llada_jax.metrics --metric=eval/solve/rate --out=curve.png vrpo=runs/vrpo naive=runs/naive

plots one metric of several runs against the step, with its standard error where one is logged (needs matplotlib).
"""

import argparse
import collections
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm


@flax.struct.dataclass
class Mean:
    """A mean and its standard error, mergeable across batches, hosts' shards and steps; works under jit.

    Deviations are kept about the mean and merged by Chan's formula: a plain sum of squares loses a small variance
    beside a large mean in float32. An empty Mean has value nan; fewer than two values have standard error nan.
    """

    total: Any  # sum of the values, float32 scalar
    count: Any  # how many values
    squares: Any  # sum of squared deviations from this Mean's own mean

    @classmethod
    def of(cls, values, mask=None) -> "Mean":
        """Mean of `values` (any shape) where `mask` (0 or 1, broadcast to it) is set; masked values may be nan."""
        values = jnp.asarray(values, jnp.float32)
        kept = jnp.ones(values.shape, bool) if mask is None else jnp.broadcast_to(jnp.asarray(mask) != 0, values.shape)
        count = kept.sum(dtype=jnp.float32)
        total = jnp.where(kept, values, 0).sum()
        mean = total / jnp.maximum(count, 1)
        return cls(total, count, jnp.square(jnp.where(kept, values - mean, 0)).sum())

    def merge(self, other: "Mean") -> "Mean":
        """The Mean of both sets of values."""
        shift = other.total / jnp.maximum(other.count, 1) - self.total / jnp.maximum(self.count, 1)
        count = self.count + other.count
        between = shift**2 * self.count * other.count / jnp.maximum(count, 1)
        return Mean(self.total + other.total, count, self.squares + other.squares + between)

    def over_devices(self, axis_name: str | None) -> "Mean":
        """The Mean of the values of all devices along a mapped axis; None: of this one's alone."""
        if axis_name is None:
            return self
        total, count = jax.lax.psum((self.total, self.count), axis_name)
        shift = self.total / jnp.maximum(self.count, 1) - total / jnp.maximum(count, 1)
        return Mean(total, count, jax.lax.psum(self.squares + self.count * shift**2, axis_name))

    @property
    def value(self):
        return self.total / self.count

    @property
    def stderr(self):
        """Standard error of the mean of independent values, from their unbiased variance."""
        enough = self.count > 1
        variance = self.squares / jnp.where(enough, self.count - 1, 1)
        return jnp.where(enough, jnp.sqrt(variance / jnp.maximum(self.count, 1)), jnp.nan)


def floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Python floats of scalars, scalar arrays and Means (their value); waits for the device."""
    values = {name: metric.value if isinstance(metric, Mean) else metric for name, metric in metrics.items()}
    return {name: float(value) for name, value in jax.device_get(values).items()}


class Writer:
    """Writes metrics to workdir/metrics.jsonl (one line a call) and as TensorBoard scalars to workdir/tb.

    `start_step` is the step a run continues from: what an earlier process logged beyond it, after its last checkpoint,
    is dropped, since those steps will be run and logged again; under `evaluates_again` so is what it logged as "eval/"
    at that step. Only process 0 of a pod writes. Object stores cannot append: on a path with "://" metrics.jsonl is
    written whole at most every `remote_seconds`, and at `flush`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        start_step: int = 0,
        *,
        evaluates_again: bool = False,
        remote_seconds: float | int = 60,
    ):
        self._enabled = jax.process_index() == 0
        if not self._enabled:
            return
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        self._lines = _lines_until(self._path, start_step, evaluated=not evaluates_again)
        self._rewrite()
        self._remote_seconds = remote_seconds
        self._file = None
        if not _is_remote(workdir):
            self._lines.clear()
            self._file = open(self._path, "a", encoding="utf-8")
        try:
            # The suffix keeps a process that starts within the same second from overwriting the file of the last.
            options = {"purge_step": start_step + 1, "flush_secs": 30, "filename_suffix": f".from{start_step}"}
            self._tensorboard = SummaryWriter(str(workdir / "tb"), **options)
        except ImportError as error:  # tensorboardX needs a package of its own for gs:// and s3://
            self._tensorboard = None
            logging.warning("No TensorBoard scalars in %s (%s); metrics.jsonl has them all.", workdir, error)

    def write(self, step: int, metrics: Mapping[str, Any]):
        """Logs one step; what JSON has no number for (nan, infinities) becomes null in metrics.jsonl."""
        if not self._enabled:
            return
        values = floats(metrics)
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": int(step), **finite}) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._written >= self._remote_seconds:
                self._rewrite()
        if self._tensorboard:
            for name, value in finite.items():
                if value is not None:  # TensorBoard draws no nan, and warns of each
                    self._tensorboard.add_scalar(name, value, int(step))

    def flush(self):
        """Makes everything written so far visible to readers; call it beside a checkpoint."""
        if not self._enabled:
            return
        if not self._file:
            self._rewrite()
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self):
        if not self._enabled:
            return
        self.flush()
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _rewrite(self):
        # Renaming is atomic on a disk, and so is a write of a whole object in a bucket.
        target = self._path if _is_remote(self._path) else self._path.with_name("metrics.jsonl.tmp")
        target.write_text("".join(self._lines))
        if target != self._path:
            target.replace(self._path)
        self._written = time.monotonic()


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _lines_until(path: epath.Path, step: float | int, evaluated: bool = True) -> list[str]:
    """The whole lines of a metrics file up to a step, and its evaluation if `evaluated`; none torn by a crash."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
            again = not evaluated and found["step"] == step and any(name.startswith("eval/") for name in found)
            if found["step"] <= step and not again:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return lines


class Progress:
    """Shows steps done, rates, time left and chosen metrics: a bar on a terminal, else a line every `every` seconds.

    Rates are those of the last `window` seconds of updates, so that neither compilation (before the first update) nor
    an evaluation distorts them for long. Only process 0 of a pod shows anything.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        unit: str = "step",
        show: Sequence[str] = ("loss",),
        every: float | int = 10,
        window: float | int = 30,
        clock: Callable[[], float | int] = time.monotonic,
    ):
        self._total, self._unit, self._show, self._every, self._window = total, unit, show, every, window
        self._clock = clock
        self._history = collections.deque()  # (time, step, counts so far)
        self._counts: dict[str, float | int] = {}
        self._unseen: tuple | None = None  # the last update, while it is not shown
        self._shown_at = -math.inf
        self._quiet = jax.process_index() != 0
        self._bar = None
        if not self._quiet and sys.stderr.isatty():
            self._every = min(every, 0.5)
            self._bar = tqdm(total=total, initial=start, bar_format="{percentage:3.0f}%|{bar}| {desc}")

    def update(self, step: int, metrics: Mapping[str, Any] | None = None, **counts: float | int) -> dict[str, float]:
        """Notes that `step` (of `total`) is done, with `counts` (tokens=..., pairs=...) done since the last update.

        Returns the recent rates, ready to log: `steps/s`, one `<count>/s` each, and `seconds_left`; empty at first.
        """
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        now = self._clock()
        self._history.append((now, step, dict(self._counts)))
        while len(self._history) > 2 and self._history[1][0] <= now - self._window:
            self._history.popleft()
        rates = self._rates()
        self._unseen = (step, rates, metrics or {})
        if now - self._shown_at >= self._every:
            self._shown_at = now
            self._flush()
        return rates

    def close(self):
        """Shows the last update, if it was not yet shown."""
        self._flush()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _rates(self) -> dict[str, float]:
        (then, first, before), (now, last, after) = self._history[0], self._history[-1]
        if now <= then or last <= first:
            return {}
        rates = {f"{name}/s": (after[name] - before.get(name, 0)) / (now - then) for name in after}
        steps = (last - first) / (now - then)
        return {f"{self._unit}s/s": steps, **rates, "seconds_left": (self._total - last) / steps}

    def _flush(self):
        if self._unseen is None or self._quiet:
            return
        step, rates, metrics = self._unseen
        self._unseen = None
        parts = [f"{self._unit} {step}/{self._total}"]
        parts += [f"{_short(rate)} {name}" for name, rate in rates.items() if name != "seconds_left"]
        if "seconds_left" in rates:
            parts.append(f"{_duration(rates['seconds_left'])} left")
        shown = floats({name: metrics[name] for name in self._show if name in metrics})
        parts += [f"{name} {value:.4g}" for name, value in shown.items()]
        if self._bar is None:
            print("  ".join(parts), flush=True)
        else:
            self._bar.n = step
            self._bar.set_description_str("  ".join(parts))


def _short(rate: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{suffix}"
    return f"{rate:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds:02}s" if minutes else f"{seconds}s"


def read(workdir: epath.PathLike, metric: str) -> tuple[list[int], list[float], list[float]]:
    """(steps, values, standard errors) of a metric in workdir/metrics.jsonl; nan where no standard error was logged."""
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {workdir} is not the workdir of a run")
    found = [line for line in map(json.loads, _lines_until(path, math.inf)) if line.get(metric) is not None]
    if not found:
        raise ValueError(f"{path} has no {metric!r}: see its lines for the names that it has")
    errors = [line.get(f"{metric}_stderr") for line in found]
    return (
        [line["step"] for line in found],
        [line[metric] for line in found],
        [math.nan if error is None else error for error in errors],
    )


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m llada_jax.metrics", description="Plots a metric of several runs.")
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
            axes.errorbar(steps, values, errors, label=name or workdir, capsize=2, marker="o", markersize=3)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    axes.set(xlabel="step", ylabel=args.metric)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.out, dpi=150)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
