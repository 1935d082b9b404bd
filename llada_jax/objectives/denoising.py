"""Pre-training and supervised fine-tuning: denoising cross-entropy, one response per segment."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from llada_jax import losses, noise
from llada_jax.batch import Batch
from llada_jax.config import key
from llada_jax.objectives.objective import Examples, Objective, check_chunk
from llada_jax.objectives.terms import draw, model_terms, segment_lengths


@dataclasses.dataclass(frozen=True)
class Denoising:
    """How the denoising loss is estimated. The default is the published one: one Bernoulli mask."""

    scheme: noise.Scheme = noise.Scheme(n_t=1, masks="bernoulli", eps=1e-3)
    mc_chunk: int = key(0, changes_result=False)  # draws computed at a time; 0: all
    seed: int = key(0, given=True, argument=True)
    stream: str = key("policy", given=True)

    def __post_init__(self):
        check_chunk(self)
        if self.scheme.share_in_pair != "nothing":
            raise ValueError(
                f"share_in_pair={self.scheme.share_in_pair!r} is for pairs: samples share nothing"
            )

    def for_heldout(self, n_t: int) -> "Denoising":
        """The settings for held-out samples: `n_t` exact masks, whatever training uses."""
        scheme = noise.Scheme(n_t)
        return dataclasses.replace(self, scheme=scheme, mc_chunk=1, stream="evaluate")


@dataclasses.dataclass(frozen=True)
class Pretraining(Denoising):
    """The denoising loss on plain text; some rows may be cut to a random length."""

    crop_probability: float = 0.0  # share of rows cut to a random length; published: 0.01

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.crop_probability <= 1:
            raise ValueError(
                f"crop_probability={self.crop_probability} is no probability: at least 0, at most 1"
            )


def is_sample(batch: Batch) -> Bool[Array, "r s"]:
    """Which of the s segments of a row contain a sample."""
    return segment_lengths(batch) > 0


def score_samples(
    params: Any, batch: Batch, frozen: None, *, model: nn.Module, settings: Denoising
) -> Examples:
    """Returns the loss of every sample, [r, s]: sum over masked tokens of CE / p, divided by L.

    L is the number of response tokens, p the mask probability (arXiv:2502.09992, section 2). In
    pre-training a row is one segment that consists of response only, so the mean over the batch is
    the published "divided by batch x length".
    """
    del frozen
    drawn = draw(batch, settings.scheme, seed=settings.seed, stream=settings.stream)
    terms = model_terms(model, params, batch, drawn, chunk=settings.mc_chunk)
    loss = losses.denoising_loss(terms.mean(0), segment_lengths(batch))
    return {"loss": loss, "elbo_per_token": -loss}


def crop(batch: Batch, settings: Pretraining) -> Batch:
    """Cuts each row to a uniform random length with probability `crop_probability`.

    The tokens after the cut become padding.
    """
    if not settings.crop_probability:
        return batch
    keys = noise.row_keys(noise.stream_key(settings.seed, "crop"), batch.row_ids, batch.epochs)
    length = batch.tokens.shape[1]

    def row_length(key):
        chance, where = jax.random.split(key)
        cut = jax.random.randint(where, (), 1, length + 1)
        return jnp.where(jax.random.uniform(chance) < settings.crop_probability, cut, length)

    kept = jnp.arange(length) < jax.vmap(row_length)(keys)[:, None]
    return dataclasses.replace(
        batch,
        segment_ids=jnp.where(kept, batch.segment_ids, 0),
        response_mask=batch.response_mask & kept,
    )


SFT = Objective(
    "sft",
    section="denoising",
    records="sft",
    unit="samples",
    Settings=Denoising,
    is_example=is_sample,
    examples=score_samples,
    heldout=("elbo_per_token",),
)
PRETRAIN = dataclasses.replace(
    SFT, name="pretrain", records="text", Settings=Pretraining, prepare=crop
)
