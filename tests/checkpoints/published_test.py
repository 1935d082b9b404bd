"""Published weights: the authors' outputs, a NumPy LLaDA in float64, and conversion both ways."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import refusal, run_command
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import llada_jax
from llada_jax import convert
from llada_jax.checkpoints import loading, published
from llada_jax.models.llada import ROWS, LLaDA, ModelConfig
from llada_jax.parallel import mesh as mesh_lib

GQA = {
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 3,
    "mlp_hidden_size": 48,
    "vocab_size": 60,
    "embedding_size": 64,
    "mask_token_id": 59,
    "rope_theta": 10_000.0,
    "max_sequence_length": 64,
}


def numpy_weights(config, dtype=np.float32, seed=0):
    """Random weights under the published names, [out, in]."""
    rng = np.random.default_rng(seed)
    d, mlp, kv = config["d_model"], config["mlp_hidden_size"], config["n_kv_heads"]
    kv = d // config["n_heads"] * kv
    shapes = {"wte": (config["embedding_size"], d), "ln_f": (d,)}
    if not config.get("weight_tying"):
        shapes["ff_out"] = (config["embedding_size"], d)
    block = {
        "attn_norm": (d,),
        "q_proj": (d, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "attn_out": (d, d),
    }
    block |= {"ff_norm": (d,), "ff_proj": (mlp, d), "up_proj": (mlp, d), "ff_out": (d, mlp)}
    for i in range(config["n_layers"]):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {
        f"model.transformer.{k}.weight": rng.normal(0, 0.3, shape).astype(dtype)
        for k, shape in shapes.items()
    }


def numpy_llada(config, weights, tokens):
    """Logits [length, embedding_size] of one row in float64, from the published definition."""
    w = {
        name.removeprefix("model.transformer.").removesuffix(".weight"): np.float64(x)
        for name, x in weights.items()
    }
    heads, kv_heads = config["n_heads"], config["n_kv_heads"]
    size, length = config["d_model"] // heads, len(tokens)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def rope(x):  # [length, size]
        angle = np.arange(length)[:, None] * config["rope_theta"] ** (-np.arange(0, size, 2) / size)
        first, second = x[:, : size // 2], x[:, size // 2 :]
        sin, cos = np.sin(angle), np.cos(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = w["wte"][tokens]
    for i in range(config["n_layers"]):
        b = {
            name: w[f"blocks.{i}.{name}"]
            for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_out")
        }
        h, mixed = norm(x, w[f"blocks.{i}.attn_norm"]), []
        for head in range(heads):
            group = head // (heads // kv_heads)
            q = rope(h @ b["q_proj"][head * size : (head + 1) * size].T)
            k = rope(h @ b["k_proj"][group * size : (group + 1) * size].T)
            v = h @ b["v_proj"][group * size : (group + 1) * size].T
            scores = np.exp(q @ k.T / np.sqrt(size))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(mixed, -1) @ b["attn_out"].T
        h = norm(x, w[f"blocks.{i}.ff_norm"])
        gate = h @ w[f"blocks.{i}.ff_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"blocks.{i}.up_proj"].T)) @ b["ff_out"].T
    return norm(x, w["ln_f"]) @ w["wte" if config.get("weight_tying") else "ff_out"].T


def write_folder(folder, config, weights, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {name: f"part-{k % shards}.safetensors" for k, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file(
            {name: weights[name] for name in weights if weight_map[name] == file}, folder / file
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def all_weights(folder):
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def assert_same_weights(found, wanted):
    assert sorted(found) == sorted(wanted)
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape, name
        assert found[name].tobytes() == x.tobytes(), name


def test_golden_logits(golden):
    outputs = np.load(golden / "golden.npz")
    model, params = llada_jax.load(golden / "policy")
    tokens, mask = outputs["logits_tokens"], outputs["logits_padded_attention_mask"]
    logits = model.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, outputs["logits"], rtol=0, atol=2e-4)
    padded = model.apply({"params": params}, jnp.asarray(tokens), attention_mask=jnp.asarray(mask))
    kept = mask.astype(bool)
    np.testing.assert_allclose(padded[kept], outputs["logits_padded"][kept], rtol=0, atol=2e-4)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("weight_tying", [False, True])
def test_grouped_query_attention_is_numpys(tmp_path, shards, weight_tying):
    config = {**GQA, "weight_tying": weight_tying}
    weights = numpy_weights(config)
    model, params = loading.load(write_folder(tmp_path / "hf", config, weights, shards))
    tokens = np.random.default_rng(1).integers(0, 60, 24)
    logits = model.apply({"params": params}, jnp.asarray(tokens)[None])[0]
    np.testing.assert_allclose(logits, numpy_llada(config, weights, tokens), rtol=1e-4, atol=1e-4)
    assert model.config.n_kv_heads == 2 and ("ff_out" in params) is not weight_tying


def test_the_table_fills_every_parameter_once():
    paths = [row.path for row in ROWS]
    assert sorted(paths) == sorted(
        published._flat(published.param_shapes(ModelConfig(**GQA)))
    ) and len(set(paths)) == len(paths)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("weight_tying", [False, True])
def test_round_trip_is_exact(tmp_path, dtype, weight_tying):
    config = {**GQA, "weight_tying": weight_tying}
    weights = numpy_weights(config, dtype)
    model, params = loading.load(write_folder(tmp_path / "hf", config, weights, 2))
    assert model.dtype == model.param_dtype == params["wte"]["embedding"].dtype == dtype
    published.export(model, params, tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    published.export(model, params, tmp_path / "many", max_shard_bytes=16_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in weights.values())
    assert all((tmp_path / "many" / file).stat().st_size < 20_000 for file in files)
    for folder in ("one", "many"):
        assert_same_weights(all_weights(tmp_path / folder), weights)
        again, _ = loading.load(tmp_path / folder)
        assert again.config == model.config and again.dtype == dtype
    assert not list(tmp_path.glob(".*"))


def test_dtype_casts_and_mixed_files_take_the_widest(tmp_path):
    weights = numpy_weights(GQA)
    folder = write_folder(tmp_path / "hf", GQA, weights)
    model, params = loading.load(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
        np.dtype(jnp.bfloat16)
    } and model.dtype == jnp.bfloat16
    wte = weights["model.transformer.wte.weight"]
    np.testing.assert_array_equal(params["wte"]["embedding"], wte.astype(ml_dtypes.bfloat16))
    published.export(model, params, tmp_path / "wide", dtype=np.float32)
    assert all_weights(tmp_path / "wide")["model.transformer.wte.weight"].dtype == np.float32
    for name in list(weights)[:4]:
        weights[name] = weights[name].astype(np.float16)
    model, params = loading.load(write_folder(tmp_path / "mixed", GQA, weights))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="dtype 'int7' is not float32, float16 or bfloat16"):
        loading.load(folder, dtype="int7")


def test_shardings_place_the_parameters(tmp_path):
    weights = numpy_weights(GQA)
    folder = write_folder(tmp_path / "hf", GQA, weights, 2)
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("fsdp",))
    shapes = nn.unbox(
        jax.eval_shape(LLaDA(ModelConfig(**GQA)).init, jax.random.key(0), jnp.zeros((1, 4), int))
    )
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, P(*[None] * (x.ndim - 1), "fsdp")), shapes["params"]
    )
    convert.import_folder(folder, tmp_path / "ours")
    for path in (folder, tmp_path / "ours"):
        _, params = loading.load(path, shardings=shardings)
        jax.tree.map(
            lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding}"), params, shardings
        )
        np.testing.assert_array_equal(
            params["ff_out"]["kernel"].T, weights["model.transformer.ff_out.weight"]
        )


def test_a_sharded_load_reads_each_slice_once_and_only_what_its_devices_hold(tmp_path, monkeypatch):
    """Compares with the weights that were written, and counts the slices that are read."""
    weights = numpy_weights(GQA)
    folder = write_folder(tmp_path / "hf", GQA, weights, 2)
    mesh = mesh_lib.make_mesh(2, 2, 1, jax.devices()[:4])  # each half of a matrix on two devices
    boxed = jax.eval_shape(
        LLaDA(ModelConfig(**GQA)).init, jax.random.key(0), jnp.zeros((1, 4), int)
    )
    shardings = mesh_lib.shardings(mesh, boxed["params"])
    read = {}

    class Weights:
        def __init__(self, opened):
            self.opened = opened

        def __enter__(self):
            self.weights = self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def get_slice(self, name):
            whole = self.weights.get_slice(name)

            class Slice:
                get_shape, get_dtype = whole.get_shape, whole.get_dtype

                def __getitem__(self, index):
                    read.setdefault(name, []).append(whole[index].shape)
                    return whole[index]

            return Slice()

        def __getattr__(self, name):
            return getattr(self.weights, name)

    monkeypatch.setattr(
        published, "safe_open", lambda *args, **kwargs: Weights(safe_open(*args, **kwargs))
    )
    _, params = loading.load(folder, "bfloat16", shardings)
    for name, found in read.items():
        shape = weights[name].shape
        if len(shape) == 1:
            assert found == [shape], name
        else:  # fsdp splits the axis of d_model: the outputs of these two, the inputs of others
            out = "attn_out" in name or (".ff_out" in name and "blocks" in name)
            assert found == [(shape[0] // 2, shape[1]) if out else (shape[0], shape[1] // 2)] * 2, (
                name
            )
    assert read.keys() == weights.keys()
    q_proj = params["blocks"]["q_proj"]["kernel"]
    assert (
        q_proj.sharding == shardings["blocks"]["q_proj"]["kernel"] and q_proj.dtype == jnp.bfloat16
    )
    for path, leaf in published._flat(params).items():
        row = next(row for row in ROWS if row.path == path)
        layers = [weights[row.name.format(i=i)] for i in range(3 if "{i}" in row.name else 1)]
        wanted = np.stack([layer.T if row.transpose else layer for layer in layers]).astype(
            ml_dtypes.bfloat16
        )
        np.testing.assert_array_equal(
            leaf, wanted if "{i}" in row.name else wanted[0], err_msg=path
        )


def test_large_tensors_are_read_in_blocks(tmp_path, monkeypatch):
    weights = numpy_weights(GQA)
    folder = write_folder(tmp_path / "hf", GQA, weights)
    whole = loading.load(folder)[1]
    monkeypatch.setattr(published, "_BLOCK_BYTES", 700)  # five rows of d_model
    jax.tree.map(np.testing.assert_array_equal, loading.load(folder)[1], whole)


def test_one_error_lists_every_wrong_weight(tmp_path):
    weights = numpy_weights(GQA)
    prefix = "model.transformer."
    weights[f"{prefix}blocks.0.q_proj.bias"] = np.zeros(32, np.float32)
    weights[f"{prefix}blocks.2.k_proj.weight"] = np.zeros((32, 32), np.float32)
    weights[f"{prefix}ln_f.weight"] = np.zeros(32, np.int8)
    del weights[f"{prefix}blocks.1.ff_norm.weight"], weights[f"{prefix}ff_out.weight"]
    with pytest.raises(ValueError) as error:
        loading.load(write_folder(tmp_path, GQA, weights))
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message and message.count(prefix) == 5
    for part in (
        "blocks.1.ff_norm.weight [32] is missing",
        f"{prefix}ff_out.weight [64, 32] is missing",
        "blocks.2.k_proj.weight is [32, 32], expected [16, 32] (model.safetensors)",
        "ln_f.weight is of type I8, not F32, F16, BF16",
        "blocks.0.q_proj.bias is surplus (model.safetensors)",
    ):
        assert part in message


def test_bad_folders_are_one_line(tmp_path):
    def fails(kind, text, path):
        with pytest.raises(kind) as error:
            loading.load(path)
        assert (
            text in str(error.value)
            and str(path) in str(error.value)
            and "\n" not in str(error.value)
        )

    fails(FileNotFoundError, "does not exist", tmp_path / "nowhere")
    fails(FileNotFoundError, "neither config.json", tmp_path)
    weights = numpy_weights(GQA)
    fails(
        ValueError,
        "include_bias=True",
        write_folder(tmp_path / "bias", {**GQA, "include_bias": True}, weights),
    )
    folder = write_folder(tmp_path / "hf", GQA, weights, 2)
    (folder / "part-1.safetensors").rename(folder / "gone")
    fails(FileNotFoundError, "names shards that are not there: part-1.safetensors", folder)
    (folder / "part-1.safetensors").write_bytes((folder / "gone").read_bytes()[:-100])
    fails(ValueError, "part-1.safetensors is no readable safetensors file", folder)
    save_file(
        load_file(folder / "gone") | load_file(folder / "part-0.safetensors"),
        folder / "part-1.safetensors",
    )
    fails(ValueError, "wte.weight is in both part-0.safetensors and part-1.safetensors", folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    fails(ValueError, "is not an index of shards", folder)
    (folder / "model.safetensors.index.json").unlink()
    fails(FileNotFoundError, "neither model.safetensors nor", folder)
    (folder / "config.json").write_text("{")
    fails(ValueError, "config.json is not JSON", folder)


def test_export_refuses(tmp_path):
    model, params = loading.load(write_folder(tmp_path / "hf", GQA, numpy_weights(GQA)))
    with pytest.raises(ValueError, match="hf exists and is not empty"):
        published.export(model, params, tmp_path / "hf")
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
        published.export(model, params, tmp_path / "out", tokenizer_from=tmp_path / "hf")
    with pytest.raises(
        ValueError, match=r"ln_f/scale is missing, the model's is \[32\]; lora is \[3\], .* absent"
    ):
        published.export(
            model,
            {**{k: v for k, v in params.items() if k != "ln_f"}, "lora": np.zeros(3)},
            tmp_path / "out",
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]  # nothing half-written


def test_import_and_export_by_command(tmp_path, capsys):
    def run(*words):
        assert run_command(convert, *map(str, words)) == 0

    weights = numpy_weights(GQA, ml_dtypes.bfloat16)
    folder = write_folder(tmp_path / "hf", GQA, weights, 2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"a": 1}')
    run("import", folder, tmp_path / "ours")
    model, _ = llada_jax.load(tmp_path / "ours")
    step_model, _ = llada_jax.load(tmp_path / "ours" / "checkpoints" / "0")
    assert model.config == step_model.config == ModelConfig(**GQA) and model.dtype == jnp.bfloat16
    run("export", tmp_path / "ours", tmp_path / "back", "--max_shard_bytes=1.6e4")
    assert_same_weights(all_weights(tmp_path / "back"), weights)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"a": 1}'
    run("export", tmp_path / "ours", tmp_path / "f32", "--dtype=float32")
    assert all_weights(tmp_path / "f32")["model.transformer.ln_f.weight"].dtype == np.float32
    for arguments in (
        ["import", tmp_path / "nowhere", tmp_path / "x"],
        ["import", tmp_path / "ours", tmp_path / "x"],
        ["import", folder, tmp_path / "ours"],
        ["export", tmp_path / "nowhere", tmp_path / "x"],
        ["export", tmp_path / "ours" / "checkpoints" / "7", tmp_path / "x"],
        ["export", tmp_path / "ours", folder],
    ):
        error = refusal(capsys, convert, *map(str, arguments))
        assert error.startswith("error: ") and not (tmp_path / "x").exists()


def test_the_module_runs_on_the_cpu(tmp_path):
    folder = write_folder(tmp_path / "hf", GQA, numpy_weights(GQA))
    # There is no such platform here: to ask for its devices is an error.
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}

    def run(*arguments):
        command = [sys.executable, "-m", "llada_jax.convert", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run("import", folder, tmp_path / "ours").returncode == 0
    done = run("export", tmp_path / "nowhere", tmp_path / "x")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "does not exist" in done.stderr
