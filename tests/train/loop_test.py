"""The trainer end to end on eight devices: runs, resumes, refuses."""

import dataclasses
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, config_of
from jax.experimental.compilation_cache import compilation_cache
from jax.tree_util import Partial

import llada_jax
from configs import base, sft_8b, vrpo_8b
from llada_jax import elbo, metrics, noise, sampling, tokenizer
from llada_jax.checkpoints import loading
from llada_jax.checkpoints.orbax import Checkpoints
from llada_jax.evaluate import heldout
from llada_jax.tasks import sudoku
from llada_jax.train import (
    STOPPED,
    Experiment,
    describe,
    loop,
    make_plan,
    reference_cache,
    result,
    train,
)
from llada_jax.train.reference_cache import ReferenceCache

TOKENIZER = ROOT / "llada_jax" / "assets" / "sudoku" / "tokenizer.json"
NUM_STEPS = 6
RATES = {"tokens/s", "steps/s", "seconds_left"}
SFT = {
    "objective": "sft",
    "num_steps": NUM_STEPS,
    "model.arch": dict(
        d_model=16,
        n_heads=2,
        n_layers=1,
        mlp_hidden_size=16,
        embedding_size=16,
        max_sequence_length=66,
    ),
    "data.train": "python:llada_jax.tasks.sudoku:records?count=50",
    "data.holdout": 0.2,
    "data.tokenizer": str(TOKENIZER),
    "data.template": "plain",
    "data.append_eos": False,
    "data.row_length": 33,
    "data.batch_rows": 8,
    "optimizer.warmup_steps": 1,
    "checkpoint.every": 2,
    "eval.every": 3,
    "solve.prompts": "python:llada_jax.tasks.sudoku:records?count=4&split=heldout",
    "solve.scorer": "llada_jax.tasks.sudoku:score",
    "solve.gen_length": 16,
    "solve.steps": 2,
    "solve.block_length": 16,
    "solve.batch_size": 4,
}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """One quick compilation for all runs of the same program, subprocesses included."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings} | {
        "jax_disable_most_optimizations": False
    }
    settings["jax_disable_most_optimizations"] = True
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


WATCHED = []  # what the run of the fixture `sft` showed to its caller


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Sudoku pairs of many lengths (one to three a row of 66), as a source."""
    records = []
    for n, r in zip([16, 9, 5, 8] * 15, sudoku.records(60, seed=2), strict=True):
        wrong = r["response"].translate(str.maketrans("1234", "2341"))
        records.append(
            {"prompt": r["prompt"][:n], "chosen": r["response"][:n], "rejected": wrong[: n - n % 2]}
        )
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", records)


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """The workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("sft")
    plan = make_plan(config_of(SFT), workdir)
    assert train(plan, lambda *seen: WATCHED.append(seen), table=False) == 0
    return workdir


@pytest.fixture(scope="module")
def vrpo(sft, pairs):
    """Changes of the config for VRPO from the workdir `sft`."""
    return SFT | {
        "objective": "vrpo",
        "init_from": str(sft),
        "model.arch": {},
        "data.tokenizer": "",
        "data.train": pairs,
        "data.row_length": 66,
        "vrpo.n_t": 2,
        "solve.prompts": "",
        "eval.every": 0,
        "checkpoint.every": 4,
        "optimizer.peak": 5e-3,
    }


@pytest.fixture(scope="module")
def vrpo_run(vrpo, tmp_path_factory):
    """The workdir of a finished run of `vrpo`, and how many models its updates hold in memory."""
    workdir = tmp_path_factory.mktemp("vrpo")
    with pytest.MonkeyPatch.context() as patch:
        copies = count_models(patch)
        assert run(vrpo, workdir) == 0
    return workdir, copies


def run(changes, workdir):
    return train(make_plan(config_of(changes), workdir))


def lines(workdir):
    return [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().splitlines(True)
        if line[-1] == "\n"
    ]


def without_rates(workdir):
    return [
        {k: v for k, v in line.items() if k != "seconds_left" and "/s" not in k[-2:]}
        for line in lines(workdir)
    ]


def steps_of(workdir):
    return [line for line in lines(workdir) if "loss" in line]


def assert_same_params(a, b):
    (_, a), (_, b) = llada_jax.load(a), llada_jax.load(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def count_models(patch):
    """A list that gets, at each update, how many arrays of an embedding's shape were made since."""
    gc.collect()

    def alive():
        return sum(x.shape == (16, 16) and x.dtype == np.float32 for x in jax.live_arrays())

    before, found, jit_update = alive(), [], loop.jit_update

    def counting(*args):
        update = jit_update(*args)

        def counted(*args):
            found.append(alive() - before)
            return update(*args)

        return counted

    patch.setattr(loop, "jit_update", counting)
    return found


# ---- runs


def test_sft_logs_and_evaluates(sft):
    logged = steps_of(sft)
    assert [line["step"] for line in logged] == list(range(1, NUM_STEPS + 1))
    assert all({"loss", "grad_norm", "learning_rate"} <= line.keys() for line in logged)
    assert all(line.keys() >= RATES for line in logged[1:])
    assert logged[0]["learning_rate"] == 0 and logged[1]["learning_rate"] == pytest.approx(1e-3)
    evaluated = [line for line in lines(sft) if "eval/elbo_per_token" in line]
    assert [line["step"] for line in evaluated] == [0, 3, 6]
    names = ("elbo_per_token", "solve/rate")
    assert all(
        f"eval/{name}{end}" in line
        for line in evaluated
        for name in names
        for end in ("", "_stderr")
    )
    assert evaluated[0]["eval/elbo_per_token"] == pytest.approx(-np.log(16), rel=0.05)
    assert evaluated[-1]["eval/elbo_per_token"] > evaluated[0]["eval/elbo_per_token"]
    assert sorted(path.name for path in (sft / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert any((sft / "tb").iterdir())


def test_a_caller_sees_each_line_of_the_metrics(sft):
    def known(values):
        return {name: value for name, value in values.items() if math.isfinite(value)}

    logged = [{k: v for k, v in line.items() if v is not None} for line in lines(sft)]
    assert [{"step": step, **known(values)} for step, values in WATCHED] == logged
    assert all(type(value) is float for _, values in WATCHED for value in values.values())


def test_pretrain_runs(tmp_path):
    records = [{"text": r["prompt"] + r["response"]} for r in sudoku.records(60)]
    changes = SFT | {
        "objective": "pretrain",
        "data.train": write_jsonl(tmp_path / "text.jsonl", records),
        "denoising.crop_probability": 0.5,
        "solve.prompts": "",
        "data.holdout": 0.0,
        "num_steps": 3,
    }
    assert run(changes, tmp_path / "run") == 0
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2, 3]
    assert steps_of(tmp_path / "run")[-1].keys() >= RATES


def test_vrpo_logs_what_users_of_dpo_expect(vrpo_run):
    workdir, _ = vrpo_run
    first, *later = steps_of(workdir)
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    promised = rewards | {
        "loss",
        "loss/sft",
        "score/mc_stderr",
        "grad_norm",
        "learning_rate",
        "pairs",
    }
    assert promised <= first.keys()
    assert all(promised | RATES | {"pairs/s"} <= line.keys() for line in later)
    # The policy is the reference yet, and shares its noise.
    assert abs(first["rewards/margins"]) < 1e-4 and first["loss/preference"] == pytest.approx(
        np.log(2), abs=1e-4
    )
    assert first["loss"] == pytest.approx(
        first["loss/preference"] + 0.05 * first["loss/sft"], rel=1e-5
    )
    assert later[-1]["rewards/margins"] > 0.01 and later[-1]["score/mc_stderr"] > 0
    before, after = [line for line in lines(workdir) if "eval/rewards/accuracies" in line]
    assert (before["step"], after["step"]) == (0, NUM_STEPS)
    assert before["eval/loss/preference"] == pytest.approx(np.log(2), abs=1e-4)
    assert after["eval/loss/preference"] < before["eval/loss/preference"]
    assert (
        0 <= after["eval/rewards/accuracies"] <= 1 and after["eval/rewards/accuracies_stderr"] >= 0
    )


@pytest.mark.slow
def test_another_mesh_takes_the_same_steps(vrpo, vrpo_run, tmp_path):
    changes = vrpo | {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    plan = make_plan(config_of(changes), tmp_path)
    assert train(dataclasses.replace(plan, heldout=None)) == 0
    for here, there in zip(steps_of(tmp_path), steps_of(vrpo_run[0]), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4), here["step"]


def read_only(fill):
    """A fill that finds all terms on disk, and computes none."""

    def filling(self, terms_of, *args, **kwargs):
        return fill(self, lambda batch: pytest.fail("terms were computed again"), *args, **kwargs)

    return filling


@pytest.mark.slow
def test_a_cached_reference_takes_the_same_steps(vrpo, vrpo_run, tmp_path, monkeypatch):
    cached = vrpo | {"vrpo.reference": "cached"}
    with monkeypatch.context() as patch:
        # The fill obeys, and the next run keeps the first file.
        signal_at(patch, reference_cache, "_write", calls=1)
        assert run(cached, tmp_path) == STOPPED
        assert len(list(tmp_path.glob("reference/*/*.npy"))) == 1
    with monkeypatch.context() as patch:
        copies = count_models(patch)
        stop_after(patch, 3)
        assert run(cached, tmp_path) == STOPPED
    monkeypatch.setattr(ReferenceCache, "fill", read_only(ReferenceCache.fill))
    assert run(cached, tmp_path) == 0
    for here, there in zip(without_rates(tmp_path), without_rates(vrpo_run[0]), strict=True):
        if here.get("loss/preference") == pytest.approx(np.log(2), abs=1e-6):
            del (
                here["rewards/accuracies"],
                there["rewards/accuracies"],
            )  # rounding decides: policy and reference agree
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5), here["step"]
    # Embedding and head, each with its two moments; two more of the reference. A save adds some for
    # a while.
    assert min(copies) == 6 and min(vrpo_run[1]) == 8


@pytest.mark.slow
def test_a_cached_reference_has_the_epochs_of_a_run_that_goes_on_with_smaller_batches(
    vrpo, tmp_path, monkeypatch
):
    def update(current, batch, frozen, numbers):
        assert batch.reference is not None and frozen is None
        values = {"loss": 1.0, "grad_norm": 1.0, "pairs": 8.0}
        return current.replace(step=current.step + 1), values

    monkeypatch.setattr(loop, "jit_update", lambda *args: update)
    cached = vrpo | {"vrpo.reference": "cached", "data.holdout": 0.0}
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert run(cached | {"data.batch_rows": 24}, tmp_path) == STOPPED
    rows = len(make_plan(config_of(cached), tmp_path).rows)
    assert (
        NUM_STEPS * 8 <= 2 * rows <= 5 * 24
    )  # another epoch than that of a run with the smaller batches alone
    assert run(cached, tmp_path) == 0
    assert [line["step"] for line in steps_of(tmp_path)] == list(range(1, NUM_STEPS + 1))
    # And of one that has passed its end.
    assert (
        run(cached | {"num_steps": 1, "optimizer.warmup_steps": 0, "data.batch_rows": 40}, tmp_path)
        == 0
    )


# ---- stopping


def stop_after(patch, step):
    """SIGTERM when the metrics of a step are written."""
    write = metrics.Writer.write

    def writing(self, at, values):
        write(self, at, values)
        if at == step and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(metrics.Writer, "write", writing)


def signal_at(patch, module, name, calls):
    """SIGTERM at so many calls of a function."""
    function, made = getattr(module, name), []

    def calling(*args):
        made.append(name)
        if len(made) == calls:
            signal.raise_signal(signal.SIGTERM)
        return function(*args)

    patch.setattr(module, name, calling)


class Killed(BaseException):
    pass


def die_after_evaluating(patch, step):
    write = metrics.Writer.write

    def writing(self, at, values):
        write(self, at, values)
        if at == step and "eval/elbo_per_token" in values:
            raise Killed

    patch.setattr(metrics.Writer, "write", writing)


def die_after_saving(patch, step):
    save = Checkpoints.save

    def saving(self, at, *args):
        save(self, at, *args)
        if at == step:
            self.wait()
            raise Killed

    patch.setattr(Checkpoints, "save", saving)


def test_a_run_that_is_stopped_in_every_way_takes_the_same_steps(
    sft, tmp_path, monkeypatch, capsys
):
    handler = signal.getsignal(signal.SIGTERM)
    # A death before the first checkpoint; a signal during step 3, where an evaluation is due, and a
    # death after that evaluation; a death between two steps; a signal during the last step.
    for stop, after, at in (
        (die_after_evaluating, 0, 0),
        (stop_after, 2, 3),
        (die_after_evaluating, 3, 3),
        (die_after_saving, 4, 4),
        (stop_after, 5, NUM_STEPS),
    ):
        with monkeypatch.context() as patch:
            stop(patch, after)
            if stop is stop_after:
                assert run(SFT, tmp_path) == STOPPED == 143
                assert f"stopped at step {at} of {NUM_STEPS}" in capsys.readouterr().out
            else:
                with pytest.raises(Killed):
                    run(SFT, tmp_path)
        assert (
            max((int(path.name) for path in (tmp_path / "checkpoints").iterdir()), default=0) == at
        )
        assert signal.getsignal(signal.SIGTERM) is handler
    assert run(SFT, tmp_path) == 0
    printed = capsys.readouterr().out
    assert (
        f"continuing from step {NUM_STEPS} of {NUM_STEPS}" in printed
        and f"after (step {NUM_STEPS})\n" in printed
    )
    assert without_rates(tmp_path) == without_rates(sft)  # to the last bit, the evaluations too
    assert_same_params(tmp_path, sft)


@pytest.mark.slow
def test_a_signal_during_an_evaluation_is_obeyed(sft, tmp_path, monkeypatch, capsys):
    # In the middle of the run, and again at the start of the next one, which begins with the same
    # evaluation.
    for calls, said in (
        (2, f"stopped at step 3 of {NUM_STEPS}"),
        (1, "the evaluation at the start"),
    ):
        with monkeypatch.context() as patch:
            signal_at(patch, heldout, "over_batches", calls)
            assert run(SFT, tmp_path) == STOPPED
        printed = capsys.readouterr().out
        assert said in printed and "evaluation at step 3" not in printed
        assert (tmp_path / "checkpoints" / "3").is_dir()
    assert run(SFT, tmp_path) == 0
    assert without_rates(tmp_path) == without_rates(sft)


def test_a_finished_run_only_prints_its_result(sft, monkeypatch, capsys):
    before = (sft / "metrics.jsonl").read_text()
    monkeypatch.setattr(loop, "jit_update", lambda *args: None)
    assert run(SFT, sft) == 0
    printed = capsys.readouterr().out
    assert f"done: {NUM_STEPS} steps" in printed and "share of the errors removed" in printed
    assert (sft / "metrics.jsonl").read_text() == before


def test_a_resumed_run_goes_on_where_the_data_stood(sft, monkeypatch):
    started = []
    monkeypatch.setattr(result, "print_result", lambda *args: None)
    batches = Experiment.batches

    def noting(self, rows, *, start=0, **settings):
        started.append(start)
        return batches(self, rows, start=start, **settings)

    monkeypatch.setattr(Experiment, "batches", noting)
    assert run(SFT | {"data.batch_rows": 16}, sft) == 0
    assert started == [NUM_STEPS * 8]


def test_other_data_cannot_continue_a_run(sft, monkeypatch):
    monkeypatch.setattr(loop, "jit_update", None)  # an error before that
    with pytest.raises(
        ValueError, match=r"trained with other settings: data \(.* then, .* now\).*--workdir"
    ) as e:
        run(SFT | {"data.train": "python:llada_jax.tasks.sudoku:records?count=51"}, sft)
    assert "\n" not in str(e.value)
    with pytest.raises(
        ValueError, match=r"another model or optimiser: .*\[1, .*\] there, .*\[2, .*\] here"
    ) as e:
        run(SFT | {"model.arch": SFT["model.arch"] | {"n_layers": 2}}, sft)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, value", [("loss", np.nan), ("loss", np.inf), ("grad_norm", np.nan)])
def test_what_is_not_finite_ends_the_run(tmp_path, monkeypatch, name, value):
    def update(current, batch, frozen, numbers):
        values = {"loss": 1.0, "grad_norm": 1.0, "samples": 8.0}
        values |= {name: value} if current.step == 3 else {}
        return current.replace(step=current.step + 1), values

    monkeypatch.setattr(loop, "jit_update", lambda *args: update)
    changes = SFT | {"solve.prompts": "", "data.holdout": 0.0}
    with pytest.raises(
        FloatingPointError, match=f"the {name} at step 4 is {value}: lower optimizer.peak"
    ) as e:
        run(changes, tmp_path)
    assert "\n" not in str(e.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert steps_of(tmp_path)[-1]["step"] == 4


# ---- the command line


def command(config, workdir, *more):
    return [
        sys.executable,
        "-m",
        "llada_jax.train",
        f"--config={config}",
        f"--workdir={workdir}",
        *more,
    ]


@pytest.mark.parametrize(
    "config, more, status, message",
    [
        (
            "vrpo_8b",
            ["--config.data.tran=x"],
            2,
            'config.data.tran: .* has no key .tran.; did you mean "train"',
        ),
        (
            "sft_8b",
            ["--config.vrpo.beta=-3"],
            2,
            "config.vrpo.beta: configs/sft_8b.py .objective .sft.. has no key .vrpo.",
        ),
        ("vrpo_8b", ["--config.vrpo.beta=-3"], 1, "config.vrpo.beta=-3.0 must be above 0"),
        ("none", [], 2, "--config=configs/none.py: there is no such file"),
        ("sft_sudoku", ["--config.init_from=nowhere"], 1, "nowhere does not exist"),
        ("sft_sudoku", ["--config.optimizer.peak=high"], 2, "=high is not of type float"),
        ("sft_sudoku", ["--dry"], 2, "unrecognized arguments: --dry"),
    ],
)
def test_cli_errors_are_one_line(tmp_path, config, more, status, message):
    config = f"configs/{config}.py"
    done = subprocess.run(
        command(config, tmp_path, *more), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status and "Traceback" not in done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 1 and done.stdout == ""
    assert re.search(message, said[0])


@pytest.mark.slow
def test_a_killed_process_continues_to_the_last_bit(vrpo, tmp_path, compiled_once):
    changes = vrpo | {
        "num_steps": 40,
        "checkpoint.every": 5,
        "eval.every": 15,
        "vrpo.reference": "cached",
    }
    config = tmp_path / "config.py"
    config.write_text(
        "from configs import base\ndef get_config():\n"
        f"    c = base.get_config('vrpo')\n    c.update_from_flattened_dict({changes!r})\n"
        "    return c\n"
    )
    environment = os.environ | compiled_once

    def start():
        return subprocess.Popen(
            command(config, tmp_path / "killed"),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    for number, after in ((signal.SIGTERM, 8), (signal.SIGKILL, 20)):
        process = start()
        until = time.monotonic() + 120
        while (
            not (tmp_path / "killed/metrics.jsonl").exists()
            or len(lines(tmp_path / "killed")) < after
        ):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        if number == signal.SIGTERM:
            assert process.returncode == 143 and "stopped at step" in said
        else:
            assert process.returncode == -signal.SIGKILL
    process = start()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "continuing from step" in said and "done: 40 steps" in said
    assert run(changes, tmp_path / "whole") == 0
    assert without_rates(tmp_path / "killed") == without_rates(tmp_path / "whole")
    assert_same_params(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_the_quickstart_does_not_stall_on_eight_virtual_devices(tmp_path):
    # With one thread a device, the collectives of XLA's CPU client wait for ever. Smaller models do
    # not show it.
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    changes = {"num_steps": 10, "optimizer.warmup_steps": 1, "solve.prompts": "", "vrpo.n_t": 4}
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    full_command = command("configs/vrpo_sudoku.py", tmp_path, *flags)
    done = subprocess.run(
        full_command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "done: 10 steps" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    "config, printed",
    [
        (
            vrpo_8b,
            [
                "8,015,581,184",
                "objective       vrpo on 8 x cpu",
                "each 16 rows x 4096",
                "8 draws",
                "GiB",
            ],
        ),
        (
            sft_8b,
            [
                "8,015,581,184",
                "objective       sft",
                "each 256 rows",
                "FLOPs a step",
                "data.train is not set",
            ],
        ),
    ],
)
def test_dry_run_of_the_recipes_makes_no_array(config, printed, tmp_path):
    gc.collect()
    before = len(jax.live_arrays())
    plan = make_plan(config.get_config(), tmp_path / "run", dry_run=True)
    description = describe(plan)
    assert all(text in description for text in printed), description
    assert len(jax.live_arrays()) <= before and not (tmp_path / "run").exists()


def test_dry_run_with_data_counts_it(tmp_path):
    description = describe(make_plan(config_of(SFT), tmp_path, dry_run=True))
    per_epoch = make_plan(config_of(SFT | {"num_steps": 0, "epochs": 3}), tmp_path)
    assert "train rows" in description and "held-out rows" in description
    rows = len(per_epoch.rows)
    assert (
        f"steps           {NUM_STEPS} ({NUM_STEPS * 8 / rows:.2f} epochs), each 8 rows x 33 = 264"
        in description
    )
    assert per_epoch.num_steps == 3 * len(per_epoch.rows) // 8


@pytest.mark.slow
def test_the_divergence_and_the_examples_of_a_run(vrpo, sft, tmp_path, monkeypatch, capsys):
    """Truth: the exact ELBOs of the responses that the parameters of the checkpoint write."""
    changes = vrpo | {
        "solve.prompts": SFT["solve.prompts"],
        "solve.gen_length": 4,
        "solve.steps": 4,
        "solve.block_length": 4,
        "solve.temperature": 1.0,
        "solve.remasking": "random",
        "solve.kl_draws": 63,  # as many as an answer of 6 tokens has subsets
        "solve.show": 2,
        "data.append_eos": True,
        "data.answer_multiple": 3,
        "data.holdout": 0.0,
        "num_steps": 2,
        "optimizer.peak": 0.05,
        "mesh.fsdp": 2,
    }
    assert run(changes, tmp_path) == 0
    printed = capsys.readouterr().out
    before, after = (x for x in lines(tmp_path) if "eval/solve/kl" in x)
    assert before["eval/solve/kl"] == 0 == before["eval/solve/kl_stderr"]

    model, policy = llada_jax.load(tmp_path)
    _, reference = llada_jax.load(sft)
    config = model.config
    tokens = tokenizer.load(str(TOKENIZER))
    prompts = [
        [tokens.bos_id, *tokens.encode(r["prompt"])] for r in sudoku.records(4, split="heldout")
    ]
    policy, reference = (Partial(model.apply, {"params": p}) for p in (policy, reference))
    sampler = dict(gen_length=4, steps=4, block_length=4, temperature=1.0, remasking="random")
    found = sampling.sample_responses(
        policy,
        prompts,
        key=noise.stream_key(0, "solve"),
        mask_id=config.mask_token_id,
        pad_id=tokens.eos_id,
        batch_size=4,
        **sampler,
    )
    ratios = []
    for prompt, response in zip(prompts, found.tolist(), strict=True):
        end = response.index(tokens.eos_id) + 1 if tokens.eos_id in response else len(response)
        answer = response[:end] + [tokens.eos_id] * (-end % 3)
        row = jnp.array([[*prompt, *answer]])
        is_answer = jnp.arange(row.shape[1])[None] >= len(prompt)
        exact = (
            elbo.exact_elbo(logits_fn, row, is_answer, mask_id=config.mask_token_id)
            for logits_fn in (policy, reference)
        )
        ratios.append(float(next(exact)[0] - next(exact)[0]))
    assert after["eval/solve/kl"] == pytest.approx(np.mean(ratios), abs=1e-4)
    assert after["eval/solve/kl_stderr"] == pytest.approx(np.std(ratios, ddof=1) / 2, abs=1e-4)
    assert abs(np.mean(ratios)) > 0.01

    table, *examples = printed.partition("done: 2 steps")[2].split("\n\n")
    assert "answers to 4 prompts" in table and "KL from reference (nats)" in table
    texts = [tokens.decode(sampling.trim(row, tokens.eos_id)) for row in found[:2]]
    for example, prompt, text in zip(examples, prompts, texts, strict=False):
        assert example.splitlines()[0] == tokens.decode(prompt[1:])
        assert example.splitlines()[-2:] == ["  after: score 0", f"    {text}".rstrip()]
    assert examples[-1].endswith("unmasking.png\n") and (tmp_path / "unmasking.html").exists()
    monkeypatch.setattr(loop, "jit_update", lambda *args: None)
    assert run(changes, tmp_path) == 0  # a finished run has kept the texts
    assert capsys.readouterr().out.endswith(printed[printed.index("done: 2 steps") :])


# ---- bad input


def bad_json(tmp_path):
    (tmp_path / "broken.jsonl").write_text(
        '{"prompt": "1", "response": "2"}\n{"prompt": "1", "resp\n'
    )
    return {"data.train": f"jsonl:{tmp_path / 'broken.jsonl'}", "data.holdout": 0.0}


def empty_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    return {"data.train": f"jsonl:{tmp_path / 'empty.jsonl'}"}


def empty_prompts(tmp_path):
    return {"solve.prompts": empty_file(tmp_path)["data.train"]}


def sampled_rows_beyond_the_kernel(tmp_path):
    shape = arch(d_model=64, n_heads=1, embedding_size=16, max_sequence_length=128)
    return shape | {"model.attention": "splash", "data.row_length": 128}


def larger_vocabulary(tmp_path):
    content = json.loads(TOKENIZER.read_text())
    content["model"]["vocab"] |= {f"<{i}>": i for i in range(len(content["model"]["vocab"]), 20)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return {"data.tokenizer": str(tmp_path)} | arch(vocab_size=12)


def arch(**values):
    return {"model.arch": SFT["model.arch"] | values}


RANDOM_ORDER = {"solve.temperature": 1.0, "solve.remasking": "random", "solve.kl_draws": 4}
BAD_SFT = [
    ({"init_from": "/nowhere/model"}, "config.init_from: /nowhere/model does not exist"),
    ({"data.train": ""}, "data.train is not set: pass --config.data.train="),
    ({"data.train": "jsonl:/nowhere.jsonl"}, "no file matches '/nowhere.jsonl'"),
    ({"data.train": "/nowhere.jsonl"}, "write jsonl:PATH"),
    ({"data.tokenizer": ""}, "data.tokenizer is not set"),
    ({"data.tokenizer": "/nowhere"}, "config.data.tokenizer: tokenizer /nowhere does not"),
    ({"data.batch_rows": 12}, "data.batch_rows=12 is not a multiple of 8"),
    ({"data.batch_rows": 0}, "config.data.batch_rows=0 must be at least 1"),
    (
        {"optimizer.accumulate": 2},
        "data.batch_rows=8 is not a multiple of 16.*accumulate=2",
    ),
    ({"eval.batch_rows": 4}, "eval.batch_rows=4 is not a multiple of 8"),
    ({"data.batch_rows": 64, "num_steps": 0}, "fill no batch of data.batch_rows=64"),
    ({"data.row_length": 67}, "data.row_length=67 is beyond the model's max_sequence_length=66"),
    ({"data.row_length": 20}, "gives no sample .*raise row_length"),
    ({"data.template": "chats"}, "config.data.template='chats' is not one of chat, plain"),
    ({"data.heldout": "jsonl:a"}, "both say which records are held out"),
    ({"optimizer.b2": 1.0}, "config.optimizer.b2=1.0 must be at least 0 and below 1"),
    ({"optimizer.peak": float("nan")}, "config.optimizer.peak=nan is no finite number"),
    ({"model.dtype": "float"}, "config.model.dtype='float' is not one of float32, bfloat16"),
    ({"model.remat": "all"}, "config.model.remat='all'"),
    ({"model.attention": "flash"}, "config.model.attention='flash'"),
    ({"optimizer.schedule": "linear"}, "config.optimizer.schedule='linear'"),
    ({"checkpoint.every": 0}, "config.checkpoint.every=0 must be at least 1"),
    ({"optimizer.warmup_steps": 9}, "warmup_steps=9 must be at least 0 and below the 6 steps"),
    ({"denoising.mc_chunk": 3}, "config.denoising.mc_chunk=3 does not divide n_t x n_yt = 1"),
    ({"denoising.masks": "exact"}, "config.denoising.eps=0.001, masks='exact': eps is"),
    ({"denoising.share_in_pair": "times"}, "share_in_pair='times' is for pairs"),
    ({"mesh.data": 3}, "data=3, fsdp=1, tensor=1 do not fit 8 devices"),
    ({"mesh.data": 2, "mesh.tensor": 4}, "n_heads=2 cannot be split over mesh.tensor=4"),
    ({"model.arch": {}}, "neither config.init_from nor config.model.arch is set"),
    (arch(n_kv_head=1), "config.model.arch has n_kv_head, no key of a config.json"),
    (
        arch(activation_type="gelu"),
        "config.model.arch: the model cannot honour .*activation_type='gelu'",
    ),
    (arch(mask_token_id=9), "mask id 10 is not the model's mask_token_id=9"),
    (larger_vocabulary, "the tokenizer has ids up to 19, the model 16 embeddings"),
    (empty_file, "empty.jsonl holds no record"),
    (bad_json, r"broken.jsonl:2: no JSON \(.*\); repair it"),
    (empty_prompts, "solve.prompts: .*empty.jsonl holds no record that is tested"),
    (
        {"solve.gen_length": 64, "solve.steps": 4},
        "config.solve: .* a prompt of 17 tokens and gen_length=64 exceed the 66",
    ),
    ({"solve.scorer": "llada_jax.tasks.sudoku:none"}, "config.solve.scorer: .* no function none"),
    (
        {"solve.block_length": 8, "solve.steps": 3},
        "config.solve.steps=3 is not a positive multiple of the 2 blocks",
    ),
    ({"solve.batch_size": 0}, "config.solve.batch_size=0 must be at least 1"),
    ({"solve.threshold": 0.9}, 'config.solve.threshold=0.9 has no effect with commit="schedule"'),
    ({"solve.top_p": 0.9}, "config.solve.top_p=0.9 has no effect at temperature=0"),
    ({"solve.prompts": "", "solve.show": 1}, "config.solve.show=1 needs prompts: set solve.prom"),
    (RANDOM_ORDER, "config.solve.kl_draws=4 .* objective='sft' has none: set it to 0"),
    (
        RANDOM_ORDER | {"solve.temperature": 0.0},
        "config.solve.kl_draws=4 .* solve.temperature=0.0: set it to 1, or kl_draws to 0",
    ),
    (
        RANDOM_ORDER | {"solve.remasking": "low_confidence"},
        "not with solve.remasking=low_confidence: set it to random",
    ),
    (sampled_rows_beyond_the_kernel, "rows of 33 positions are no multiple of 128"),
]
BAD_VRPO = [
    (
        {"init_from": "", "data.tokenizer": str(TOKENIZER), **arch()},
        "config.init_from is not set: vrpo starts from",
    ),
    (
        {"model.arch": {"n_layers": 2}},
        "is another architecture: n_layers: 2 in model.arch, 1 there",
    ),
    ({"vrpo.reference_from": "/nowhere"}, "/nowhere does not exist"),
    (
        {"vrpo.reference_from": "another"},
        "is another architecture: n_layers: 1 in the policy, 2 there",
    ),
    ({"vrpo.reference_dtype": "fp8"}, "config.vrpo.reference_dtype='fp8'"),
    ({"vrpo.reference": "none"}, "config.vrpo.reference='none' is not one of model, cached"),
    ({"vrpo.kind": "kto"}, "config.vrpo.kind='kto' is not one of sigmoid, ipo, hinge, robust"),
    (
        RANDOM_ORDER | {"vrpo.reference": "cached", "solve.prompts": SFT["solve.prompts"]},
        "config.solve.kl_draws=4 .* cached reference releases: set vrpo.reference='model'",
    ),
    ({"vrpo.mc_chunk": 3}, "config.vrpo.mc_chunk=3 does not divide n_t x n_yt = 2"),
    ({"vrpo.beta": 0.0}, "config.vrpo.beta=0.0 must be above 0"),
    ({"vrpo.sft_weight": -1.0}, "config.vrpo.sft_weight=-1.0 must be at least 0"),
    (
        {"data.row_length": 16},
        "gives no sample .*too_long_dropped .*raise row_length or set data.too_long",
    ),
]


def check_refused(changes, workdir, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        make_plan(config_of(changes), workdir)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change, message", BAD_SFT, ids=[message[:40] for _, message in BAD_SFT])
def test_bad_input_is_one_line(tmp_path, change, message):
    check_refused(
        SFT | (change(tmp_path) if callable(change) else change), tmp_path / "run", message
    )


@pytest.mark.parametrize("change, message", BAD_VRPO, ids=[message[:40] for _, message in BAD_VRPO])
def test_bad_input_of_vrpo_is_one_line(vrpo, sft, tmp_path, change, message):
    if change.get("vrpo.reference_from") == "another":
        config = loading.read_config(sft).to_dict() | {"n_layers": 2}
        (tmp_path / "config.json").write_text(json.dumps(config))
        change = {"vrpo.reference_from": str(tmp_path)}
    check_refused(vrpo | change, tmp_path / "run", message)


def test_a_misspelt_key_in_a_config_file_is_an_error():
    with pytest.raises(AttributeError, match='Did you mean "train" instead of "trian"'):
        base.get_config("sft").data.trian = "jsonl:x"


def test_another_architecture_of_the_same_shape_cannot_continue_a_run(sft, monkeypatch):
    monkeypatch.setattr(loop, "jit_update", None)  # an error before that
    with pytest.raises(ValueError, match="model rope_theta=500000.0, which is 7.0 now") as e:
        run(SFT | arch(rope_theta=7.0), sft)
    assert "\n" not in str(e.value)


def test_an_objective_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match="objective='dpo' is not one of pretrain, sft, vrpo"):
        base.get_config("dpo")


def test_a_config_of_another_objective_is_one_line(tmp_path):
    config = config_of(SFT)
    config.objective = "vrpo"
    with pytest.raises(ValueError, match="start it with base.get_config"):
        make_plan(config, tmp_path)
