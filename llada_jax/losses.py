"""Preference and denoising losses: arrays in, per-example arrays out."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _sigmoid(s: Array, beta: float | Array, e: float | int) -> Array:
    return -(1 - e) * jax.nn.log_sigmoid(s) - e * jax.nn.log_sigmoid(-s)


def _robust(s: Array, beta: float | Array, e: float | int) -> Array:
    return (-(1 - e) * jax.nn.log_sigmoid(s) + e * jax.nn.log_sigmoid(-s)) / (1 - 2 * e)


def _hinge(s: Array, beta: float | Array, e: float | int) -> Array:
    return jax.nn.relu(1 - s)


def _ipo(s: Array, beta: float | Array, e: float | int) -> Array:
    return jnp.square(s / beta - 1 / (2 * beta))


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A loss of a score s, and whether label smoothing e has a meaning for it."""

    of_score: Callable[[Array, float | Array, float], Array]  # (s, beta, e) -> loss
    smooths_labels: bool = False


# A new loss is one function and one entry.
LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(_sigmoid, smooths_labels=True),
    "ipo": PreferenceLoss(_ipo),
    "hinge": PreferenceLoss(_hinge),
    "robust": PreferenceLoss(_robust, smooths_labels=True),
}


def check_preference(beta: float | Array, kind: str, label_smoothing: float) -> None:
    """Raises ValueError if `preference_loss` cannot honour a setting.

    A traced beta is not checked.
    """
    if kind not in LOSSES:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(LOSSES)}")
    if not isinstance(beta, jax.core.Tracer) and not beta > 0:
        raise ValueError(f"beta={beta} must be above 0")
    if label_smoothing and not LOSSES[kind].smooths_labels:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for kind={kind!r}: set it to 0"
        )
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing} is the share of wrong labels: at least 0, below 0.5"
        )


def preference_loss(
    policy_chosen_elbo: Float[Array, "*b"],
    policy_rejected_elbo: Float[Array, "*b"],
    reference_chosen_elbo: Float[Array, "*b"],
    reference_rejected_elbo: Float[Array, "*b"],
    *,
    beta: float | Array,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "*b"], dict[str, Array]]:
    """DPO and related losses of every pair, from ELBOs in nats, with their metrics.

    s is the score (equation 8), and e is `label_smoothing`. The loss by `kind`:

    - "sigmoid": -log sigmoid(s). For e > 0 the conservative form,
      -(1 - e) log sigmoid(s) - e log sigmoid(-s).
    - "robust": the unbiased form for labels that are wrong with probability e (arXiv:2403.00409),
      (-(1 - e) log sigmoid(s) + e log sigmoid(-s)) / (1 - 2 e).
    - "hinge": max(0, 1 - s) (SLiC, arXiv:2305.10425).
    - "ipo": (s / beta - 1 / (2 beta))^2 (arXiv:2310.12036), on ELBOs of the whole response.

    Raises ValueError if `check_preference` refuses a setting.
    """
    check_preference(beta, kind, label_smoothing)
    chosen = beta * (policy_chosen_elbo - reference_chosen_elbo)
    rejected = beta * (policy_rejected_elbo - reference_rejected_elbo)
    score = chosen - rejected
    loss = LOSSES[kind].of_score(score, beta, label_smoothing)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": score,
        # A score of exactly 0 counts as half correct: at the first step the policy equals its
        # reference, and every score is 0.
        "rewards/accuracies": (jnp.sign(score) + 1) / 2,
    }
    return loss, metrics


def denoising_loss(elbo: Float[Array, "*b"], lengths: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """-ELBO / length in nats per token: the loss of pre-training and SFT.

    A padding segment has length 0 and ELBO 0; its loss is 0.
    """
    return -elbo / jnp.maximum(lengths, 1)
