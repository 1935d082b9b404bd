"""Win rates: the closed form, the likelihood maximised by another route, errors by formula."""

import itertools

import numpy as np
import pytest
from scipy import optimize, stats

from llada_jax.evaluate.judge import bias, rating, style
from llada_jax.evaluate.judge.verdict import VERDICTS


def draw(n, seed=0, chances=(0.1, 0.3, 0.2, 0.25, 0.15)):
    """Pairs of verdicts of a judge that is right more often than not."""
    rng = np.random.default_rng(seed)
    first = rng.choice(5, n, p=chances)
    second = np.clip(4 - first + rng.integers(-1, 2, n), 0, 4)
    return [(VERDICTS[a], VERDICTS[b]) for a, b in zip(first, second, strict=True)]


def games(pairs):
    """The games written out: (the model is A, the outcome for A), a strong win three times."""
    for pair in pairs:
        for model_is_a, verdict in zip((True, False), pair, strict=True):
            outcome = 1.0 if verdict[0] == "A" else 0.0
            if "=" in verdict:
                yield model_is_a, 0.5
            else:
                yield from [(model_is_a, outcome)] * (3 if ">>" in verdict else 1)


def test_bradley_terry_by_brute_force():
    """Ratings of both players on a grid of differences, over all games written out."""
    pairs = draw(60)
    difference = np.linspace(-3, 3, 60001)
    total = 0.0
    for model_is_a, outcome in games(pairs):
        a_wins = 1 / (1 + np.exp(-difference if model_is_a else difference))
        total = total + outcome * np.log(a_wins) + (1 - outcome) * np.log1p(-a_wins)
    best = difference[np.argmax(total)]
    found = rating.win_rate(rating.tally(pairs), rating.resamples(60, 0)).win_rate
    assert found == pytest.approx(100 / (1 + np.exp(-best)), abs=0.01)


def test_wins_by_hand():
    pairs = [("A>>B", "B>A"), ("A=B", "A>B"), ("B>>A", "B>>A")]
    wins = rating.tally(pairs)
    np.testing.assert_array_equal(wins, [[4, 0], [0.5, 1.5], [3, 3]])
    assert rating.win_rate(wins, rating.resamples(3, 0)).win_rate == pytest.approx(100 * 7.5 / 12)


def test_every_verdict_mirrors():
    for a, b in itertools.product(VERDICTS, repeat=2):
        ours, swapped = rating.tally([(a, b)]), rating.tally([(b, a)])
        np.testing.assert_array_equal(ours[:, ::-1], swapped)


def test_a_judge_who_wants_the_first_place_gives_a_half():
    pairs = [("A>B", "A>B")] * 9
    wins = rating.tally(pairs)
    assert rating.win_rate(wins, rating.resamples(9, 0))[:2] == (50, 0)


def test_the_error_is_that_of_a_ratio():
    """By linearisation: the ratio of two means over independent questions."""
    wins = rating.tally(draw(400))
    found = rating.win_rate(wins, rating.resamples(400, 3))
    share = wins[:, 0].sum() / wins.sum()
    expected = (wins[:, 0] - share * wins.sum(1)).std(ddof=1) / 20 / wins.sum(1).mean()
    assert found.stderr == pytest.approx(100 * expected, rel=0.08)
    low, high = found.interval
    assert high - low == pytest.approx(2 * 1.96 * found.stderr, rel=0.08)
    assert low < found.win_rate < high


def test_the_interval_covers():
    """Of 200 samples of 50 questions about 95 % of the intervals hold the truth."""
    population = rating.tally(draw(20_000, seed=5))
    truth = 100 * population[:, 0].sum() / population.sum()
    rng = np.random.default_rng(0)
    hit = 0
    for seed in range(200):
        wins = population[rng.integers(0, 20_000, 50)]
        low, high = rating.win_rate(wins, rating.resamples(50, seed)).interval
        hit += low <= truth <= high
    assert stats.binomtest(hit, 200, 0.95).pvalue > 0.001


def test_the_seed_decides():
    np.testing.assert_array_equal(rating.resamples(5, 1), rating.resamples(5, 1))
    assert (rating.resamples(5, 1) != rating.resamples(5, 2)).any()
    assert (rating.resamples(5, 1).sum(1) == 5).all()


def test_one_question_has_no_error():
    wins = rating.tally([("A>B", "A=B")])
    counts = rating.resamples(1, 0)
    assert rating.win_rate(wins, counts) == (75, None, None)
    assert rating.controlled(wins, np.zeros((1, 4)), counts)[0] == (pytest.approx(75), None, None)


def test_without_controls_the_fit_is_the_share():
    wins = rating.tally(draw(80))
    ((theta,),) = rating.fit(np.ones((80, 1)), wins[None])
    assert rating.sigmoid(theta) == pytest.approx(wins[:, 0].sum() / wins.sum(), abs=1e-9)


def test_the_fit_by_another_optimiser():
    pairs, rng = draw(120), np.random.default_rng(1)
    x = np.c_[np.ones(120), rng.normal(size=(120, 3)) + 0.3]

    def nll(b):
        return b[1:] @ b[1:] / 4 + sum(
            -outcome * np.log(p) - (1 - outcome) * np.log1p(-p)
            for row, pair in zip(x, pairs, strict=True)
            for model_is_a, outcome in games([pair])
            for p in [1 / (1 + np.exp(-(row @ b if model_is_a else -(row @ b))))]
        )

    expected = optimize.minimize(nll, np.zeros(4), method="BFGS").x
    np.testing.assert_allclose(rating.fit(x, rating.tally(pairs)[None])[0], expected, atol=2e-4)


def test_equal_style():
    """Half of the model's wins come from length: a truth of 60 % that the plain rate misses."""
    rng = np.random.default_rng(2)
    n = 5_000
    x = np.zeros((n, 4))
    x[:, 0] = rng.normal(0.4, 0.3, n)
    p = rating.sigmoid(np.log(0.6 / 0.4) + 4 * x[:, 0])
    won = rng.random((n, 2)) < p[:, None]
    wins = np.c_[won.sum(1), 2 - won.sum(1)].astype(float)
    counts = rating.resamples(n, 0)[:20]
    rate, (length, *others) = rating.controlled(wins, x, counts)
    assert rating.win_rate(wins, counts).win_rate > 80
    assert rate.win_rate == pytest.approx(60, abs=4 * rate.stderr) and rate.stderr < 2
    assert length == pytest.approx(4 * 0.3, rel=0.1) and others == [None] * 3


def test_wins_that_style_separates_stay_finite():
    x = np.c_[np.linspace(-1, 1, 10), np.zeros((10, 3))]
    wins = np.where(x[:, :1] > 0, [2.0, 0.0], [0.0, 2.0])
    rate, coefficients = rating.controlled(wins, x, rating.resamples(10, 0))
    assert np.isfinite([*rate[:2], *rate.interval, coefficients[0]]).all()
    assert rate.win_rate == pytest.approx(50, abs=1e-3)
    all_won, _ = rating.controlled(np.full((10, 2), [2.0, 0.0]), x, rating.resamples(10, 0))
    assert all_won.win_rate > 99.9


def test_style_by_hand():
    text = "# Head\n\n## Sub\n1. one\n- two\n  * three\n**bold** and __also__"
    text += "\n```\n# code\n- no\n```\n#no"
    np.testing.assert_array_equal(style.counts(text), [len(text), 2, 3, 2])
    np.testing.assert_array_equal(style.counts(""), [0] * 4)
    found = style.differences("- a\n" * 3, "b" * 4)
    np.testing.assert_allclose(found, [8 / 16, 0, 0.25 / 1.25, 0])
    np.testing.assert_allclose(style.differences("b" * 4, "- a\n" * 3), -found)
    assert not style.differences("", "").any()


def test_long_runs_of_blank_lines_take_no_time():
    assert style.counts("\n" * 300_000 + "- x")[2] == 1


def test_bias_of_an_honest_judge():
    pairs = [("A>B", "B>A")] * 30 + [("B>>A", "A>B")] * 30 + [("A=B", "A=B")] * 40
    found = bias.judge_bias(pairs)
    assert found[:3] == (50, 1, 0)
    assert found.disagree_by_chance == pytest.approx(100 * (1 - 0.09 - 0.09 - 0.16))
    assert found.agree_z > 10


def test_bias_to_the_first_place():
    """Ten questions: eight lean to the first place, one to the second, one to none."""
    pairs = [("A>B", "A=B")] * 8 + [("B>>A", "B>A")] + [("A>B", "B>A")]
    found = bias.judge_bias(pairs)
    assert found.first_place == pytest.approx(100 * (8 * 1.5 + 0 + 1) / 20)
    assert found.p_value == pytest.approx(stats.binomtest(8, 9).pvalue)
    assert found.disagree == pytest.approx(90)


def test_bias_of_chance():
    rng = np.random.default_rng(0)
    pairs = [(VERDICTS[a], VERDICTS[b]) for a, b in rng.integers(0, 5, (500, 2))]
    found = bias.judge_bias(pairs)
    assert found.p_value > 0.01 and abs(found.agree_z) < 3
    assert found.disagree_by_chance == pytest.approx(64, abs=3)


@pytest.mark.parametrize(("ups", "downs"), [(0, 0), (1, 0), (7, 2), (5, 5), (300, 200), (0, 500)])
def test_the_sign_test(ups, downs):
    expected = stats.binomtest(ups, ups + downs).pvalue if ups + downs else 1
    assert bias.sign_test(ups, downs) == pytest.approx(expected)
