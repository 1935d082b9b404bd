"""Caches: keys and values that are kept, against passes without a cache and the golden logits."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from sampling.rows_test import CONFIG, MASK, PROMPTS, SETTINGS, model

import llada_jax
from llada_jax import sampling
from llada_jax.models.llada import LLaDA
from llada_jax.sampling import state
from llada_jax.sampling.view import View

THRESHOLD = dict(commit="threshold", threshold=0.5)
PARTS = dict(refresh=4, refresh_prompt=8, transfer_ratio=0.25)
WINO = dict(commit="wino", threshold=0.1, revoke="wino", threshold_back=0.9)


def padded_prompts():
    prompts = np.random.default_rng(0).integers(0, MASK, (3, 7))
    mask = np.ones_like(prompts)
    mask[1, :5] = 0
    prompts[2, 3] = MASK
    return prompts, mask


@pytest.mark.parametrize(
    "cache, settings",
    [
        ("dual", THRESHOLD),
        pytest.param("prefix", dict(cfg_scale=0.5), marks=pytest.mark.slow),
        pytest.param("dual", dict(cfg_scale=0.5), marks=pytest.mark.slow),
        pytest.param("prefix", THRESHOLD, marks=pytest.mark.slow),
        ("delayed", THRESHOLD),
        pytest.param("dual", dict(WINO, block_length=16), marks=pytest.mark.slow),
        pytest.param("prefix", dict(WINO, block_length=16), marks=pytest.mark.slow),
        pytest.param("delayed", dict(WINO, block_length=16), marks=pytest.mark.slow),
        pytest.param(
            "selective",
            dict(cfg_scale=0.5, refresh_prompt=1, transfer_ratio=0.5),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_cache_renewed_in_each_pass_is_no_cache(cache, settings):
    # Truth: the same passes without a cache, to the last token, pass and confidence.
    prompts, mask = padded_prompts()
    settings = (
        dict(mask_id=MASK, steps=8, gen_length=16, block_length=4, attention_mask=mask, trace=True)
        | settings
    )
    of_cache = ("refresh_prompt", "transfer_ratio")
    without = {k: v for k, v in settings.items() if k not in of_cache}
    plain = sampling.generate(model(), prompts, lockstep=cache != "selective", **without)
    got = sampling.generate(model(), prompts, cache=cache, refresh=1, **settings)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    np.testing.assert_array_equal(got.steps, plain.steps)
    np.testing.assert_allclose(got.confidence, plain.confidence, rtol=1e-5)
    assert (got.tokens[:, 7:] != MASK).all()
    assert (np.asarray(got.revocations) > 0).any() == (settings.get("revoke") == "wino")


@pytest.mark.parametrize(
    "cache, settings",
    [
        pytest.param("prefix", {}, marks=pytest.mark.slow),
        pytest.param("dual", {}, marks=pytest.mark.slow),
        pytest.param("dual", WINO, marks=pytest.mark.slow),
        pytest.param("delayed", {}, marks=pytest.mark.slow),
        pytest.param("selective", PARTS, marks=pytest.mark.slow),
    ],
)
def test_a_row_with_a_cache_does_not_depend_on_its_batch(cache, settings):
    # Rows end at their EOS and are refilled, so they stand in different blocks.
    settings = {**SETTINGS, **THRESHOLD, "stop_at_eos": True, "cache": cache} | settings
    prompts = PROMPTS[:24]
    alone = sampling.sample_responses(model(), prompts, batch_size=1, **settings)
    together = sampling.sample_responses(model(), prompts, batch_size=8, **settings)
    np.testing.assert_array_equal(alone, together)
    of_cache = ("refresh", "refresh_prompt", "transfer_ratio")
    without = {k: v for k, v in settings.items() if k not in of_cache}
    uncached = sampling.sample_responses(
        model(), prompts, batch_size=8, **{**without, "cache": "none"}
    )
    assert (alone != uncached).any()  # the cache does something


@pytest.mark.slow
def test_a_delayed_cache_keeps_what_was_known_before_the_pass_before():
    # Second route: plain loops over blocks and passes (spec/samplers.md 3.2). All tokens are fed,
    # and those that the cache has are not written.
    prompt, block, steps, refresh = np.random.default_rng(4).integers(0, MASK, 5), 8, 4, 3
    module, variables = LLaDA(CONFIG), model().args[0]
    apply = jax.jit(lambda *a: module.apply(variables, *a, method="with_cache"))
    row = np.append(prompt, np.full(16, MASK))
    places = jnp.arange(21)[None]
    cache = module.init_cache(1, 21)
    for first in (5, 13):
        known = []  # before each pass of the block
        for turn in range(steps):
            known.append(row != MASK)
            fed = np.ones(21, bool)
            if turn > 1 and turn % refresh:
                fed = ~known[turn - 1]
            logits, cache = apply(row[None], None, places, cache.at(places, jnp.asarray(fed)[None]))
            logits = np.float64(logits[0])
            p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            candidates = logits[:, :MASK].argmax(-1)
            score = p[np.arange(21), candidates]
            inside = (row == MASK) & (np.arange(21) >= first) & (np.arange(21) < first + block)
            best = sorted(np.flatnonzero(inside), key=lambda i: -score[i])[: block // steps]
            row[best] = candidates[best]
    settings = dict(gen_length=16, block_length=block, steps=2 * steps, remasking="probability")
    settings |= dict(mask_id=MASK, cache="delayed", refresh=refresh)
    got = sampling.generate(model(), prompt[None], **settings)
    np.testing.assert_array_equal(got[0], row)


def test_a_shadow_sees_all_but_what_it_stands_for():
    # Second route: a text of 5 + 4 positions and 4 shadows, with the mask written out.
    prompts = np.random.default_rng(0).integers(0, MASK, (1, 5))
    s = sampling.Settings(MASK, gen_length=4, block_length=4, **WINO)
    rows = state.begin(state.Inputs(jnp.asarray(prompts), None, None, None, None), s)
    rows = rows.replace(tokens=rows.tokens.at[0, 6].set(3))
    logits, shadow, _ = View(rows, s, wanted=jnp.arange(5, 9)[None]).logits(model(), None)
    sees = np.zeros((13, 13), bool)
    sees[:, :9] = True  # the text
    sees[9:, 9:] = True  # shadows see each other
    for shadow_of in range(4):
        sees[9 + shadow_of, 5 + shadow_of] = False
    tokens = np.append(rows.tokens[0], [MASK] * 4)[None]
    positions = np.append(np.arange(9), np.arange(5, 9))[None]
    expected = model()(*map(jnp.asarray, (tokens, sees[None])), positions=jnp.asarray(positions))
    np.testing.assert_allclose(shadow[0], expected[0, 9:], atol=1e-5)
    np.testing.assert_allclose(logits[0], expected[0, 5:9], atol=1e-5)


def test_every_mask_is_filled_beside_a_cache():
    # The masks of the prompt are outside the windows; only full passes fill them.
    prompts = np.random.default_rng(0).integers(0, MASK, (2, 6))
    prompts[0, 1:4] = prompts[1, 5] = MASK
    for settings in (dict(steps=8), dict(steps=8, commit="threshold", threshold=0.99)):
        got = sampling.generate(
            model(), prompts, mask_id=MASK, gen_length=8, block_length=4, cache="dual", **settings
        )
        assert (got != MASK).all()


def test_logits_of_a_window_are_those_of_the_whole():
    # Truth: the model without a cache, for a text whose kept part has not changed.
    module, variables = LLaDA(CONFIG), model().args[0]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, MASK, (2, 12)))
    mask = jnp.ones((2, 12), jnp.int32).at[1, :3].set(0)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    cache = module.init_cache(2, 12)
    apply = jax.jit(lambda *a: module.apply(variables, *a, method="with_cache"))
    full, cache = apply(tokens, mask, positions, cache)
    expected = module.apply(variables, tokens, mask)
    np.testing.assert_allclose(full, expected, atol=1e-5)
    for start, first, stop in ((6, 6, 9), (4, 6, 9), (6, 6, 12), (0, 6, 12)):
        places = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        at = cache.at(places, places >= first)
        got, same = apply(tokens[:, start:stop], mask, positions[:, start:stop], at)
        np.testing.assert_allclose(got, expected[:, start:stop], atol=1e-5)
        # Other tokens replace what is theirs, and nothing else.
        changed, new = apply(tokens[:, start:stop] * 0, mask, positions[:, start:stop], at)
        assert np.abs(changed - got).max() > 0.1
        kept = np.r_[0:first, stop:12]
        np.testing.assert_array_equal(new.keys[..., kept, :], cache.keys[..., kept, :])
        np.testing.assert_array_equal(new.values[..., kept, :], cache.values[..., kept, :])
        assert (new.values[..., first:stop, :] != same.values[..., first:stop, :]).any()


@pytest.mark.parametrize("method", ["prefix", "dual"])
def test_golden_logits_of_cached_passes(shared, method):
    # Truth: the authors' PyTorch code, the logits of passes 2, 3 (first block) and 5 (second).
    folder = shared / "golden" / "samplers" / "llada_mha"
    about = json.loads((folder / "samplers.json").read_text())
    arrays = np.load(folder / "samplers.npz")
    name = f"fast_dllm/{method}_quota_uneven"
    run = next(run for run in about["runs"] if run["id"] == name)
    prompt, tokens, step = (arrays[f"{name}/{k}"] for k in ("prompt", "tokens", "step"))
    module, params = llada_jax.load(shared / "golden" / "llada_mha" / "policy")
    step_fn = jax.jit(lambda *a: module.apply({"params": params}, *a, method="with_cache"))
    apply = lambda tokens, *a: step_fn(jnp.asarray(tokens), *a)
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    before = lambda n: np.where(step >= n, about["mask_token_id"], tokens)
    for block, first_pass, passes in ((0, 1, (2, 3)), (1, 4, (5,))):
        start = prompt.shape[1] + block * run["block_length"]
        stop = length if method == "prefix" else start + run["block_length"]
        _, cache = apply(before(first_pass), None, positions, module.init_cache(batch, length))
        for n in passes:
            at = cache.at(jnp.broadcast_to(jnp.arange(start, stop), (batch, stop - start)))
            got, cache = apply(before(n)[:, start:stop], None, positions[:, start:stop], at)
            np.testing.assert_allclose(got, arrays[f"{name}/logits_pass{n}"], atol=2e-4)


def test_windows():
    # By hand: 8 blocks of 4 after a prompt of 10, and 3 tokens after them.
    got = sampling.CACHES["prefix"].windows(10, 45, 4, 8)
    assert got.sizes == (35, 19, 11, 7)
    np.testing.assert_array_equal(got.size_of, [0, 0, 0, 0, 1, 1, 2, 3])
    np.testing.assert_array_equal(got.starts, [10, 10, 10, 10, 26, 26, 34, 38])
    got = sampling.CACHES["dual"].windows(10, 45, 4, 3)
    assert got.sizes == (4,) and list(got.starts) == [10, 14, 18]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits_fn=lambda t, m: 0), 'cache="dual" needs the model itself'),
        (dict(cache="best"), "cache='best' is not one of none, prefix, dual, delayed, selective"),
        (dict(refresh=0), "refresh=0 must be a whole number, at least 1"),
        (dict(cache="none", refresh=4), 'refresh=4 has no effect with cache="none"'),
    ],
)
def test_bad_arguments_are_one_line(change, message):
    arguments = dict(logits_fn=Partial(LLaDA(CONFIG).apply, {}), prompts=np.ones((1, 3), int))
    arguments |= dict(mask_id=MASK, steps=4, gen_length=4, block_length=4, cache="dual")
    with pytest.raises(ValueError, match=message) as error:
        sampling.generate(**arguments | change)
    assert "\n" not in str(error.value)


def test_a_pass_does_not_copy_the_cache():
    # The compiled program has no copy of an array of the shape of the keys inside its loops.
    prompts = np.ones((2, 5), int)
    settings = dict(mask_id=MASK, steps=8, gen_length=16, block_length=8, cache="dual")

    def run(logits_fn):
        return sampling.generate(logits_fn, prompts, **settings)

    text = jax.jit(run).lower(model()).compile().as_text()
    shape = r"f32\[2,2,4,21,8\]"
    entry = text[text.index("\nENTRY ") :]
    copies = re.findall(rf"= {shape}\S* copy\(", text)
    outside = re.findall(rf"= {shape}\S* copy\(", entry)
    assert re.search(shape, text) and len(copies) == len(outside)
