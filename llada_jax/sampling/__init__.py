"""How a model writes: one compiled sampler, and responses to prompts of any lengths."""

from llada_jax.sampling.cache import CACHES, Cache, Windows
from llada_jax.sampling.flags import FLAGS, add_flags, settings_of
from llada_jax.sampling.growth import Growth
from llada_jax.sampling.responses import (
    Response,
    prompt_width,
    respond,
    sample_responses,
    trim,
)
from llada_jax.sampling.revoke import REVOKES, Revoke, Written
from llada_jax.sampling.sampler import generate, lower, stream
from llada_jax.sampling.settings import Settings, check_schedule
from llada_jax.sampling.texts import respond_in_words
from llada_jax.sampling.trace import Trace
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES, Commit, Confidence, Row

__all__ = [
    "CACHES",
    "COMMITS",
    "CONFIDENCES",
    "FLAGS",
    "REVOKES",
    "Cache",
    "Commit",
    "Confidence",
    "Growth",
    "Response",
    "Revoke",
    "Row",
    "Settings",
    "Trace",
    "Windows",
    "Written",
    "add_flags",
    "check_schedule",
    "generate",
    "lower",
    "prompt_width",
    "respond",
    "respond_in_words",
    "sample_responses",
    "settings_of",
    "stream",
    "trim",
]
