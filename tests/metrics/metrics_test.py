"""Means against NumPy, metrics files across a crash, progress, and plots of runs."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refusal, run_command
from tensorboardX.proto import event_pb2

from llada_jax import metrics
from llada_jax.metrics import __main__ as command
from llada_jax.metrics import writer as writer_lib


def test_mean_and_stderr_are_numpys():
    # The spread is small beside the mean.
    values = np.random.default_rng(0).normal(-500, 1, 60).astype(np.float32)
    mask = np.arange(60) % 3 > 0
    values[~mask] = np.nan
    mean = jax.jit(metrics.Mean.of)(values.reshape(5, 12), mask.reshape(5, 12))
    kept = values[mask].astype(np.float64)
    np.testing.assert_allclose(mean.value, kept.mean(), rtol=1e-6)
    np.testing.assert_allclose(mean.stderr, kept.std(ddof=1) / np.sqrt(kept.size), rtol=1e-4)


def test_merged_means_are_the_mean_of_everything():
    values = np.random.default_rng(1).normal(-500, 1, 40).astype(np.float32)
    merged = metrics.Mean.of(values[:0])  # an empty batch changes nothing
    for part in (values[:1], values[1:30], values[30:]):
        merged = jax.jit(metrics.Mean.merge)(merged, metrics.Mean.of(part))
    np.testing.assert_allclose(merged.value, values.astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(
        merged.stderr, values.astype(np.float64).std(ddof=1) / np.sqrt(40), rtol=1e-4
    )
    assert np.isnan(metrics.Mean.of(values[:0]).value) and np.isnan(
        metrics.Mean.of(values[:1]).stderr
    )


def test_writer_drops_steps_logged_after_the_checkpoint(tmp_path):
    with metrics.Writer(tmp_path / "run") as writer:
        for step in range(1, 6):
            writer.write(
                step,
                {
                    "loss": jnp.float32(step),
                    "grad_norm": jnp.nan,
                    "mean": metrics.Mean.of(jnp.ones(3)),
                },
            )
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn by the crash
    with metrics.Writer(tmp_path / "run", start_step=3) as writer:
        writer.write(4, {"loss": 40.0})
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert (
        lines[0] == {"step": 1, "loss": 1.0, "grad_norm": None, "mean": 1.0}
        and lines[-1]["loss"] == 40.0
    )
    assert len(list((tmp_path / "run" / "tb").iterdir())) == 2
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "tb"}


def test_tensorboard_scalars_and_purged_steps(tmp_path):
    with metrics.Writer(tmp_path, start_step=7) as writer:
        writer.write(8, {"rewards/margins": 0.25})
    data, events = next((tmp_path / "tb").iterdir()).read_bytes(), []
    while data:  # length, its checksum, event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[size + 16 :]
    assert [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START] == [8]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(8, "rewards/margins", 0.25)]


def test_writer_on_a_path_without_append(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_lib, "is_remote", lambda path: True)
    writer = metrics.Writer(tmp_path, remote_seconds=1e9)
    writer.write(1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    writer.flush()
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2]


def test_progress_lines_and_recent_rates(capsys):
    now = 100.0
    progress = metrics.Progress(1000, 200, every=10, window=30, clock=lambda: now)
    # One update gives no rate: it waited for the compiler.
    assert progress.update(201, {"loss": 2.5}, tokens=4096) == {}
    assert capsys.readouterr().out == "step 201/1000  loss 2.5\n"
    rates = {}
    for step in range(202, 300):  # a step a second, then two a second: only the last 30 s count
        now += 1.0 if step < 240 else 0.5
        rates = progress.update(step, {"loss": jnp.float32(step)}, tokens=4096)
    assert rates["steps/s"] == pytest.approx(2, rel=0.05)
    assert rates["tokens/s"] == pytest.approx(8192, rel=0.05)
    assert rates["seconds_left"] == pytest.approx(701 / rates["steps/s"])
    assert len(capsys.readouterr().out.splitlines()) == 6
    progress.close()
    last = capsys.readouterr().out
    assert last.startswith("step 299/1000  2 steps/s  8.19k tokens/s  5m 5") and last.endswith(
        " left  loss 299\n"
    )


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = metrics.Progress(10, 5)
    progress.update(6, {"loss": 0.5})
    progress.close()
    out, err = capsys.readouterr()
    assert out == "" and "60%" in err and "step 6/10  loss 0.5" in err


def test_curves_of_runs_are_plotted(tmp_path, monkeypatch, capsys):
    for name, offset in (("a", 0.0), ("b", 0.5)):
        with metrics.Writer(tmp_path / name) as writer:
            writer.write(1, {"eval/x": 1.0 + offset, "eval/x_stderr": 0.1, "loss": math.nan})
            writer.write(3, {"eval/x": 2.0 + offset})
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "eval/x": 3.')  # a run that is writing, or crashed
    assert command.read(tmp_path / "b", "eval/x")[:2] == ([1, 3], [1.5, 2.5])
    out = tmp_path / "new" / "curve.png"
    flags = ["--metric=eval/x", f"--out={out}"]
    assert run_command(command, f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", *flags) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    for workdir, metric, message in (
        (tmp_path / "a", "loss", "has no 'loss'"),
        (tmp_path / "c", "x", "does not exist"),
    ):
        words = [f"a={workdir}", f"--metric={metric}", f"--out={out}"]
        assert message in refusal(capsys, command, *words)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = refusal(capsys, command, f"a={tmp_path / 'a'}", *flags)
    assert error == "error: plots need matplotlib: pip install 'llada_jax[plot]'"
