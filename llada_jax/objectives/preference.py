"""VRPO: preference optimisation on ELBO estimates (equations 6 and 8)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from llada_jax import config, elbo, losses, noise
from llada_jax.batch import Batch
from llada_jax.config import key
from llada_jax.objectives.objective import Examples, Objective, check_chunk
from llada_jax.objectives.terms import draw, model_terms, segment_lengths


@dataclasses.dataclass(frozen=True)
class Preference:
    """The preference loss, the estimator of its ELBOs, and the number of draws at a time."""

    # scale of the score; a larger beta keeps the policy closer to the reference
    beta: float = key(0.2, argument=True)
    kind: str = "sigmoid"  # preference loss of a score: a name in losses.LOSSES
    label_smoothing: float = 0.0  # share of wrong labels; for kinds "sigmoid" and "robust"
    # weight of the denoising loss on the winner, from the same terms
    sft_weight: float = key(0.05, argument=True)
    # policy and reference use the same masks (the paper: antithetic sampling)
    share_noise: bool = True
    scheme: noise.Scheme = noise.Scheme()
    mc_chunk: int = key(0, changes_result=False)  # draws computed at a time; 0: all
    seed: int = key(0, given=True, argument=True)
    stream: str = key("policy", given=True)  # the noise stream of the policy

    def __post_init__(self):
        losses.check_preference(self.beta, self.kind, self.label_smoothing)
        config.at_least(self, sft_weight=0)
        check_chunk(self)

    def for_heldout(self, n_t: int) -> "Preference":
        """The settings for held-out pairs: `n_t` exact masks, shared, whatever training uses."""
        scheme = noise.Scheme(n_t)
        return dataclasses.replace(
            self, share_noise=True, scheme=scheme, mc_chunk=1, stream="evaluate"
        )


def is_pair(batch: Batch) -> Bool[Array, "r p"]:
    """Which of the p places of a row contain a pair."""
    return segment_lengths(batch)[:, 0::2] > 0


def reference_terms(
    params: Any, batch: Batch, *, model: nn.Module, settings: Preference
) -> Float32[Array, "r n s"]:
    """The reference policy's terms at the masks that `score_pairs` draws for this batch."""
    stream = settings.stream if settings.share_noise else "reference"
    drawn = draw(batch, settings.scheme, seed=settings.seed, stream=stream)
    terms = model_terms(model, params, batch, drawn, chunk=settings.mc_chunk)
    return jax.lax.stop_gradient(jnp.moveaxis(terms, 0, 1))


def score_pairs(
    params: Any, batch: Batch, frozen: Any, *, model: nn.Module, settings: Preference
) -> Examples:
    """Returns the loss and the metrics of every pair, [r, p] each (equations 6 and 8).

    `frozen` contains the reference policy's parameters, or is None if `batch.reference` has its
    terms. "score/mc_variance" is the squared standard error of the score. It is included only if
    the draws determine it (`elbo.error_is_known`).
    """
    scheme = settings.scheme
    reference = batch.reference
    if reference is None:
        reference = reference_terms(frozen, batch, model=model, settings=settings)
    drawn = draw(batch, scheme, seed=settings.seed, stream=settings.stream)
    terms = model_terms(model, params, batch, drawn, chunk=settings.mc_chunk)
    reference = jnp.moveaxis(reference, 1, 0)
    policy, fixed = terms.mean(0), reference.mean(0)
    loss, metrics = losses.preference_loss(
        policy[:, 0::2],
        policy[:, 1::2],
        fixed[:, 0::2],
        fixed[:, 1::2],
        beta=settings.beta,
        kind=settings.kind,
        label_smoothing=settings.label_smoothing,
    )
    denoising = losses.denoising_loss(policy, segment_lengths(batch))
    metrics |= {
        "loss/preference": loss,
        "loss/sft": denoising[:, 0::2],
        "loss/sft_rejected": denoising[:, 1::2],
    }
    if elbo.error_is_known(scheme):
        # Take the spread of the score's own draws. It contains the noise that winner and loser,
        # policy and reference share, exactly as the score does.
        ratio = terms - reference
        draws = settings.beta * (ratio[..., 0::2] - ratio[..., 1::2])
        errors = elbo.standard_error(draws.reshape(scheme.n_t, scheme.n_yt, *draws.shape[1:]))
        metrics["score/mc_variance"] = jnp.square(errors)
    return metrics


def _loss(means: dict[str, Array], settings: Preference) -> Array:
    return means["loss/preference"] + settings.sft_weight * means["loss/sft"]


def _error_of_the_score(means: dict[str, Array]) -> dict[str, Array]:
    if "score/mc_variance" not in means:
        return {}
    return {"score/mc_stderr": jnp.sqrt(means["score/mc_variance"])}


VRPO = Objective(
    "vrpo",
    section="vrpo",
    records="preference",
    unit="pairs",
    Settings=Preference,
    is_example=is_pair,
    examples=score_pairs,
    loss=_loss,
    summary=_error_of_the_score,
    reference_terms=reference_terms,
    segments_per_example=2,
    shown=("loss", "rewards/accuracies", "rewards/margins"),
    heldout=(
        "rewards/accuracies",
        "rewards/margins",
        "loss/preference",
        "loss/sft",
        "loss/sft_rejected",
        "score/mc_variance",
        "score_variance",
    ),
)
