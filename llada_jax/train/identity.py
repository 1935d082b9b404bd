"""The identity of a run: the named values that must not change when the run resumes."""

from collections.abc import Mapping
from typing import Any

from llada_jax import config, models, noise
from llada_jax.train.experiment import Experiment

# Checkpoints of an earlier version have this entry instead of "settings". Its value is one text,
# in which even a change of mc_chunk counted.
_AS_TEXT = "settings of the loss, its noise or the seed"


def of(plan: Experiment, reference: str) -> dict[str, Any]:
    """Returns the identity of an experiment; `reference` is the reference policy's fingerprint."""
    return {
        "data": plan.rows.fingerprint,
        "noise format": noise.FORMAT,
        "objective": plan.objective.name,
        "reference policy": reference,
        "settings": config.identity(plan.settings),
        "model": models.architecture(plan.model.config),
    }


def check(
    mine: Mapping[str, Any], recorded: Mapping[str, Any] | None, *, settings: type, workdir: Any
) -> str:
    """Compares the identity of an experiment with the one in its checkpoint.

    `settings` is the class of the objective's settings: if the checkpoint does not name a setting,
    it had its default then. Returns a line to print, or "". Raises ValueError if a value differs.
    """
    if recorded is None:
        return "the checkpoint records no settings: nothing of them is compared"
    changed = [
        f"{name} ({_short(recorded[name])} then, {_short(mine[name])} now)"
        for name in ("objective", "noise format", "data", "reference policy")
        if name in recorded and recorded[name] != mine[name]
    ]
    for name, then in recorded.get("model", {}).items():
        if then != mine["model"].get(name):
            changed.append(f"model {name}={then!r}, which is {mine['model'].get(name)!r} now")
    note = ""
    if "settings" in recorded:
        defaults = config.identity(settings())
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
            f"{workdir} was trained with other settings: {'; '.join(changed)}. Go on with the "
            "old config and files, or give another --workdir"
        )
    return note


def _short(value: Any) -> str:
    return str(value)[:12] or "none"
