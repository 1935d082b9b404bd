"""The laboratory against closed forms, numpy, and its own command on the shipped Sudoku pair."""

import doctest
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import noise, variance, variance_report, variance_run
from llada_jax.batch import Batch
from llada_jax.variance import EVERYTHING, Decomposition, Estimator, Moments, Problem

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUDOKU = ROOT / "llada_jax" / "assets" / "sudoku"
MASK = 7
PARTS = (EVERYTHING, "slope", "table[1]")


@pytest.fixture(scope="module")
def toy():
    """Params of a toy model, another's, one batch of two rows with two pairs in all, and the problem."""
    rng = np.random.default_rng(0)
    segments = np.zeros((2, 16), np.int32)
    segments[0, :7], segments[0, 7:15] = 1, 2
    segments[1, :6], segments[1, 6:12] = 1, 2
    response = segments > 0
    for row, starts in ((0, (0, 7)), (1, (0, 6))):
        for start in starts:
            response[row, start : start + 2] = False
    tokens = rng.integers(0, MASK, (2, 16)).astype(np.int32)
    batch = Batch(tokens, segments, np.zeros_like(tokens), response, np.arange(2), np.zeros(2, np.int32))
    batch = jax.tree.map(jnp.asarray, batch)

    def logits_fn(params, tokens):  # log p at a position depends on its neighbour, if that is not masked
        left = jnp.roll(tokens, 1, -1)
        return params["table"][left] + params["slope"] * jnp.sum(tokens == MASK, -1)[..., None, None] * jnp.arange(8)

    def params(seed):
        return {"table": jax.random.normal(jax.random.key(seed), (8, 8)), "slope": jnp.float32(0.02 * seed)}

    terms_fn = variance.terms_of(logits_fn, mask_id=MASK, num_segments=2)
    return params(1), params(2), batch, Problem(terms_fn, 2, beta=0.1, parts=PARTS)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(variance).failed == 0 and doctest.testmod(variance).attempted >= 7


def test_decomposition_finds_both_variances_and_its_errors_are_true():
    rng = np.random.default_rng(0)
    # 400 experiments: times with variance 4, samples with variance 9.
    terms = 2 * rng.normal(size=(20, 1, 400)) + 3 * rng.normal(size=(20, 3, 400)) + 50
    found = variance.decompose(jnp.asarray(terms))
    for value, error, truth in ((found.v_t, found.v_t_stderr, 4), (found.v_yt, found.v_yt_stderr, 9)):
        spread = float(value.std())
        assert abs(float(value.mean()) - truth) < 4 * spread / 20
        assert float(jnp.sqrt(jnp.mean(error**2))) == pytest.approx(spread, rel=0.15)
    split = Decomposition(*(jnp.array(x) for x in (4.0, 9.0, 0.0, 0.0)))
    assert float(split.predict(2, 3)) == pytest.approx(4 / 2 + 9 / 6)
    with pytest.raises(ValueError, match="at least 3 times and 2 samples"):
        variance.decompose(jnp.zeros((3, 1, 5)))


def test_streamed_moments_are_those_of_stacked_gradients():
    rng = np.random.default_rng(0)
    grads = [{"slope": jnp.float32(rng.normal()), "table": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
             for _ in range(6)]  # fmt: skip
    moments = Moments.zero(grads[0], PARTS)
    for g in grads:
        moments = moments.add(g, PARTS)
    tables = np.stack([g["table"] for g in grads])
    slope = np.var([g["slope"] for g in grads], ddof=1)
    rows = tables.var(0, ddof=1).sum(-1)
    np.testing.assert_allclose(moments.trace(PARTS), [slope + rows.sum(), slope, rows[1]], rtol=1e-5)
    with pytest.raises(ValueError, match="no parameter 'tables'; it has slope, table"):
        variance.squared_norms(grads[0], ("tables",))


def test_repeats_agree_with_their_prediction_and_with_autodiff(toy):
    params, reference, batch, problem = toy
    repeat = jax.jit(problem.repeat, static_argnames="estimator")
    truth = jax.tree.map(jnp.zeros_like, params)
    elbos, errors, moments = {}, [], None
    for scheme in (noise.Scheme(4), noise.Scheme(2, 2)):
        estimator = Estimator(scheme)
        moments = Moments.zero(params, PARTS)
        found = []
        for k in range(300):
            one, moments, error = repeat(params, reference, batch, k, moments, truth, estimator=estimator)
            found.append(np.asarray(one))
            errors.append(np.asarray(error))
        elbos[scheme] = np.stack(found)
        # With truth 0 the errors are the gradients' norms: E|g|^2 = |E g|^2 + tr Var.
        squares = np.mean(np.square(errors[-300:]), 0)
        mean = variance.squared_norms(moments.total, PARTS) / 300**2
        np.testing.assert_allclose(squares - mean, moments.trace(PARTS), rtol=0.02)
    nested = jax.jit(problem.nested, static_argnames="n_yt")
    scores = variance.scores_of(elbos[noise.Scheme(4)].mean(0).reshape(2, -1, 2), 0.1).reshape(2, 1)
    outs = [nested(params, reference, batch, k, jnp.asarray(scores, jnp.float32), n_yt=2) for k in range(400)]
    terms = jnp.stack([o[0][0] for o in outs])  # [t, y, r, s] of the policy
    split = variance.decompose(terms)
    for scheme, found in elbos.items():
        predicted = np.asarray(split.predict(scheme.n_t, scheme.n_yt))
        np.testing.assert_allclose(found[:, 0].var(0, ddof=1), predicted, rtol=0.25)
    shares = np.stack([o[1] for o in outs])
    assert shares.min() > 0 and shares.max() == 1


def test_pair_statistics_are_numpys(toy):
    rng = np.random.default_rng(0)
    elbos, truth = rng.normal(size=(2000, 2, 3, 2)), np.zeros((2, 3, 2))
    found = variance.pair_statistics(elbos, truth, 0.5)
    scores = 0.5 * ((elbos[:, 0, :, 0] - elbos[:, 1, :, 0]) - (elbos[:, 0, :, 1] - elbos[:, 1, :, 1]))
    np.testing.assert_allclose(found["score variance"], scores.var(0, ddof=1))
    np.testing.assert_allclose(found["Eq. 9"], found["score variance"], rtol=0.1)  # winner and loser independent
    np.testing.assert_allclose(found["loss error"], np.abs(np.log1p(np.exp(-scores)) - np.log(2)).mean(0))
    # Theorem 1, on numbers for which it holds with room.
    assert (found["loss error"] <= np.sqrt(found["score variance"])).all()
    assert (found["loss variance"] <= 4 * found["score variance"]).all()


def test_bootstrap_covers():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        values = rng.normal(3, 1, 40)
        value, low, high = variance.bootstrap(lambda c, v=values: v[c].mean(), 40, seed=seed, draws=200)
        covered += low < 3 < high
    assert 85 <= covered <= 100 and value == pytest.approx(values.mean())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--schemes=n_t=four"], "'n_t=four' in 'n_t=four' sets nothing"),
        (["--schemes=time=iid"], "'time=iid' in 'time=iid' sets nothing"),
        (["--schemes=times=idd"], "times='idd' is not one of"),
        (["--truth=3"], "--truth even"),
        (["--batch_rows=3"], "no multiple of the 8 shards"),
        (["--reference=nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_one_line(flags, message, tmp_path, capsys):
    argv = [f"--policy={SUDOKU}", f"--reference={SUDOKU}", f"--pairs=jsonl:{SUDOKU / 'pairs.jsonl.gz'}"]
    with pytest.raises(SystemExit) as error:
        variance_run.main([*argv, f"--out={tmp_path}", "--batch_rows=8", *flags])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_measures_goes_on_and_says_the_same(tmp_path, capsys, monkeypatch):
    argv = [
        f"--policy={SUDOKU}", f"--reference={SUDOKU}", f"--pairs=jsonl:{SUDOKU / 'pairs.jsonl.gz'}", "--template=plain",
        "--no_eos", "--row_length=66", "--pairs_limit=8", "--batch_rows=8", "--repeats=2", "--truth=2", "--nested_t=3",
        "--nested_yt=2", "--only_schemes", "--schemes=n_t=2", "--schemes=n_t=1,share_noise=no", f"--out={tmp_path}",
    ]  # fmt: skip
    variance_run.main(argv)
    text = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())
    # Policy and reference are the same model: shared noise leaves no variance of the score.
    assert max(table["columns"]["n_t=2"]["score variance"]) < 1e-9
    assert table["columns"]["n_t=1,share_noise=no"]["score variance"][0] > 0.01
    assert table["columns"]["n_t=2"][f"gradient variance: {EVERYTHING}"][0] > 0
    assert table["columns"]["n_t=2"][f"gradient variance: {variance_run.UP_PROJ}"][0] > 0
    assert {p.name for p in tmp_path.glob("*.png")} == {"variance.png", "bias.png", "terms.png"}
    assert "n_t=1,share_noise=no" in (tmp_path / "table.csv").read_text()

    (tmp_path / "batch00000" / "n_t=2.npz").unlink()  # as if it had been stopped
    monkeypatch.setattr(variance_report, "_plot", lambda table, out: None)
    variance_run.main(argv)
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if "repeat " not in line] == [
        line for line in text.splitlines() if "repeat " not in line
    ]
    with pytest.raises(SystemExit) as error:
        variance_run.main([*argv, "--beta=0.5"])
    assert "holds results with other beta=0.2" in str(error.value)
