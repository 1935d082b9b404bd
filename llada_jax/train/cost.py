"""The work of a step by formula."""

from llada_jax.models import llada
from llada_jax.train.experiment import Plan


def pass_flops(plan: Plan) -> int:
    """Floating-point operations of one forward pass over a whole batch and all its draws, by formula."""
    c = plan.config
    positions = c.data.batch_rows * c.data.row_length * plan.settings.scheme.n
    return positions * llada.flops_per_token(plan.model.config, c.data.row_length)


def forward_passes(plan: Plan, recomputed: bool = True) -> tuple[int, str]:
    """The work of a step in forward passes, and what they are; not `recomputed`: without what saves memory only."""
    passes, why = 3, "forward, backward"
    if recomputed and plan.model.remat == "full":
        passes, why = passes + 1, why + ", layers again"
    if recomputed and plan.settings.mc_chunk not in (0, plan.settings.scheme.n):
        passes, why = passes + 1, why + ", chunks again"
    if plan.config.objective == "vrpo" and plan.config.vrpo.reference == "model":
        passes, why = passes + 1, why + ", reference"
    return passes, why
