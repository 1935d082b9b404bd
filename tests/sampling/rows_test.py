"""A row's tokens do not depend on its batch, its padding, or its place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from llada_jax import sampling
from llada_jax.models.llada import LLaDA, ModelConfig

MASK, EOS, EOT, PAD = 40, 5, 6, 0
CONFIG = ModelConfig(
    d_model=32,
    n_heads=4,
    n_layers=2,
    vocab_size=41,
    mask_token_id=MASK,
    mlp_hidden_size=48,
    init_std=0.3,
)
RNG = np.random.default_rng(0)
# 200 prompts of 20 lengths, one of them a single token.
PROMPTS = [RNG.integers(0, MASK, 1 + i % 20).tolist() for i in range(200)]
SETTINGS = dict(
    mask_id=MASK, pad_id=PAD, eos_id=EOS, eot_id=EOT, steps=6, gen_length=12, block_length=6
)


@functools.cache
def model():
    module = LLaDA(CONFIG)
    params = module.init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    return Partial(module.apply, {"params": params})


CASES = {
    "greedy": {},
    "drawn": dict(temperature=1.0, key=jax.random.key(0)),
    "ties": dict(confidence_eos_eot_inf=True),
    "random": dict(remasking="random", temperature=0.7, key=jax.random.key(1)),
    "threshold": dict(commit="threshold", threshold=0.5, stop_at_eos=True),
    "drawn_threshold": dict(
        commit="threshold", threshold=0.3, temperature=1.0, key=jax.random.key(2)
    ),
    "wino": dict(
        commit="wino", threshold=0.05, revoke="wino", threshold_back=0.5, stop_at_eos=True
    ),
    "remdm": dict(
        revoke="remdm", revoke_number=2, revoke_passes=3, temperature=1.0, key=jax.random.key(3)
    ),
    "klass": dict(commit="klass", threshold=0.2, kl_threshold=0.3),
    "growth": dict(
        commit="threshold",
        threshold=0.3,
        remasking="probability",
        growth=sampling.Growth(4, factor=3, eos_confidence=0.01, eos_window=4),
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c == "ties" else pytest.mark.slow) for c in CASES],
)
def test_tokens_of_a_row_are_its_own(case):
    # Truth: the same prompts, one by one. 0 of 2400 tokens differ. Rows that are finished early
    # are refilled, in two buckets.
    settings = {**SETTINGS, **CASES[case]}
    if case == "ties":
        # EOS and EoT are the candidates of half of the positions.
        bias = jnp.where(jnp.isin(jnp.arange(CONFIG.vocab_size), jnp.array([EOS, EOT])), 2.0, 0)
        fn = Partial(biased, bias, model())
    else:
        fn = model()
    alone = sampling.sample_responses(fn, PROMPTS, batch_size=1, **settings)
    order = np.random.default_rng(1).permutation(len(PROMPTS))
    for batch_size in (8, 64):
        got = sampling.sample_responses(fn, PROMPTS, batch_size=batch_size, **settings)
        np.testing.assert_array_equal(got, alone)
        shuffled = sampling.sample_responses(
            fn,
            [PROMPTS[i] for i in order],
            batch_size=batch_size,
            row_ids=order,
            **settings,
        )
        np.testing.assert_array_equal(shuffled, alone[order])
    if case != "greedy":
        assert len({tuple(r) for r in alone.tolist()}) > 150
    # Without padding: all prompts of one length.
    for length in (13,) if case in ("drawn", "ties") else (1, 13):
        rows = [i for i in range(len(PROMPTS)) if len(PROMPTS[i]) == length]
        got = sampling.sample_responses(
            fn, [PROMPTS[i] for i in rows], batch_size=len(rows), row_ids=rows, **settings
        )
        np.testing.assert_array_equal(got, alone[rows])


def test_eight_devices_write_what_one_does():
    """200 prompts of one length, their rows split over eight devices: 0 of 2400 tokens differ."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    prompts = np.random.default_rng(2).integers(0, MASK, (200, 7))
    settings = {k: v for k, v in SETTINGS.items() if k != "pad_id"} | CASES["drawn"]
    alone = sampling.generate(model(), prompts, **settings)
    fn = jax.device_put(model(), NamedSharding(mesh, P()))
    split = sampling.generate(
        fn, jax.device_put(prompts, NamedSharding(mesh, P("data"))), **settings
    )
    assert len(split.sharding.device_set) == 8
    np.testing.assert_array_equal(split, alone)


@pytest.mark.slow
def test_eight_devices_refill_their_rows():
    """200 prompts of 20 lengths in a queue of 64 rows, eight a device: 0 of 2400 tokens differ."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    settings = SETTINGS | CASES["threshold"] | dict(batch_size=64)
    alone = sampling.sample_responses(model(), PROMPTS, **settings)
    fn = jax.device_put(model(), NamedSharding(mesh, P()))
    split = sampling.sample_responses(
        fn, PROMPTS, row_sharding=NamedSharding(mesh, P("data")), **settings
    )
    np.testing.assert_array_equal(split, alone)


def biased(bias, fn, tokens, attention_mask=None, positions=None):
    return fn(tokens, attention_mask, positions=positions) + bias
