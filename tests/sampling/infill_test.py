"""Masks in the prompt and after the response, stopping at EOS, and the trace."""

import jax
import numpy as np
import pytest
from sampling.sampler_test import EOS, MASK, V, toy_logits

from llada_jax import sampling

RULES = [
    dict(steps=6),
    dict(steps=1, block_length=12),
    dict(steps=12, commit="threshold", threshold=0.5),
    dict(steps=12, commit="factor", factor=1.0, remasking="margin"),
    dict(steps=6, remasking="random", key=jax.random.key(0), temperature=1.0),
    dict(steps=6, cfg_scale=0.5),
]


def prompts_with_masks():
    prompts = np.random.default_rng(2).integers(0, MASK, (5, 8))
    prompts[0, 2] = prompts[1, 5] = prompts[1, 6] = MASK
    prompts[2] = MASK  # a prompt of only masks
    mask = np.ones_like(prompts)
    mask[3, :3] = 0
    prompts[3, 1], prompts[3, 4] = MASK, MASK  # one of them is padding
    return prompts, mask


@pytest.mark.parametrize("rule", range(len(RULES)))
def test_every_mask_is_filled(rule):
    prompts, mask = prompts_with_masks()
    suffix = np.random.default_rng(3).integers(0, MASK, (5, 3))
    suffix[0, 1] = suffix[4, 2] = MASK
    settings = {"mask_id": MASK, "gen_length": 12, "block_length": 6, **RULES[rule]}
    got = sampling.generate(
        toy_logits, prompts, attention_mask=mask, suffix=suffix, trace=True, **settings
    )
    given = np.concatenate([prompts, np.full((5, 12), MASK), suffix], 1)
    is_open = given == MASK
    is_open[3, 1] = False
    tokens, steps = np.asarray(got.tokens), np.asarray(got.steps)
    np.testing.assert_array_equal(tokens[~is_open], given[~is_open])
    assert (tokens[is_open] != MASK).all()
    assert (steps[~is_open] == 0).all() and (steps[is_open] > 0).all()
    np.testing.assert_array_equal(np.isnan(got.confidence), ~is_open)
    np.testing.assert_array_equal(got.row_passes, steps.max(1))
    assert int(got.passes) == steps.max()
    # A second block begins after all before its end is filled.
    if settings["block_length"] == 6:
        assert (steps[:, :14].max(1) < np.where(is_open, steps, 99)[:, 14:].min(1)).all()


def reference_infill(prompts, steps):
    """The schedule in plain loops and float64, over all masks of the row, in one block."""
    x = np.concatenate([prompts, np.full((len(prompts), 6), MASK)], 1)
    order, planned = np.where(x == MASK, -1, 0), (x == MASK).sum(1)
    for step in range(steps):
        logits = np.array(toy_logits(x, None), np.float64)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        for b in range(len(x)):
            best = np.where(np.arange(V) == MASK, -1, p[b]).argmax(-1)
            places = [i for i in range(x.shape[1]) if x[b, i] == MASK]
            places.sort(key=lambda i: -p[b, i, best[i]])
            count = planned[b] // steps + (step < planned[b] % steps)
            for i in places[:count]:
                x[b, i], order[b, i] = best[i], step + 1
    return x, order


def test_the_schedule_counts_the_masks_of_the_prompt():
    # Truth: plain loops.
    prompts, _ = prompts_with_masks()
    got = sampling.generate(
        toy_logits, prompts, mask_id=MASK, steps=3, gen_length=6, block_length=6, trace=True
    )
    tokens, order = reference_infill(prompts, 3)
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_array_equal(got.steps, order)


def test_the_mask_token_is_not_written():
    def fn(tokens, attention_mask):  # the mask token is the best, the place comes second
        return 3.0 * jax.nn.one_hot(tokens * 0 + MASK, V) + jax.nn.one_hot(
            np.arange(tokens.shape[1]) % MASK, V
        )

    settings = dict(mask_id=MASK, steps=4, gen_length=4, block_length=2)
    got = sampling.generate(fn, np.ones((2, 3), int), **settings)
    np.testing.assert_array_equal(got, [[1, 1, 1, 3, 4, 5, 6]] * 2)
    for rule in ({}, dict(commit="threshold", threshold=0.1)):
        left = sampling.generate(fn, np.ones((2, 3), int), infill="published", **settings | rule)
        assert (left[:, 3:] == MASK).all()  # as the published loop leaves it


def test_only_allowed_tokens_are_written():
    allowed = np.isin(np.arange(V), [3, 4, 7])
    for temperature in (0.0, 2.0):
        got = sampling.generate(
            toy_logits,
            np.ones((4, 3), int),
            mask_id=MASK,
            steps=4,
            gen_length=8,
            block_length=4,
            temperature=temperature,
            key=jax.random.key(0),
            allowed=allowed,
        )
        assert set(np.unique(got[:, 3:])) <= {3, 4, 7}


@pytest.mark.parametrize("commit", [{}, dict(commit="threshold", threshold=0.4)])
def test_a_row_stops_at_eos(commit):
    # Truth: the same rows without stopping, and when the last token up to the EOS was committed.
    def fn(tokens, attention_mask):
        return toy_logits(tokens, attention_mask) + 5.0 * jax.nn.one_hot(tokens * 0 + EOS, V)

    prompts = np.random.default_rng(4).integers(0, MASK, (16, 5))
    settings = dict(mask_id=MASK, steps=24, gen_length=24, block_length=4, eos_id=EOS, **commit)
    settings |= dict(temperature=1.0, key=jax.random.key(0))  # for rows that end differently
    whole = sampling.generate(fn, prompts, trace=True, **settings)
    got = sampling.generate(fn, prompts, trace=True, stop_at_eos=True, **settings)
    lengths = []
    for b in range(16):
        response = np.asarray(whole.tokens)[b, 5:].tolist()
        end = 5 + (response.index(EOS) + 1 if EOS in response else 24)
        lengths.append(end)
        np.testing.assert_array_equal(got.tokens[b, :end], whole.tokens[b, :end])
        np.testing.assert_array_equal(got.steps[b, :end], whole.steps[b, :end])
        assert int(got.row_passes[b]) == np.asarray(whole.steps)[b, :end].max()
        done = np.asarray(whole.steps)[b] <= int(got.row_passes[b])
        expected = np.where(done, whole.tokens[b], EOS)
        np.testing.assert_array_equal(got.tokens[b], expected)
        np.testing.assert_array_equal(got.steps[b], np.where(done, whole.steps[b], -1))
    assert len(set(lengths)) > 3 and min(lengths) < 12
    assert int(got.passes) == int(got.row_passes.max()) < int(whole.passes)


def test_confidence_of_the_trace():
    # Truth: the softmax of the logits before the pass, recomputed from the trace.
    prompts = np.random.default_rng(4).integers(0, MASK, (3, 5))
    got = sampling.generate(
        toy_logits, prompts, mask_id=MASK, steps=4, gen_length=8, block_length=8, trace=True
    )
    tokens, steps = np.asarray(got.tokens), np.asarray(got.steps)
    for n in range(1, 5):
        before = np.where(steps >= n, MASK, tokens)
        p = np.asarray(jax.nn.softmax(toy_logits(before, None), -1))
        own = np.take_along_axis(p, tokens[..., None], -1)[..., 0]
        np.testing.assert_allclose(
            np.asarray(got.confidence)[steps == n], own[steps == n], rtol=1e-5
        )


def test_lockstep_writes_the_same_tokens_in_more_passes():
    prompts = np.random.default_rng(4).integers(0, MASK, (8, 5))
    settings = dict(mask_id=MASK, steps=24, gen_length=24, block_length=4, trace=True)
    settings |= dict(commit="threshold", threshold=0.6, temperature=1.0, key=jax.random.key(0))
    alone = sampling.generate(toy_logits, prompts, **settings)
    together = sampling.generate(toy_logits, prompts, lockstep=True, **settings)
    np.testing.assert_array_equal(alone.tokens, together.tokens)
    np.testing.assert_array_equal(alone.row_passes, together.row_passes)
    assert int(alone.passes) < int(together.passes)
