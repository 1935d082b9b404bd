"""Losses against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import losses

ELBOS = [jnp.array(x) for x in ([-10.0, -30.0], [-12.0, -25.0], [-11.0, -28.0], [-11.5, -27.0])]
BETA = 0.2
SCORE = np.array([0.2 * ((-10 + 11) - (-12 + 11.5)), 0.2 * ((-30 + 28) - (-25 + 27))])  # 0.3, -0.8


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize(
    "kind, smoothing, expected",
    [
        ("sigmoid", 0.0, -log_sigmoid(SCORE)),
        ("sigmoid", 0.1, -0.9 * log_sigmoid(SCORE) - 0.1 * log_sigmoid(-SCORE)),
        ("robust", 0.1, (-0.9 * log_sigmoid(SCORE) + 0.1 * log_sigmoid(-SCORE)) / 0.8),
        ("hinge", 0.0, np.maximum(0, 1 - SCORE)),
        ("ipo", 0.0, (SCORE / BETA - 1 / (2 * BETA)) ** 2),
    ],
)
def test_losses(kind, smoothing, expected):
    loss, metrics = losses.preference_loss(*ELBOS, beta=BETA, kind=kind, label_smoothing=smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], SCORE, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/chosen"], [0.2, -0.4], rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/rejected"], [-0.1, 0.4], rtol=1e-5)
    np.testing.assert_array_equal(metrics["rewards/accuracies"], [1.0, 0.0])


def test_the_gradient_is_sigmoid_of_minus_the_score_times_beta():
    grads = jax.grad(lambda e: losses.preference_loss(*e, beta=BETA)[0].sum())(
        ELBOS[:2] + ELBOS[2:]
    )
    expected = BETA / (1 + np.exp(SCORE))
    np.testing.assert_allclose(grads[0], -expected, rtol=1e-5)
    np.testing.assert_allclose(grads[1], expected, rtol=1e-5)


def test_the_robust_loss_averages_to_the_clean_one():
    # If labels are wrong with probability e, the expected robust loss is the plain loss.
    e, flipped = 0.2, [ELBOS[1], ELBOS[0], ELBOS[3], ELBOS[2]]
    right, _ = losses.preference_loss(*ELBOS, beta=BETA, kind="robust", label_smoothing=e)
    wrong, _ = losses.preference_loss(*flipped, beta=BETA, kind="robust", label_smoothing=e)
    clean, _ = losses.preference_loss(*ELBOS, beta=BETA)
    np.testing.assert_allclose((1 - e) * right + e * wrong, clean, rtol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "sigmod"}, "kind='sigmod' is not one of"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "no meaning"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"beta": 0.0}, "above 0"),
    ],
)
def test_settings_without_a_meaning_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        losses.preference_loss(*ELBOS, **{"beta": BETA} | settings)


def test_a_loss_registered_from_outside(monkeypatch):
    linear = losses.PreferenceLoss(lambda s, beta, e: -(1 - 2 * e) * s, smooths_labels=True)
    monkeypatch.setitem(losses.LOSSES, "linear", linear)
    loss, metrics = losses.preference_loss(*ELBOS, beta=BETA, kind="linear", label_smoothing=0.1)
    np.testing.assert_allclose(loss, -0.8 * SCORE, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], SCORE, rtol=1e-5)
    with pytest.raises(ValueError, match="is not one of sigmoid, .*, linear$"):
        losses.preference_loss(*ELBOS, beta=BETA, kind="square")


def test_denoising_loss_is_per_token_and_zero_for_padding():
    np.testing.assert_allclose(
        losses.denoising_loss(jnp.array([-6.0, 0.0]), jnp.array([3.0, 0.0])), [2.0, 0.0]
    )
