"""The numpy samplers of the papers: what their definitions imply."""

import itertools
import math

import numpy as np
import pytest
from sampling import paper_rules
from sampling.paper_rules import Daedal, Remdm, decode, rule

VOCABULARY, MASK, EOS, BLOCK = 12, 11, 3, 8
PROMPT = [5, 2, 7]


def model(seed, scale=4.0, eos=0.0):
    """A fixed random function from tokens [L] to logits [L, V]; eos favours EOS at the end."""
    rng = np.random.default_rng(seed)
    embed, head, place = (
        rng.normal(size=(12, 6)),
        rng.normal(size=(6, 12)),
        rng.normal(size=(99, 6)),
    )
    mix = rng.normal(size=(99, 99)) * np.exp(-abs(np.subtract.outer(range(99), range(99))) / 3)

    def predict(tokens):
        n = len(tokens)
        logits = scale * np.tanh(place[:n] + 0.6 * mix[:n, :n] @ embed[tokens]) @ head
        logits[:, EOS] += eos * np.arange(n) / n
        return logits

    return predict


def fill(predict, rule, length=2 * BLOCK, **settings):
    row = np.append(PROMPT, np.full(length, MASK))
    settings = {"start": len(PROMPT), "block_length": BLOCK, "mask_id": MASK, **settings}
    return decode(predict, row, rule=rule, **settings)


def same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.steps, b.steps)
    assert a.passes == b.passes


@pytest.fixture(params=range(3))
def predict(request):
    return model(request.param)


def test_every_mask_is_filled_block_by_block(predict):
    for name, numbers in [
        ("schedule", {"steps": 3}),
        ("threshold", {"limit": 0.9}),
        ("eb", {"budget": 0.3}),
        ("klass", {"limit": 0.6, "kl_limit": 0.3}),
    ]:
        got = fill(predict, rule(name, **numbers))
        assert not (got.tokens == MASK).any()
        np.testing.assert_array_equal(got.tokens[:3], PROMPT)
        assert (got.steps[:3] == 0).all() and got.steps.max() == got.passes
        assert set(got.steps[3:]) == set(range(1, got.passes + 1))  # no pass without a commit
        assert got.steps[3 : 3 + BLOCK].max() < got.steps[3 + BLOCK :].min()
        # Each is the argmax of a pass in which it was masked: replay the passes.
        for turn in range(1, got.passes + 1):
            before = np.where(got.steps < turn, got.tokens, MASK)
            best = np.where(np.arange(12) == MASK, -np.inf, predict(before)).argmax(-1)
            now = got.steps == turn
            np.testing.assert_array_equal(got.tokens[now], best[now])


def test_schedule_has_its_steps(predict):
    got = fill(predict, rule("schedule", steps=3))
    assert np.bincount(got.steps)[1:].tolist() == [3, 3, 2, 3, 3, 2]


def test_eb_commits_the_largest_prefix_within_the_budget(predict):
    # Truth: all subsets, of which those that are prefixes by confidence count.
    p = paper_rules.softmax(predict(np.full(9, MASK)))
    confidence, is_open = p.max(1), np.arange(9) != 4
    now = paper_rules.Pass([p], confidence, is_open, 0, 8)
    entropy = -(p * np.log(p)).sum(1)
    for budget in (0.0, 0.2, 1.0, 4.0, 99.0):
        allowed = []
        for count in range(1, 9):
            for subset in itertools.combinations(np.flatnonzero(is_open), count):
                rest = sorted(set(np.flatnonzero(is_open)) - set(subset))
                prefix = not rest or confidence[list(subset)].min() > confidence[rest].max()
                h = entropy[list(subset)]
                if prefix and h.sum() - h.max() <= budget:
                    allowed.append(subset)
        got = np.flatnonzero(paper_rules.eb(now, budget))
        assert tuple(got) == max(allowed, key=len)


def test_eb_without_budget_is_one_at_a_time(predict):
    same(fill(predict, rule("eb", budget=0)), fill(predict, rule("schedule", steps=BLOCK)))


def test_klass_of_any_divergence_is_the_threshold(predict):
    loose = fill(predict, rule("klass", limit=0.6, kl_limit=math.inf))
    same(loose, fill(predict, rule("threshold", limit=0.6)))
    strict = fill(predict, rule("klass", limit=0.6, kl_limit=0))
    same(strict, fill(predict, rule("schedule", steps=BLOCK)))


def test_klass_waits_for_its_history():
    # Predictions that no token changes: divergences are 0 from the second pass on.
    still = model(0)(np.full(19, MASK))
    for history in (1, 2, 3):
        got = fill(lambda tokens: still, rule("klass", limit=0, kl_limit=1e-9, history=history))
        assert np.bincount(got.steps)[1:].tolist() == [1] * history + [BLOCK - history, BLOCK]
        guarded = rule("klass", limit=0, kl_limit=1e-9, history=history, guard=True)
        got = fill(lambda tokens: still, guarded)
        first, second = [1] * history + [BLOCK - history], [1] * (history - 1)
        assert np.bincount(got.steps)[1:].tolist() == [*first, *second, BLOCK - history + 1]
        anew = rule("klass", limit=0, kl_limit=1e-9, history=history, within=True)
        got = fill(lambda tokens: still, anew)
        assert np.bincount(got.steps)[1:].tolist() == [*first, *first]


def test_divergence_is_from_the_pass_before():
    past = [np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])]
    first, second = paper_rules.divergences(past)
    assert second[0] == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert first[0] == pytest.approx(math.log(1e12) - math.log(2))


@pytest.mark.parametrize("share", [7 / 8, 1])
def test_remdm_revises_the_least_confident(predict, share):
    plain = fill(predict, rule("schedule", steps=BLOCK))
    same(fill(predict, rule("schedule", steps=BLOCK), revoke=Remdm(2, 0)), plain)
    seen = []

    def spy(tokens):
        seen.append(tokens.copy())
        return predict(tokens)

    got = fill(spy, rule("schedule", steps=BLOCK), revoke=Remdm(2, 3, share))
    assert got.passes == plain.passes + 2 * 3 and got.revoked.sum() == 2 * 2 * 3
    assert (got.revoked[:3] == 0).all() and not (got.tokens == MASK).any()
    filled = int(share * BLOCK)
    loop = seen[filled]  # the first pass that revises: 2 of those filled are masks again
    assert (loop[3 : 3 + BLOCK] == MASK).sum() == BLOCK - filled + 2
    sure = np.where((plain.steps > 0) & (plain.steps <= filled), plain.confidence, np.inf)
    lost = np.flatnonzero((loop == MASK) & (plain.steps <= filled) & (plain.steps > 0))
    assert set(lost) == set(np.argsort(sure)[:2])


def test_daedal_without_thresholds_does_not_grow(predict):
    plain = fill(predict, rule("threshold", limit=0.9))
    for still in (Daedal(EOS, eos=0, low=0, check=1), Daedal(EOS, eos=0, expand_eos=0, check=1)):
        got = fill(predict, rule("threshold", limit=0.9), grow=still)
        np.testing.assert_array_equal(got.tokens, plain.tokens)
        assert got.length_passes == 1 and got.passes == plain.passes + 1


def test_daedal_lengthens_until_eos_is_sure():
    predict = model(1, eos=0.0)
    grow = Daedal(EOS, eos=2, low=0, factor=5, check=6, max_length=24)  # never sure enough
    got = fill(predict, rule("threshold", limit=0.9), length=8, grow=grow)
    assert len(got.tokens) == 3 + 24 and got.length_passes == 5  # 8, 13, 18, 23, 24
    sure = model(1, eos=99.0)  # EOS everywhere, with probability 1 towards the end
    grow = Daedal(EOS, low=0, factor=5, check=6, max_length=24)
    got = fill(sure, rule("threshold", limit=0.9), length=8, grow=grow)
    assert got.length_passes == 1 and len(got.tokens) == 3 + 8 + 3
    assert (got.tokens[-3:] == EOS).all() and (got.steps[-3:] == 0).all()  # check // 2, given


def test_daedal_eos_confidence_counts_absent_ones_as_zero():
    p = np.full((5, 12), 0.01)
    p[[1, 2, 4], EOS] = [0.8, 0.6, 0.5]  # the position 3 prefers no EOS
    p[3, 0] = 0.9
    assert Daedal(EOS, check=4).sureness(p, 2) == pytest.approx((0.6 + 0.5) / 4)
    assert Daedal(EOS, check=1).sureness(p, 1) == pytest.approx(0.5)


def test_daedal_puts_masks_where_it_is_least_sure(predict):
    seen = []

    def spy(tokens):
        seen.append(tokens.copy())
        return predict(tokens)

    grow = Daedal(EOS, eos=0, expand_eos=2, low=1, factor=4, check=1, max_length=25)
    got = fill(spy, rule("schedule", steps=BLOCK), grow=grow)
    assert len(got.tokens) == 3 + 25 and not (got.tokens == MASK).any()
    # 16, 19, 22, then 25: the first three passes commit one and grow by three.
    assert [len(t) - 3 for t in seen[:6]] == [16, 16, 19, 22, 25, 25]
    p = paper_rules.softmax(predict(seen[1]))
    confidence = np.where(np.arange(12) == MASK, 0, p).max(1)[3 : 3 + BLOCK]
    committed, least = confidence.argmax(), confidence.argmin()
    place = committed if committed < least else committed + 3
    assert np.flatnonzero(seen[2][3:] != MASK).tolist() == [place]


def test_daedal_grows_at_the_least_sure_mask_that_is_not_filled():
    p = np.full((6, 12), 0.01)
    p[:, 0] = [0.9, 0.05, 0.08, 0.02, 0.07, 0.01]
    is_open = np.array([1, 1, 1, 1, 1, 0], bool)
    now = paper_rules.Pass([p], p[:, 0], is_open, 0, 5)
    filled = np.array([1, 0, 0, 1, 0, 0], bool)
    assert Daedal(EOS).place(now, filled, 0) == 1
    assert Daedal(EOS, low=0.05).place(now, filled, 0) is None
    assert Daedal(EOS, max_length=6).place(now, filled, 0) is None
