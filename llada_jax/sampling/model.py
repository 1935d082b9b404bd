"""How the sampler calls a model."""

import inspect
from collections.abc import Callable

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

# What a cache asks of a model (see models.family.Family).
METHODS = {
    "windows": ("init_cache", "with_cache"),
    "parts": ("init_features", "with_features"),
}


def call(logits_fn: Callable, tokens: Array, attention_mask, positions, at) -> Array:
    """Returns logits_fn(tokens, attention_mask) of the positions `at` [b, t], or of all for None.

    A function that takes `positions` [b, l] gets them. They are None if no row is padded, and make
    the logits of a padded row the same as those of the row alone. (Rotary embeddings depend on
    differences of positions only, so a function without them differs by rounding.) One that takes
    `at` computes no other logits.
    """
    takes = _parameters(logits_fn)
    given = {}
    if positions is not None and "positions" in takes:
        given["positions"] = positions
    if at is not None and "at" in takes:
        return logits_fn(tokens, attention_mask, **given, at=at)
    logits = logits_fn(tokens, attention_mask, **given)
    if at is None or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        return logits
    return jnp.take_along_axis(logits, at[..., None], 1)


def _parameters(logits_fn: Callable) -> tuple[str, ...]:
    function = getattr(logits_fn, "func", logits_fn)
    module = getattr(function, "__self__", None)
    if module is not None and function.__name__ == "apply":  # of a flax module
        function = type(module).__call__
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def takes_positions(logits_fn: Callable) -> bool:
    """Whether a function takes the RoPE positions of the tokens."""
    return "positions" in _parameters(logits_fn)


def cached_model(logits_fn: Callable, kind: str):
    """Returns the module if logits_fn is a model that offers a kind of cache, else None.

    That is a `Partial(model.apply, variables)` of a flax module with the METHODS of the kind.
    """
    if not isinstance(logits_fn, Partial) or getattr(logits_fn.func, "__name__", "") != "apply":
        return None
    module = getattr(logits_fn.func, "__self__", None)
    return module if all(hasattr(module, name) for name in METHODS[kind]) else None


def call_cached(logits_fn: Partial, kind: str, tokens: Array, attention_mask, positions, cache, at):
    """Returns (logits of the tokens `at`, cache); the cache says what is computed."""
    return logits_fn(tokens, attention_mask, positions, cache, at, method=METHODS[kind][1])
