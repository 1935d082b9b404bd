"""Several processes on this machine: same steps as one process, same runs, one end."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT

from configs import base
from llada_jax import metrics
from llada_jax.tasks import sudoku
from llada_jax.train import STOPPED, make_plan, train

LAUNCHER = [sys.executable, str(ROOT / "launch" / "local_cluster.py")]
NUM_STEPS = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file, and its changes of configs/base.py.

    VRPO with a cached reference; a row has one to three pairs.
    """
    directory = tmp_path_factory.mktemp("config")
    with (directory / "pairs.jsonl").open("w") as f:
        for n, r in zip([16, 9, 5, 8] * 15, sudoku.records(60, seed=2), strict=True):
            wrong = r["response"].translate(str.maketrans("1234", "2341"))
            pair = {
                "prompt": r["prompt"][:n],
                "chosen": r["response"][:n],
                "rejected": wrong[: n - n % 2],
            }
            f.write(json.dumps(pair) + "\n")
    changes = {
        "init_from": str(ROOT / "llada_jax" / "assets" / "sudoku"),
        "num_steps": NUM_STEPS,
        "data.train": f"jsonl:{directory / 'pairs.jsonl'}",
        "data.holdout": 0.2,
        "data.template": "plain",
        "data.append_eos": False,
        "data.row_length": 66,
        "data.batch_rows": 8,
        "vrpo.n_t": 2,
        "vrpo.reference": "cached",
        "optimizer.warmup_steps": 1,
        "optimizer.peak": 1e-4,
        "checkpoint.every": 100,
        "eval.n_t": 2,
    }
    text = f"""from configs import base
def get_config():
    c = base.get_config("vrpo")
    c.update_from_flattened_dict({changes!r})
    return c
"""
    (directory / "config.py").write_text(text)
    return directory / "config.py", changes


@contextlib.contextmanager
def cluster(*command, processes=2, devices=4, grace=15):
    options = [f"--processes={processes}", f"--devices={devices}", f"--grace={grace}"]
    process = subprocess.Popen(
        [*LAUNCHER, *options, "--", sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for _ in range(2):  # a second one is not a request
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def trainer(config, workdir, **changes):
    more = [f"--config.{name}={value}" for name, value in changes.items()]
    return ["-m", "llada_jax.train", f"--config={config[0]}", f"--workdir={workdir}", *more]


def run_here(config, workdir):
    """One process with eight devices: this one."""
    c = base.get_config("vrpo")
    c.update_from_flattened_dict(config[1])
    return train(make_plan(c, workdir))


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return (
        [json.loads(x) for x in path.read_text().splitlines(True) if x[-1] == "\n"]
        if path.exists()
        else []
    )


def assert_same_steps(here, there):
    here, there = lines(here), lines(there)
    assert [x["step"] for x in here] == [x["step"] for x in there]
    for a, b in zip(here, there, strict=True):
        for name in (
            "loss",
            "loss/sft",
            "grad_norm",
            "pairs",
            "eval/loss/preference",
            "eval/loss/sft",
        ):
            if name in b:
                rtol = 1e-6 if name == "loss" else 1e-5
                np.testing.assert_allclose(
                    a[name], b[name], rtol=rtol, err_msg=f"{name} at step {a['step']}"
                )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The workdir of a run of one process, never stopped: the truth of these tests."""
    workdir = tmp_path_factory.mktemp("whole")
    assert run_here(config, workdir) == 0
    return workdir


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_one_goes_on_with_them(config, whole, tmp_path):
    # The loss of a step depends only on its rows and their noise. If a row were missed or used
    # twice, some step would have another loss.
    with cluster(*trainer(config, tmp_path, parallelism="pmap")) as process:
        until = time.monotonic() + 300
        while not lines(tmp_path) or lines(tmp_path)[-1]["step"] < 3:
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == STOPPED, errors
    assert "[0] stopped at step" in said and "[1] stopped" not in said and "of 2 hosts" in said
    assert 3 < lines(tmp_path)[-1]["step"] <= NUM_STEPS
    assert run_here(config, tmp_path) == 0
    assert_same_steps(tmp_path, whole)


@pytest.mark.slow
def test_two_processes_go_on_with_the_run_of_one(config, whole, tmp_path, monkeypatch):
    write = metrics.Writer.write

    def stopping(self, at, values):
        write(self, at, values)
        if at == 3 and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, "write", stopping)
        assert run_here(config, tmp_path) == STOPPED
    # Now the devices of a host hold rows of their own, and the parameters are split over all.
    with cluster(*trainer(config, tmp_path, **{"mesh.data": 2, "mesh.fsdp": 4})) as process:
        said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "[0] continuing from step 4 of 8" in said and "reference row" not in said
    assert_same_steps(tmp_path, whole)


@pytest.mark.slow
def test_bad_input_is_one_line(config, tmp_path):
    with cluster(*trainer(config, tmp_path, **{"mesh.tensor": 3})) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert (
        "its last lines:\n    error: mesh sizes data=-1, fsdp=1, tensor=3 do not fit 8 devices"
        in errors
    )


WAITING = """
import os, signal
from llada_jax.parallel import hosts
hosts.initialize()
import jax
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("start")
print("last words of", jax.process_index(), flush=True)
if jax.process_index() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
multihost_utils.sync_global_devices("never")
"""


def test_when_one_process_is_killed_the_others_end_and_its_last_lines_are_shown():
    began = time.monotonic()
    with cluster("-c", WAITING, devices=1, grace=2) as process:
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - began < 60
    assert "[0] last words of 0" in said and "[1] last words of 1" in said
    assert "process 1 ended with status 137; its last lines:\n    last words of 1\n" in errors
