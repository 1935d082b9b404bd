"""Compiling the sampler: no copies of the cache, int8 read as int8, and the cost of its passes."""

import math

import jax
import jax.numpy as jnp
import pytest
from helpers import refusal

from configs import vrpo_8b
from llada_jax.chips import CHIPS
from llada_jax.compile import __main__ as command
from llada_jax.compile import passes, sample, target
from llada_jax.compile.hlo import Program
from llada_jax.compile.sample import Sampler
from llada_jax.compile.step import plan_for
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.models.quantized import Int8Kernel
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.sampling.settings import make

DUAL = dict(gen_length=256, block_length=32, commit="threshold", threshold=0.9, cache="dual")


def config_of(**mesh):
    config = vrpo_8b.get_config()
    config.mesh.update(mesh)
    return config.lock()


def plain_sampler(batch_size=2, quantize=None, mesh=(1, 1, 1), **settings):
    """A sampler for devices of this machine, which is not compiled."""
    config = ModelConfig(**vrpo_8b.LLADA_8B)
    devices = jax.devices()[: math.prod(mesh)]
    settings = {
        "gen_length": 256,
        "block_length": 32,
        "commit": "threshold",
        "threshold": 0.9,
    } | settings
    return Sampler(
        LLaDA(config, jnp.bfloat16, jnp.bfloat16),
        mesh_lib.make_mesh(*mesh, devices),
        batch_size,
        512,
        quantize,
        make(True, mask_id=config.mask_token_id, **settings),
    )


def test_flops_and_weights_of_a_pass_of_llada_8b():
    """By hand: 6.98e9 weights in the layers, 0.52e9 in the head; 4 FLOPs a key and width."""
    layers, head = 32 * (4 * 4096**2 + 3 * 4096 * 12288), 4096 * 126464
    sampler = plain_sampler(cache="dual")
    each = 2 * layers + 4 * 768 * 4096 * 32
    assert passes.pass_flops(sampler, 768) == 2 * (768 * each + 32 * 2 * head)
    assert passes.pass_flops(sampler, 32) == 2 * (32 * each + 32 * 2 * head)
    assert passes.pass_flops(plain_sampler(cfg_scale=1.0), 768) == 4 * (768 * each + 32 * 2 * head)
    norms = 65 * 4096
    assert passes.weight_bytes(sampler) == 2 * (layers + head + norms)
    # Over two by two chips a chip has a quarter of each matrix, half of the scales of its outputs
    # (tensor, or fsdp of what comes back to d_model), and all norms.
    scales = 32 * (3 * 4096 + 2 * 12288 + 2 * 4096) + 126464
    small = plain_sampler(4, "int8", (1, 2, 2), cache="dual")
    assert passes.weight_bytes(small) == (layers + head) // 4 + 4 * scales // 2 + 2 * norms
    assert small.cache_shape() == (32, 2, 16, 768, 128)
    kernel = sample.abstract_params(small)["blocks"]["ff_proj"]["kernel"]
    assert isinstance(kernel, Int8Kernel) and kernel.values.dtype == jnp.int8
    assert sample.abstract_params(small)["wte"]["embedding"].dtype == jnp.bfloat16


def test_tokens_per_second():
    """By hand: eight blocks of 32 tokens; at 4 a pass a block takes 8 passes."""
    rate = passes.tokens_per_second
    assert rate(plain_sampler(), {768: 0.5}, 4) == pytest.approx(2 * 256 / (8 * 8 * 0.5))
    seconds = {768: 0.5, 32: 0.1}
    dual = plain_sampler(cache="dual")
    assert rate(dual, seconds, 4) == pytest.approx(2 * 256 / (8 * (0.5 + 7 * 0.1)))
    often = plain_sampler(cache="dual", refresh=2)
    assert rate(often, seconds, 4) == pytest.approx(2 * 256 / (8 * (4 * 0.5 + 4 * 0.1)))
    # The prefix cache has the windows 256 (blocks 0 to 3), 128 (4, 5), 64 and 32.
    seconds = {768: 0.5, 256: 0.4, 128: 0.3, 64: 0.2, 32: 0.1}
    assert rate(plain_sampler(cache="prefix"), seconds, 4) == pytest.approx(
        2 * 256 / (8 * 0.5 + 7 * (4 * 0.4 + 2 * 0.3 + 0.2 + 0.1))
    )


def test_one_chip_is_a_topology():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (pip install libtpu)")
    for name, count in (("v6e:1x1", 1), ("v5e:1x2", 2), ("v5p:1x1x1", 1)):
        devices, chip = target.topology(name)
        assert len(devices) == count and chip is CHIPS[name[:3]]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size=2"], "--batch_size is read with --sample only"),
        (["--cache=dual"], "--cache is read with --sample only"),
        (["--sample", "--tokens_per_pass=2"], "--commit=schedule has gen_length / steps"),
        (
            ["--sample", "--tokens_per_pass=64", "--commit=threshold", "--threshold=1"],
            "from 1 to --block_length=32",
        ),
    ],
)
def test_flags_without_effect_are_one_line(flags, message, capsys):
    flags = ["--config=configs/vrpo_8b.py", "--topology=v6e:1x1", *flags]
    assert message in refusal(capsys, command, *flags)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(batch_size=0), "--batch_size=0: at least 1"),
        (dict(batch_size=3), "--batch_size=3 is not a multiple of data x fsdp = 2"),
        (dict(prompt_length=4000), "are 4256 tokens, the model takes 4096"),
        (dict(threshold=None), 'commit="threshold" needs threshold'),
        (
            dict(cache="selective", refresh=2, refresh_prompt=2, transfer_ratio=0.5),
            "--cache=selective computes parts of each layer",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change, message):
    plan = plan_for(config_of(fsdp=2, tensor=1), jax.devices()[:2])
    with pytest.raises(ValueError, match=message) as error:
        sample.sampler_of(plan, **{**DUAL, "batch_size": 2, "prompt_length": 8, **change})
    assert "\n" not in str(error.value)


NESTED = """HloModule m

%retile (r: s8[6,8,4]) -> s8[6,8,4] {
  %r = s8[6,8,4]{2,1,0} parameter(0)
  ROOT %tiles = s8[6,8,4]{2,1,0} copy(%r)
}

%slice (a: s8[6,8,4], i: s32[]) -> s8[8,4] {
  %a = s8[6,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %same = s8[6,8,4]{2,1,0} fusion(%a), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retile
  %one = s8[1,8,4]{2,1,0} dynamic-slice(%same, %i, %i, %i), dynamic_slice_sizes={1,8,4}
  ROOT %flat = s8[8,4]{1,0} bitcast(%one)
}

%product (b: s8[6,8,4], j: s32[], x: bf16[2,8]) -> f32[2,4] {
  %b = s8[6,8,4]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %x = bf16[2,8]{1,0} parameter(2)
  %layer = s8[8,4]{1,0} fusion(%b, %j), kind=kLoop, calls=%slice
  ROOT %y = f32[2,4]{1,0} convolution(%x, %layer), dim_labels=bf_io->bf
}

%rows (t: bf16[100,8], k: s32[2]) -> bf16[2,8] {
  %t = bf16[100,8]{1,0} parameter(0)
  %k = s32[2]{0} parameter(1)
  ROOT %taken = bf16[2,8]{1,0} gather(%t, %k), offset_dims={1}, slice_sizes={1,8}
}

%body (p: (s32[], s8[6,8,4], bf16[100,8])) -> (s32[], s8[6,8,4], bf16[100,8]) {
  %p = (s32[], s8[6,8,4]{2,1,0}, bf16[100,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %w = s8[6,8,4]{2,1,0} get-tuple-element(%p), index=1
  %table = bf16[100,8]{1,0} get-tuple-element(%p), index=2
  %ids = s32[2]{0} constant({1, 2})
  %h = bf16[2,8]{1,0} fusion(%table, %ids), kind=kLoop, calls=%rows
  %out = f32[2,4]{1,0} fusion(%w, %n, %h), kind=kOutput, calls=%product
  %moved = bf16[100,8]{0,1} copy(%table)
  ROOT %next = (s32[], s8[6,8,4]{2,1,0}, bf16[100,8]{1,0}) tuple(%n, %w, %moved)
}

%condition (c: (s32[], s8[6,8,4], bf16[100,8])) -> pred[] {
  %c = (s32[], s8[6,8,4]{2,1,0}, bf16[100,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: (s32[], s8[6,8,4], bf16[100,8])) -> (s32[], s8[6,8,4], bf16[100,8]) {
  %a = (s32[], s8[6,8,4]{2,1,0}, bf16[100,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], s8[6,8,4]{2,1,0}, bf16[100,8]{1,0}) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""


def test_slices_in_nested_fusions_and_what_writes_a_whole_array():
    """By hand: a product reads one of six layers, a lookup two rows of a hundred."""
    program = Program(NESTED)
    product = 8 * 4 + 4 + 2 * 8 * 2 + 2 * 4 * 4
    lookup = 2 * 8 * 2 + 2 * 4 + 2 * 8 * 2
    copy = 2 * 100 * 8 * 2
    assert program.part("body").hbm_bytes() == product + lookup + copy
    assert program.hbm_bytes() == 6 * (product + lookup + copy)
    assert [i.name for i in program.writers((100, 8))] == ["moved"]
    assert program.writers((6, 8, 4)) == [] and program.part("body").writers((100, 8)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, batch_size, mesh, quantize",
    [
        ("v6e:1x1", 4, {}, None),
        ("v5e:1x1", 4, {}, "int8"),
        ("v5e:2x2", 4, dict(fsdp=1, tensor=4), None),
        ("v5e:2x2", 4, dict(fsdp=2, tensor=2), "int8"),
    ],
)
def test_the_compiled_loop_of_llada_8b(name, batch_size, mesh, quantize):
    """A pass copies neither the cache nor the weights, and a window pass reads both once."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (pip install libtpu)")
    devices, chip = target.topology(name)
    plan = plan_for(config_of(**mesh), devices)
    settings = dict(batch_size=batch_size, prompt_length=512, quantize=quantize, **DUAL)
    sampler = sample.sampler_of(plan, **settings)
    loop, seconds = sample.compile_sampler(sampler)
    found, program = (
        passes.report(sampler, name, chip, loop, seconds, None),
        Program(loop.as_text()),
    )

    fsdp, tensor = plan.mesh.shape["fsdp"], plan.mesh.shape["tensor"]
    cache = (32, batch_size // fsdp, 32 // tensor, 768, 128)
    assert sampler.cache_shape() == cache and found["cache_copies"] == 0
    assert any(s.dims == cache for s in program.arrays()), "each chip holds its rows and heads"
    weights = jax.tree.leaves(sample.abstract_params(sampler))
    held = [x.sharding.shard_shape(x.shape) for x in weights]
    arrays = [i for name in program.times for i in program.computations[name].values()]
    for i in arrays:
        if i.shapes and i.shapes[0].dims in held and len(i.shapes[0].dims) == 3:
            assert i.shapes[0].dtype == ("s8" if quantize else "bf16"), i.text
            assert i.opcode in ("parameter", "get-tuple-element", "bitcast"), i.text

    assert [one["positions"] for one in found["passes"]] == [768, 32]
    if fsdp == 1:  # otherwise each chip also gathers the weights of the others
        least = found["weight_bytes"] + found["memory"]["cache"]
        assert least < found["passes"][1]["hbm_bytes"] < 1.1 * least
    arguments = sum(
        math.prod(shape) * x.dtype.itemsize for shape, x in zip(held, weights, strict=True)
    )
    memory = found["memory"]
    assert arguments <= memory["arguments"] < 1.01 * arguments
    assert memory["total"] < arguments + memory["cache"] + (2**29 if fsdp == 1 else 2**31)
    text = passes.as_text(found)
    assert "window pass     32 positions a row" in text and "(Fast-dLLM)" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(cache="prefix", commit="threshold", threshold=0.9),
        dict(cache="delayed", steps=64),
        dict(cache="dual", commit="wino", revoke="wino", threshold=0.6, threshold_back=0.9),
    ],
    ids=["prefix", "delayed", "wino"],
)
def test_no_rule_copies_the_cache(settings):
    """Windows that keep some of their positions, scattered ones, and those with a shadow."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (pip install libtpu)")
    devices, chip = target.topology("v6e:1x1")
    lengths = dict(batch_size=2, prompt_length=704, gen_length=64, block_length=32)
    sampler = sample.sampler_of(plan_for(config_of(), devices), **lengths, **settings)
    found = passes.report(sampler, "v6e:1x1", chip, *sample.compile_sampler(sampler), None)
    assert found["cache_copies"] == 0
    # Of the cache, a pass reads and writes some copies of a layer, not of all layers.
    most = found["weight_bytes"] + 5 * found["memory"]["cache"]
    assert all(one["hbm_bytes"] < most for one in found["passes"][1:])


@pytest.mark.slow
def test_a_sampler_that_does_not_fit_is_one_line():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (pip install libtpu)")
    plan = plan_for(config_of(), target.topology("v5e:1x1")[0])
    sampler = sample.sampler_of(plan, batch_size=4, prompt_length=512, **DUAL)
    with pytest.raises(
        MemoryError, match=r"sampler needs [\d.]+ GiB on a chip that has 15\.75.*--quantize=int8"
    ) as error:
        sample.compile_sampler(sampler)
    assert "\n" not in str(error.value)
