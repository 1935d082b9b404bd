"""Progress display: steps done, rates and time left."""

import collections
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from llada_jax.metrics.mean import floats


class Progress:
    """Shows steps done, rates, time left and chosen metrics.

    On a terminal it draws a bar, otherwise it prints a line every `every` seconds. Rates are those
    of the last `window` seconds. Compilation, which ends before the first update, does not count,
    and an evaluation distorts the rates only for that long. Only process 0 of a pod shows anything.

    total: number of steps of the run.
    start: number of steps done before.
    unit: what is counted, for display.
    show: names of the metrics to show.
    clock: returns the time in seconds.
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
        self._total, self._unit, self._show, self._every, self._window = (
            total,
            unit,
            show,
            every,
            window,
        )
        self._clock = clock
        self._history = collections.deque()  # (time, step, counts so far)
        self._counts: dict[str, float | int] = {}
        self._unseen: tuple | None = None  # the last update, until it is shown
        self._shown_at = -math.inf
        self._quiet = jax.process_index() != 0
        self._bar = None
        if not self._quiet and sys.stderr.isatty():
            self._every = min(every, 0.5)
            self._bar = tqdm(
                total=total, initial=start, bar_format="{percentage:3.0f}%|{bar}| {desc}"
            )

    def update(
        self, step: int, metrics: Mapping[str, Any] | None = None, **counts: float | int
    ) -> dict[str, float]:
        """Notes that `step` (of `total`) is done.

        `counts` (tokens=..., pairs=...) are what was processed since the last update. Returns the
        recent rates, ready to log: `steps/s` (after `unit`), `<count>/s` for each count, and
        `seconds_left`. The first call returns {}.
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
        """Shows the last update if it was not shown yet, and closes the bar."""
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
        parts += [
            f"{_short(rate)} {name}" for name, rate in rates.items() if name != "seconds_left"
        ]
        if "seconds_left" in rates:
            parts.append(f"{duration(rates['seconds_left'])} left")
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


def duration(seconds: float) -> str:
    """Returns a time as 2h 05m, 5m 03s or 3s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h {minutes:02}m"
        if hours
        else f"{minutes}m {seconds:02}s"
        if minutes
        else f"{seconds}s"
    )
