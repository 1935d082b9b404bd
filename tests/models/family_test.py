"""What the library asks of every architecture, for each entry of FAMILIES."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import models
from llada_jax.checkpoints import loading, published
from llada_jax.models import FAMILIES

# A tiny configuration of each family, under the names of its config.json.
SIZES = {
    "llada": {
        "d_model": 16,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_layers": 2,
        "vocab_size": 24,
        "embedding_size": 32,
        "mask_token_id": 23,
        "mlp_hidden_size": 24,
    }
}


@pytest.fixture(params=FAMILIES)
def made(request):
    family = FAMILIES[request.param]
    config = models.config_from_dict({"model_type": request.param, **SIZES[request.param]}, "test")
    model = family.Module(config)
    tokens = jnp.arange(12).reshape(2, 6)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens)["params"])
    return family, config, model, params, tokens


def test_counts_rows_and_fields(made):
    family, config, _, params, _ = made
    assert models.family_of(config) is family and family.name == config.model_type
    counted = family.num_params(config)
    assert sum(counted.values()) == sum(x.size for x in jax.tree.leaves(params))
    paths = {
        "/".join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert {row.path for row in family.rows} == paths.keys()
    assert len({row.name for row in family.rows}) == len(family.rows)
    assert family.flops_per_token(config, 64) > 2 * counted["layers"]
    assert family.activation_width(config) > 0
    known = models.architecture(config)
    assert known["model_type"] == family.name and set(family.splits) <= known.keys()
    assert models.config_from_dict(config.to_dict(), "test") == config


def test_log_probabilities_are_those_of_the_logits(made):
    """Truth: log softmax of all logits."""
    _, _, model, params, tokens = made
    targets = (tokens + 1) % 24
    logits = model.apply({"params": params}, tokens)
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    found = model.apply({"params": params}, tokens, targets, method="token_logps")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_export_and_load_are_inverse(made, tmp_path):
    _, config, model, params, _ = made
    published.export(model, params, tmp_path / "hf")
    again, loaded = loading.load(tmp_path / "hf")
    assert again.config == config and type(again) is type(model)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_a_parameter_without_a_row_is_named(made, monkeypatch, tmp_path):
    family, _, model, params, _ = made
    short = dataclasses.replace(family, rows=family.rows[1:])
    monkeypatch.setitem(FAMILIES, family.name, short)
    with pytest.raises(ValueError, match=f"has no row for {family.rows[0].path}: add one"):
        published.export(model, params, tmp_path / "hf")


def test_an_unknown_family_is_one_line():
    with pytest.raises(ValueError, match="test: model_type='gpt' is not one of llada"):
        models.config_from_dict({"model_type": "gpt"}, "test")
