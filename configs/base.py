"""The config of an objective, every key at its default. Not an experiment: the files beside it are.

`python -m llada_jax.train --help` lists every key with its comment; docs/training.md says more.
"""

from llada_jax.train import settings


def get_config(objective: str):
    """The keys of "pretrain", "sft", "vrpo" or an objective of yours."""
    return settings.experiment(objective)
