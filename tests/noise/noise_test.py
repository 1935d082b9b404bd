"""Masks and weights: counts, bias, and what noise depends on (seed, stream, row, epoch, draw)."""

import functools
import re
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT

from llada_jax import noise

# Two segments and padding; 3 and 5 response tokens.
SEGMENTS = jnp.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0])
RESPONSE = jnp.array([0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0], bool)


@functools.partial(jax.jit, static_argnames=("scheme", "num_segments"))
def draw(keys, scheme, num_segments=2):
    rows = keys.shape[0]
    tile = lambda x: jnp.tile(x, (rows, 1))
    return noise.draw_rows(
        keys, tile(RESPONSE), tile(SEGMENTS), num_segments=num_segments, scheme=scheme
    )


@pytest.fixture(scope="module")
def many():
    keys = jax.random.split(jax.random.key(0), 3000)
    return {masks: draw(keys, noise.Scheme(n_t=2, n_yt=2, masks=masks)) for masks in noise.MASKS}


@pytest.mark.parametrize("masks", noise.MASKS)
def test_only_responses_are_masked_and_padding_never(many, masks):
    drawn = many[masks]
    assert not drawn.masked[..., ~RESPONSE].any() and not drawn.weights[~drawn.masked].any()


def test_exact_counts_are_uniform_and_weigh_length_over_count(many):
    drawn = many["exact"]
    for segment, length in ((1, 3), (2, 5)):
        inside = np.asarray(segment == SEGMENTS)
        counts = np.asarray(drawn.masked[..., inside].sum(-1))
        assert counts.min() == 1 and counts.max() == length
        shares = np.bincount(counts.ravel(), minlength=length + 1)[1:] / counts.size
        np.testing.assert_allclose(shares, 1 / length, atol=0.03)
        weights = np.asarray(drawn.weights[..., inside].max(-1))
        np.testing.assert_allclose(weights, length / counts, rtol=1e-6)


@pytest.mark.parametrize("masks", noise.MASKS)
def test_every_token_counts_one_on_average(many, masks):
    weights = np.asarray(many[masks].weights)[..., np.asarray(RESPONSE)].reshape(-1, 8)
    error = weights.std(0) / np.sqrt(weights.shape[0] / 4)  # four draws of a row may share times
    assert np.all(np.abs(weights.mean(0) - 1) < 4 * error) and np.all(error < 0.1)


@pytest.mark.parametrize("masks", noise.MASKS)
def test_subsets_of_one_size_are_equally_likely(many, masks):
    inside = np.asarray(many[masks].masked[..., 6:11]).reshape(-1, 5)
    pairs = inside[inside.sum(1) == 2] @ (1 << np.arange(5))
    counts = np.bincount(pairs)[np.bincount(pairs) > 0]
    assert counts.size == 10
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi2 < 27.9  # 0.1 % of a chi-squared with nine degrees of freedom


COMBINATIONS = [
    *({"times": times} for times in noise.TIMES),
    {"times": "iid", "weights": "self_normalised"},
    {"times": "iid", "masks": "bernoulli", "eps": 0.2},
    *({"times": "stratified", "masks": masks} for masks in noise.MASKS),
    *(
        {"times": times, "masks": masks, "weights": "leave_one_out", "pseudo_count": count}
        for times, masks, count in (
            ("iid", "exact", 0.0),
            ("stratified", "exact", 1.5),
            ("systematic", "bernoulli", 1.5),
            ("antithetic", "coupled", 0.0),
            ("importance", "exact", 1.5),
            ("importance", "coupled", 0.0),
        )
    ),
    *(
        {"times": times, "masks": masks, "weights": "balanced", "pseudo_count": count}
        for times, masks, count in (
            ("iid", "exact", 0.1),
            ("stratified", "cyclic", 0.5),
            ("antithetic", "coupled", 2.0),
            ("systematic", "bernoulli", 1.0),
            ("importance", "cyclic", 1.0),
        )
    ),
    {"times": "stratified", "masks": "cyclic", "share_in_pair": "masks"},
    {"times": "importance", "weights": "leave_one_out", "share_in_pair": "times"},
]


def assert_expected_weights(scheme):
    """Checks that token i has the mean weight 1 / (l C(L, l)) under each mask m of size l.

    The ELBO is the sum of this weight times log p_i(m) over all m and all i in m (equation 14). So
    the estimate is unbiased for every model, and so is its gradient.
    """
    rows, length = 12_000, 4
    layout = jnp.tile(jnp.array([1, 1, 1, 1, 1, 2, 2, 2, 2, 0]), (rows, 1))
    response = jnp.tile(jnp.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 0], bool), (rows, 1))
    draw = jax.jit(
        lambda keys: noise.draw_rows(keys, response, layout, num_segments=2, scheme=scheme)
    )
    drawn = draw(jax.random.split(jax.random.key(0), rows))
    worst = 0.0
    for start in (1, 5):
        masked, weights = (
            np.asarray(x[..., start : start + length]) for x in (drawn.masked, drawn.weights)
        )
        subset = masked @ (1 << np.arange(length))
        for m in range(1, 2**length):
            for i in (i for i in range(length) if m >> i & 1):
                found = np.where(subset == m, weights[..., i], 0).mean(0)
                size = m.bit_count()
                error = max(found.std() / np.sqrt(rows), 1e-6)
                worst = max(worst, abs(found.mean() - 1 / (size * comb(length, size))) / error)
    if scheme.biased:
        assert worst > 10, "what is called biased is not"
    else:
        assert worst < 4.5  # 64 numbers


@pytest.mark.parametrize("scheme", COMBINATIONS, ids=lambda s: "-".join(map(str, s.values())))
def test_expected_weights_are_those_of_the_exact_elbo(scheme):
    # "official" is biased where i L / n ends in one half.
    assert_expected_weights(noise.Scheme(n_t=8 if scheme["times"] == "official" else 3, **scheme))


def test_the_documented_scheme_of_your_own_is_unbiased():
    text = (ROOT / "docs" / "estimators.md").read_text().partition("\n## Add one\n")[2]
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    before = dict(noise.TIMES)
    try:
        exec(example, {})
        (name,) = set(noise.TIMES) - set(before)
        assert_expected_weights(noise.Scheme(n_t=3, times=name))
    finally:
        noise.TIMES.clear()
        noise.TIMES.update(before)


@pytest.mark.parametrize("times", noise.TIMES)
def test_one_time_is_enough(times):
    drawn = draw(jax.random.split(jax.random.key(0), 2), noise.Scheme(n_t=1, times=times))
    assert drawn.masked.shape == (1, 2, 13) and jnp.isfinite(drawn.weights).all()


def test_a_pair_may_share_times_and_masks():
    layout, response = np.zeros((1, 20), int), np.zeros((1, 20), bool)
    layout[0, :9], layout[0, 9:19] = 1, 2
    response[0, 3:9], response[0, 12:19] = True, True  # 6 and 7 tokens
    keys = jax.random.split(jax.random.key(0), 1)

    def of(**kwargs):
        scheme = noise.Scheme(n_t=64, **kwargs)
        drawn = noise.draw_rows(
            keys, jnp.asarray(response), jnp.asarray(layout), num_segments=2, scheme=scheme
        )
        masked = np.asarray(drawn.masked[:, 0])
        return masked[:, 3:9], masked[:, 12:19]

    def alike(pair):
        return (pair[0] == pair[1][:, :6]).mean()

    winner, loser = of(share_in_pair="times")
    assert np.abs(winner.sum(1) / 6 - loser.sum(1) / 7).max() < 1 / 6
    assert alike((winner, loser)) < 0.85 < alike(of(share_in_pair="masks"))
    # Sharing leaves the winner's own noise as it was.
    np.testing.assert_array_equal(winner, of()[0])
    np.testing.assert_array_equal(winner, of(share_in_pair="masks")[0])


def test_complements_and_circles():
    keys = jax.random.split(jax.random.key(0), 200)
    coupled = np.asarray(
        draw(keys, noise.Scheme(n_t=4, times="antithetic", masks="coupled")).masked
    )
    both = coupled[0::2].astype(int) + coupled[1::2]
    assert (both[..., RESPONSE] >= 1).all() and (both[..., 6:11] == 2).sum(-1).max() <= 1
    cyclic = np.asarray(draw(keys, noise.Scheme(n_t=4, times="stratified", masks="cyclic")).masked)
    often = cyclic.sum(0)[:, 6:11]
    assert np.ptp(often, axis=1).max() <= 1


def test_balanced_weights_are_the_ridge_solution_and_keep_each_draws_sum():
    """Truth: the constrained least squares of the docstring, solved token by token in float64."""
    keys, c = jax.random.split(jax.random.key(3), 8), 0.4
    scheme = noise.Scheme(
        n_t=4, times="stratified", masks="cyclic", weights="balanced", pseudo_count=c
    )
    found = draw(keys, scheme)
    plain = draw(keys, noise.Scheme(n_t=4, times="stratified", masks="cyclic"))
    for row in range(8):
        for where in (slice(2, 5), slice(6, 11)):
            masked = np.asarray(found.masked[:, row, where])
            j, i = np.nonzero(masked)
            # Unknowns w_ij and one multiplier a draw: gradient of the objective, then the sums.
            same_token, of_draw = (i[:, None] == i), (j[:, None] == np.arange(4)).astype(float)
            top = np.hstack([np.eye(i.size) + same_token / c, of_draw])
            bottom = np.hstack([of_draw.T, np.zeros((4, 4))])
            sums = np.asarray(plain.weights[:, row, where]).sum(1)
            solution = np.linalg.solve(
                np.vstack([top, bottom]), np.append(np.full(i.size, 4 / c), sums)
            )
            np.testing.assert_allclose(
                np.asarray(found.weights[:, row, where])[j, i], solution[: i.size], atol=2e-5
            )


def test_segments_draw_independently(many):
    masked = np.asarray(many["exact"].masked)
    first, second = masked[..., :5].sum(-1).ravel(), masked[..., 5:].sum(-1).ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_samples_of_one_time_share_the_count_and_not_the_mask(many):
    masked = np.asarray(many["exact"].masked)  # draws (0, 1) are time 0, (2, 3) time 1
    counts = masked[..., 5:].sum(-1)
    np.testing.assert_array_equal(counts[0], counts[1])
    assert (counts[0] != counts[2]).mean() > 0.5
    assert (masked[0] != masked[1]).any(-1).mean() > 0.5


def test_noise_depends_on_seed_stream_row_and_epoch_alone():
    scheme = noise.Scheme(n_t=4)

    def of(seed, stream, rows, epochs):
        keys = noise.row_keys(noise.stream_key(seed, stream), jnp.array(rows), jnp.array(epochs))
        return np.asarray(draw(keys, scheme).masked)

    both = of(0, "policy", [5, 9], [0, 1])
    np.testing.assert_array_equal(both[:, 1], of(0, "policy", [9], [1])[:, 0])
    for other in (
        of(1, "policy", [5], [0]),
        of(0, "reference", [5], [0]),
        of(0, "policy", [5], [1]),
    ):
        assert (other[:, 0] != both[:, 0]).any()
    # More draws leave the earlier ones as they were.
    keys = noise.row_keys(noise.stream_key(0, "policy"), jnp.array([5, 9]), jnp.array([0, 1]))
    np.testing.assert_array_equal(draw(keys, noise.Scheme(n_t=6)).masked[:4], both)


def test_one_token_responses_are_always_masked_with_weight_one():
    drawn = noise.draw_rows(
        jax.random.split(jax.random.key(0), 50),
        jnp.tile(jnp.array([False, True]), (50, 1)),
        jnp.ones((50, 2), int),
        num_segments=1,
        scheme=noise.Scheme(n_t=3),
    )
    assert drawn.masked[..., 1].all()
    np.testing.assert_array_equal(drawn.weights[..., 1], 1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"times": "importance", "masks": "bernoulli"}, "use masks by count"),
        ({"pseudo_count": 1.0}, "0 but for weights leave_one_out, balanced"),
        (
            {"times": "importance", "weights": "self_normalised"},
            "divides by ratios.*use other times",
        ),
        ({"weights": "balanced"}, "needs pseudo_count above 0"),
        (
            {"weights": "leave_one_out", "masks": "cyclic"},
            "have none: use more times, or other masks",
        ),
        ({"weights": "leave_one_out", "n_t": 1}, "have none"),
        ({"share_in_pair": "noise"}, "share_in_pair='noise' is not one of"),
        ({"times": "idd"}, "times='idd' is not one of"),
        ({"masks": "exactly"}, "masks='exactly' is not one of"),
        ({"n_t": 0}, "at least 1"),
        ({"eps": 0.1}, "0 for masks by count"),
    ],
)
def test_bad_settings_are_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        noise.Scheme(**change)
