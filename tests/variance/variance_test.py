"""The laboratory against closed forms, numpy, and its own command on the shipped Sudoku pair."""

import dataclasses
import doctest
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, refusal, run_command

from llada_jax import noise, variance
from llada_jax.batch import Batch
from llada_jax.checkpoints import loading
from llada_jax.variance import EVERYTHING, Estimator, Moments, Problem, tables
from llada_jax.variance import __main__ as command
from llada_jax.variance.columns import UP_PROJ
from llada_jax.variance.measure import Run

SUDOKU = ROOT / "llada_jax" / "assets" / "sudoku"
MASK = 7
PARTS = (EVERYTHING, "slope", "table[1]")
# The flags of a small measurement.
SMALL = (
    f"--policy={SUDOKU}",
    f"--reference={SUDOKU}",
    f"--pairs=jsonl:{SUDOKU / 'pairs.jsonl.gz'}",
    "--template=plain",
    "--no_eos",
    "--row_length=66",
    "--pairs_limit=8",
    "--batch_rows=8",
    "--repeats=2",
    "--truth=2",
    "--nested_t=3",
    "--nested_yt=2",
    "--only_schemes",
)


def toy_logits(
    params, tokens
):  # log p at a position depends on its neighbour, if that is not masked
    left = jnp.roll(tokens, 1, -1)
    return params["table"][left] + params["slope"] * jnp.sum(tokens == MASK, -1)[
        ..., None, None
    ] * jnp.arange(8)


def toy_elbos(params, batch, drawn):
    """Two pairs' ELBOs [2, 2 (winner, loser)]: the mean over draws of weighted sums."""
    logits = toy_logits(params, jnp.where(drawn.masked, MASK, batch.tokens))
    each = jax.nn.log_softmax(logits) * jax.nn.one_hot(batch.tokens, 8)
    each = (
        jnp.where(drawn.masked[..., None], drawn.weights[..., None] * each, 0).sum(-1).mean(0)
    )  # [r, l]
    return jnp.stack(
        [jnp.where(batch.segment_ids == segment, each, 0).sum(-1) for segment in (1, 2)], -1
    )


@pytest.fixture(scope="module")
def toy():
    """Parameters of two toy models, a batch of two rows with two pairs in all, and the problem."""
    rng = np.random.default_rng(0)
    segments = np.zeros((2, 16), np.int32)
    segments[0, :7], segments[0, 7:15] = 1, 2
    segments[1, :6], segments[1, 6:12] = 1, 2
    response = segments > 0
    for row, starts in ((0, (0, 7)), (1, (0, 6))):
        for start in starts:
            response[row, start : start + 2] = False
    tokens = rng.integers(0, MASK, (2, 16)).astype(np.int32)
    batch = Batch(
        tokens,
        segments,
        np.zeros_like(tokens),
        response,
        np.arange(2),
        np.zeros(2, np.int32),
        num_segments=2,
    )
    batch = jax.tree.map(jnp.asarray, batch)

    def params(seed):
        return {
            "table": jax.random.normal(jax.random.key(seed), (8, 8)),
            "slope": jnp.float32(0.02 * seed),
        }

    terms_fn = variance.terms_of(toy_logits, mask_id=MASK)
    return params(1), params(2), batch, Problem(terms_fn, beta=0.1, parts=PARTS)


@pytest.mark.slow
def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(variance).failed == 0 and doctest.testmod(variance).attempted >= 7


def test_decomposition_finds_both_variances_and_its_errors_are_true():
    rng = np.random.default_rng(0)
    # 400 experiments: times with variance 4, samples with variance 9.
    terms = 2 * rng.normal(size=(20, 1, 400)) + 3 * rng.normal(size=(20, 3, 400)) + 50
    found = variance.decompose(jnp.asarray(terms))
    for value, error, truth in (
        (found.v_t, found.v_t_stderr, 4),
        (found.v_yt, found.v_yt_stderr, 9),
    ):
        spread = float(value.std())
        assert abs(float(value.mean()) - truth) < 4 * spread / 20
        assert float(jnp.sqrt(jnp.mean(error**2))) == pytest.approx(spread, rel=0.15)
    assert variance.predicted_variance(4.0, 9.0, 2, 3) == pytest.approx(4 / 2 + 9 / 6)
    with pytest.raises(ValueError, match="at least 3 times and 2 samples"):
        variance.decompose(jnp.zeros((3, 1, 5)))


def test_decomposition_of_few_times_is_unbiased_and_its_jackknife_leaves_one_time_out():
    rng = np.random.default_rng(0)
    terms = 2 * rng.normal(size=(3, 1, 20_000)) + 3 * rng.normal(size=(3, 2, 20_000))
    found = variance.decompose(jnp.asarray(terms))
    for value, truth in ((found.v_t, 4), (found.v_yt, 9)):
        error = float(value.std()) / 20_000**0.5
        assert error < 0.02 * truth and abs(float(value.mean()) - truth) < 4 * error
    terms = rng.normal(size=(6, 3))
    found = variance.decompose(jnp.asarray(terms))
    but_one = [np.delete(terms, k, 0) for k in range(6)]
    v_yt = np.array([x.var(1, ddof=1).mean() for x in but_one])
    v_t = np.array([x.mean(1).var(ddof=1) for x in but_one]) - v_yt / 3
    for error, values in ((found.v_t_stderr, v_t), (found.v_yt_stderr, v_yt)):
        assert float(error) == pytest.approx(np.sqrt(5 * values.var()), rel=1e-4)


@pytest.mark.parametrize("share", ["times", "masks"])
def test_what_a_pair_shares_no_other_pair_of_the_row_has(share):
    segments = jnp.repeat(jnp.arange(1, 5), 6)[None]
    drawn = noise.draw_rows(
        jax.random.split(jax.random.key(0), 4000),
        jnp.tile(segments > 0, (4000, 1)),
        jnp.tile(segments, (4000, 1)),
        num_segments=4,
        scheme=noise.Scheme(1, share_in_pair=share),
    )
    masked = np.asarray(drawn.masked[0]).reshape(4000, 4, 6)
    counts = np.corrcoef(masked.sum(-1).T)
    assert counts[0, 1] == pytest.approx(1) == counts[2, 3] and np.abs(counts[:2, 2:]).max() < 0.06
    assert (masked[:, 0] == masked[:, 1]).all() == (share == "masks")
    alike = (masked[:, 0] == masked[:, 2]).mean()  # two independent sets, of l and k of 6
    assert alike == pytest.approx((7 / 12) ** 2 + (5 / 12) ** 2, abs=0.02)


def test_streamed_moments_are_those_of_stacked_gradients():
    rng = np.random.default_rng(0)
    grads = [
        {
            "slope": jnp.float32(rng.normal()),
            "table": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        }
        for _ in range(6)
    ]
    moments = Moments.zero(grads[0], PARTS)
    for g in grads:
        moments = moments.add(g, PARTS)
    tables = np.stack([g["table"] for g in grads])
    slope = np.var([g["slope"] for g in grads], ddof=1)
    rows = tables.var(0, ddof=1).sum(-1)
    np.testing.assert_allclose(
        moments.trace(PARTS), [slope + rows.sum(), slope, rows[1]], rtol=1e-5
    )
    with pytest.raises(ValueError, match="no parameter 'tables'; it has slope, table"):
        variance.squared_norms(grads[0], ("tables",))


@pytest.mark.parametrize("share_noise", [True, False])
def test_the_gradient_of_several_pairs_is_autodiffs_of_a_loss_written_out(toy, share_noise):
    params, reference, batch, problem = toy
    # Rows with room for two pairs that hold one: the mean is over pairs, not over places.
    batch = batch.replace(num_segments=4)
    estimator = Estimator(noise.Scheme(3), share_noise)
    estimate = jax.jit(problem.estimate, static_argnames="estimator")
    (found,), elbos = estimate(params, reference, batch, jnp.int32(5), estimator=estimator)

    def loss(params):
        drawn, other = (
            problem.draw(batch, estimator.scheme, jnp.int32(5), x)
            for x in ("evaluate", "reference")
        )
        both = (
            toy_elbos(params, batch, drawn),
            toy_elbos(reference, batch, drawn if share_noise else other),
        )
        ratio = both[0] - both[1]
        return jnp.mean(jnp.log1p(jnp.exp(-0.1 * (ratio[:, 0] - ratio[:, 1])))), jnp.stack(both)

    expected, both = jax.jit(jax.grad(loss, has_aux=True))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )
    np.testing.assert_allclose(elbos[:, :, :2], both, rtol=1e-5)


@pytest.mark.parametrize("one_pair", [True, False])
def test_streamed_v_t_and_v_yt_of_gradients_are_those_of_stacked_ones(toy, one_pair):
    params, reference, batch, problem = toy
    batch = jax.tree.map(lambda x: x[:1], batch) if one_pair else batch
    problem = dataclasses.replace(problem, one_pair=one_pair)
    scores = jnp.array([[0.3], [-1.2]])[: len(batch.tokens)]
    slopes = (
        -0.1 * jax.nn.sigmoid(-scores) * jnp.array([1, -1]) / len(scores)
    )  # of the loss by every ELBO

    def summands(params, drawn):
        each = slopes * toy_elbos(params, batch, drawn)
        return each.sum(0) if one_pair else each.sum()[None]

    @jax.jit
    def stacked(time):
        drawn = problem.draw(batch, noise.Scheme(1, 3), time, "evaluate")
        return jax.vmap(lambda one: jax.jacrev(summands)(params, one))(
            jax.tree.map(lambda x: x[:, None], drawn)
        )

    nested = jax.jit(problem.nested, static_argnames="n_yt")
    grads, squares, of_times, whole = [], [], [], problem.zero(params)
    norms = jax.jit(
        lambda moments: jnp.stack([variance.squared_norms(m.total, PARTS) for m in moments])
    )
    for time in range(5):
        grads.append(stacked(time))
        _, _, moments, square = nested(params, reference, batch, jnp.int32(time), scores, n_yt=3)
        squares.append(square)
        of_times.append(norms(moments))
        whole = jax.tree.map(jnp.add, whole, moments)
    found = variance.decompose_norms(
        *map(np.asarray, (jnp.stack(squares), jnp.stack(of_times), norms(whole)))
    )

    # Of every coordinate, summand by summand.
    split = jax.jit(
        lambda *grads: jax.tree.map(lambda *g: variance.decompose(jnp.stack(g)), *grads)
    )(*grads)
    for name, values in (("v_t", found[0]), ("v_yt", found[1])):
        slope, table = (np.asarray(getattr(split[x], name)) for x in ("slope", "table"))
        expected = [slope.sum() + table.sum(), slope.sum(), table[:, 1].sum()]
        np.testing.assert_allclose(values, expected, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_repeats_agree_with_their_prediction(toy):
    params, reference, batch, problem = toy
    repeat = jax.jit(problem.repeat, static_argnames="estimator")
    truth = jax.tree.map(jnp.zeros_like, params)
    elbos, errors, moments = {}, [], None
    for scheme in (noise.Scheme(4), noise.Scheme(2, 2)):
        estimator = Estimator(scheme)
        moments = problem.zero(params)
        found = []
        for k in range(300):
            one, moments, norms = repeat(
                params, reference, batch, k, moments, truth, estimator=estimator
            )
            found.append(np.asarray(one))
            errors.append(np.asarray(norms["error"]))
        elbos[scheme] = np.stack(found)
        # With truth 0 the errors are the gradients' norms: E|g|^2 = |E g|^2 + tr Var.
        squares = np.mean(np.square(errors[-300:]), 0)
        mean = variance.squared_norms(moments[0].total, PARTS) / 300**2
        np.testing.assert_allclose(squares - mean, moments[0].trace(PARTS), rtol=0.02)
    nested = jax.jit(problem.nested, static_argnames="n_yt")
    scores = variance.scores_of(elbos[noise.Scheme(4)].mean(0).reshape(2, -1, 2), 0.1).reshape(2, 1)
    outs = [
        nested(params, reference, batch, k, jnp.asarray(scores, jnp.float32), n_yt=2)
        for k in range(400)
    ]
    terms = jnp.stack([o[0][0] for o in outs])  # [t, y, r, s] of the policy
    split = variance.decompose(terms)
    for scheme, found in elbos.items():
        predicted = variance.predicted_variance(split.v_t, split.v_yt, scheme.n_t, scheme.n_yt)
        np.testing.assert_allclose(found[:, 0].var(0, ddof=1), predicted, rtol=0.25)
    shares = np.stack([o[1] for o in outs])
    assert shares.min() > 0 and shares.max() == 1


def by_count(theta, tokens):
    """log p of any token is -theta x how many tokens of its half of the row are masked."""
    masks = jnp.repeat(
        jnp.sum((tokens == MASK).reshape(*tokens.shape[:-1], 2, -1), -1), tokens.shape[-1] // 2, -1
    )
    target = -theta * masks[..., None]
    return jnp.concatenate(
        [target, jnp.log1p(-jnp.exp(target)), jnp.full((*tokens.shape, 6), -jnp.inf)], -1
    )


@pytest.mark.slow
def test_theorem_4_and_the_limits_of_one_pair_against_enumeration():
    size, theta, other, beta, repeats = np.array([5, 3]), 0.7, 0.2, 0.5, 3000
    segments = jnp.repeat(jnp.array([[1, 2]]), 6, axis=1)
    response = jnp.arange(12) % 6 < size[np.arange(12) // 6]
    zeros = jnp.zeros((1, 12), int)
    batch = Batch(
        zeros, segments, zeros, response[None], jnp.zeros(1, int), jnp.zeros(1, int), num_segments=2
    )
    terms_fn = variance.terms_of(by_count, mask_id=MASK)
    problem = Problem(terms_fn, beta, parts=(EVERYTHING,), one_pair=True)
    params, reference = {"t": jnp.float32(theta)}, {"t": jnp.float32(other)}
    problem = dataclasses.replace(problem, terms_fn=lambda p, *rest: terms_fn(p["t"], *rest))

    # A term is -theta L l, so score and gradient of every combination of the two counts are closed
    # forms.
    counts = np.stack(np.meshgrid(np.arange(1, 6), np.arange(1, 4), indexing="ij"), -1).reshape(
        -1, 2
    )
    slopes = beta * (counts * size) @ np.array([-1, 1])  # of the score by theta
    scores = slopes * (theta - other)
    grads = -slopes / (1 + np.exp(scores))
    true_score, true_slope = scores.mean(), slopes.mean()
    true_grad = -true_slope / (1 + np.exp(true_score))

    repeat = jax.jit(problem.repeat, static_argnames="estimator")
    moments, truth, norms = problem.zero(params), {"t": jnp.float32(true_grad)}, []
    for k in range(repeats):
        _, moments, norm = repeat(
            params, reference, batch, k, moments, truth, estimator=Estimator(noise.Scheme(1))
        )
        norms.append(norm)
    of_loss, of_score = (float(m.trace((EVERYTHING,))[0]) for m in moments)
    largest = float(max(norm["score gradient"][0] for norm in norms))
    error = float(np.mean([norm["error"][0] for norm in norms]))
    assert largest == pytest.approx(np.abs(slopes).max(), rel=1e-5)
    assert of_score == pytest.approx(slopes.var(), rel=0.1) and of_loss == pytest.approx(
        grads.var(), rel=0.1
    )
    assert error == pytest.approx(np.abs(grads - true_grad).mean(), rel=0.1)
    c = np.abs(slopes).max()
    bounds = [
        x[0] for x in variance.theorem_4(*(np.array([x]) for x in (scores.var(), slopes.var(), c)))
    ]
    assert bounds == pytest.approx(
        [c / 4 * scores.std() + slopes.std(), c**2 / 8 * scores.var() + slopes.var()]
    )
    assert np.abs(grads - true_grad).mean() <= bounds[0] and grads.var() <= bounds[1]
    # A score whose sigmoid is 0 in float32 leaves the loss no gradient, the score its own.
    sure = dataclasses.replace(problem, beta=1e4).estimate(
        reference, params, batch, jnp.int32(0), Estimator(noise.Scheme(1))
    )[0]
    assert float(sure[0]["t"]) == 0 and abs(float(sure[1]["t"])) > 1e3

    # The gradient made linear at the true score has two summands, (1 - sigmoid) beta L l of winner
    # and loser.
    nested = jax.jit(problem.nested, static_argnames="n_yt")
    scores = jnp.full((1, 1), true_score, jnp.float32)
    outs = [nested(params, reference, batch, k, scores, n_yt=2) for k in range(500)]
    squares, shares = (np.stack([np.asarray(o[i]) for o in outs]) for i in (3, 1))
    summands = beta / (1 + np.exp(true_score)) * size * size  # at l = L; they go as l
    np.testing.assert_allclose(np.sqrt(squares[..., 0]), shares[:, :, 0] * summands, rtol=1e-4)
    assert [float(m.count) for m in outs[0][2]] == [2, 2]
    together = dataclasses.replace(problem, one_pair=False)
    together = together.nested(params, reference, batch, jnp.int32(0), scores, n_yt=2)[2]
    np.testing.assert_allclose(
        together[0].total["t"], sum(m.total["t"] for m in outs[0][2]), rtol=1e-5
    )


def test_theorem_4_holds_for_the_sample_variances_of_a_few_wild_repeats():
    rng = np.random.default_rng(0)
    scores, grads = rng.standard_t(1.5, (3, 5000)) * 3, rng.standard_t(1.5, (3, 5000, 2))
    grads += scores[..., None]  # the worst is a gradient that grows with the error of its score
    loss_grads = -grads * (1 - np.tanh(scores / 2))[..., None] / 2
    largest = np.sqrt((grads**2).sum(-1))
    moments = scores.var(0, ddof=1), grads.var(0, ddof=1).sum(-1)
    found = loss_grads.var(0, ddof=1).sum(-1)
    assert (found <= variance.theorem_4(*moments, largest.max(0))[1]).all()
    assert (
        found > variance.theorem_4(*moments, largest.min(0))[1]
    ).any()  # C has to bound them all


def test_the_best_density_of_times_is_that_of_enumeration_and_of_drawing_from_it():
    rng = np.random.default_rng(0)
    sizes = np.arange(
        1.0, 21.0
    )  # of the term in each twentieth of sqrt(l / L); its sign is a coin's
    width = np.diff((np.arange(21) / 20) ** 2)
    shares = rng.random((4000, 2, 3, 2))
    squares = sizes[(np.sqrt(shares) * 20).astype(int)] ** 2
    mean, second = width @ sizes, width @ sizes**2
    found = variance.best_times(squares, shares, np.full(3, second))
    drawn = rng.choice(20, 100_000, p=width * sizes / mean)
    terms = rng.choice([-1, 1], drawn.size) * sizes[drawn] / (sizes / mean)[drawn]
    assert found(np.arange(3)) == pytest.approx(terms.var() / second, rel=0.03)
    assert 0 < abs(found(np.array([1, 1])) - found(np.arange(3))) < 0.05
    # Without the coin, a term divided by a density proportional to it is constant: nothing is left.
    alike = variance.best_times(squares, shares, np.full(3, second - mean**2))(np.arange(3))
    assert alike == pytest.approx(0, abs=0.05)
    # Squares as 1 / l, each l once: what the parts' width costs is little for long responses too.
    for size in (16, 200, 1000):
        l = np.arange(1, size + 1).repeat(2).reshape(size, 1, 1, 2)
        found = variance.best_times(1 / l, l / size, np.array([np.mean(1 / l)]))(np.arange(1))
        assert found == pytest.approx(np.mean(l**-0.5) ** 2 / np.mean(1 / l), rel=0.006)
    # A constant, which no density changes, does not count as variance. At l = L a share of 1 is in
    # the last part.
    constant = variance.best_times(
        np.full((8, 2, 1, 2), 9.0), np.linspace(0.1, 1, 32).reshape(8, 2, 1, 2), np.ones(1)
    )
    assert constant(np.arange(1)) == pytest.approx(1)


def test_budget_by_pair_is_neymans_allocation():
    variances = np.array([1.0, 4.0, 25.0, 0.0])
    calls = 120 * np.sqrt(variances) / np.sqrt(variances).sum()
    by_pair = sum(v / c for v, c in zip(variances, calls, strict=True) if v) / 4
    assert variance.neyman(variances)(np.arange(4)) == pytest.approx(
        by_pair / np.mean(variances / 30)
    )
    assert variance.neyman(np.array([3.0, 3.0, -1e-9]))(np.array([0, 1])) == pytest.approx(1)


def test_pair_statistics_are_numpys(toy):
    rng = np.random.default_rng(0)
    elbos, truth = rng.normal(size=(2000, 2, 3, 2)), np.zeros((2, 3, 2))
    found = variance.pair_statistics(elbos, truth, 0.5)
    scores = 0.5 * (
        (elbos[:, 0, :, 0] - elbos[:, 1, :, 0]) - (elbos[:, 0, :, 1] - elbos[:, 1, :, 1])
    )
    np.testing.assert_allclose(found["score variance"], scores.var(0, ddof=1))
    np.testing.assert_allclose(
        found["Eq. 9"], found["score variance"], rtol=0.1
    )  # winner and loser independent
    np.testing.assert_allclose(
        found["loss error"], np.abs(np.log1p(np.exp(-scores)) - np.log(2)).mean(0)
    )
    # Theorem 1, on numbers for which it holds with room.
    assert (found["loss error"] <= np.sqrt(found["score variance"])).all()
    assert (found["loss variance"] <= 4 * found["score variance"]).all()


def test_the_table_of_one_pair_a_batch_has_theorem_4_and_both_limits():
    rng = np.random.default_rng(0)
    estimator = Estimator(noise.Scheme(2), name="two")
    gradients = {
        "trace": [4.0, 9.0],
        "error": rng.random((2, 5, 1)),
        "mean_error": [1.0, 1.0],
        "score trace": [16.0, 25.0],
        "score gradient": [[2, 3, 2, 2, 1], [1, 1, 1, 7, 1]],
    }
    found = []
    for pair in range(2):
        of = {k: np.asarray(v[pair], float) for k, v in gradients.items()}
        of = {k: v[..., None] if v.ndim < 2 else v for k, v in of.items()} | {
            "elbos": rng.normal(size=(5, 2, 1, 2))
        }
        nested = {
            "terms": rng.normal(size=(4, 2, 2, 1, 2)),
            "shares": rng.random((4, 2, 1, 2)),
            "v_t": np.ones(1),
            "v_yt": np.ones(1),
            "squares": rng.random((4, 2, 2, 1)),
        }
        # The norm of the true score's gradient, 4, tops the repeats' 3.
        truth = {
            "is_pair": np.ones((1, 1), bool),
            "elbos": np.zeros((2, 2, 1, 2)),
            "score norm": np.array([16.0]),
            "variance": np.zeros(1),
        }
        found.append({"two": of, "nested": nested, "truth": truth})
    table = tables.tabulate(found, [estimator], parts=(EVERYTHING,), beta=1.0, flops=1.0)
    column, split = table["columns"]["two"], table["decomposition"][f"gradient: {EVERYTHING}"]
    c, scores = (
        np.array([4.0, 7.0]),
        np.array([variance.scores_of(batch["two"]["elbos"], 1.0) for batch in found]),
    )
    spread = scores[..., 0].var(1, ddof=1)
    assert column[f"Theorem 4: C: {EVERYTHING}"] == c.mean()
    expected = (c / 4 * np.sqrt(spread) + [4, 5]).mean(), (c**2 / 8 * spread + [16, 25]).mean()
    for name, value in zip(("error", "variance"), expected, strict=True):
        assert column[f"Theorem 4: bound of gradient {name}: {EVERYTHING}"] == pytest.approx(value)
    assert column[f"budget by pair / equal: {EVERYTHING}"][0] == pytest.approx(2.5**2 / 6.5)
    squares = np.stack([batch["nested"]["squares"][..., 0] for batch in found], 2)
    shares = np.concatenate([batch["nested"]["shares"] for batch in found], 2)
    assert split["best independent times / iid"][0] == variance.best_times(
        squares, shares, np.ones(2)
    )(np.arange(2))
    text = tables.as_text(table)
    assert "budget by pair / equal: all" in text and text.count("best independent times / iid") == 3
    del (
        found[1]["two"]["score trace"],
        found[1]["nested"]["squares"],
    )  # several pairs a batch have neither
    table = tables.tabulate(found, [estimator], parts=(EVERYTHING,), beta=1.0, flops=1.0)
    assert not any("Theorem 4" in k or "budget" in k for k in table["columns"]["two"])
    assert tables.as_text(table).count("best independent times / iid") == 2


def test_the_table_against_numbers_by_hand():
    estimators = (
        Estimator(noise.Scheme(2), name="vrpo"),
        Estimator(noise.Scheme(1, 2), name="one time"),
        Estimator(noise.Scheme(4, times="stratified"), name="ours"),
    )
    # The winner's ELBO under the policy; all other ELBOs are 0, so the score is half of it. By
    # estimator, pair and repeat.
    winners = {
        "vrpo": ([2, 4, 6], [0, 4, 8]),
        "one time": ([1, 3, 8], [0, 0, 0]),
        "ours": ([4, 5, 6], [2, 4, 6]),
    }
    true_winners = ([2, 4], [3, 5])  # two halves of the truth
    traces, mean_errors, truth_variances = (
        {"vrpo": (4, 6), "one time": (1, 1), "ours": (3, 1)},
        (1, 3),
        (0.1, 0.3),
    )

    def elbos(values, pair):  # the second row of the second batch is no pair
        out = np.zeros((*np.shape(values), 2, 1 + pair, 2))
        out[..., 0, 0, 0] = values
        out[..., 1:, :] = 1e6
        return out

    found = []
    for pair in range(2):
        truth = {
            "is_pair": np.array([[True], [False]])[: 1 + pair],
            "elbos": elbos(true_winners[pair], pair),
            "variance": np.array([truth_variances[pair]]),
        }
        # Three times with means 1, 2, 3, and 0.5 to both sides of each: V_yt 0.5, V_t 1 - 0.5 / 2.
        nested = {
            "terms": elbos([[0.5, 1.5], [1.5, 2.5], [2.5, 3.5]], pair),
            "v_t": np.array([3.0 + pair]),
            "shares": np.full((3, 2, 1 + pair, 2), 0.5),
            "v_yt": np.array([1.0]),
        }
        found.append({"truth": truth, "nested": nested})
        for name, values in winners.items():
            of = {
                "trace": [traces[name][pair]],
                "mean_error": [mean_errors[pair]],
                "error": np.ones((3, 1)),
            }
            found[pair][name] = {k: np.asarray(v, float) for k, v in of.items()} | {
                "elbos": elbos(values[pair], pair)
            }
    table = tables.tabulate(found, estimators, parts=(EVERYTHING,), beta=0.5, flops=1e9)
    vrpo, one_time, ours = table["columns"].values()

    def loss(score):
        return np.log(1 + np.exp(-score))

    assert vrpo["score variance"][0] == pytest.approx((1 + 4) / 2) and ours["score variance"][
        0
    ] == pytest.approx(0.625)
    assert vrpo["score bias"][0] == pytest.approx((2 - 1.5 + 2 - 2) / 2)
    assert ours["score bias"][0] == pytest.approx((2.5 - 1.5 + 2 - 2) / 2)
    bias = (
        loss(np.array([1, 2, 3])).mean() - loss(1.5) + loss(np.array([0, 2, 4])).mean() - loss(2)
    ) / 2
    assert vrpo["loss bias"][0] == pytest.approx(bias)
    # |mean error|^2 - the truth's variance - a third of one repeat's.
    part = f"gradient bias^2: {EVERYTHING}"
    assert vrpo[part][0] == pytest.approx(((1 - 0.1 - 4 / 3) + (3 - 0.3 - 6 / 3)) / 2)
    assert ours[part][0] == pytest.approx(((1 - 0.1 - 3 / 3) + (3 - 0.3 - 1 / 3)) / 2)
    # Four calls against two.
    assert ours["score variance x cost / VRPO"][0] == pytest.approx(4 / 2 * 0.625 / 2.5)
    assert ours[f"gradient variance: {EVERYTHING} x cost / VRPO"][0] == pytest.approx(4 / 2 * 2 / 5)
    assert one_time[f"gradient variance: {EVERYTHING} x cost / VRPO"][0] == pytest.approx(
        2 / 2 * 1 / 5
    )
    assert [column["FLOPs a pair"] for column in table["columns"].values()] == [8e9, 8e9, 16e9]
    text = tables.as_text(table).splitlines()
    assert text[0].split()[:3] == ["estimator", "n", "FLOPs"] and text[3].split()[:3] == [
        "ours",
        "4",
        "1.6e+10",
    ]

    # Only the winner's term varies: a policy's ELBO has half of it,
    # the score 2 x 0.5^2 x that half.
    split = table["decomposition"]
    measured = {name: [np.var(pair, ddof=1) for pair in of] for name, of in winners.items()}
    for name, v_t, v_yt, found in (
        ("policy ELBO", 0.75 / 2, 0.5 / 2, {k: np.mean(v) / 2 for k, v in measured.items()}),
        ("score", 0.75 / 4, 0.5 / 4, {k: np.mean(v) / 4 for k, v in measured.items()}),
        (f"gradient: {EVERYTHING}", 3.5, 1.0, {k: np.mean(v) for k, v in traces.items()}),
    ):
        assert [split[name][x][0] for x in ("V_t", "V_yt")] == pytest.approx([v_t, v_yt])
        pairs = split[name]["predicted, measured"]
        assert set(pairs) == {"vrpo", "one time"}  # the prediction is of iid times
        assert pairs["vrpo"] == pytest.approx([v_t / 2 + v_yt / 2, found["vrpo"]])
        assert pairs["one time"] == pytest.approx([v_t + v_yt / 2, found["one time"]])


def test_bootstrap_covers():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        values = rng.normal(3, 1, 40)
        value, low, high = variance.bootstrap(
            lambda c, v=values: v[c].mean(), 40, seed=seed, draws=200
        )
        covered += low < 3 < high
    assert 85 <= covered <= 100 and value == pytest.approx(values.mean())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schemes=n_t=four"], "'n_t=four' in 'n_t=four' sets nothing"),
        (["--schemes=time=iid"], "'time=iid' in 'time=iid' sets nothing"),
        (["--schemes=times=idd"], "times='idd' is not one of"),
        (
            ["--import=nowhere"],
            "--import=nowhere: No module named 'nowhere'; it must be importable from here",
        ),
        (["--truth=3"], "--truth even"),
        (["--batch_rows=3"], "no multiple of the 8 shards"),
        (["--batch_rows=0"], "--batch_rows=0 is no multiple of the 8 shards"),
        (["--mc_chunk=-1"], "--mc_chunk=-1: at least 0"),
        (["--reference=nowhere"], "nowhere"),
        (["--part=nowhere"], "no parameter 'nowhere'"),
        (["--row_length=1"], "row_length=1"),
        ([], "plots need matplotlib: pip install 'llada_jax[plot]', or --no_plots"),
    ],
)
def test_bad_flags_are_one_line_before_a_model_is_read(
    flags, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loading, "load", lambda *args: pytest.fail("a model was read"))
    if not flags:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = [
        f"--policy={SUDOKU}",
        f"--reference={SUDOKU}",
        f"--pairs=jsonl:{SUDOKU / 'pairs.jsonl.gz'}",
    ]
    said = refusal(capsys, command, *argv, f"--out={tmp_path}", "--batch_rows=8", *flags)
    assert message in said


def test_a_scheme_of_an_imported_module_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(noise.TIMES, "mine", None)  # so that it is gone when the test ends
    del noise.TIMES["mine"]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_schemes.py").write_text(
        "from llada_jax import noise\nnoise.TIMES['mine'] = noise.TIMES['iid']\n"
    )
    argv = ["--policy=p", "--reference=r", "--pairs=x", "--schemes=times=mine", "--mc_chunk=-1"]
    for flags, message in (
        ([], "times='mine' is not one of"),
        (["--import=my_schemes"], "--mc_chunk=-1: at least"),
    ):
        assert message in refusal(capsys, command, *argv, *flags)


@pytest.mark.slow
def test_other_weights_at_the_same_path_do_not_reuse_results(tmp_path, monkeypatch, capsys):
    def measure(run):
        raise ValueError("measured")

    monkeypatch.setattr(Run, "measure", measure)
    policy = shutil.copytree(SUDOKU, tmp_path / "policy")
    weights = policy / "model.safetensors"

    def ends_with():
        argv = [
            f"--policy={policy}",
            f"--reference={SUDOKU}",
            f"--pairs=jsonl:{SUDOKU / 'pairs.jsonl.gz'}",
        ]
        argv += [
            "--template=plain",
            "--no_eos",
            "--row_length=66",
            "--pairs_limit=8",
            "--batch_rows=8",
            "--no_plots",
        ]
        return refusal(capsys, command, *argv, f"--out={tmp_path / 'out'}")

    assert ends_with() == "error: measured"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused = ends_with()
    assert (
        "holds results with other weights of the policy=" in refused
        and "give another --out" in refused
    )
    assert "reference" not in refused


@pytest.mark.slow
def test_the_command_measures_goes_on_and_says_the_same(tmp_path, capsys, monkeypatch):
    argv = [*SMALL, "--schemes=n_t=2", "--schemes=n_t=1,share_noise=no", f"--out={tmp_path}"]
    run_command(command, *argv)
    text = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())
    # Policy and reference are the same model: shared noise leaves no variance of the score.
    assert max(table["columns"]["n_t=2"]["score variance"]) < 1e-9
    assert table["columns"]["n_t=1,share_noise=no"]["score variance"][0] > 0.01
    assert table["columns"]["n_t=2"][f"gradient variance: {EVERYTHING}"][0] > 0
    assert table["columns"]["n_t=2"][f"gradient variance: {UP_PROJ}"][0] > 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"variance.png", "bias.png", "terms.png"}
    assert "n_t=1,share_noise=no" in (tmp_path / "table.csv").read_text()

    (tmp_path / "batch00000" / "n_t=2.npz").unlink()  # as if it had been stopped
    monkeypatch.setattr(tables, "plot", lambda table, out: None)
    run_command(command, *argv)
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if "repeat " not in line] == [
        line for line in text.splitlines() if "repeat " not in line
    ]
    assert not any("Theorem 4" in name for name in table["columns"]["n_t=2"])
    one = [
        f"--out={tmp_path / 'one'}" if "--out" in flag else flag.replace("limit=8", "limit=1")
        for flag in argv
    ]
    run_command(command, *one)
    column = json.loads((tmp_path / "one" / "table.json").read_text())["columns"]["n_t=2"]
    for left, name in (("error", "gradient error"), ("variance", "gradient variance")):
        value = np.ravel(column[f"{name}: {EVERYTHING}"])[0]
        assert 0 < value <= column[f"Theorem 4: bound of gradient {left}: {EVERYTHING}"]
    assert column[f"budget by pair / equal: {EVERYTHING}"] == pytest.approx([1, 1, 1])
    assert "holds results with other beta=0.2" in refusal(capsys, command, *argv, "--beta=0.5")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Flags of a measurement, and every array that one process with eight devices measured."""
    out = tmp_path_factory.mktemp("measured")
    argv = [*SMALL, "--schemes=n_t=2,share_noise=no", "--no_plots", "--dtype=float32"]
    run_command(command, *argv, f"--out={out}")
    arrays = arrays_in(out)
    assert len(arrays) == 12
    return argv, arrays


def arrays_in(out):
    return {
        (path.name, name): x
        for path in sorted(out.glob("batch*/*.npz"))
        for name, x in np.load(path).items()
    }


def assert_measured_alike(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # Sums in another order, in float32. The two models are the same, so their difference is
        # rounding alone.
        np.testing.assert_allclose(
            found[name], values, rtol=1e-3, atol=1e-4 * np.abs(values).max(), err_msg=str(name)
        )


@pytest.mark.slow
def test_without_gradients_the_rest_is_the_same(measured, tmp_path, capsys):
    argv, expected = measured
    run_command(command, *argv, f"--out={tmp_path}", "--no_gradient")
    rest = {
        name: x
        for name, x in expected.items()
        if name[1] in ("elbos", "is_pair", "terms", "shares")
    }
    assert_measured_alike(arrays_in(tmp_path), rest)
    text = capsys.readouterr().out
    assert "score: V_t" in text and "grad" not in text


@pytest.mark.slow
def test_split_parameters_measure_the_same(measured, tmp_path):
    argv, expected = measured
    run_command(command, *argv, f"--out={tmp_path}", "--fsdp=2", "--tensor=2")
    assert_measured_alike(arrays_in(tmp_path), expected)


@pytest.mark.slow
def test_two_processes_measure_the_same_and_one_writes(measured, tmp_path):
    argv, expected = measured
    launcher = [
        sys.executable,
        str(ROOT / "launch" / "local_cluster.py"),
        "--processes=2",
        "--devices=4",
        "--",
    ]
    command = [sys.executable, "-m", "llada_jax.variance", *argv, f"--out={tmp_path}", "--fsdp=4"]
    for _ in range(2):  # the second finds all of it done
        ended = subprocess.run(
            [*launcher, *command], cwd=ROOT, capture_output=True, text=True, timeout=580
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "[0] estimator" in ended.stdout and "[1] estimator" not in ended.stdout
        assert_measured_alike(arrays_in(tmp_path), expected)
