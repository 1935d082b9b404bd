"""The trainer: makes an experiment from a config, and runs it.

plan = train.make_plan(config, workdir)
print(train.describe(plan))
train.train(plan)
"""

from llada_jax.train.experiment import Experiment, make_plan
from llada_jax.train.loop import STOPPED, train
from llada_jax.train.step import jit_update
from llada_jax.train.summary import describe

__all__ = ["STOPPED", "Experiment", "describe", "jit_update", "make_plan", "train"]
