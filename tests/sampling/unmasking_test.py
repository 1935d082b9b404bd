"""Confidence and commit rules of one row, against float64 and plain loops."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sampling
from llada_jax.sampling import candidates, unmasking


def probabilities(logits):
    p = np.exp(np.float64(logits) - np.float64(logits).max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def logits_of(spread, seed=0, shape=(40, 30)):
    """Logits of which some rows are so confident that a float32 softmax is exactly 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=shape)
    logits[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] += spread * rng.random(
        shape[0]
    )
    return np.float32(logits)


def float64_confidence(name, logits, chosen):
    p = probabilities(logits)
    if name == "probability":
        return p[np.arange(len(p)), chosen]
    if name == "margin":
        best = -np.sort(-p, 1)
        return best[:, 0] - best[:, 1]
    return (p * np.log(np.maximum(p, 1e-300))).sum(1)


@pytest.mark.parametrize("spread", [0, 10, 30])
@pytest.mark.parametrize("name", ["probability", "margin", "entropy"])
def test_order_and_value_are_those_of_float64(name, spread):
    # Truth: a float64 softmax. At spread 30 many float32 probabilities are exactly 1.
    logits = logits_of(spread)
    chosen = logits.argmax(1)
    confidence = sampling.CONFIDENCES[name]
    score = np.asarray(confidence.score(jnp.asarray(logits), jnp.asarray(chosen), None))
    expected = float64_confidence(name, logits, chosen)
    np.testing.assert_allclose(confidence.value(score), expected, rtol=2e-5, atol=1e-7)
    order = np.argsort(expected, kind="stable")
    np.testing.assert_array_equal(np.argsort(score, kind="stable"), order)
    for t in np.sort(expected)[[3, 20]] * (1 - 1e-6):
        limit = np.float32(confidence.limit(t))
        np.testing.assert_array_equal(score >= limit, expected >= t)
    if spread == 30 and name == "probability":
        rounded = np.asarray(jax.nn.softmax(logits, -1)).max(1)
        assert (rounded == 1).sum() > 3  # the case for which log-odds are there


def test_extreme_logits_have_finite_order():
    logits = jnp.array([[0.0, -jnp.inf, -jnp.inf], [200.0, 0.0, 0.0], [-jnp.inf, 0.0, 0.0]])
    chosen = jnp.zeros(3, jnp.int32)
    for name in ("probability", "margin", "entropy"):
        score = np.asarray(sampling.CONFIDENCES[name].score(logits, chosen, None))
        assert not np.isnan(score).any(), name
    value = sampling.CONFIDENCES["probability"].score(logits, chosen, None)
    np.testing.assert_array_equal(np.argsort(-value), [0, 1, 2])
    assert value[2] == -np.inf


def entropies(p):
    return -(p * np.log(np.maximum(p, 1e-300))).sum(1)


def plain_rule(name, p, chosen, is_open, number):
    """The rules in plain loops and float64, from the papers and spec/samplers.md."""
    c = p[np.arange(len(p)), chosen]
    order = sorted((i for i in range(len(p)) if is_open[i]), key=lambda i: (-c[i], i))
    c = [c[i] for i in order]
    m = len(order)
    if name == "schedule":
        count = min(number, m)
    elif name == "threshold":
        count = max(sum(x >= number for x in c), min(m, 1))
    elif name == "factor":
        count = max([j for j in range(1, m + 1) if (j + 1) * (1 - c[j - 1]) < number] + [min(m, 1)])
    elif name == "factor_published":
        count = m
        for j in range(2, m + 1):
            if c[j - 1] < 1 - number / (j + 1):
                count = m if j == m else j - 1
                break
    elif name == "wino":
        most = min(max(int(0.7 * m), 5), 20)
        count = max(min(sum(x > number for x in c), most), min(m, 1))
    else:
        h = entropies(p)[order]
        count = max([k for k in range(1, m + 1) if h[:k].sum() - h[:k].max() <= number], default=0)
    return set(order[:count])


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("schedule", [0, 1, 3, 100]),
        ("threshold", [0.0, 0.3, 0.9, 1.0]),
        ("factor", [0.0, 0.5, 1.0, 2.0, 50.0]),
        ("factor_published", [0.0, 0.5, 1.0, 2.0, 50.0]),
        ("entropy", [0.0, 0.05, 0.5, 3.0, 1000.0]),
        ("wino", [0.0, 0.1, 0.5, 0.9]),
    ],
)
def test_rules_agree_with_plain_loops(name, numbers):
    # Truth: plain loops in float64, on rows with 0, 1, 2, 3 and more open positions.
    rule, confidence = sampling.COMMITS[name], sampling.CONFIDENCES["probability"]
    sizes = set()
    for seed, count in enumerate((0, 1, 2, 3, 3, 3, 9, 40)):
        logits = logits_of(12, seed)
        p, chosen = probabilities(logits), logits.argmax(1)
        is_open = np.random.default_rng(seed).permutation(40) < count
        score = confidence.score(jnp.asarray(logits), jnp.asarray(chosen), None)
        order = np.lexsort((np.arange(40), -np.asarray(score), ~is_open))
        rank = np.argsort(order) + 40 * ~is_open
        for number in numbers:
            row = unmasking.Row(
                jnp.asarray(is_open),
                score,
                jnp.asarray(rank),
                jnp.int32(number if name == "schedule" else 0),
                unmasking.entropy(jnp.asarray(logits)),
                jnp.zeros(40, int),
            )
            fields = dict.fromkeys(rule.needs, number)
            got = rule.choose(row, types.SimpleNamespace(**fields), confidence.limit)
            expected = plain_rule(name, p, chosen, is_open, number)
            assert set(np.flatnonzero(got)) == expected, (name, count, number)
            sizes.add(len(expected))
    assert len(sizes) > 4


def test_klass_needs_confidence_and_stability():
    # By hand: the second is unsure, the third has changed, the last is closed.
    row = unmasking.Row(
        open=jnp.array([True, True, True, False]),
        score=jnp.array([0.9, 0.2, 0.95, 0.99]),
        rank=jnp.array([1, 2, 0, 7]),
        quota=jnp.int32(1),
        entropy=jnp.zeros(4),
        stable=jnp.array([2, 5, 1, 9]),
    )
    got = unmasking.klass(row, types.SimpleNamespace(threshold=0.9), lambda p: p)
    np.testing.assert_array_equal(got, [True, False, False, False])


def test_the_divergence_is_that_of_this_pass_from_the_one_before():
    logits, before = logits_of(3, 0), logits_of(3, 1)
    p, q = probabilities(logits), probabilities(before)
    got = unmasking.divergence(jnp.asarray(logits), jnp.asarray(before))
    np.testing.assert_allclose(got, (p * np.log(p / q)).sum(1), rtol=1e-4)


def written(**changes):
    """A block of six: four written before, one now; the shadow doubts three of the four."""
    odds = np.log(np.array([0.8, 0.3, 0.1, 0.2, 0.01, 0.01]))
    odds -= np.log1p(-np.exp(odds))
    fields = dict(
        written=jnp.array([True, True, True, True, False, False]),
        committed=jnp.array([False, False, False, False, True, False]),
        score=jnp.array([3.0, 1.0, 2.0, 4.0, 0.5, jnp.inf]),
        shadow=jnp.float32(odds),
        number=jnp.int32(2),
        last=jnp.int32(30),
        planned=jnp.int32(6),
        revisions=jnp.int32(0),
    )
    return sampling.Written(**fields | changes)


@pytest.mark.parametrize(
    "rule, changes, expected",
    [
        ("wino", {}, {1, 2, 3}),  # below 0.5 by the shadow; what this pass wrote is not judged
        ("wino", dict(last=jnp.int32(3)), {2, 3}),  # fewer than the pass before committed
        ("wino", dict(last=jnp.int32(4)), {1, 2, 3}),
        ("wino", dict(number=jnp.int32(1)), set()),  # a pass that commits one revokes none
        ("remdm", {}, {1, 4}),  # the two lowest, once 7/8 of six, so five, are written
        ("remdm", dict(planned=jnp.int32(7)), set()),
        ("remdm", dict(revisions=jnp.int32(3)), set()),
    ],
)
def test_what_is_revoked(rule, changes, expected):
    # By hand, from spec/samplers.md (WINO) and the paper's appendix D.4 (ReMDM).
    numbers = types.SimpleNamespace(threshold_back=0.5, revoke_number=2, revoke_passes=3)
    got = sampling.REVOKES[rule].choose(written(**changes), numbers)
    assert set(np.flatnonzero(got)) == expected


def test_a_rule_from_outside():
    # Truth: by hand. It commits open positions two by two, from the left, whatever they are.
    def leftmost(row, numbers, limit):
        return row.open & (jnp.cumsum(row.open) <= numbers.factor)

    def descending(logits, candidates, noise):
        return -jnp.arange(logits.shape[0], dtype=jnp.float32)

    def fn(tokens, attention_mask):
        return jax.nn.one_hot((tokens == 9).sum(-1)[:, None] + jnp.zeros_like(tokens), 10)

    same = lambda x: x
    sampling.COMMITS["leftmost"] = sampling.Commit(leftmost, needs=("factor",))
    sampling.CONFIDENCES["descending"] = sampling.Confidence(descending, same, same)
    settings = dict(mask_id=9, steps=6, gen_length=6, block_length=6)
    try:
        tokens = sampling.generate(
            fn, np.zeros((1, 1), int), commit="leftmost", factor=2, **settings
        )
        np.testing.assert_array_equal(tokens, [[0, 6, 6, 4, 4, 2, 2]])
        tokens = sampling.generate(fn, np.zeros((1, 1), int), remasking="descending", **settings)
        np.testing.assert_array_equal(tokens, [[0, 6, 5, 4, 3, 2, 1]])
        # A rule that would never commit anything commits the most confident, one a pass.
        tokens = sampling.generate(
            fn,
            np.zeros((1, 1), int),
            commit="leftmost",
            factor=0,
            remasking="descending",
            **settings,
        )
        np.testing.assert_array_equal(tokens, [[0, 6, 5, 4, 3, 2, 1]])
    finally:
        del sampling.COMMITS["leftmost"], sampling.CONFIDENCES["descending"]


def test_top_k_and_top_p_draw_from_the_truncated_softmax():
    # Truth: the probabilities, renormalised by hand; each frequency within 4.5 standard errors.
    p = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
    temperature = 0.5
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p)) * temperature, (4000, 5))
    noise = jax.random.gumbel(jax.random.key(0), logits.shape)
    for settings, kept in (
        ({}, [0, 1, 2, 3, 4]),
        (dict(top_k=2), [1, 3]),
        (dict(top_p=0.8), [1, 3, 4]),
        (dict(top_p=0.69), [1, 3]),
        (dict(top_p=1e-9), [1]),
        (dict(top_k=2, top_p=0.8), [1, 3]),
    ):
        drawn = candidates.draw(logits, noise, temperature=temperature, **settings)
        share = np.bincount(np.asarray(drawn), minlength=5) / 4000
        expected = np.where(np.isin(np.arange(5), kept), p, 0)
        expected = expected / expected.sum()
        assert np.all(np.abs(share - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / 4000))
    np.testing.assert_array_equal(candidates.draw(logits[:2], None), [1, 1])


def test_logit_at_the_ends():
    assert unmasking.logit(0.0) == -np.inf and unmasking.logit(-1.0) == -np.inf
    # 1 is what float64 cannot tell from 1.
    assert math.isclose(unmasking.logit(1.0), 53 * math.log(2), rel_tol=1e-3)
