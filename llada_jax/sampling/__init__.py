"""How a model writes: LLaDA's sampler, compiled once, and responses to prompts of any lengths."""

from llada_jax.sampling.flags import add_flags, settings_of
from llada_jax.sampling.responses import prompt_width, sample_responses, trim
from llada_jax.sampling.sampler import REMASKING, check_schedule, generate

__all__ = [
    "REMASKING",
    "add_flags",
    "check_schedule",
    "generate",
    "prompt_width",
    "sample_responses",
    "settings_of",
    "trim",
]
