"""Studies: arms, seeds and metrics in one file, run and reported by one command."""

from llada_jax.study.definition import Arm, Study, Tune

__all__ = ["Arm", "Study", "Tune"]
