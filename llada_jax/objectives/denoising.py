"""Pre-training and supervised fine-tuning: the denoising cross-entropy."""

import dataclasses

import jax
import jax.numpy as jnp

from llada_jax import noise
from llada_jax.batch import Batch


@dataclasses.dataclass(frozen=True)
class Denoising:
    """What SFT and pre-training compute: the published Bernoulli masks, and rows cut short for pre-training."""

    scheme: noise.Scheme = noise.Scheme(n_t=1, masks="bernoulli", eps=1e-3)
    crop_probability: float = 0.0  # of a row being cut to a uniformly random length
    mc_chunk: int = 0
    seed: int = 0


def crop(batch: Batch, settings: Denoising) -> Batch:
    """Cuts a row to a random length with probability `crop_probability`: what is beyond becomes padding."""
    if not settings.crop_probability:
        return batch
    keys = noise.row_keys(noise.stream_key(settings.seed, "crop"), batch.row_ids, batch.epochs)
    length = batch.tokens.shape[1]

    def row_length(key):
        chance, where = jax.random.split(key)
        cut = jax.random.randint(where, (), 1, length + 1)
        return jnp.where(jax.random.uniform(chance) < settings.crop_probability, cut, length)

    kept = jnp.arange(length) < jax.vmap(row_length)(keys)[:, None]
    return batch.replace(
        segment_ids=jnp.where(kept, batch.segment_ids, 0), response_mask=batch.response_mask & kept
    )
