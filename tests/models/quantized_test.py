"""Int8 weights: rounding, the product, loading, and what is refused."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT, refusal, run_command
from jax.sharding import PartitionSpec as P

import llada_jax
from llada_jax import convert
from llada_jax.checkpoints import published
from llada_jax.models import boxed_shapes, quantized
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.models.quantized import Int8Kernel
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.sampling import __main__ as sampling
from llada_jax.train import state

CONFIG = ModelConfig(
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    n_layers=2,
    vocab_size=96,
    mask_token_id=95,
    mlp_hidden_size=48,
    init_std=0.2,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 95, (2, 12)))


@functools.cache
def weights(tying=False):
    """(model, its parameters, quantised, and these as an ordinary tree of float32)."""
    model = LLaDA(dataclasses.replace(CONFIG, weight_tying=tying), logps_chunk=40)
    params = jax.jit(lambda key: nn.unbox(model.init(key, TOKENS)))(jax.random.key(0))
    params = params["params"]
    small = jax.tree_util.tree_map_with_path(
        lambda path, x: quantized.quantize(x) if path[-1].key == "kernel" else x, params
    )
    wide = jax.tree.map(
        lambda x: x.values * x.scale[..., None, :] if isinstance(x, Int8Kernel) else x,
        small,
        is_leaf=lambda x: isinstance(x, Int8Kernel),
    )
    return model, params, small, wide


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_moves_by_half_a_scale_at_most(dtype):
    # Truth: the bound of rounding, and float64.
    kernel = jax.random.normal(jax.random.key(0), (3, 40, 16), dtype) * 0.02
    kernel = kernel.at[1, :, 4].set(0).at[2, 7, 5].set(3)
    found = quantized.quantize(kernel)
    exact, values, scale = (np.float64(x) for x in (kernel, found.values, found.scale))
    assert (np.abs(exact - values * scale[:, None]) <= scale[:, None] * (0.5 + 1e-5)).all()
    largest = np.abs(values).max(1)
    assert (largest == np.where(np.abs(exact).max(1) > 0, 127, 0)).all()
    np.testing.assert_allclose(scale * 127, np.abs(exact).max(1), rtol=1e-6, atol=1e-30)


def outputs(model):
    """Compiles logits, keys, values, log-probabilities and a gradient from a model's parameters."""

    def loss(embedding, params):
        params = {**params, "wte": {"embedding": embedding}}
        return model.apply({"params": params}, TOKENS, TOKENS, method="token_logps").sum()

    @jax.jit
    def compute(params):
        positions = jnp.broadcast_to(jnp.arange(12), TOKENS.shape)
        args = TOKENS, None, positions, model.init_cache(*TOKENS.shape)
        cached, cache = model.apply({"params": params}, *args, method="with_cache")
        gradient = jax.value_and_grad(loss)(params["wte"]["embedding"], params)
        return cached, cache.keys, cache.values, *gradient

    return compute


@pytest.mark.slow
@pytest.mark.parametrize("tying", [False, True])
def test_all_outputs_are_those_of_the_dequantised_weights(tying):
    """Truth: the ordinary model with float32 weights values * scale.

    The head is split by a chunk of 40 of 96 entries. With weight tying the embedding is the head,
    and stays as it is.
    """
    model, params, small, wide = weights(tying)
    assert ("ff_out" in small) is not tying
    assert small["wte"]["embedding"].dtype == jnp.float32
    compute = outputs(model)
    found, expected, exact = compute(small), compute(wide), compute(params)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    assert 1e-3 < np.abs(found[0] - exact[0]).max() < 0.1 * np.abs(exact[0]).max()


def test_int8_is_what_the_loop_over_layers_reads():
    """The compiled program has no wide array of all layers, and the layers are not copied."""
    model, _, small, _ = weights()
    text = jax.jit(model.apply).lower({"params": small}, TOKENS).compile().as_text()
    assert re.search(r"s8\[2,32,48\]", text)
    assert not re.search(r"(f32|s32|bf16)\[2,(32,48|48,32|32,32|32,16)\]", text)
    assert not re.search(r"= s8\[2,\d+,\d+\]\S* copy\(", text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights in a Hugging Face style folder and in a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("models")
    model, params, _, _ = weights()
    published.export(model, params, folder / "hf")
    convert.import_folder(folder / "hf", folder / "ours")
    return folder / "hf", folder / "ours"


def test_loading_quantises_every_matrix_alone(folders):
    _, _, small, _ = weights()
    for path in folders:
        model, params = llada_jax.load(path, quantize="int8")
        jax.tree.map(np.testing.assert_array_equal, params, small)
        assert model.dtype == jnp.float32
    model, params = llada_jax.load(folders[1], "bfloat16", quantize="int8")
    # The scales are those of the weights in the file.
    jax.tree.map(
        np.testing.assert_array_equal, params["blocks"]["ff_proj"], small["blocks"]["ff_proj"]
    )
    assert model.dtype == params["wte"]["embedding"].dtype == jnp.bfloat16


def test_values_are_sharded_like_the_kernel_and_scales_like_its_outputs(folders):
    model, _, small, _ = weights()
    mesh = mesh_lib.make_mesh(2, 2, 2)
    shardings = nn.unbox(mesh_lib.shardings(mesh, boxed_shapes(CONFIG)))
    for path in folders:
        _, params = llada_jax.load(path, shardings=shardings, quantize="int8")
        jax.tree.map(np.testing.assert_array_equal, params, small)
        up, down = params["blocks"]["up_proj"]["kernel"], params["blocks"]["ff_out"]["kernel"]
        assert up.values.sharding.spec == P(None, "fsdp", "tensor")
        assert up.scale.sharding.spec == P(None, "tensor")
        assert down.values.sharding.spec == P(None, "tensor", "fsdp")
        assert down.scale.sharding.spec == P(None, "fsdp")
    expected = jax.jit(model.apply)({"params": small}, TOKENS)
    with mesh_lib.use(mesh):
        found = jax.jit(model.apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_what_int8_cannot_do_is_one_line(folders, tmp_path):
    model, _, small, _ = weights()
    with pytest.raises(ValueError, match="quantize='int4' is not int8; leave it for none"):
        llada_jax.load(folders[0], quantize="int4")
    with pytest.raises(ValueError, match="^the parameters are quantised, and int8 has no gradient"):
        state.init_state(model, optax.sgd(1), mesh_lib.make_mesh(), jax.random.key(0), small)
    with pytest.raises(ValueError, match="are quantised: load them without quantize to export"):
        published.export(model, small, tmp_path / "out")


@pytest.mark.slow
def test_the_command_takes_it(capsys, tmp_path):
    puzzles = ["0010020000400300", "0001040240003010"]
    flags = [f"--model={ROOT / 'llada_jax/assets/sudoku'}", "--template=plain", "--steps=8"]
    flags += ["--gen_length=16", "--block_length=16", *(f"--prompt={puzzle}" for puzzle in puzzles)]
    run_command(sampling, *flags)
    plain = capsys.readouterr().out
    run_command(sampling, *flags, "--quantize=int8", f"--out={tmp_path / 'out.jsonl'}")
    lines = (tmp_path / "out.jsonl").read_text()
    assert '"quantize": "int8"' in lines and all(text in lines for text in plain.split())
    said = refusal(capsys, sampling, *flags, f"--out={tmp_path / 'out.jsonl'}")
    assert "is not of these prompts and settings" in said
