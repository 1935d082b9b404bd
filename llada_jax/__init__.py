"""Masked diffusion language models in JAX: LLaDA, VRPO, and a laboratory for ELBO estimators.

`from llada_jax import elbo` estimates the ELBO of any `logits_fn`. `llada_jax.load(path)` opens
published weights or a checkpoint of this library.
`python -m llada_jax.train --config=FILE --workdir=DIR` trains a model.
"""

import importlib

__version__ = "0.1.0"

_MODULES = ("elbo", "likelihood", "losses", "noise", "sampling", "tokenizer", "variance")
_NAMES = {"load": "checkpoints.loading", "LLaDA": "models.llada", "ModelConfig": "models.llada"}

__all__ = [*_MODULES, *_NAMES]  # noqa: PLE0604 (names of two tables)


def __getattr__(name):
    # Import lazily, so that `import llada_jax` is cheap, and `python -m llada_jax.x` does not
    # import x twice.
    if name in _MODULES:
        return importlib.import_module(f"llada_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"llada_jax.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'llada_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
