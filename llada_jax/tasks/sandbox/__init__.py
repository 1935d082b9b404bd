"""Runs generated programs, so that they can harm neither this machine nor their own verdict."""

from llada_jax.tasks.sandbox.choice import PROTECTIONS, protection, run
from llada_jax.tasks.sandbox.execute import Result

__all__ = ["PROTECTIONS", "Result", "protection", "run"]
