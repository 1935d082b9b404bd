"""Architectures, one a file. A new one is one file and one entry of FAMILIES."""

from typing import Any

import jax
import jax.numpy as jnp

from llada_jax.models.family import Family
from llada_jax.models.llada import LLADA

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA,)}

__all__ = ["FAMILIES", "Family", "boxed_shapes", "config_from_dict", "family_of"]


def family_of(config: Any) -> Family:
    """The family of a model's configuration."""
    return FAMILIES[config.model_type]


def config_from_dict(values: dict[str, Any], source: str) -> Any:
    """The configuration that a config.json describes; without a `model_type` it is LLaDA's.

    Raises one ValueError for an unknown type, or for keys that the architecture cannot honour.
    """
    name = values.get("model_type", LLADA.name)
    if name not in FAMILIES:
        raise ValueError(f"{source}: model_type={name!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name].Config.from_dict(values, source)


def boxed_shapes(config: Any) -> Any:
    """The parameter tree as shapes with their logical axes, from which `mesh.shardings` places them."""
    module, tokens = family_of(config).Module(config), jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
