"""VRPO: preference optimisation on ELBO estimates (equations 6 and 8)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from llada_jax import elbo, losses, noise
from llada_jax.batch import Batch
from llada_jax.models.llada import LLaDA
from llada_jax.objectives.terms import Metrics, draw, model_terms, segment_lengths


@dataclasses.dataclass(frozen=True)
class Preference:
    """What VRPO computes: the loss, how its ELBOs are estimated, and how that is split."""

    beta: float = 0.2
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.05  # of the denoising loss on the winner, from the same terms
    share_noise: bool = True  # the paper's antithetic sampling
    scheme: noise.Scheme = noise.Scheme()
    mc_chunk: int = 0  # draws at a time, 0: all
    seed: int = 0
    stream: str = "policy"  # of the policy's noise

    def __post_init__(self):
        losses.check_preference(self.beta, self.kind, self.label_smoothing)
        if self.mc_chunk < 0 or (self.mc_chunk and self.scheme.n % self.mc_chunk):
            raise ValueError(
                f"mc_chunk={self.mc_chunk} does not divide n_t x n_yt = {self.scheme.n}: choose a divisor"
            )


def reference_terms(
    params: Any, batch: Batch, *, model: LLaDA, settings: Preference, num_segments: int
) -> Float32[Array, "r n s"]:
    """The reference policy's terms at the masks that `vrpo_step` draws for this batch: what a cache stores by row."""
    stream = settings.stream if settings.share_noise else "reference"
    drawn = draw(
        batch, settings.scheme, seed=settings.seed, stream=stream, num_segments=num_segments
    )
    terms = model_terms(
        model, params, batch, drawn, num_segments=num_segments, chunk=settings.mc_chunk
    )
    return jax.lax.stop_gradient(jnp.moveaxis(terms, 0, 1))


def score_pairs(
    params: Any,
    batch: Batch,
    reference: Float32[Array, "r n s"],
    *,
    model: LLaDA,
    settings: Preference,
    num_segments: int,
) -> tuple[Metrics, Bool[Array, "r p"]]:
    """Loss and metrics of every pair, [r, p] each, and which of the p places of a row hold a pair (equations 6, 8).

    `reference` holds the terms of the reference policy for this batch (`reference_terms`). "score/mc_variance" is there
    where a scheme's own draws tell it (`elbo.error_is_known`).
    """
    scheme = settings.scheme
    drawn = draw(
        batch, scheme, seed=settings.seed, stream=settings.stream, num_segments=num_segments
    )
    terms = model_terms(
        model, params, batch, drawn, num_segments=num_segments, chunk=settings.mc_chunk
    )
    reference = jnp.moveaxis(reference, 1, 0)
    policy, frozen = terms.mean(0), reference.mean(0)
    lengths = segment_lengths(batch, num_segments)
    loss, metrics = losses.preference_loss(
        policy[:, 0::2],
        policy[:, 1::2],
        frozen[:, 0::2],
        frozen[:, 1::2],
        beta=settings.beta,
        kind=settings.kind,
        label_smoothing=settings.label_smoothing,
    )
    denoising = losses.denoising_loss(policy, lengths)
    metrics |= {
        "loss/preference": loss,
        "loss/sft": denoising[:, 0::2],
        "loss/sft_rejected": denoising[:, 1::2],
    }
    if elbo.error_is_known(scheme):
        # From the spread of each score's own draws: what winner and loser, policy and reference share is in it or not.
        ratio = terms - reference
        draws = settings.beta * (ratio[..., 0::2] - ratio[..., 1::2])
        errors = elbo.standard_error(draws.reshape(scheme.n_t, scheme.n_yt, *draws.shape[1:]))
        metrics["score/mc_variance"] = jnp.square(errors)
    return metrics, lengths[:, 0::2] > 0
