"""Registers the model `llada_jax` in the lm-evaluation-harness (package lm_eval)."""

try:
    import lm_eval.api.model as _  # noqa: F401
except ImportError:
    raise ImportError(
        "the lm-evaluation-harness is not installed: pip install 'llada_jax[evaluate]'"
    ) from None
from llada_jax.evaluate.lm_eval.model import LladaJax

__all__ = ["LladaJax"]
