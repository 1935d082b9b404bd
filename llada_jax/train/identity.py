"""A run's identity: what a run may not change in the middle, by name and value."""

from collections.abc import Mapping
from typing import Any

from llada_jax import config, noise
from llada_jax.train.experiment import Experiment

# What checkpoints of an earlier version recorded instead of "settings": one text, which ended a run
# for a change of mc_chunk too.
_AS_TEXT = "settings of the loss, its noise or the seed"


def of(plan: Experiment, reference: str) -> dict[str, Any]:
    """The identity of an experiment; `reference` is the fingerprint of the reference policy."""
    return {
        "data": plan.rows.fingerprint,
        "noise format": noise.FORMAT,
        "objective": plan.objective.name,
        "reference policy": reference,
        "settings": config.identity(plan.settings),
    }


def check(plan: Experiment, mine: Mapping[str, Any], recorded: Mapping[str, Any] | None) -> str:
    """Compares an experiment with what its checkpoint recorded; returns a line to say, or "".

    A setting that the checkpoint does not name had its default then. Raises ValueError if anything
    differs.
    """
    if recorded is None:
        return "the checkpoint records no settings: nothing of them is compared"
    changed = [
        f"{name} ({_short(recorded[name])} then, {_short(mine[name])} now)"
        for name in ("objective", "noise format", "data", "reference policy")
        if name in recorded and recorded[name] != mine[name]
    ]
    note = ""
    if "settings" in recorded:
        defaults = config.identity(plan.objective.Settings())
        then, now = recorded["settings"], mine["settings"]
        changed += [
            f"{name}={then.get(name, defaults.get(name))!r}, which is {now.get(name)!r} now"
            for name in {**now, **then}
            if then.get(name, defaults.get(name)) != now.get(name)
        ]
    elif _AS_TEXT in recorded:
        note = (
            "the checkpoint is of an earlier version: data and reference are compared, settings not"
        )
    if changed:
        raise ValueError(
            f"{plan.workdir} was trained with other settings: {'; '.join(changed)}. Go on with the "
            "old config and files, or give another --workdir"
        )
    return note


def _short(value: Any) -> str:
    return str(value)[:12] or "none"
