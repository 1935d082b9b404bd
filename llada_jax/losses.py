"""Preference and denoising losses: arrays in, per-example arrays out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = ("sigmoid", "ipo", "hinge", "robust")


def check_preference(beta: float, kind: str, label_smoothing: float) -> None:
    """One line for each setting that `preference_loss` cannot honour."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0")
    if label_smoothing and kind not in ("sigmoid", "robust"):
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
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, "*b"], dict[str, Array]]:
    """DPO and its relatives on ELBOs in nats: the loss and the metrics of every pair.

    With s the score (equation 8): "sigmoid" is -log sigmoid(s), under label smoothing e the conservative
    -(1 - e) log sigmoid(s) - e log sigmoid(-s); "robust" its unbiased form for labels wrong with probability e
    (arXiv:2403.00409); "hinge" max(0, 1 - s) (SLiC, arXiv:2305.10425); "ipo" (s / beta - 1 / (2 beta))^2
    (arXiv:2310.12036, on whole-response ELBOs). Raises ValueError for settings without a meaning.
    """
    check_preference(beta, kind, label_smoothing)
    chosen = beta * (policy_chosen_elbo - reference_chosen_elbo)
    rejected = beta * (policy_rejected_elbo - reference_rejected_elbo)
    score = chosen - rejected
    e = label_smoothing
    if kind == "sigmoid":
        loss = -(1 - e) * jax.nn.log_sigmoid(score) - e * jax.nn.log_sigmoid(-score)
    elif kind == "robust":
        loss = (-(1 - e) * jax.nn.log_sigmoid(score) + e * jax.nn.log_sigmoid(-score)) / (1 - 2 * e)
    elif kind == "hinge":
        loss = jax.nn.relu(1 - score)
    else:
        loss = jnp.square(score / beta - 1 / (2 * beta))
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": score,
        # A tie, as of a policy that is still its reference, is a coin's half.
        "rewards/accuracies": (jnp.sign(score) + 1) / 2,
    }
    return loss, metrics


def denoising_loss(elbo: Float[Array, "*b"], lengths: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """-ELBO / length, in nats a token: the pre-training and SFT objective of each example (spec: Objectives).

    0 where the length is 0 (a padding segment).
    """
    return -elbo / jnp.maximum(lengths, 1)
