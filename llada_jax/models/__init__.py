"""Model architectures. Each is one file and one entry of FAMILIES."""

from typing import Any

import jax
import jax.numpy as jnp

from llada_jax.models.family import Family
from llada_jax.models.llada import LLADA

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA,)}

__all__ = ["FAMILIES", "Family", "boxed_shapes", "config_from_dict", "family_of"]


def family_of(config: Any) -> Family:
    """Returns the family of a model's configuration."""
    return FAMILIES[config.model_type]


def config_from_dict(values: dict[str, Any], source: str) -> Any:
    """Makes the configuration from the values of a config.json; `model_type` defaults to LLaDA's.

    Raises one ValueError, which begins with `source`, if the type is unknown or if the architecture
    does not support the values.
    """
    name = values.get("model_type", LLADA.name)
    if name not in FAMILIES:
        raise ValueError(f"{source}: model_type={name!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[name].Config.from_dict(values, source)


def boxed_shapes(config: Any) -> Any:
    """Returns the parameter tree as shapes with logical axes, the input of `mesh.shardings`."""
    module, tokens = family_of(config).Module(config), jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
