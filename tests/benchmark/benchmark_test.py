"""The benchmarks measure the trainer's own step. Counts are closed forms or made by hand."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import ROOT, refusal

from configs import base, vrpo_8b, vrpo_sudoku
from llada_jax import cli, sampling
from llada_jax.benchmark import __main__ as command
from llada_jax.benchmark import load, sample, step
from llada_jax.checkpoints import loading
from llada_jax.chips import CHIPS, Chip
from llada_jax.data import batches
from llada_jax.data.synthetic import SyntheticRows
from llada_jax.models import llada
from llada_jax.models.llada import ModelConfig
from llada_jax.tasks import sudoku
from llada_jax.train import cost

ARCH = dict(d_model=32, n_heads=2, n_layers=1, mlp_hidden_size=64, vocab_size=60, mask_token_id=59)

SLOW = pytest.mark.slow


def load_torch_loop():
    pytest.importorskip("torch", reason="PyTorch (the extra benchmark) is not installed")
    from llada_jax.benchmark import torch_loop

    return torch_loop


def tiny(objective="vrpo", **settings):
    c = base.get_config(objective)
    c.model.arch = ARCH
    c.data.row_length = 24
    c.data.batch_rows = 8
    c.optimizer.warmup_steps = 1
    c.optimizer.peak = 1e-9
    if objective == "vrpo":
        c.vrpo.n_t = 2
    with c.unlocked():
        c.update_from_flattened_dict(settings)
    return c


@pytest.mark.parametrize(
    "objective, changes",
    [
        pytest.param("vrpo", {"vrpo.reference": "model", "vrpo.mc_chunk": 1}, marks=SLOW),
        pytest.param("vrpo", {"vrpo.reference": "cached"}, marks=SLOW),
        pytest.param("sft", {}, marks=SLOW),
    ],
    ids=["vrpo-model", "vrpo-cached", "sft"],
)
def test_a_step_on_synthetic_rows(tmp_path, objective, changes, capsys):
    c = tiny(objective, **changes)
    found = step.run(c, str(tmp_path), 2, "")
    assert json.loads(json.dumps(found))["loss"] == found["loss"] and found["devices"] == 8
    assert (
        len(found["step_seconds_all"]) == 2
        and min(found["step_seconds_all"]) <= found["step_seconds"]
    )
    assert found["tokens_per_second"] == pytest.approx(8 * 24 / found["step_seconds"])
    assert found["mfu"] is None and "attention       xla" in capsys.readouterr().out
    if objective == "vrpo":
        # At this rate the policy stays its reference. Random parameters know nothing of 60 tokens.
        assert found["loss"] == pytest.approx(np.log(2) + 0.05 * np.log(60), abs=0.01)


def test_synthetic_rows_are_full_rows_of_whole_pairs():
    rows = SyntheticRows("preference", 4096, 1000, 2)
    batch = next(batches.loader(rows, batch_rows=2, seed=0))
    assert rows.num_segments == 8 and batch.segment_ids.min() == 1
    for segment in range(1, 9):
        inside = batch.segment_ids[0] == segment
        assert inside.sum() == 512 and batch.response_mask[0][inside].sum() == 384
        np.testing.assert_array_equal(batch.positions[0][inside], np.arange(512))
    text = SyntheticRows("text", 4096, 1000, 1)
    assert text.num_segments == 1 and text[0]["response_mask"].all()
    with pytest.raises(ValueError, match="row_length=7 holds no synthetic pair: at least 8"):
        SyntheticRows("preference", 7, 1000, 1)


def test_utilisation_is_the_formula(monkeypatch, tmp_path):
    c = vrpo_8b.get_config()
    c.data.batch_rows = 8
    of_8b = step.prepare(c, str(tmp_path))
    passed = 8 * 4096 * 8 * llada.flops_per_token(of_8b.model.config, 4096)
    assert cost.pass_flops(of_8b) == passed
    assert (
        cost.forward_passes(of_8b)[0] == 6 and cost.forward_passes(of_8b, recomputed=False)[0] == 4
    )
    monkeypatch.setitem(CHIPS, "cpu", Chip("test", passed / 8, 1, 1.0, 1.0))
    found = step.rates(of_8b, 8.0)
    assert found["mfu"] == pytest.approx(4 / 8) and found["hfu"] == pytest.approx(6 / 8)


def test_memory_of_the_step_and_of_the_process():
    """By hand: two arrays come, one takes the place of the first; devices may count more."""
    size = dict(
        argument_size_in_bytes=8,
        output_size_in_bytes=4,
        temp_size_in_bytes=3,
        alias_size_in_bytes=4,
    )
    compiled = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**size))

    def on(*stats):
        return [SimpleNamespace(memory_stats=lambda x=x: x) for x in stats]

    assert step.peak_bytes(on({"peak_bytes_in_use": 20}, {"peak_bytes_in_use": 30}), compiled) == (
        11,
        30,
    )
    assert step.peak_bytes(on(None, {"peak_bytes_in_use": 30}), compiled) == (11, None)


def test_top_costs_of_a_profile(tmp_path, monkeypatch):
    """Events as XLA names them, by hand: the streams of a GPU add up; a CPU has none to rank."""

    def named(name, **fields):
        return type("X", (), {"name": name, **fields})

    def stream(name, **events):
        return named(name, events=[named(k, duration_ns=v) for k, v in events.items()])

    planes = [
        named("/host:CPU", lines=[stream("python", work=1000)]),
        named(
            "/device:GPU:0",
            lines=[
                stream("Stream #13", gemm=60, copy=10),
                stream("Stream #14", gemm=20, fusion=10),
                stream("Steps", all=100),
            ],
        ),
    ]
    (tmp_path / "host.xplane.pb").write_text("")
    monkeypatch.setattr(
        jax.profiler.ProfileData, "from_file", lambda file: named("", planes=planes)
    )
    assert step.top_costs(str(tmp_path), 2) == [("gemm", 0.8), ("copy", 0.1)]
    planes.pop()
    assert step.top_costs(str(tmp_path)) == []


def test_a_loaded_checkpoint_is_what_was_written(tmp_path):
    config = ModelConfig(**ARCH)
    written = load.write_checkpoint(tmp_path / "hf", config, shard_bytes=10_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    count = llada.num_params(config)
    assert written == {"bytes": 2 * sum(count.values()), "largest": 2 * 32 * 64}
    found = load.measure(str(tmp_path / "hf"), "float32", 4, 2)
    # Matrices once over fsdp x tensor, the scales of the norms on all eight devices.
    scales = (2 * config.n_layers + 1) * 32
    assert found["destination"] == 4 * (sum(count.values()) + 7 * scales)


def run(*arguments, **environment):
    command = [sys.executable, "-m", "llada_jax.benchmark", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_commands_refuse_in_one_line(tmp_path):
    for arguments, text in (
        (["step"], "the following arguments are required: --config"),
        (["walk", "--config=configs/vrpo_sudoku.py"], "invalid choice: 'walk'"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and text in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_load_as_a_command(tmp_path):
    out = tmp_path / "load.json"
    done = run(
        "load", "--layers=2", "--width=128", "--vocab=512", f"--folder={tmp_path}", f"--out={out}"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["destination_gb"] == pytest.approx(found["gb"], rel=0.05) and found["devices"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]  # the checkpoint is gone


@pytest.fixture(scope="module")
def beside_pytorch(tmp_path_factory):
    """(plan, work, PyTorch step, our compiled step) of the Sudoku benchmark, made smaller."""
    torch_loop = load_torch_loop()
    c = vrpo_sudoku.get_config()
    c.data.batch_rows, c.vrpo.n_t, c.model.unroll = 8, 2, 1
    prepared = step.prepare(c, str(tmp_path_factory.mktemp("work")))
    with prepared.parallel.use():
        work = step.make_work(prepared)
        trees = [
            (prepared.model.config, jax.device_get(tree))
            for tree in (work.state.params, work.frozen)
        ]
        torch_step = torch_loop.TorchStep(prepared.optimizer, *trees, prepared.settings)
        return prepared, work, torch_step, step.compile_step(prepared, work)[0]


@pytest.mark.slow
def test_pytorch_computes_the_same_loss_and_gradient(beside_pytorch):
    """Our step on packed rows against the PyTorch loop on padded ones, at the same masks."""

    torch_loop = load_torch_loop()
    before = jax.device_get(beside_pytorch[1].state)
    found = torch_loop.check_same(*beside_pytorch)
    assert found["loss_torch"] == pytest.approx(found["loss_jax"], rel=1e-4)
    assert found["grad_norm_torch"] == pytest.approx(found["grad_norm_jax"], rel=1e-3)
    assert abs(found["loss_jax"] - np.log(2) - 0.05 * np.log(12)) > 0.01, "the score is not 0"
    jax.tree.map(np.testing.assert_array_equal, before, beside_pytorch[1].state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutation", ["loser first", "draws apart", "beta", "weights", "sft_weight", "no reference"]
)
def test_another_loss_is_not_the_same(beside_pytorch, mutation, monkeypatch):
    torch_loop = load_torch_loop()
    right = torch_loop.preference_loss

    def wrong(model, reference, rows, masked, weights, settings):
        if mutation == "loser first":
            swap = lambda x: x.unflatten(-2, (-1, 2)).flip(-2).flatten(-3, -2)
            rows, masked, weights = (
                {name: swap(x) for name, x in rows.items()},
                swap(masked),
                swap(weights),
            )
        elif mutation == "draws apart":
            masked = masked.roll(1, 0)
        elif mutation == "weights":
            weights = masked.float()
        elif mutation == "no reference":
            reference = model
        else:
            settings = dataclasses.replace(
                settings, **{mutation: 1.01 * getattr(settings, mutation)}
            )
        return right(model, reference, rows, masked, weights, settings)

    monkeypatch.setattr(torch_loop, "preference_loss", wrong)
    with pytest.raises(
        ValueError, match="do not compute the same (loss|grad_norm) on the same masks"
    ):
        torch_loop.check_same(*beside_pytorch)


@pytest.mark.slow
def test_pytorch_draws_masks_by_the_paper():
    torch_loop = load_torch_loop()
    torch = torch_loop.torch
    response = torch.arange(24).expand(8, 24) >= 8
    masked, weights = torch_loop.draw(response, 64)
    assert not (masked & ~response).any()
    count = masked.sum(-1, keepdim=True)
    assert count.min() >= 1 and torch.allclose(
        weights.sum(-1), response.sum(-1).float().expand(64, -1)
    )
    assert count.float().mean() == pytest.approx(8.5, abs=0.5)  # uniform on 1 .. 16


def test_the_pytorch_loop_says_what_it_does_not_do(tmp_path):
    torch_loop = load_torch_loop()
    plan = step.prepare(tiny(**{"vrpo.kind": "ipo", "vrpo.n_yt": 2}), str(tmp_path))
    with pytest.raises(
        ValueError, match="does not do vrpo.kind='ipo', vrpo.n_yt=2: set vrpo.kind='sigmoid', .*=1"
    ):
        torch_loop.check_supported(plan)


def test_the_sampling_benchmark_is_consistent(capsys):
    flags = "--model=tiny --prompt_length=8 --gen_length=8 --block_length=4 --batch=2 --repeats=2"
    args = cli.parse(command.parser(), ["sample", *flags.split(), "--cache=none"])
    found = sample.run(args, None)
    (case,) = json.loads(json.dumps(found))["cases"]
    assert (case["cache"], case["batch"], case["passes"]) == ("none", 2, 8)
    assert case["passes_per_token"] == 1 and case["torch"] is None
    assert set(case["speedup"].values()) == {1} and case["flops_speedup"] == 1
    # By hand: 8 passes of 16 positions for 8 tokens.
    assert case["flops_per_token"] == 16 * llada.flops_per_token(sample.SIZES["tiny"], 16)
    assert len(case["seconds_all"]) == len(case["first_block_seconds_all"]) == 2
    assert case["tokens_per_second"] == pytest.approx(2 * 8 / case["seconds"])
    assert case["planned_bytes"] > 4 * found["parameters"]
    said = capsys.readouterr().out.splitlines()
    assert "cases: 1, turns: 2" in said[0] and said[-1].split()[3:5] == ["schedule", "none"]
    assert "PyTorch" not in said[-2]  # no column without a number


def test_the_ratios_of_the_sampling_benchmark():
    """By hand: three turns, in which the plain sampler took 8, 9 and 30 s."""
    size = dict.fromkeys(("argument", "output", "temp", "alias"), 1)
    sizes = SimpleNamespace(**{f"{name}_size_in_bytes": n for name, n in size.items()})
    compiled = SimpleNamespace(memory_analysis=lambda: sizes)

    def program(cache, positions, *seconds):
        times, case = sample.Times(), sample.Case(4, 4, 3, "schedule", cache)
        for turn in seconds:
            times.add(turn, 3 * turn, turn / 2, 4, np.arange(24).reshape(3, 8))
        return sample.Program(case, {}, np.zeros((3, 4), int), None, compiled, positions, times)

    plain, dual = program("none", 32, 8.0, 9.0, 30.0), program("dual", 20, 4.0, 3.0, 5.0)
    dual.theirs.add(6.0, 6.0, 1.0, 4, np.arange(24).reshape(3, 8) % 7)
    dual.theirs.add(9.0, 6.0, 1.0, 4, np.arange(24).reshape(3, 8) % 7)
    dual.theirs.add(10.0, 6.0, 1.0, 4, np.arange(24).reshape(3, 8) % 7)
    found = sample.result_of(dual, plain, sample.SIZES["tiny"])
    assert found["seconds"] == 4 and found["first_block_seconds"] == 2
    assert found["tokens_per_second"] == 3 * 4 / 4 and found["planned_bytes"] == 2
    assert found["speedup"] == {"median": 9 / 4, "low": 2, "high": 6, "processor": 9 / 4}
    assert found["flops_speedup"] == 32 / 20
    assert found["torch"]["ratio"] == {"median": 9 / 4, "low": 1.5, "high": 3, "processor": 0.5}
    assert found["torch"]["same_tokens"] == 3 / 12  # 4, 5 and 6 are below 7
    line = sample.table([found]).splitlines()[1].split()
    assert line[:5] == ["4", "4", "3", "schedule", "dual"] and line[-1] == "25%"
    assert line[line.index("2.25") + 3 :][:2] == ["1.60", "141%"]


@pytest.mark.parametrize(
    "cache, positions",
    [("none", 7 * 20), ("prefix", 3 * 20 + 2 * 12 + 8 + 4), ("dual", 3 * 20 + 4 * 4)],
)
def test_positions_that_the_passes_compute(cache, positions):
    """By hand: blocks of 4 tokens after 8, filled in 3, 2 and 2 passes of the slower row."""
    steps = np.zeros((2, 20), int)
    steps[:, 8:] = [[1, 1, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7], [1, 1, 1, 1, 4, 5, 5, 5, 6, 7, 7, 7]]
    case = sample.Case(8, 12, 2, "schedule", cache)
    assert sample.positions_of(case, 4, steps, 7) == positions


def test_the_sampling_benchmark_refuses_in_one_line(capsys):
    for flags, text in (
        ("--cache=disk", "--cache=disk is not one of none, "),
        ("--batch=1,x", "argument --batch: '1,x' is no number and no list N,N,..."),
        ("--batch=0", "--batch=0 must be at least 1"),
        ("--repeats=0", "--repeats=0: at least one turn is timed"),
        ("--threshold=0.9", "--threshold=0.9 has no effect with --commit=schedule"),
        ("--commit=threshold", 'commit="threshold" needs threshold=...'),
        ("--prompt_length=5000", "are 5256 tokens together, the model takes 4096"),
        ("--steps=7", "steps=7 is not a positive multiple of the 8 blocks"),
    ):
        status = 2 if "argument" in text else 1
        said = refusal(capsys, command, "sample", "--model=tiny", *flags.split(), status=status)
        assert text in said


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("threshold", [None, 0.9], ids=["schedule", "threshold"])
def test_pytorch_writes_the_same_tokens_in_as_many_passes(cache, threshold):
    load_torch_loop()
    from llada_jax.benchmark import torch_sampling

    logits_fn, config, words = loading.open_model(f"{ROOT}/llada_jax/assets/sudoku", "float32")
    puzzles = sudoku.records(8, seed=3, split="heldout")
    prompts = np.array([[words.bos_id, *words.encode(r["prompt"])] for r in puzzles], np.int32)
    flags = ["--gen_length=16", "--block_length=4", "--steps=8", f"--cache={cache}"]
    if threshold:
        flags += ["--commit=threshold", f"--threshold={threshold}"]
    args = cli.parse(command.parser(), ["sample", *flags])
    case = sample.Case(17, 16, 8, args.commit[0], cache)
    settings = sample.settings_of(case, args, config)
    program = sample.Program(case, settings, prompts, None)
    model = torch_sampling.TorchLLaDA(config, logits_fn.args[0]["params"])
    sample.time_torch(program, torch_sampling, model)
    ours = sampling.generate(logits_fn, prompts, trace=True, **settings, lockstep=True)
    np.testing.assert_array_equal(program.theirs.tokens, ours.tokens)
    assert program.theirs.passes == int(ours.passes)
