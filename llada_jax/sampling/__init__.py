"""How a model writes: one compiled sampler, and responses to prompts of any lengths."""

from llada_jax.sampling.cache import CACHES, Windows
from llada_jax.sampling.flags import add_flags, settings_of
from llada_jax.sampling.responses import prompt_width, response_batches, sample_responses, trim
from llada_jax.sampling.sampler import generate
from llada_jax.sampling.settings import check_schedule
from llada_jax.sampling.trace import Trace
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES, Commit, Confidence, Numbers, Row

__all__ = [
    "CACHES",
    "COMMITS",
    "CONFIDENCES",
    "Commit",
    "Confidence",
    "Numbers",
    "Row",
    "Trace",
    "Windows",
    "add_flags",
    "check_schedule",
    "generate",
    "prompt_width",
    "response_batches",
    "sample_responses",
    "settings_of",
    "trim",
]
