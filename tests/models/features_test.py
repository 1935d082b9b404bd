"""The selective cache's choice of positions, on a layer made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax.models.features import Features, Layer, layer_pass

LAYER = Layer(
    values=lambda x: x[:, :, None],
    queries=lambda x, positions: (x[:, :, None], x[:, :, None]),
    attend=lambda q, k, v, mask: jnp.full((*q.shape[:2], 2), 5.0),
    mlp=lambda x: jnp.full(x.shape, 7.0),
)


@pytest.mark.parametrize(
    "plan, renewed",
    [
        (dict(chosen=1), {4}),
        (dict(chosen=2), {2, 4}),
        (dict(chosen=2, prompt=True, rows_prompt=True), {0, 1, 2, 4}),
        (dict(chosen=1, response=True, rows_response=True), {2, 3, 4, 5}),
        # Another row of the batch is due: this one keeps its own choice.
        (dict(chosen=1, prompt=True, response=True), {4}),
        (dict(chosen=0, most=0), set()),
    ],
)
def test_the_positions_that_changed_most_are_computed(plan, renewed):
    # Two of the prompt, four of the response: the values of 4 turn around, those of 2 by a quarter.
    kept = np.tile(np.array([1.0, 0.0]), (6, 1))
    x = kept.copy()
    x[2], x[4] = [0.0, 1.0], [-1.0, 0.0]
    cache = Features.zeros(1, 1, 6, 1, 2, 2, jnp.float32)
    cache = cache.replace(values=jnp.asarray(kept, jnp.float32)[None, None, :, None])
    plan = dict(prompt=False, response=False, most=2, start=2) | plan
    rows = ("rows_prompt", "rows_response", "chosen")
    plan |= {name: jnp.array([plan.get(name, False)]) for name in rows}
    out, new = layer_pass(
        LAYER,
        0,
        jnp.asarray(x, jnp.float32)[None],
        None,
        jnp.arange(6)[None],
        cache.plan(**plan),
        False,
    )
    changed = np.isin(np.arange(6), list(renewed))
    np.testing.assert_array_equal(new.mlp[0, 0, :, 0], np.where(changed, 7, 0))
    np.testing.assert_array_equal(new.attention[0, 0, :, 0], np.where(changed, 5, 0))
    np.testing.assert_array_equal(out[0] - x, np.where(changed, 12, 0)[:, None].repeat(2, 1))
    # All values of the response are new, unless nothing is chosen by them.
    values = np.where((np.arange(6) >= 2)[:, None] & (plan["most"] > 0), x, kept)
    np.testing.assert_array_equal(new.values[0, 0, :, 0], values)


def test_the_first_layer_computes_everything():
    cache = Features.zeros(1, 1, 4, 1, 2, 2, jnp.float32).plan(False, False, start=2)
    _, new = layer_pass(LAYER, 0, jnp.ones((1, 4, 2)), None, jnp.arange(4)[None], cache, True)
    assert (new.mlp == 7).all() and (new.attention == 5).all() and (new.keys == 1).all()
