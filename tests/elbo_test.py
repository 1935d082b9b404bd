"""ELBO estimates against closed forms and exact enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import elbo, noise
from llada_jax.models.llada import LLaDA, ModelConfig

MASK = 7
TOKENS = jnp.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
RESPONSE = jnp.array([[0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1]], bool)
# Every unbiased entry once; noise_test.py has the expected weights of all combinations.
SCHEMES = [
    {"times": "iid", "masks": "exact", "weights": "plain"},
    {"times": "iid", "masks": "bernoulli", "weights": "plain"},
    {"times": "stratified", "masks": "exact", "weights": "leave_one_out"},
    {"times": "antithetic", "masks": "coupled", "weights": "leave_one_out", "pseudo_count": 1.0},
    {"times": "systematic", "masks": "cyclic", "weights": "plain"},
    {"times": "importance", "masks": "exact", "weights": "leave_one_out", "pseudo_count": 1.0},
    {"times": "importance", "masks": "cyclic", "weights": "balanced", "pseudo_count": 0.3},
]


def counting_logits(tokens):
    """log p of token 2 is linear in the number of masks, so the ELBO has a closed form."""
    masks = jnp.sum(tokens == MASK, axis=-1, keepdims=True)
    target = -0.3 * masks - 0.1 * jnp.arange(tokens.shape[-1])
    # Two tokens with probabilities p and 1 - p, the rest none.
    logps = jnp.stack([jnp.log1p(-jnp.exp(target)), target], -1)
    return jnp.concatenate([jnp.full((*tokens.shape, 1), -jnp.inf), logps], -1)


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig(
        d_model=16, n_heads=2, n_layers=2, vocab_size=8, mask_token_id=MASK, mlp_hidden_size=24
    )
    model = LLaDA(config)
    # Large weights, so that the terms differ between masks.
    params = jax.tree.map(lambda x: 8 * x, model.init(jax.random.key(1), TOKENS)["params"])
    return jax.jit(lambda tokens: model.apply({"params": params}, tokens))


def test_exact_elbo_matches_the_closed_form():
    # p_i depends on the count l only: B = sum_l (1/L) (L/l) (l/L) sum_i log p_i(l).
    # This is the mean over l of the sums.
    tokens = jnp.full((2, 6), 2)
    for row, positions in enumerate(([1, 2, 3, 4], [2, 4, 5])):
        length = len(positions)
        expected = np.mean(
            [sum(-0.3 * k - 0.1 * i for i in positions) for k in range(1, length + 1)]
        )
        found = elbo.exact_elbo(counting_logits, tokens, RESPONSE, mask_id=MASK)[row]
        assert found == pytest.approx(expected, rel=1e-5)


def test_exact_elbo_is_the_same_in_any_chunks_and_batches(tiny):
    whole = elbo.exact_elbo(tiny, TOKENS, RESPONSE, mask_id=MASK)
    chunked = elbo.exact_elbo(tiny, TOKENS, RESPONSE, mask_id=MASK, chunk=4)
    alone = elbo.exact_elbo(tiny, TOKENS[1:], RESPONSE[1:], mask_id=MASK)
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)
    np.testing.assert_allclose(alone[0], whole[1], rtol=1e-5)


def test_exact_elbo_refuses_long_responses(tiny):
    with pytest.raises(ValueError, match="at most 20"):
        elbo.exact_elbo(tiny, jnp.zeros((1, 30), int), jnp.ones((1, 30), bool), mask_id=MASK)


@pytest.mark.parametrize(
    "n_t, n_yt, scheme",
    [(4, 2, s) for s in SCHEMES] + [(1, 3, s) for s in SCHEMES if s["times"] == "iid"],
    ids=lambda s: "-".join(map(str, s.values())) if isinstance(s, dict) else s,
)
def test_estimates_are_unbiased(tiny, scheme, n_t, n_yt):
    exact = elbo.exact_elbo(tiny, TOKENS, RESPONSE, mask_id=MASK)
    repeats = 4000
    estimate = elbo.estimate_elbo(
        jax.random.key(3),
        tiny,
        jnp.tile(TOKENS, (repeats, 1)),
        jnp.tile(RESPONSE, (repeats, 1)),
        mask_id=MASK,
        n_t=n_t,
        n_yt=n_yt,
        **scheme,
    )
    values = np.asarray(estimate.value).reshape(repeats, 2)
    error = values.std(0, ddof=1) / np.sqrt(repeats)
    assert np.all(error < 0.02 * np.abs(exact)), "the test has no power"
    assert np.all(np.abs(values.mean(0) - exact) < 4 * error)
    if elbo.error_is_known(noise.Scheme(n_t, n_yt, **scheme)):  # the reported error is the true one
        reported = np.sqrt(np.mean(np.asarray(estimate.stderr).reshape(repeats, 2) ** 2, 0))
        np.testing.assert_allclose(reported, values.std(0, ddof=1), rtol=0.15)


def test_gradients_are_unbiased():
    # The truth is the gradient of the enumerated ELBO. Weights are constants in the gradient.
    def value(estimate, scale):
        def logits_fn(tokens):
            masks = jnp.sum(tokens == MASK, -1)[..., None, None]
            return (
                scale * jnp.cos(tokens[..., None] * jnp.arange(8) + masks)
                + jnp.arange(8) * scale**2
            )

        return estimate(logits_fn).sum()

    exact = jax.grad(
        lambda s: value(lambda f: elbo.exact_elbo(f, TOKENS, RESPONSE, mask_id=MASK), s)
    )(0.7)

    def estimated(key):
        settings = {
            "times": "importance",
            "weights": "leave_one_out",
            "pseudo_count": 1.0,
            "n_t": 3,
        }
        return jax.grad(
            lambda s: value(
                lambda f: (
                    elbo.estimate_elbo(key, f, TOKENS, RESPONSE, mask_id=MASK, **settings).value
                ),
                s,
            )
        )(0.7)

    found = np.asarray(jax.jit(jax.vmap(estimated))(jax.random.split(jax.random.key(0), 20_000)))
    error = found.std(ddof=1) / np.sqrt(found.size)
    assert error < 0.02 * abs(exact), "the test has no power"
    assert abs(found.mean() - exact) < 4 * error


def test_where_the_spread_of_the_terms_is_their_error():
    known = [s for s in SCHEMES if elbo.error_is_known(noise.Scheme(4, 2, **s))]
    assert known == SCHEMES[:2]  # iid times, exact or Bernoulli masks, plain weights
    assert not elbo.error_is_known(noise.Scheme(1, 4))
    for changed in (
        {"masks": "coupled"},
        {"masks": "cyclic"},
        {"times": "systematic"},
        {"weights": "leave_one_out"},
    ):
        assert not elbo.error_is_known(noise.Scheme(4, **changed))
    # The draws of one score are still independent.
    assert elbo.error_is_known(noise.Scheme(4, share_in_pair="masks"))


def test_one_time_has_no_standard_error(tiny):
    estimate = elbo.estimate_elbo(
        jax.random.key(0), tiny, TOKENS, RESPONSE, mask_id=MASK, n_t=1, n_yt=4
    )
    assert estimate.terms.shape == (1, 4, 2) and np.isnan(estimate.stderr).all()


def test_chunks_change_neither_value_nor_gradient():
    def value(scale, chunk):
        def logits_fn(tokens):
            return scale * jnp.cos(
                tokens[..., None] * jnp.arange(8) + jnp.sum(tokens == MASK, -1)[..., None, None]
            )

        return elbo.estimate_elbo(
            jax.random.key(0), logits_fn, TOKENS, RESPONSE, mask_id=MASK, n_t=4, n_yt=2, chunk=chunk
        ).value.sum()

    whole = jax.value_and_grad(value)(1.5, 0)
    for chunk in (1, 2, 4):
        np.testing.assert_allclose(jax.value_and_grad(value)(1.5, chunk), whole, rtol=1e-5)
    with pytest.raises(ValueError, match="chunk=3 does not divide"):
        value(1.5, 3)


def test_terms_take_weights_by_draw_or_by_token(tiny):
    masked = jnp.array(
        [[[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]], [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0]]], bool
    )
    weights = jnp.array([[2.0, 1.5], [4.0, 3.0]])
    by_draw = elbo.elbo_terms(tiny, TOKENS, masked, weights, mask_id=MASK)
    by_token = elbo.elbo_terms(
        tiny, TOKENS, masked, jnp.where(masked, weights[..., None], 99.0), mask_id=MASK
    )
    np.testing.assert_allclose(by_draw, by_token, rtol=1e-6)
    logps = jax.nn.log_softmax(tiny(jnp.where(masked[0, 0], MASK, TOKENS[0])))
    np.testing.assert_allclose(by_draw[0, 0], 2 * (logps[1, 2] + logps[3, 4]), rtol=1e-5)


def test_golden_terms(golden):
    import llada_jax

    arrays = np.load(golden / "golden.npz")
    for name in ("policy", "reference"):
        model, params = llada_jax.load(golden / name)
        for pair in range(2):
            for side in ("chosen", "rejected"):
                get = {
                    k: arrays[f"vrpo_{pair}_{side}_{k}"]
                    for k in ("tokens", "masks", "num_masked", f"{name}_terms")
                }
                prompt = int(arrays[f"vrpo_{pair}_{side}_prompt_length"])
                length = get["tokens"].size - prompt
                masks = np.zeros((4, 1, get["tokens"].size), bool)
                masks[:, 0, prompt:] = get["masks"][:, -length:]
                terms = elbo.elbo_terms(
                    lambda tokens, m=model, p=params: m.apply({"params": p}, tokens),
                    jnp.asarray(get["tokens"].reshape(1, -1), jnp.int32),
                    jnp.asarray(masks),
                    jnp.asarray(length / get["num_masked"], jnp.float32)[:, None],
                    mask_id=model.config.mask_token_id,
                )
                np.testing.assert_allclose(terms[:, 0], get[f"{name}_terms"], rtol=1e-4)


@pytest.mark.slow
def test_the_example_in_the_docstring_runs():
    import doctest

    assert doctest.testmod(elbo).failed == 0 and doctest.testmod(elbo).attempted >= 5
