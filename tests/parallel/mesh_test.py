"""Meshes, shardings and sharded initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.parallel import mesh
from llada_jax.train import optim, state

MODEL = LLaDA(
    ModelConfig(
        d_model=16, n_heads=4, n_layers=2, vocab_size=32, mask_token_id=31, mlp_hidden_size=24
    )
)
TX = optim.make_optimizer(optim.make_schedule(peak=1e-3, warmup_steps=1, num_steps=10))


def test_one_size_may_be_what_is_left():
    assert dict(mesh.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(mesh.make_mesh(-1).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (2, 2, 1)])
def test_sizes_that_do_not_fit_are_one_line(sizes):
    with pytest.raises(ValueError, match=f"data={sizes[0]}, fsdp={sizes[1]}"):
        mesh.make_mesh(*sizes)


def test_a_mesh_of_rows_takes_what_is_asked_or_all():
    assert dict(mesh.of_rows(8).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(mesh.of_rows(4, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.of_rows(9, 1, 3).devices.size == 3
    assert mesh.of_rows(7, 1) is None and mesh.of_rows(7, devices=jax.devices()[:1]) is None


@pytest.mark.parametrize(
    "batch_size, sizes, message",
    [
        (8, (-1, 3, 1), "data_parallel=-1 fsdp=3 tensor=1 use 6 of the 8 devices: change them"),
        (8, (3, 3, 1), "data_parallel=3 fsdp=3 tensor=1 do not fit"),
        (8, (0, 1, 1), "data_parallel=0 fsdp=1 tensor=1 do not fit"),
        (8, (-1, 0, 1), "data_parallel=-1 fsdp=0 tensor=1 do not fit"),
        (6, (2, 2, 1), "batch_size=6 is no multiple of the 4 parts of the rows"),
    ],
)
def test_a_mesh_of_rows_that_does_not_fit_is_one_line(batch_size, sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh.of_rows(batch_size, *sizes)


def test_parameters_and_moments_are_sharded_by_the_rules_and_made_where_they_live():
    m = mesh.make_mesh(2, 2, 2)
    made = state.init_state(MODEL, TX, m, jax.random.key(0))
    blocks = made.params["blocks"]
    kernel = blocks["ff_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 12)
    # d_model over fsdp, everything else over tensor, layers and scales over nothing.
    for names, spec in (
        ("q_proj k_proj v_proj ff_proj up_proj", P(None, "fsdp", "tensor")),
        ("attn_out ff_out", P(None, "tensor", "fsdp")),
    ):
        assert {blocks[name]["kernel"].sharding.spec for name in names.split()} == {spec}
    assert made.params["wte"]["embedding"].sharding.spec == P("tensor", "fsdp")
    assert made.params["ff_out"]["kernel"].sharding.spec == P("fsdp", "tensor")
    assert all(
        x.sharding.is_fully_replicated
        for x in (made.params["ln_f"]["scale"], blocks["attn_norm"]["scale"])
    )
    moments = jax.tree.leaves(made.opt_state)
    assert sum(x.shape == kernel.shape and x.sharding == kernel.sharding for x in moments) >= 2
    abstract = state.abstract_state(MODEL, TX, m)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


def test_the_same_parameters_on_any_mesh():
    one = state.init_state(MODEL, TX, mesh.make_mesh(devices=jax.devices()[:1]), jax.random.key(0))
    eight = state.init_state(MODEL, TX, mesh.make_mesh(2, 2, 2), jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one.params, eight.params)


def test_given_parameters_are_taken():
    params = jax.tree.map(
        np.asarray, state.init_state(MODEL, TX, mesh.make_mesh(), jax.random.key(3)).params
    )
    made = state.init_state(MODEL, TX, mesh.make_mesh(1, 4, 2), jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, made.params, params)


def test_schedule_and_weight_decay():
    schedule = optim.make_schedule(peak=2.0, warmup_steps=4, num_steps=20, end_fraction=0.1)
    np.testing.assert_allclose(
        [schedule(i) for i in (0, 2, 4, 12, 20)], [0, 1, 2, 1.1, 0.2], rtol=1e-5
    )
    constant = optim.make_schedule(
        peak=2.0, warmup_steps=4, num_steps=20, end_fraction=0.1, kind="constant"
    )
    np.testing.assert_allclose(
        [constant(i) for i in (0, 2, 4, 18, 19, 20)], [0, 1, 2, 2, 1.1, 0.2], rtol=1e-5
    )
    with pytest.raises(ValueError, match="warmup_steps=20"):
        optim.make_schedule(peak=1.0, warmup_steps=20, num_steps=20)
    params = state.init_state(MODEL, TX, mesh.make_mesh(), jax.random.key(0)).params
    tx = optim.make_optimizer(lambda step: 0.1, weight_decay=0.5, clip_norm=0.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    kernels = (tree["blocks"]["q_proj"]["kernel"] for tree in (updates, params))
    np.testing.assert_allclose(next(kernels), -0.05 * next(kernels), rtol=1e-5)
    np.testing.assert_array_equal(updates["ln_f"]["scale"], 0)
    np.testing.assert_array_equal(updates["blocks"]["ff_norm"]["scale"], 0)
