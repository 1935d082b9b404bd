"""Writes metrics to disk: metrics.jsonl and TensorBoard scalars."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath
from tensorboardX import SummaryWriter

from llada_jax.files import is_remote, write_whole
from llada_jax.metrics.mean import floats


class Writer:
    """Writes metrics to workdir/metrics.jsonl and TensorBoard scalars to workdir/tb.

    Each call adds one line to metrics.jsonl. Only process 0 of a pod writes.

    start_step: the step from which the run continues. Lines of later steps, which an earlier
        process logged after its last checkpoint, are dropped: these steps will run again.
    evaluates_again: the evaluation at start_step will run again too, so its line ("eval/") is
        dropped as well.
    remote_seconds: object stores cannot append. On a path with "://" the whole metrics.jsonl is
        rewritten, at most once in this many seconds, and at `flush`.
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
        self._lines = lines_until(self._path, start_step, evaluated=not evaluates_again)
        self._rewrite()
        self._remote_seconds = remote_seconds
        self._file = None
        if not is_remote(workdir):
            self._lines.clear()
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (until `close`)
        try:
            # File names hold the time in seconds. The suffix keeps a process that starts within the
            # same second from overwriting the file of the last process.
            options = {
                "purge_step": start_step + 1,
                "flush_secs": 30,
                "filename_suffix": f".from{start_step}",
            }
            self._tensorboard = SummaryWriter(str(workdir / "tb"), **options)
        except ImportError as error:  # tensorboardX needs extra packages for gs:// and s3://
            self._tensorboard = None
            logging.warning(
                "No TensorBoard scalars in %s (%s); metrics.jsonl has them all.", workdir, error
            )

    def write(self, step: int, metrics: Mapping[str, Any]):
        """Logs the metrics of one step; nan and infinity become null in metrics.jsonl."""
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
                if value is not None:  # TensorBoard cannot draw nan, and warns about each one
                    self._tensorboard.add_scalar(name, value, int(step))

    def flush(self):
        """Makes everything written so far visible to readers; call it with every checkpoint."""
        if not self._enabled:
            return
        if not self._file:
            self._rewrite()
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self):
        """Flushes and closes the files."""
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
        write_whole(self._path, "".join(self._lines))
        self._written = time.monotonic()


def lines_until(path: epath.Path, step: float | int, evaluated: bool = True) -> list[str]:
    """Returns the lines of a metrics file up to and including `step`.

    With `evaluated` False, the evaluation ("eval/") at `step` itself is left out. Lines that a
    crash cut short are skipped.
    """
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
            again = (
                not evaluated
                and found["step"] == step
                and any(name.startswith("eval/") for name in found)
            )
            if found["step"] <= step and not again:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return lines
