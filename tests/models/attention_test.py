"""Attention: every implementation agrees with plain attention, and "auto" says why it chose one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.models import attention
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.parallel import mesh
from llada_jax.train import state

LENGTH = 128
SEGMENTS = np.repeat([[1, 2, 0], [1, 1, 2]], (50, 60, 18), axis=1)
SEEN = np.arange(LENGTH) % 7 > 0


def make_inputs(draws=3):
    shapes = [(draws, 2, LENGTH, heads, 64) for heads in (4, 2, 2)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def outputs_and_gradients(implementation, inputs, **kwargs):
    """The inputs have a vmapped axis of draws, which share segments and masks."""

    def attend(*x):
        one = lambda *x: attention.attend(*x, implementation=implementation, **kwargs)
        out = jax.vmap(one)(*x)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(attend, (0, 1, 2), has_aux=True))(*inputs)
    return out, *grads


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    "with_mask, with_segments", [(False, False), (True, False), (False, True), (True, True)]
)
def test_attention_in_query_blocks_is_attention(monkeypatch, with_mask, with_segments):
    key = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(key[0], (2, 22, 4, 8))
    k, v = (jax.random.normal(x, (2, 22, 2, 8)) for x in key[1:])
    kwargs = {}
    if with_mask:
        kwargs["attention_mask"] = jnp.arange(22) < jnp.array([[22], [15]])
    if with_segments:
        kwargs["segment_ids"] = jnp.tile(jnp.arange(22) // 6, (2, 1))

    def value_and_grads():
        loss = lambda *x: jnp.sum(attention.attend(*x, **kwargs)[:, :12] ** 2)
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    whole = value_and_grads()
    monkeypatch.setattr(attention, "QUERY_BLOCK", 5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        value_and_grads(),
        whole,
    )


def test_splash_is_xla():
    """The Pallas kernel, interpreted: packed rows, a key mask, fewer key heads, vmapped draws."""
    kwargs = {
        "segment_ids": jnp.asarray(SEGMENTS),
        "attention_mask": jnp.broadcast_to(jnp.asarray(SEEN), SEGMENTS.shape),
    }
    inputs = make_inputs(2)
    expected = outputs_and_gradients("xla", inputs, **kwargs)
    assert_close(outputs_and_gradients("splash", inputs, **kwargs), expected)
    kwargs["attention_mask"] = None
    assert np.abs(outputs_and_gradients("xla", inputs, **kwargs)[0] - expected[0]).max() > 0.1, (
        "masks matter"
    )


@pytest.mark.parametrize("rows, axes", [(4, ("data", "fsdp")), (3, None)])
def test_splash_under_a_mesh_is_xla(rows, axes):
    """Rows over data and fsdp, heads over tensor. Three rows do not divide over the devices."""
    inputs = [jnp.concatenate([x, x[:, ::-1]], axis=1)[:, :rows] for x in make_inputs(1)]
    segments = jnp.concatenate([SEGMENTS, SEGMENTS[::-1]])[:rows]
    expected = outputs_and_gradients("xla", inputs, segment_ids=segments)
    mesh8 = mesh.make_mesh(2, 2, 2)
    spread = NamedSharding(mesh8, PartitionSpec(None, axes))
    with mesh.use(mesh8):
        inputs = [jax.device_put(x, spread) for x in inputs]
        found = outputs_and_gradients("splash", inputs, segment_ids=segments)
    assert len(found[0].sharding.device_set) == 8
    assert_close(found, expected)


def test_a_model_for_splash_is_made_like_any():
    """Parameters are made on two tokens, too few for the kernel."""
    config = ModelConfig(d_model=64, n_heads=1, n_layers=1, vocab_size=32, mask_token_id=3)
    mesh1 = mesh.make_mesh(1, 1, 1, jax.devices()[:1])
    shapes = [
        jax.tree.map(
            lambda x: x.shape,
            state.abstract_state(LLaDA(config, attention=name), optax.identity(), mesh1),
        )
        for name in ("splash", "xla")
    ]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="rows of 4 positions are no multiple of 128"):
        LLaDA(config, attention="splash").init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def test_cudnn_is_wired_like_xla(monkeypatch):
    """With XLA's attention in place of the kernel, which needs a GPU: draws become rows."""
    plain, rows = jax.nn.dot_product_attention, set()

    def kernel(query, *rest, implementation, **kwargs):
        rows.add(len(query))
        return plain(query, *rest, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(attention, "choose", lambda name, *_, **__: (name, "asked for"))
    inputs, kwargs = make_inputs(), {"segment_ids": jnp.asarray(SEGMENTS)}
    kwargs["attention_mask"] = jnp.broadcast_to(jnp.asarray(SEEN), SEGMENTS.shape)
    expected = outputs_and_gradients("xla", inputs, **kwargs)
    rows.clear()
    assert_close(outputs_and_gradients("cudnn", inputs, **kwargs), expected)
    assert 3 * 2 in rows, "the kernel sees draws as rows, not as an axis that JAX batches"
    assert_close(outputs_and_gradients("cudnn", inputs), outputs_and_gradients("xla", inputs))


@pytest.mark.parametrize(
    "platform, changes, name, reason",
    [
        ("tpu", {}, "splash", "the kernel for tpu"),
        ("tpu", {"length": 4000}, "xla", "no multiple of 128"),
        ("tpu", {"head_size": 32}, "xla", "no multiple of 64"),
        ("tpu", {"dtype": "float32"}, "xla", "round"),
        ("gpu", {}, "cudnn", "the kernel for gpu"),
        ("gpu", {"dtype": "float32"}, "xla", "bfloat16 and float16"),
        ("gpu", {"head_size": 256}, "xla", "up to 128"),
        ("cpu", {}, "xla", "no kernel for cpu"),
    ],
)
def test_auto_chooses_and_says_why(platform, changes, name, reason):
    shape = {"length": 4096, "head_size": 128, "dtype": "bfloat16"} | changes
    found = attention.choose("auto", platform, **shape)
    assert found[0] == name and reason in found[1]


@pytest.mark.parametrize(
    "name, platform, message",
    [
        ("flash", "tpu", "is not one of auto, xla, splash, cudnn"),
        ("splash", "gpu", "runs on TPU, not on gpu"),
        ("cudnn", "cpu", "NVIDIA GPUs, not on cpu"),
    ],
)
def test_what_cannot_be_is_one_clear_error(name, platform, message):
    with pytest.raises(ValueError, match=message):
        attention.choose(name, platform, length=4096, head_size=128, dtype="bfloat16")
