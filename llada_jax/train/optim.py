"""Learning-rate schedule, weight-decay mask and optimiser."""

import dataclasses

import jax
import optax

from llada_jax import config

SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW and its learning rate."""

    peak: float = config.key(1e-3, argument=True)  # learning rate after warm-up
    warmup_steps: int = 100  # steps of linear warm-up from 0
    schedule: str = "cosine"  # after warm-up; or "constant": decays in the last tenth of the steps
    end_fraction: float = 0.0  # learning rate at the last step, as a fraction of the peak
    b1: float = 0.9  # AdamW: decay of the mean of the gradients
    b2: float = 0.95  # AdamW: decay of the mean of their squares
    eps: float = 1e-8  # AdamW: added to the square root of the latter
    weight_decay: float = 0.01  # weight decay of matrices; norm scales have none
    clip_norm: float = 1.0  # largest global norm of the gradient; 0: no clipping
    accumulate: int = 1  # split a batch into so many parts: less memory, the same result

    def __post_init__(self):
        config.one_of(self, schedule=SCHEDULES)
        config.at_least(self, accumulate=1, warmup_steps=0, weight_decay=0, clip_norm=0)
        for name in ("peak", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if not 0 <= self.end_fraction <= 1:
            raise ValueError(f"end_fraction={self.end_fraction} must be at least 0 and at most 1")


def make_schedule(
    *,
    peak: float | jax.Array,
    warmup_steps: int,
    num_steps: int,
    end_fraction: float = 0.0,
    kind: str = "cosine",
) -> optax.Schedule:
    """Returns a schedule: linear warm-up from 0 to `peak` in `warmup_steps`, then decay.

    kind "cosine": cosine decay from the end of the warm-up on (LLaDA 1.5).
    kind "constant": stays at the peak, and decays linearly in the last tenth of the steps (LLaDA's
        SFT).

    Both reach `end_fraction * peak` at `num_steps`. Raises ValueError for another kind, or if the
    warm-up is not shorter than the run.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule={kind!r} is not one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be at least 0 and below the {num_steps} steps of "
            "the run: lower optimizer.warmup_steps, or raise num_steps"
        )
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    if kind == "cosine":
        decay = optax.cosine_decay_schedule(peak, num_steps - warmup_steps, end_fraction)
        return optax.join_schedules([warmup, decay], [warmup_steps])
    decay_steps = min(max(num_steps // 10, 1), num_steps - warmup_steps)
    return optax.join_schedules(
        [
            warmup,
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, end_fraction * peak, decay_steps),
        ],
        [warmup_steps, num_steps - decay_steps],
    )


def decay_mask(params):
    """Returns a tree that is True at parameters with weight decay: all but the norm scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(getattr(part, "key", None) == "scale" for part in path), params
    )


def make(o: Optimizer, num_steps: int) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the schedule and the optimiser that settings describe."""
    schedule = make_schedule(
        peak=o.peak,
        warmup_steps=o.warmup_steps,
        num_steps=num_steps,
        end_fraction=o.end_fraction,
        kind=o.schedule,
    )
    return schedule, make_optimizer(
        schedule,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
    )


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Returns AdamW with clipping of the global gradient norm; `clip_norm` 0 turns it off."""
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(
        clip, optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
    )
