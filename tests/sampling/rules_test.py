"""Rules of papers in the compiled loop, against plain numpy loops written from the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from sampling import paper_rules
from sampling.rows_test import EOS, MASK, biased, model

from llada_jax import sampling
from llada_jax.sampling import growth, state

START = 5
PROMPTS = np.random.default_rng(3).integers(0, MASK, (4, START))
LENGTH = 16


@functools.cache
def endings():
    """The model, to which EOS is likely."""
    return Partial(biased, jnp.zeros(MASK + 1).at[EOS].set(3.0), model())


def predict(fn, length):
    """The logits of a row of ids, computed as the sampler does: in a buffer of one length."""
    compiled = jax.jit(fn)

    def of(tokens):
        row = np.full((1, length), MASK)
        row[0, : len(tokens)] = tokens
        seen = (np.arange(length) < len(tokens)).astype(np.int32)[None]
        return np.float64(compiled(row, seen)[0, : len(tokens)])

    return of


CASES = {
    "eb": (
        dict(commit="entropy", entropy_budget=3.0),
        dict(rule=paper_rules.rule("eb", budget=3.0)),
    ),
    "klass": (
        dict(commit="klass", threshold=0.2, kl_threshold=0.3),
        dict(rule=paper_rules.rule("klass", limit=0.2, kl_limit=0.3, within=True)),
    ),
    "remdm": (
        dict(commit="schedule", steps=8, revoke="remdm", revoke_number=3, revoke_passes=3),
        dict(
            rule=paper_rules.rule("schedule", steps=4), revoke=paper_rules.Remdm(count=3, loops=3)
        ),
    ),
}


@pytest.mark.parametrize("case", [pytest.param("eb", marks=pytest.mark.slow), "klass", "remdm"])
def test_a_rule_writes_what_its_paper_says(case):
    # Truth: `paper_rules`, row by row. Tokens, passes of commits, and revocations.
    settings, reference = CASES[case]
    got = sampling.generate(
        model(),
        PROMPTS,
        mask_id=MASK,
        gen_length=LENGTH,
        block_length=8,
        remasking="probability",
        trace=True,
        **settings,
    )
    several, predictions = 0, predict(model(), START + LENGTH)
    for b, prompt in enumerate(PROMPTS):
        row = np.append(prompt, np.full(LENGTH, MASK))
        expected = paper_rules.decode(
            predictions, row, start=START, block_length=8, mask_id=MASK, **reference
        )
        np.testing.assert_array_equal(got.tokens[b], expected.tokens)
        np.testing.assert_array_equal(got.steps[b], expected.steps)
        np.testing.assert_array_equal(got.revocations[b], expected.revoked)
        assert int(got.row_passes[b]) == expected.passes
        np.testing.assert_allclose(
            np.asarray(got.confidence)[b, START:], expected.confidence[START:], rtol=1e-4
        )
        several += expected.passes < LENGTH or expected.revoked.sum() > 0
    assert several >= 3  # the rule does something


def test_a_mask_becomes_several_and_the_text_moves():
    # By hand: position 3 of the text becomes three masks; the last two positions are cut off.
    prompts = jnp.array([[7, 8]])
    s = sampling.Settings(
        MASK, gen_length=6, block_length=6, growth=sampling.Growth(5, factor=3), eos_id=EOS
    )
    rows = state.begin(state.Inputs(prompts, None, None, None, None), s)
    tokens = jnp.array([[7, 8, 20, MASK, 21, MASK, MASK, MASK]])
    past = {"logits": jnp.arange(8.0).reshape(1, 8, 1), "stable": jnp.arange(8)[None]}
    rows = rows.replace(tokens=tokens, history=past, sizing=jnp.array([False]))
    value = jnp.array([[1, 1, 1, 0.01, 1, 0.05, 1, 1]])
    got = growth.insert(rows, jnp.zeros(1), value, tokens == MASK, s.growth, 6, MASK)
    np.testing.assert_array_equal(got.tokens, [[7, 8, 20, MASK, MASK, MASK, 21, MASK]])
    nan = np.nan
    np.testing.assert_array_equal(got.history["logits"][0, :, 0], [0, 1, 2, 3, nan, nan, 4, 5])
    assert int(got.end[0]) == 8
    kept = growth.insert(rows, jnp.ones(1), value, tokens == MASK, s.growth, 6, MASK)
    np.testing.assert_array_equal(kept.tokens, tokens)


@pytest.mark.parametrize(
    "low, expand, rule",
    [
        pytest.param(0.0, 0.9, "threshold", marks=pytest.mark.slow),
        (0.2, 0.9, "threshold"),
        # What the rule remembers of the passes before moves with the text.
        pytest.param(0.2, 0.9, "klass", marks=pytest.mark.slow),
    ],
)
def test_a_response_finds_its_length(low, expand, rule):
    # Truth: `paper_rules`. The first case grows before its first commit only.
    rules = {
        "threshold": (dict(threshold=0.3), dict(limit=0.3)),
        "klass": (
            dict(threshold=0.15, kl_threshold=1.0),
            dict(limit=0.15, kl_limit=1.0, within=True),
        ),
    }
    ours, theirs = rules[rule]
    numbers = dict(factor=3, eos_window=4)
    lengths = sampling.Growth(
        initial_length=4,
        eos_confidence=0.02,
        insert_eos_confidence=expand,
        insert_confidence=low,
        **numbers,
    )
    got = sampling.generate(
        endings(),
        PROMPTS,
        mask_id=MASK,
        gen_length=24,
        block_length=4,
        commit=rule,
        **ours,
        remasking="probability",
        eos_id=EOS,
        growth=lengths,
        trace=True,
    )
    reference = paper_rules.Daedal(
        EOS, max_length=24, eos=0.02, expand_eos=expand, low=low, factor=3, check=4
    )
    predictions = predict(endings(), START + 24)
    for b, prompt in enumerate(PROMPTS):
        expected = paper_rules.decode(
            predictions,
            np.append(prompt, np.full(4, MASK)),
            start=START,
            block_length=4,
            mask_id=MASK,
            rule=paper_rules.rule(rule, **theirs),
            grow=reference,
        )
        length = len(expected.tokens)
        assert int(got.lengths[b]) == length - START
        np.testing.assert_array_equal(got.tokens[b, :length], expected.tokens)
        np.testing.assert_array_equal(got.steps[b, :length], expected.steps)
        assert (got.tokens[b, length:] == EOS).all()
        assert int(got.row_passes[b]) == expected.passes
    assert len(set(got.lengths.tolist())) > 1
