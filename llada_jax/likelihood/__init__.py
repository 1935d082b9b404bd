"""What a model thinks of an answer."""

from llada_jax.likelihood.estimate import grid, terms
from llada_jax.likelihood.greedy import is_greedy

__all__ = ["grid", "is_greedy", "terms"]
