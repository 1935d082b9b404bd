"""Steps: golden losses and gradients; splits that change nothing; memory that does not grow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import config_of, make_batch

import llada_jax
from llada_jax import elbo, losses, noise
from llada_jax.batch import Batch
from llada_jax.benchmark.step import make_work
from llada_jax.compile import step as compile_step
from llada_jax.models.llada import ROWS, LLaDA, ModelConfig
from llada_jax.objectives import OBJECTIVES, denoising, preference
from llada_jax.objectives import terms as terms_lib
from llada_jax.objectives.denoising import Denoising, Pretraining
from llada_jax.objectives.preference import Preference
from llada_jax.parallel import mesh
from llada_jax.train import optim, state
from llada_jax.train.state import TrainState
from llada_jax.train.step import jit_update, train_step

CONFIG = ModelConfig(
    d_model=16,
    n_heads=2,
    n_layers=2,
    vocab_size=40,
    mask_token_id=39,
    mlp_hidden_size=24,
    max_sequence_length=64,
)
MODEL = LLaDA(CONFIG)
# (prompt, response) lengths of the segments of each row; the second row holds one pair only.
LAYOUT = [
    [(3, 5), (3, 7), (2, 4), (2, 6)],
    [(4, 9), (4, 6)],
    [(1, 8), (1, 3), (5, 2), (5, 5)],
    [(2, 2), (2, 12)],
]
LENGTH, SEGMENTS = 34, 4


def make_params(seed):
    params = jax.jit(MODEL.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.tree.map(
        lambda x: 6 * x,
        jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "value")),
    )


@pytest.fixture(scope="module")
def batch():
    return make_batch(LAYOUT, LENGTH)


@pytest.fixture(scope="module")
def policy():
    return make_params(0)


@pytest.fixture(scope="module")
def frozen(policy):
    return jax.tree.map(lambda a, b: a + 0.1 * b, policy, make_params(1))


TX = optax.sgd(1.0)  # an update is minus the gradient
SETTINGS = Preference(beta=0.2, scheme=noise.Scheme(n_t=2, n_yt=2))


def vrpo_step(settings=SETTINGS, **kwargs):
    kwargs = {"model": MODEL, "tx": TX} | kwargs
    return functools.partial(train_step, objective=OBJECTIVES["vrpo"], settings=settings, **kwargs)


@functools.cache
def jitted(settings, accumulate=1):
    return jax.jit(vrpo_step(settings, accumulate=accumulate))


def run(policy, batch, reference, settings=SETTINGS, **kwargs):
    before = TrainState(jnp.zeros((), jnp.int32), policy, TX.init(policy))
    after, metrics = jitted(settings, **kwargs)(before, batch, reference)
    return jax.tree.map(lambda a, b: a - b, before.params, after.params), metrics


def assert_same(a, b, rtol=2e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


def test_golden_vrpo_scores_loss_and_gradient(golden):
    """The authors' PyTorch numbers, at their masks, through packed rows and our loss."""
    arrays = np.load(golden / "golden.npz")
    model, params = llada_jax.load(golden / "policy")
    _, reference = llada_jax.load(golden / "reference")
    sides = [(pair, side) for pair in (0, 1) for side in ("chosen", "rejected")]
    get = lambda pair, side, name: arrays[f"vrpo_{pair}_{side}_{name}"]
    # One row a pair: winner is segment 1, loser segment 2.
    length = 64
    tokens, segment_ids, positions = (np.zeros((2, length), np.int32) for _ in range(3))
    masked, weights = np.zeros((4, 2, length), bool), np.zeros((4, 2, length), np.float32)
    starts = {0: 0, 1: 0}
    for pair, side in sides:
        text, prompt = get(pair, side, "tokens"), int(get(pair, side, "prompt_length"))
        where = slice(starts[pair], starts[pair] + text.size)
        answer = slice(where.start + prompt, where.stop)
        tokens[pair, where], positions[pair, where] = text, np.arange(text.size)
        segment_ids[pair, where] = 1 if side == "chosen" else 2
        masked[:, pair, answer] = get(pair, side, "masks")
        weights[:, pair, answer] = ((text.size - prompt) / get(pair, side, "num_masked"))[:, None]
        starts[pair] = where.stop
    drawn = noise.Noise(jnp.asarray(masked), jnp.asarray(np.where(masked, weights, 0)))
    zeros = np.zeros(2, np.int32)
    packed = jax.tree.map(
        jnp.asarray,
        Batch(tokens, segment_ids, positions, masked.any(0), zeros, zeros, num_segments=2),
    )
    beta = float(arrays["vrpo_beta"])

    def loss_fn(params):
        policy = terms_lib.model_terms(model, params, packed, drawn, chunk=2).mean(0)
        fixed = terms_lib.model_terms(model, reference, packed, drawn).mean(0)
        loss, metrics = losses.preference_loss(
            policy[:, 0], policy[:, 1], fixed[:, 0], fixed[:, 1], beta=beta
        )
        return loss.mean(), metrics["rewards/margins"]

    (loss, scores), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(scores, arrays["vrpo_scores"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, arrays["vrpo_loss"], rtol=1e-5)
    np.testing.assert_allclose(optax.global_norm(grads), arrays["vrpo_grad_norm"], rtol=1e-4)

    checked = 0
    for row in ROWS:
        ours = functools.reduce(lambda tree, key: tree[key], row.path.split("/"), grads)
        for layer in range(3) if "{i}" in row.name else [None]:
            name = "vrpo_grad/" + row.name.format(i=layer)
            if name not in arrays.files:  # the golden file keeps some of them, and the norm of all
                continue
            expected = arrays[name]
            found = ours if layer is None else ours[layer]
            found = found.T if row.transpose else found
            np.testing.assert_allclose(
                found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
            )
            checked += 1
    assert checked == len([name for name in arrays.files if name.startswith("vrpo_grad/")]) > 0


def test_the_loss_is_what_equations_6_and_8_say(policy, frozen, batch):
    """A second route: full logits of every segment alone, one draw at a time, without packing."""
    drawn = terms_lib.draw(batch, SETTINGS.scheme, seed=0, stream="policy")

    @jax.jit
    def elbo_of(params, tokens, masked, weights):
        logits_fn = lambda x: MODEL.apply({"params": params}, x)
        return elbo.elbo_terms(
            logits_fn, tokens[None], masked[:, None], weights[:, None], mask_id=39
        ).mean()

    scores, sft = [], []
    for r, segments in enumerate(LAYOUT):
        start, elbos = 0, []
        for prompt, answer in segments:
            where = slice(start, start + prompt + answer)
            masked, weights = drawn.masked[:, r, where], drawn.weights[:, r, where]
            tokens = batch.tokens[r, where]
            values = [elbo_of(params, tokens, masked, weights) for params in (policy, frozen)]
            elbos.append(values)
            sft.append(-values[0] / answer)
            start = where.stop
        for (w, w_ref), (l, l_ref) in zip(elbos[::2], elbos[1::2], strict=True):
            scores.append(0.2 * ((w - w_ref) - (l - l_ref)))
    scores = np.array(scores)
    _, metrics = run(policy, batch, frozen)
    assert metrics["pairs"] == len(scores) == 6
    np.testing.assert_allclose(metrics["rewards/margins"], scores.mean(), rtol=1e-4)
    expected = np.log1p(np.exp(-scores)).mean()
    np.testing.assert_allclose(metrics["loss/preference"], expected, rtol=1e-4)
    winners = np.mean([x for i, x in enumerate(sft) if i % 2 == 0])
    np.testing.assert_allclose(metrics["loss/sft"], winners, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], expected + 0.05 * winners, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_of_the_budget_change_nothing(policy, frozen, batch, chunk):
    whole = run(policy, batch, frozen)
    assert_same(run(policy, batch, frozen, dataclasses.replace(SETTINGS, mc_chunk=chunk)), whole)


@pytest.mark.parametrize("accumulate", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_changes_nothing(policy, frozen, batch, accumulate):
    assert_same(run(policy, batch, frozen, accumulate=accumulate), run(policy, batch, frozen))


@pytest.mark.parametrize("share_noise", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_cached_reference_is_the_reference(policy, frozen, batch, share_noise):
    settings = dataclasses.replace(SETTINGS, share_noise=share_noise)
    terms = preference.reference_terms(frozen, batch, model=MODEL, settings=settings)
    cached = run(policy, batch.replace(reference=terms), None, settings, accumulate=2)
    assert_same(cached, run(policy, batch, frozen, settings))


def test_sharing_noise_lowers_the_error_of_the_score(policy, batch):
    close = jax.tree.map(lambda x: 1.001 * x, policy)
    errors = {
        share: run(policy, batch, close, dataclasses.replace(SETTINGS, share_noise=share))[1][
            "score/mc_stderr"
        ]
        for share in (True, False)
    }
    assert errors[True] < errors[False] / 20


@pytest.mark.parametrize(
    "share_noise, share_in_pair", [(True, "nothing"), (True, "masks"), (False, "times")]
)
def test_the_reported_error_of_the_score_is_the_true_one(
    policy, frozen, batch, share_noise, share_in_pair
):
    """Against the spread of the score over many seeds."""
    scheme = noise.Scheme(n_t=4, share_in_pair=share_in_pair)
    settings = dataclasses.replace(SETTINGS, scheme=scheme, share_noise=share_noise)

    def score(seed):
        rows = batch.replace(epochs=jnp.full(4, seed, jnp.int32))
        metrics = preference.score_pairs(policy, rows, frozen, model=MODEL, settings=settings)
        return metrics["rewards/margins"], metrics["score/mc_variance"], preference.is_pair(rows)

    scores, variances, is_pair = jax.jit(lambda seeds: jax.lax.map(score, seeds))(jnp.arange(300))
    true, reported = scores.var(0, ddof=1)[is_pair[0]], variances.mean(0)[is_pair[0]]
    np.testing.assert_allclose(reported.mean(), true.mean(), rtol=0.15)


def test_the_error_of_the_score_is_logged_only_where_it_is_known(policy, frozen, batch):
    for scheme in (
        noise.Scheme(2, times="stratified"),
        noise.Scheme(2, weights="leave_one_out"),
        noise.Scheme(1, 2),
    ):
        settings = dataclasses.replace(SETTINGS, scheme=scheme)
        step = vrpo_step(settings)
        before = TrainState(jnp.zeros((), jnp.int32), policy, TX.init(policy))
        metrics = jax.eval_shape(step, before, batch, frozen)[1]
        assert "rewards/margins" in metrics and not [
            name for name in metrics if name.startswith("score/")
        ]


def test_rows_of_padding_and_other_rows_order_change_nothing(policy, frozen, batch):
    padding = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), batch).replace(row_ids=jnp.array([-1]))
    more = jax.tree.map(lambda *x: jnp.concatenate(x)[jnp.array([3, 4, 0, 2, 1])], batch, padding)
    assert_same(run(policy, more, frozen), run(policy, batch, frozen))


@pytest.mark.parametrize(
    "sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str
)
def test_a_mesh_of_eight_computes_what_one_device_does(policy, frozen, sizes):
    batch = make_batch(LAYOUT * 2, LENGTH)
    one = run(policy, batch, frozen, accumulate=1)
    mesh8 = mesh.make_mesh(*sizes)
    tx = optim.make_optimizer(optim.make_schedule(peak=1e-3, warmup_steps=0, num_steps=10))
    shardings = jax.tree.map(lambda x: x.sharding, state.abstract_state(MODEL, tx, mesh8)).params
    with mesh.use(mesh8):
        sharded = [jax.device_put(p, shardings) for p in (policy, frozen)]
        if sizes == (2, 2, 2):
            kernel = sharded[0]["blocks"]["ff_proj"]["kernel"]
            assert kernel.addressable_shards[0].data.shape == (2, 8, 12)
        jitted.cache_clear()  # logical constraints mean a mesh only where it is traced under one
        eight = run(sharded[0], jax.device_put(batch, mesh.rows(mesh8)), sharded[1])
        jitted.cache_clear()
    assert_same(eight, one, rtol=1e-4)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_budget():
    """memory_analysis of the compiled gradient: n = 8 in chunks of one against n = 1."""
    config = dataclasses.replace(
        CONFIG, d_model=64, mlp_hidden_size=128, vocab_size=512, embedding_size=512
    )
    model = LLaDA(config, logps_chunk=128)
    batch = make_batch(LAYOUT, 128)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    )
    params = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "value"))
    before = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, ())

    def temporaries(n, chunk):
        settings = dataclasses.replace(SETTINGS, scheme=noise.Scheme(n_t=n), mc_chunk=chunk)
        step = vrpo_step(settings, model=model, tx=optax.identity())
        compiled = jax.jit(step).lower(before, batch, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, chunked, whole = temporaries(1, 0), temporaries(8, 1), temporaries(8, 0)
    weights = sum(x.size * 4 for x in jax.tree.leaves(params))
    assert chunked < one + 2 * weights, (
        one,
        chunked,
        weights,
    )  # a second gradient to add to, and the masks
    assert whole > 3 * one, "without chunks it does grow"


@pytest.mark.slow
def test_no_logits_beyond_a_chunk():
    """The compiled step has no float array of vocabulary width but the head and the embedding."""
    import re

    vocab, chunk, length = 509, 61, 64  # primes: no other product makes them
    padded = -(-vocab // chunk) * chunk
    config = dataclasses.replace(CONFIG, vocab_size=vocab, embedding_size=vocab, mask_token_id=508)
    batch = make_batch(LAYOUT, length)

    def positions(chunk):
        """Of the array of vocabulary width with the most of them."""
        model = LLaDA(config, logps_chunk=chunk)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
        params = jax.tree.map(lambda x: x.value, params, is_leaf=lambda x: hasattr(x, "value"))
        step = vrpo_step(model=model)
        before = TrainState(jnp.zeros((), jnp.int32), params, TX.init(params))
        text = jax.jit(step).lower(before, batch, params).compile().as_text()
        shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", text)]
        return max(int(np.prod(s)) // v for v in (vocab, padded) for s in shapes if v in s)

    assert positions(chunk) <= config.d_model
    assert positions(vocab) >= 4 * len(LAYOUT) * length, (
        "the test can see the array that must not be there"
    )


def denoise(params, batch, settings, accumulate=1, objective="sft"):
    before = TrainState(jnp.zeros((), jnp.int32), params, TX.init(params))
    fn = functools.partial(
        train_step,
        objective=OBJECTIVES[objective],
        model=MODEL,
        tx=TX,
        settings=settings,
        accumulate=accumulate,
    )
    after, metrics = jax.jit(fn)(before, batch, None)
    return jax.tree.map(lambda a, b: a - b, before.params, after.params), metrics


def test_sft_is_cross_entropy_over_p_and_answer_length(policy, batch):
    """The formula of the spec, from full logits at the very masks of the step."""
    settings = Denoising()
    drawn = terms_lib.draw(batch, settings.scheme, seed=0, stream="policy")
    logits = MODEL.apply(
        {"params": policy},
        jnp.where(drawn.masked[0], 39, batch.tokens),
        segment_ids=batch.segment_ids,
        positions=batch.positions,
    )
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens)
    total, samples = 0.0, 0
    for r, segments in enumerate(LAYOUT):
        for s, (_, answer) in enumerate(segments):
            inside = (batch.segment_ids[r] == s + 1) & drawn.masked[0, r]
            total += float(jnp.sum(jnp.where(inside, ce[r] * drawn.weights[0, r], 0)) / answer)
            samples += 1
    _, metrics = denoise(policy, batch, settings)
    np.testing.assert_allclose(metrics["loss"], total / samples, rtol=1e-4)
    p = 1 / drawn.weights[drawn.masked]
    assert p.min() >= 1e-3 and p.max() <= 1
    assert_same(denoise(policy, batch, settings, accumulate=2), denoise(policy, batch, settings))


def test_pretraining_cuts_some_rows_short(policy):
    batch = make_batch([[(0, LENGTH)]] * 64, LENGTH)
    settings = Pretraining(crop_probability=0.3)
    cropped = denoising.crop(batch, settings)
    lengths = np.asarray((cropped.segment_ids > 0).sum(1))
    np.testing.assert_array_equal(cropped.response_mask, cropped.segment_ids > 0)
    assert 8 < (lengths < LENGTH).sum() < 32 and lengths.min() >= 1
    assert len(set(lengths.tolist())) > 6
    np.testing.assert_array_equal(
        denoising.crop(batch, Pretraining()).segment_ids, batch.segment_ids
    )
    _, metrics = denoise(policy, batch, settings, objective="pretrain")
    assert np.isfinite(metrics["loss"])


def test_settings_are_checked_where_they_are_made():
    for change, message in (
        ({"mc_chunk": 3}, "mc_chunk=3 does not divide n_t x n_yt = 4"),
        ({"kind": "dpo"}, "kind='dpo' is not one of"),
        ({"beta": -1.0}, "beta=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SETTINGS, **change)


def plan_of(**changes):
    arch = CONFIG.to_dict() | {"embedding_size": 64}
    shared = {"model.arch": arch, "data.row_length": 16, "data.batch_rows": 4, "num_steps": 9}
    shared |= {"optimizer.warmup_steps": 2, "vrpo.n_t": 2}
    return compile_step.plan_for(config_of(shared | changes).lock(), jax.devices()[:1])


NUMBERS = {"seed": 2**33 + 5, "optimizer.peak": 3e-3, "vrpo.beta": 0.7, "vrpo.sft_weight": 0.3}


def test_runs_that_differ_in_numbers_only_share_a_program():
    plans = [plan_of(), plan_of(**NUMBERS)]
    abstract = compile_step.make_abstract(plans[0])
    shardings = jax.tree.map(lambda x: x.sharding, abstract[0])
    one, other = (jit_update(plan, shardings).lower(*abstract).as_text() for plan in plans)
    assert one == other


@pytest.mark.slow
def test_numbers_that_are_arguments_give_the_bits_of_constants():
    plan = plan_of(**NUMBERS)
    shardings = jax.tree.map(lambda x: x.sharding, compile_step.make_abstract(plan)[0])
    parts = {name: getattr(plan, name) for name in ("objective", "model", "tx", "settings")}
    constants = jax.jit(functools.partial(train_step, **parts), donate_argnums=0)
    found = []
    for update, count in ((jit_update(plan, shardings), 4), (constants, 3)):
        work = make_work(plan)
        for _ in range(4):
            work.state, values = update(*work.arguments[:count])
        found.append(jax.device_get((values, work.state)))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert int(work.state.step) == 4 and values["loss/sft"] > 0
