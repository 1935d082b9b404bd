"""How a model writes: LLaDA's sampler, compiled once, and responses to prompts of any lengths."""

from llada_jax.sampling.responses import prompt_width, sample_responses, trim
from llada_jax.sampling.sampler import REMASKING, check_schedule, generate

__all__ = ["REMASKING", "check_schedule", "generate", "prompt_width", "sample_responses", "trim"]
