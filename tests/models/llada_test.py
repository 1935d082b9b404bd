"""The model: packing, chunked log-probabilities, remat, types."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.models import llada
from llada_jax.models.llada import LLaDA, ModelConfig

CONFIG = ModelConfig(
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    n_layers=2,
    vocab_size=96,
    mask_token_id=95,
    mlp_hidden_size=48,
)
PUBLISHED_8B = {
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "mask_token_id": 126336,
}


@pytest.fixture(scope="module")
def params():
    # Weights ten times the usual, so that attention and positions matter.
    key = jax.random.key(0)
    return jax.tree.map(
        lambda x: 10 * x, plain(jax.jit(LLaDA(CONFIG).init)(key, jnp.zeros((1, 4), int))["params"])
    )


def plain(tree):
    return nn.unbox(tree)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 20), 0, 96)


def test_a_packed_row_gives_what_its_segments_give_alone(params, tokens):
    apply = jax.jit(
        lambda *args, **kwargs: LLaDA(CONFIG).apply({"params": params}, *args, **kwargs)
    )
    lengths = (7, 9, 4)
    row = jnp.concatenate([tokens[i, :n] for i, n in enumerate(lengths)])[None]
    segment_ids = jnp.repeat(jnp.array([1, 2, 0]), jnp.array(lengths))[None]
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    packed = apply(row, segment_ids=segment_ids, positions=positions)[0]
    start = 0
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(
            packed[start : start + n], apply(tokens[i : i + 1, :n])[0], atol=2e-4
        )
        start += n
    assert np.abs(packed - apply(row)[0]).max() > 0.1, "without segments it is another function"


def test_padded_keys_are_not_attended_to(params, tokens):
    apply = jax.jit(
        lambda *args, **kwargs: LLaDA(CONFIG).apply({"params": params}, *args, **kwargs)
    )
    mask = jnp.arange(20) < 13
    changed = jnp.where(mask, tokens, 3)
    a = apply(tokens, attention_mask=jnp.broadcast_to(mask, tokens.shape).astype(int))
    b = apply(changed, attention_mask=jnp.broadcast_to(mask, tokens.shape))
    np.testing.assert_allclose(a[:, :13], b[:, :13], atol=1e-5)


def test_leading_axes_are_free(params, tokens):
    apply = jax.jit(lambda x: LLaDA(CONFIG).apply({"params": params}, x))
    np.testing.assert_allclose(apply(tokens.reshape(3, 1, 20))[:, 0], apply(tokens), atol=1e-3)
    np.testing.assert_allclose(apply(tokens[0]), apply(tokens)[0], atol=1e-3)


@pytest.mark.parametrize(
    "chunk, weight_tying",
    [(10, True), *(pytest.param(c, False, marks=pytest.mark.slow) for c in (6, 64))],
)
def test_token_logps_are_those_of_the_full_logits(tokens, chunk, weight_tying):
    config = dataclasses.replace(CONFIG, weight_tying=weight_tying)
    chunked = LLaDA(config, logps_chunk=chunk)
    params = plain(jax.jit(chunked.init)(jax.random.key(2), tokens)["params"])
    targets = jnp.roll(tokens, 1, -1)
    weights = jax.random.normal(jax.random.key(3), tokens.shape)

    def full(params):
        logps = jax.nn.log_softmax(LLaDA(config).apply({"params": params}, tokens))
        logps = jnp.take_along_axis(logps, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * logps), logps

    def ours(params):
        logps = chunked.apply({"params": params}, tokens, targets, method="token_logps")
        return jnp.sum(weights * logps), logps

    (_, expected), expected_grads = jax.jit(jax.value_and_grad(full, has_aux=True))(params)
    (_, logps), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    np.testing.assert_allclose(logps, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected_grads)


def test_remat_and_unrolling_change_no_gradient(params, tokens):
    def gradient(**kwargs):
        fn = lambda p: (
            LLaDA(CONFIG, **kwargs).apply({"params": p}, tokens, tokens, method="token_logps").sum()
        )
        return jax.jit(jax.grad(fn))(params)

    expected = gradient()
    for kwargs in ({"remat": "dots"}, {"remat": "full"}, {"unroll": 2}):
        close = lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()
        )
        jax.tree.map(close, gradient(**kwargs), expected)


def test_bfloat16_computes_in_bfloat16_and_returns_float32(params, tokens):
    small = jax.tree.map(lambda x: x / 10, params)
    exact = jax.jit(LLaDA(CONFIG).apply)({"params": small}, tokens)
    half = jax.jit(LLaDA(CONFIG, dtype=jnp.bfloat16).apply)({"params": small}, tokens)
    assert half.dtype == jnp.float32
    difference = np.abs(half - exact).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()
    boxed = jax.eval_shape(LLaDA(CONFIG, param_dtype=jnp.bfloat16).init, jax.random.key(0), tokens)
    assert {x.dtype.name for x in jax.tree.leaves(boxed)} == {"bfloat16"}


def test_published_size_and_flops():
    config = ModelConfig.from_dict(PUBLISHED_8B)
    count = llada.num_params(config)
    assert round(sum(count.values()) / 1e9, 2) == 8.02 and round(count["layers"] / 1e9, 2) == 6.98
    assert round(3 * llada.flops_per_token(config, 4096) / 1e9, 1) == 51.4
    tiny = jax.eval_shape(LLaDA(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4), int))
    assert sum(x.size for x in jax.tree.leaves(tiny)) == sum(llada.num_params(CONFIG).values())


def test_config_round_trip_and_defaults():
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 1, "vocab_size": 10, "mask_token_id": 9}
    minimal = ModelConfig.from_dict({**sizes, "mlp_ratio": 2, "multi_query_attention": True})
    assert (minimal.n_kv_heads, minimal.mlp_hidden_size, minimal.embedding_size) == (1, 128, 10)


def test_a_config_that_cannot_be_honoured_lists_everything():
    bad = {
        **PUBLISHED_8B,
        "activation_type": "swiglu",
        "alibi": True,
        "mask_token_id": None,
        "block_type": "llama",
    }
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict(bad, source="some/config.json")
    text = str(error.value)
    assert "some/config.json" in text and "\n" not in text
    assert all(
        part in text
        for part in ("activation_type='swiglu'", "alibi=True", "mask_token_id is missing")
    )
    assert "block_type" not in text
    with pytest.raises(ValueError, match="n_heads=32 is not a multiple of n_kv_heads=5"):
        ModelConfig.from_dict({**PUBLISHED_8B, "n_kv_heads": 5})


def test_names_of_policies_are_checked(params, tokens):
    for kwargs in ({"remat": "ful"}, {"attention": "flash"}):
        with pytest.raises(ValueError, match="is not one of"):
            LLaDA(CONFIG, **kwargs).apply({"params": params}, tokens)
