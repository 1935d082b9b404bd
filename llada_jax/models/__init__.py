"""Model architectures. Each is one file and one entry of FAMILIES."""

from typing import Any

import jax
import jax.numpy as jnp

from llada_jax.models.family import Family
from llada_jax.models.llada import LLADA

FAMILIES: dict[str, Family] = {family.name: family for family in (LLADA,)}

__all__ = [
    "FAMILIES",
    "Family",
    "architecture",
    "boxed_shapes",
    "config_from_dict",
    "family_of",
]


def family_of(config: Any) -> Family:
    """Returns the family of a model's configuration."""
    return FAMILIES[config.model_type]


def architecture(config: Any) -> dict[str, Any]:
    """What makes a model compute what it does: its type, and the fields that its family names."""
    family = family_of(config)
    return {"model_type": family.name} | {
        name: getattr(config, name) for name in family.architecture
    }


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
