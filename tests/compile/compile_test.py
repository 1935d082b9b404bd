"""Compiling for a TPU pod that is not there: what the compiled step holds, gathers and gives back."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from llada_jax.compile import step as step_lib
from llada_jax.compile import summary, target
from llada_jax.compile.hlo import Program, Shape
from llada_jax.parallel import mesh

# Sizes that tell themselves apart in the compiled program.
D_MODEL, MLP, LAYERS, VOCABULARY, CHUNK, LENGTH = 512, 1408, 6, 8192, 2048, 1152


@pytest.fixture(scope="module")
def config():
    from configs import vrpo_8b

    c = vrpo_8b.get_config()
    c.model.arch = dict(
        d_model=D_MODEL,
        n_heads=8,
        n_layers=LAYERS,
        mlp_hidden_size=MLP,
        vocab_size=VOCABULARY,
        mask_token_id=3,
    )
    c.model.logps_chunk = CHUNK
    c.data.row_length, c.data.batch_rows = LENGTH, 8
    c.vrpo.n_t = 4
    return c.lock()


@pytest.fixture(scope="module")
def topology():
    pytest.importorskip(
        "libtpu", reason="the TPU compiler cannot be installed here (pip install libtpu)"
    )
    return target.topology("v5e:2x4")


@pytest.fixture(scope="module")
def compiled(config, topology):
    """(plan, compiled step, report) for eight chips."""
    plan = step_lib.plan_for(config, topology[0])
    step, seconds = step_lib.compile_step(plan)
    return plan, step, summary.report(plan, "v5e:2x4", topology[1], step, seconds)


@pytest.mark.slow
def test_the_compiled_step(compiled):
    plan, step, _ = compiled
    program = Program(step.as_text())
    chunk = LENGTH * CHUNK * 4
    widest = max(s.nbytes for s in program.arrays() if s.dtype == "f32")
    assert widest <= chunk, "no float32 array beyond positions x one chunk of the vocabulary"

    moved = [
        (kind, s)
        for kind, i, _ in program.collectives()
        for s in i.shapes
        if s.dtype in ("f32", "bf16")
    ]
    assert any(kind in ("all-gather", "collective-permute") for kind, _ in moved)
    for kind, shape in moved:
        # Rows come from an embedding that is split over its width by one all-to-all; nothing else moves positions.
        if kind == "all-to-all":
            assert shape.nbytes <= LENGTH * D_MODEL * 2
            continue
        assert not {LENGTH, 8 * LENGTH} & set(shape.dims), (
            f"an activation is moved by {kind}: {shape}"
        )
        # One matrix of one layer, or one chunk of the head, in bfloat16: never all layers at once.
        assert shape.nbytes <= D_MODEL * max(MLP, CHUNK) * 2, (
            f"more than a layer is gathered: {shape}"
        )

    state_leaves = len(jax.tree.leaves(step_lib.make_abstract(plan)[0]))
    assert program.aliased_outputs == state_leaves, "every donated buffer is used for the new state"
    assert 'custom_call_target="tpu_custom_call"' in step.as_text(), "splash attention is in it"


@pytest.mark.slow
def test_the_report_counts_what_it_must(compiled):
    plan, _, found = compiled
    memory = found["memory"]
    arguments = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(step_lib.make_abstract(plan))
    )
    assert arguments <= memory["arguments"] < 1.2 * arguments + 2**20  # tiles of 8 x 128 round up
    # The new state lies where the old one was: the peak holds neither twice, and some 60 MiB of activations.
    assert arguments + 10 * 2**20 < memory["total"] < arguments + 150 * 2**20
    # Each of 4 draws gathers every layer in five passes: reference, forward, and three of the backward pass.
    layer = (4 * D_MODEL**2 + 3 * D_MODEL * MLP) * 2
    sent = sum(x["bytes"] for x in found["collectives"].values())
    assert 1 < sent / (4 * 5 * LAYERS * layer * 7 / 8) < 2.5
    # 6 passes over 4 draws of a row on each chip of 197 TFLOP/s: 2 FLOPs a weight, 4 a key and width.
    flops = 2 * (LAYERS * layer / 2 + D_MODEL * VOCABULARY) + 4 * LENGTH * D_MODEL * LAYERS
    assert found["implied_seconds"]["compute"] == pytest.approx(
        6 * 4 * LENGTH * flops / 197e12, rel=1e-3
    )


@pytest.mark.slow
def test_out_of_memory_is_one_line_with_the_setting_to_change(config, topology):
    c = config.copy_and_resolve_references()
    c.vrpo.mc_chunk, c.model.remat, c.data.batch_rows, c.model.logps_chunk = (
        4,
        "none",
        256,
        VOCABULARY,
    )
    plan = step_lib.plan_for(c, topology[0])
    with pytest.raises(
        MemoryError, match=r"needs [\d.]+ GiB on a chip that has 15\.75.*vrpo\.mc_chunk=1"
    ) as error:
        step_lib.compile_step(plan)
    assert "\n" not in str(error.value)


def test_data_crosses_slices_and_nothing_else_does(topology):
    devices, _ = target.topology("v5e:2x2", slices=2)
    slices = np.vectorize(lambda device: device.slice_index)(
        mesh.make_mesh(2, 2, 2, devices).devices
    )
    assert (slices == np.array([0, 1])[:, None, None]).all()
    with pytest.raises(ValueError, match="mesh.data=1 is no multiple of the 2 slices"):
        mesh.make_mesh(1, -1, 1, devices)


@pytest.mark.slow
def test_the_gradient_crosses_slices_once(topology):
    """By hand: of every float32 parameter each chip sends the part of its slice that it holds, and little else."""
    from configs import base

    c = base.get_config("sft")
    c.model.arch = dict(
        d_model=256, n_heads=4, n_layers=2, mlp_hidden_size=512, vocab_size=1024, mask_token_id=3
    )
    c.data.row_length, c.data.batch_rows = 128, 8
    c.mesh.data, c.mesh.fsdp = 2, 4
    devices, chip = target.topology("v5e:2x2", slices=2)
    plan = step_lib.plan_for(c.lock(), devices)
    found = summary.report(plan, "v5e:2x2", chip, *step_lib.compile_step(plan))
    params = jax.tree.leaves(step_lib.make_abstract(plan)[0].params)
    held = sum(np.prod(x.sharding.shard_shape(x.shape)) * 4 for x in params)
    assert held <= found["between_slices"]["bytes"] < 1.2 * held
    # Two NICs of 100 Gbit/s for a host of eight chips.
    took = found["between_slices"]["bytes"] / (2 * 100e9 / 8 / 8)
    assert (
        found["implied_seconds"]["between slices"] == pytest.approx(took)
        and found["binds"] == "between slices"
    )
    text = summary.as_text(found)
    assert "8 x TPU v5e (2 slices of v5e:2x2)" in text and "\nbetween slices  " in text


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:2by2", "H100:2x2"])
def test_an_unknown_topology_is_an_error(name):
    with pytest.raises(ValueError, match="is not GENERATION:AxB"):
        target.topology(name)


@pytest.mark.slow
def test_the_command_line(topology):
    command = [
        sys.executable,
        "-m",
        "llada_jax.compile",
        "--config=configs/vrpo_sudoku.py",
        "--config.model.unroll=1",
    ]
    command += ["--topology=v5e:2x2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chips"] == 4 and found["attention"] == "xla" and found["memory"]["total"] > 0
    done = subprocess.run(
        [*command, "--config.mesh.tensor=3"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode and done.stderr.strip().splitlines()[-1].startswith("error: mesh sizes")


@pytest.mark.slow
def test_the_hardest_preset_fits_its_pod(topology):
    """LLaDA 8B by VRPO on 16 chips of 16 GB; 14 GiB is what larger chips are held to as well, on the same mesh."""
    command = [
        sys.executable,
        "-m",
        "llada_jax.compile",
        "--config=configs/vrpo_8b.py:v5e-16",
        "--topology=v5e:4x4",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [*command, "--json"], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chips"] == 16 and found["attention"] == "splash" and found["draws"] == 8
    assert found["memory"]["total"] < 14 * 2**30


def test_a_plan_to_compile_needs_no_data_and_leaves_the_config(config):
    config = config.copy_and_resolve_references()
    config.data.train = config.data.heldout = "jsonl:nowhere"
    config.eval.variance_repeats = 3
    before = config.to_dict()
    assert step_lib.plan_for(config, jax.devices()).num_steps > 0
    assert config.to_dict() == before


PROGRAM = """HloModule m, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, may-alias) }, num_partitions=8

%fused (p0: f32[8,4], p1: s32[]) -> f32[4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,4}
}

%body (b: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %b = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%b), index=1
  %two = s32[] constant(2)
  %row = f32[1,4]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %gather = bf16[16,4]{1,0:S(1)} all-gather(%row), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %sum = (f32[8,4]{1,0}, f32[2]{0}) all-reduce(%x, %x), channel_id=2, replica_groups={}, to_apply=%add
  %copy = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]) copy-start(%x)
  %send = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1}}
  %next = s32[] add(%i, %two)
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%next, %x)
}

%condition (c: (s32[], f32[8,4])) -> pred[] {
  %c = (s32[], f32[8,4]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%n, %ten), direction=LT
}

ENTRY %main (a: f32[8,4]) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  ROOT %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body
}
"""


CALLS = """HloModule m

%row (a: f32[8,4], r: f32[1,4], i: s32[]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %r = f32[1,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %update = f32[8,4]{1,0} dynamic-update-slice(%a, %r, %i, %i)
}

%called (x: f32[8,4], y: f32[1,4], j: s32[]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = f32[1,4]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %send = (f32[1,4]{1,0}, u32[], token[]) send(%y, %j), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %written = f32[8,4]{1,0} dynamic-update-slice(%x, %y, %j, %j)
}

%fusing (u: f32[8,4], v: f32[1,4], k: s32[]) -> f32[8,4] {
  %u = f32[8,4]{1,0} parameter(0)
  %v = f32[1,4]{1,0} parameter(1)
  %k = s32[] parameter(2)
  ROOT %fused = f32[8,4]{1,0} fusion(%u, %v, %k), kind=kLoop, calls=%row
}

%body (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  ROOT %once = f32[8,4]{1,0} call(%b, %b, %b), to_apply=%called
}

%condition (c: f32[8,4]) -> pred[] {
  %c = f32[8,4]{1,0} parameter(0)
  ROOT %never = pred[] constant(false)
}

ENTRY %main (s: f32[8,4], t: f32[1,4], n: s32[]) -> f32[8,4] {
  %s = f32[8,4]{1,0} parameter(0)
  %t = f32[1,4]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %loop = f32[8,4]{1,0} while(%s), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %either = f32[8,4]{1,0} conditional(%n, %s, %s), branch_computations={%called, %fusing}
}
"""


def test_calls_branches_and_updates_in_place():
    """Counted by hand: the loop runs three times; of a choice, both branches count."""
    program = Program(CALLS)
    assert program.times == {"main": 1, "body": 3, "called": 4, "fusing": 1}
    assert program.between_slices(2) == (4, 4 * 16)
    # A send reads its row; an update reads and writes a row, and fused it reads that and the number besides.
    assert program.hbm_bytes() == 4 * (16 + 2 * 16) + (2 * 16 + 16 + 4)


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,2,4,6},{1,3,5,7}}", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("{}", 8),
        ("mesh['a'=1,'b'=4,'c'=2] {'b'}", 4),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'a','b','c'}", 8),
    ],
)
def test_groups_of_a_collective(groups, size):
    text = PROGRAM.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
    gather = next(i for kind, i, _ in Program(text).collectives() if kind == "all-gather")
    assert Program(text).group_size(gather) == size


SLICE = """HloModule m, num_partitions=4

%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %sum = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[4]{0} dynamic-slice(%sum, %id), dynamic_slice_sizes={4}
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  %part = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  %token = token[] after-all()
  %send = (f32[4]{0}, u32[], token[]) send(%part, %token), channel_id=2, is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[4]{0}, u32[], token[]) recv(%token), channel_id=3, is_host_transfer=true, frontend_attributes={\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2
  %got = (f32[4]{0}, token[]) recv-done(%recv), channel_id=3
  %whole = f32[4]{0} get-tuple-element(%got), index=0
  ROOT %all = f32[16]{0} all-gather(%whole), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


@pytest.mark.parametrize(
    "form, slices, sent",
    [
        ("ALL_REDUCE", 2, 16),
        ("ALL_REDUCE", 4, 24),
        ("ALL_GATHER", 4, 48),
        ("REDUCE_SCATTER", 4, 12),
        ("ALL_TO_ALL", 2, 8),
    ],
)
def test_what_crosses_slices(form, slices, sent):
    """Counted by hand: four floats, by rings; the collectives within the slice are those of its four chips."""
    program = Program(SLICE.replace("ALL_REDUCE", form))
    assert program.between_slices(slices) == (1, sent)
    # The all-reduce of which a quarter is kept is a reduce-scatter; that it shares a channel number means nothing.
    assert program.collective_bytes() == {
        "reduce-scatter": (1, 64 * 3 // 4),
        "all-gather": (1, 64 * 3 // 4),
    }
    # The fusion reads 64 bytes and writes 16, 16 are sent and 16 (and a number) received, 16 are read, 64 written.
    assert program.hbm_bytes() == 64 + 16 + 16 + (16 + 4) + 16 + 64


def test_a_transfer_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="unknown transfer between slices, GOSSIP, in send"):
        Program(SLICE.replace("ALL_REDUCE", "GOSSIP")).between_slices(2)


def test_reading_a_program():
    """Counted by hand: five turns (10 by twos), 3/4 of 128 bytes gathered and one row read and written in each."""
    program = Program(PROGRAM)
    assert program.aliased_outputs == 2
    assert program.times == {"main": 1, "body": 5}
    assert program.collective_bytes() == {
        "all-gather": (5, 5 * 16 * 4 * 2 * 3 // 4),
        "all-reduce": (5, 5 * 2 * (32 + 2) * 4 * 7 // 8),
        "collective-permute": (5, 5 * 16),
    }
    # The fusion reads a row and the counter and writes a row, the gather reads that row (its result stays on the
    # chip), the all-reduce reads two arrays and writes two, the copy only reads (its end is on the chip), the permute
    # reads and writes a row, the counter is read with its step and written, and the condition is not counted.
    assert program.hbm_bytes() == 5 * (
        (16 + 4 + 16) + 16 + (128 + 8 + 2 * 128) + 128 + 2 * 16 + (4 + 4 + 4)
    )
    assert Shape("bf16", (16, 4), in_hbm=False) not in program.arrays()
