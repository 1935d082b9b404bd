"""The training state and its initialisation on sharded devices."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from llada_jax.models import quantized
from llada_jax.parallel import mesh as mesh_lib


@flax.struct.dataclass
class TrainState:
    """What a training step updates and a checkpoint stores: step, parameters, optimiser state."""

    step: Int[Array, ""] | Any
    params: Any
    opt_state: Any


def _create(model: nn.Module, tx: optax.GradientTransformation):
    # Two tokens are enough to make the parameters, but too few for an attention kernel: use "xla".
    model = model.clone(attention="xla")

    def create(key):
        params = model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return create


def abstract_state(model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the shapes, types and shardings of the state. Restoring and compiling need them."""
    create, key = _create(model, tx), jax.random.key(0)
    shardings = mesh_lib.shardings(mesh, jax.eval_shape(create, key))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda k: nn.unbox(create(k)), key),
        shardings,
    )


def init_state(
    model: nn.Module, tx: optax.GradientTransformation, mesh: Mesh, key: Key[Array, ""], params=None
):
    """Makes a new state, sharded over the devices of the mesh.

    `params` (host or device arrays) replace the random parameters if given. Raises ValueError if
    they are quantised.
    """
    if quantized.is_quantized(params):
        raise ValueError(
            "the parameters are quantised, and int8 has no gradient: load them without quantize to"
            " train them"
        )
    abstract = abstract_state(model, tx, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if params is None:
        return jax.jit(lambda k: nn.unbox(_create(model, tx)(k)), out_shardings=shardings)(key)
    params = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, abstract.params)
    return jax.jit(
        lambda p: TrainState(jnp.zeros((), jnp.int32), p, tx.init(p)), out_shardings=shardings
    )(params)
