"""How the sampler calls a model."""

import inspect
from collections.abc import Callable

from jax.tree_util import Partial
from jaxtyping import Array


def call(logits_fn: Callable, tokens: Array, attention_mask, positions) -> Array:
    """Returns logits_fn(tokens, attention_mask), with `positions` if it takes them.

    `positions` [b, l] are None if no row is padded. They make the logits of a padded row the same
    as those of the row alone. Rotary embeddings depend on differences of positions only, so a
    function without them differs by rounding.
    """
    if positions is None or not _takes_positions(logits_fn):
        return logits_fn(tokens, attention_mask)
    return logits_fn(tokens, attention_mask, positions=positions)


def _takes_positions(logits_fn: Callable) -> bool:
    function = getattr(logits_fn, "func", logits_fn)
    module = getattr(function, "__self__", None)
    if module is not None and function.__name__ == "apply":  # of a flax module
        function = type(module).__call__
    try:
        return "positions" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def cached_model(logits_fn: Callable):
    """Returns the module and its arguments if logits_fn is a model that can cache, else None.

    That is a `Partial(model.apply, variables)` of a flax module with the methods `init_cache` and
    `with_cache` (see models.family.Family).
    """
    if not isinstance(logits_fn, Partial) or getattr(logits_fn.func, "__name__", "") != "apply":
        return None
    module = getattr(logits_fn.func, "__self__", None)
    offers = all(hasattr(module, name) for name in ("init_cache", "with_cache"))
    return module if offers else None


def call_cached(logits_fn: Partial, tokens: Array, attention_mask, positions, cache):
    """Returns (logits [b, w, v], cache) of a window of the text."""
    return logits_fn(tokens, attention_mask, positions, cache, method="with_cache")
