"""Objectives: what training minimises. Each is one file and one entry of OBJECTIVES."""

from llada_jax.objectives.denoising import PRETRAIN, SFT
from llada_jax.objectives.objective import Objective, Reference
from llada_jax.objectives.preference import VRPO

OBJECTIVES: dict[str, Objective] = {o.name: o for o in (PRETRAIN, SFT, VRPO)}

__all__ = ["OBJECTIVES", "Objective", "Reference"]
