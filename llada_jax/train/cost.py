"""The cost of a step by formula: FLOPs, forward passes, bytes on a device."""

import jax.numpy as jnp

from llada_jax import models
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.train.experiment import Experiment


def pass_flops(plan: Experiment) -> int:
    """Returns the FLOPs of one forward pass over a whole batch and all its draws."""
    config, length = plan.model.config, plan.row_length
    positions = plan.data.batch_rows * length * plan.settings.scheme.n
    return positions * models.family_of(config).flops_per_token(config, length)


def forward_passes(plan: Experiment, recomputed: bool = True) -> tuple[int, str]:
    """Returns (the work of a step in forward passes, their names).

    A backward pass counts as two forward passes. If `recomputed` is False, forward passes that are
    repeated to save memory do not count.
    """
    passes, why = 3, "forward, backward"
    if recomputed and plan.model.remat == "full":
        passes, why = passes + 1, why + ", layers again"
    if recomputed and plan.settings.mc_chunk not in (0, plan.settings.scheme.n):
        passes, why = passes + 1, why + ", chunks again"
    if computes_reference(plan):
        passes, why = passes + 1, why + ", reference"
    return passes, why


def computes_reference(plan: Experiment) -> bool:
    """Whether each step runs the reference policy. Its parameters are then on the devices."""
    return plan.reference is not None and not plan.reference.is_cached


def device_bytes(plan: Experiment) -> dict[str, float]:
    """Returns the bytes on a device, by part: exact for the state, an estimate for activations."""
    model, shape = plan.model, plan.mesh.shape
    config, family = model.config, models.family_of(model.config)
    total, n = sum(family.num_params(config).values()), plan.settings.scheme.n
    chunk = plan.settings.mc_chunk or n
    weight, act = jnp.dtype(model.param_dtype).itemsize, jnp.dtype(model.dtype).itemsize
    shards = shape["fsdp"] * shape["tensor"]
    positions = plan.rows_at_once // mesh_lib.row_shards(plan.mesh) * chunk * plan.row_length
    boundary = positions * config.d_model * act  # the input of a layer
    inner = positions * act * family.activation_width(config) // shape["tensor"]
    kept = {"none": inner, "dots": inner // 2, "full": 0}[model.remat]
    logits = positions * min(model.logps_chunk, config.embedding_size) * 4 // shape["tensor"]
    sizes = {
        "parameters": total * weight / shards,
        "Adam moments": 2 * total * weight / shards,
        # With chunks, a second copy accumulates the gradients of the chunks.
        "gradient": total * weight / shards * (2 if chunk < n else 1),
        "activations (estimate)": config.n_layers * (boundary + kept) + inner + 2 * logits,
    }
    if computes_reference(plan):
        sizes["reference"] = total * plan.reference_dtype.itemsize / shards
    return sizes


def training_passes(plan: Experiment) -> int:
    """Returns the model passes that a run takes to train, in forward passes over a row.

    They are steps x rows x draws x passes a draw: 3 for the policy, whose backward pass counts as
    two, and 1 for a reference policy, also if its terms are cached. Passes that are repeated to
    save memory do not count, nor do evaluations.
    """
    a_draw = 3 if plan.reference is None else 4
    return plan.num_steps * plan.data.batch_rows * plan.settings.scheme.n * a_draw
