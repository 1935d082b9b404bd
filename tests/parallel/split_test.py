"""Meshes and pmap against one device: five VRPO steps, evaluations; which host loads which rows."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llada_jax import metrics, noise
from llada_jax.batch import Batch
from llada_jax.evaluate import heldout
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.objectives import OBJECTIVES, preference
from llada_jax.objectives.preference import Preference
from llada_jax.parallel import mesh
from llada_jax.parallel.split import Parallel
from llada_jax.train import optim, state
from llada_jax.train.step import train_step

ROWS, LENGTH, SEGMENTS, NUM_STEPS = 16, 24, 4, 5
MODEL = LLaDA(
    ModelConfig(
        d_model=32, n_heads=8, n_layers=2, vocab_size=64, mask_token_id=63, mlp_hidden_size=48
    ),
    remat="full",
    logps_chunk=24,  # no divisor of the vocabulary, nor of a shard of it
)
SETTINGS = Preference(scheme=noise.Scheme(n_t=2))
KWARGS = {"model": MODEL, "settings": SETTINGS}
VRPO = OBJECTIVES["vrpo"]
# Keeps the gradient of the last update in its state, so that it can be compared.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, s, p=None: (g, g)
)
TX = optax.chain(
    KEEP,
    optim.make_optimizer(
        optim.make_schedule(peak=1e-3, warmup_steps=1, num_steps=NUM_STEPS), eps=1e-4
    ),
)


def batch_of(step):
    """Two pairs in a row, one in every third, none in the last: devices hold unequal numbers."""
    rng = np.random.default_rng(step)
    segment_ids = np.repeat(np.arange(1, SEGMENTS + 1), 6)[None].repeat(ROWS, 0)
    segment_ids[::3, 12:] = 0
    segment_ids[-1] = 0
    place = np.arange(LENGTH) % 6
    return Batch(
        tokens=rng.integers(0, 63, (ROWS, LENGTH)).astype(np.int32),
        segment_ids=segment_ids.astype(np.int32),
        positions=np.broadcast_to(place, (ROWS, LENGTH)).astype(np.int32),
        response_mask=(place >= 2) & (segment_ids > 0),
        row_ids=np.arange(ROWS, dtype=np.int32) + ROWS * step,
        epochs=np.zeros(ROWS, np.int32),
        num_segments=SEGMENTS,
    )


def make(kind, sizes):
    return Parallel(kind, mesh.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))]))


def five_steps(kind, sizes, cached=False, accumulate=1):
    """(loss, gradient) of each step, and the parameters after the last."""
    p = make(kind, sizes)
    with p.use():
        abstract = state.abstract_state(MODEL, TX, p.mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        current = state.init_state(MODEL, TX, p.mesh, jax.random.key(0), tree_of(0))
        reference = jax.device_put(tree_of(1), shardings.params)
        step = functools.partial(
            train_step,
            objective=VRPO,
            tx=TX,
            accumulate=accumulate,
            axis_name=p.axis_name,
            **KWARGS,
        )
        out_shardings = (shardings, mesh.replicated(p.mesh))
        update = p.jit(
            step, (False, True, False), out_rows=False, out_shardings=out_shardings, donate=0
        )
        found = []
        for i in range(NUM_STEPS):
            batch, frozen = batch_of(i), reference
            if cached:
                batch, frozen = batch.replace(reference=terms_of(i)), None
            current, values = update(current, p.put(batch), frozen)
            found.append(jax.device_get((values["loss"], current.opt_state[0])))
        return found, jax.device_get(current.params)


@functools.cache
def tree_of(seed):
    """Parameters on the host, far enough from initialisation for scores that differ."""
    made = state.init_state(
        MODEL, TX, mesh.make_mesh(devices=jax.devices()[:1]), jax.random.key(seed)
    ).params
    return jax.tree.map(lambda x: 4 * np.asarray(x), made)


@functools.cache
def terms_of(step):
    return np.asarray(jitted_terms()(tree_of(1), batch_of(step)))


@functools.cache
def jitted_terms():
    return jax.jit(functools.partial(preference.reference_terms, **KWARGS))


@functools.cache
def one_device():
    return five_steps("mesh", (1, 1, 1))


def assert_close(here, there):
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


CASES = [("pmap", (8, 1, 1), False, 2), ("mesh", (2, 2, 2), True, 2)]
SLOW = [
    ("mesh", (8, 1, 1), False, 1),
    ("mesh", (8, 1, 1), True, 2),
    ("mesh", (1, 8, 1), False, 2),
    ("mesh", (1, 8, 1), True, 1),
    ("mesh", (1, 1, 8), False, 1),
    ("mesh", (1, 1, 8), True, 2),
    ("mesh", (2, 2, 2), False, 2),
    ("mesh", (2, 2, 2), False, 1),
    ("mesh", (1, 1, 1), True, 4),
    ("pmap", (8, 1, 1), False, 1),
    ("pmap", (8, 1, 1), True, 2),
]


@pytest.mark.parametrize(
    "kind, sizes, cached, accumulate",
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_five_steps_are_those_of_one_device(kind, sizes, cached, accumulate):
    """Truth: the same updates on one device, with the reference's parameters."""
    (found, params), (expected, expected_params) = (
        five_steps(kind, sizes, cached, accumulate),
        one_device(),
    )
    assert expected[0][0] != expected[-1][0]
    for here, there in zip(found, expected, strict=True):
        assert_close(here, there)
    assert_close(params, expected_params)


@pytest.mark.slow
def test_metrics_of_devices_are_those_of_all_rows():
    """Truth: the same evaluation on the whole batch. The counts are unequal, one is 0."""
    p = make("pmap", (8, 1, 1))
    batch = batch_of(0).replace(reference=terms_of(0))
    evaluate = functools.partial(heldout.heldout_metrics, objective=VRPO, **KWARGS)
    whole = jax.jit(evaluate)(tree_of(0), batch, None)
    function = functools.partial(evaluate, axis_name=p.axis_name)
    split = p.jit(
        function, (False, True, False), out_rows=False, out_shardings=mesh.replicated(p.mesh)
    )
    found = split(tree_of(0), p.put(batch), None)
    for name, mean in whole.items():
        assert found[name].count == mean.count
        np.testing.assert_allclose(
            metrics.floats({"": found[name]})[""], mean.value, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(found[name].stderr, mean.stderr, rtol=1e-4, atol=1e-6)


def test_what_pmap_cannot_split_is_one_line():
    with pytest.raises(ValueError, match=r"splits rows only, not mesh.fsdp=4, mesh.tensor=2") as e:
        make("pmap", (1, 4, 2))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="parallelism='pjit' is not one of mesh, pmap"):
        make("pjit", (8, 1, 1))


# ---- which host loads which rows


Device = collections.namedtuple("Device", "id process_index")


class Hosts(Parallel):
    """Eight devices in hosts of `size`, seen from one of them."""

    def seen_from(self, monkeypatch, host, size):
        def indices(sharding, shape):
            real = sharding_indices(sharding, shape)
            return {Device(d.id, d.id // size): index for d, index in real.items()}

        sharding_indices = jax.sharding.NamedSharding.devices_indices_map
        with monkeypatch.context() as patch:
            patch.setattr(jax.sharding.NamedSharding, "devices_indices_map", indices)
            patch.setattr(jax, "process_index", lambda: host)
            return self.shard


@pytest.mark.parametrize(
    "sizes, size, expected",
    [
        ((8, 1, 1), 4, [(0, 2), (1, 2)]),
        ((2, 2, 2), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((1, 8, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # The tensor axis spans two hosts, or all: they load the same rows.
        ((2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 1, 8), 4, [(0, 1), (0, 1)]),
    ],
)
def test_hosts_load_the_rows_that_their_devices_hold(sizes, size, expected, monkeypatch):
    found = [
        Hosts("mesh", mesh.make_mesh(*sizes)).seen_from(monkeypatch, h, size)
        for h in range(8 // size)
    ]
    assert found == expected


@pytest.mark.parametrize("pairs", [3, 4])  # shares of one size, and of two
def test_rows_that_overlap_in_part_are_one_line(pairs, monkeypatch):
    # Hosts of three devices: the second holds the rows of one of the first's, and others.
    with pytest.raises(ValueError, match="rows that overlap in part: let mesh.tensor divide") as e:
        Hosts("mesh", mesh.make_mesh(pairs, 1, 2, jax.devices()[: 2 * pairs])).seen_from(
            monkeypatch, 0, 3
        )
    assert "\n" not in str(e.value)
