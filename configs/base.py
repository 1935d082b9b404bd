"""Makes the config of an objective, with every key at its default.

This file is not an experiment; the files beside it are. `python -m llada_jax.train --help` lists
every key with its comment. docs/training.md explains them.
"""

from llada_jax.train import settings


def get_config(objective: str):
    """Returns the config of "pretrain", "sft", "vrpo" or an objective of your own."""
    return settings.experiment(objective)
