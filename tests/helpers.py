"""What several tests share: paths, a tiny model's configuration, packed batches, toy logits."""

import pathlib

import jax.numpy as jnp
import numpy as np

from llada_jax.batch import Batch
from llada_jax.models.llada import ModelConfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
